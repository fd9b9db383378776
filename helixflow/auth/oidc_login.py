"""Login through an OpenID Connect provider: which of our users somebody is.

Whoever logs in there for the first time gets an account by its address only where the installation says so: at a domain
that is declared to be the account's organisation's, in `auth.oidc_organisation`, or while there is one organisation
only. Any other account was perhaps made by somebody else's administrator; its holder ties it, with its password.
"""

import base64
import secrets
from typing import Any
from uuid import UUID

from helixflow.auth import audit, fields, sessions
from helixflow.auth.actors import anonymous
from helixflow.auth.oidc import Identity, Provider
from helixflow.auth.pepper import Pepper
from helixflow.auth.sessions import Issued, Sessions
from helixflow.config import AuthConfig
from helixflow.core_rs import Conflict, InvalidCredentials, InvalidRequest, InvalidToken, NotFound, PermissionDenied
from helixflow.db.pool import Pool
from helixflow.refusals import refusal

CALLBACK = "/auth/v1/oidc/callback"
"""Path at the gateway that the provider sends browsers back to."""

STATE_BYTES = 32
STATE_TTL_S = 600.0
LONGEST_CODE = 2048

_USER = """
SELECT u.id, u.email, u.organisation_id, u.disabled OR o.suspended AS refused
FROM users u JOIN organisations o ON o.id = u.organisation_id
"""
_BY_ADDRESS = f"""{_USER}
WHERE u.email = $1 AND NOT u.service_account AND u.deleted_at IS NULL
    AND ($2 = ANY(o.domains) OR lower(o.name) = lower($3) OR (SELECT count(*) FROM organisations) = 1)
"""  # noqa: S608 - the text above
_BY_IDENTITY = f"""{_USER} JOIN oidc_identities i ON i.user_id = u.id
WHERE i.issuer = $1 AND i.subject = $2 AND u.deleted_at IS NULL
"""
_BY_SESSION = f"""{_USER} JOIN sessions s ON s.user_id = u.id
WHERE s.id = $1 AND s.revoked_at IS NULL AND s.expires_at > now() AND u.deleted_at IS NULL
"""


class OidcLogin:
    """Starts and finishes logins. A state is used once; nonce and verifier are derived from it and stored nowhere."""

    def __init__(
        self, pool: Pool, options: AuthConfig, pepper: Pepper, begun: Sessions, provider: Provider | None
    ) -> None:
        """`provider` None: there is no login through one."""
        self._pool = pool
        self._options = options
        self._pepper = pepper
        self._sessions = begun
        self._provider = provider

    async def start(self, redirect_uri: str, session: UUID | None = None) -> tuple[str, str]:
        """The provider's URL for the browser, and the state to keep there. `session`: whose account is to be tied.

        Raises NotFound, Unavailable, and InvalidRequest for a URI that the provider must not send a browser to.
        """
        provider, target = self._need(), fields.redirect(redirect_uri)
        public = self._options.public_url
        if public and target != public + CALLBACK:
            raise refusal(InvalidRequest, f"redirect_uri must be {public + CALLBACK} (auth.public_url)", "redirect_uri")
        state = base64.urlsafe_b64encode(secrets.token_bytes(STATE_BYTES)).rstrip(b"=").decode()
        nonce, verifier = self._derived(state)
        url = await provider.authorize_url(redirect_uri=target, state=state, nonce=nonce, verifier=verifier)
        async with self._pool.acquire() as connection:
            await connection.execute(
                "INSERT INTO oidc_states (digest, redirect_uri, expires_at, session_id) "
                "VALUES ($1, $2, now() + make_interval(secs => $3), $4)",
                self._digest(state),
                target,
                STATE_TTL_S,
                session,
            )
        return url, state

    async def finish(self, code: str, state: str, redirect_uri: str, address: str) -> Issued:
        """Tokens for whom the code stands for.

        Raises InvalidCredentials (state, code or token are not valid), PermissionDenied (no account here), NotFound
        (no provider), Unavailable; and, where an account is to be tied, InvalidToken (its session is over) or Conflict
        (the identity is another account's).
        """
        provider = self._need()
        if not code or len(code) > LONGEST_CODE:
            raise refusal(InvalidRequest, "code must be what the identity provider sent", "code")
        async with self._pool.acquire() as connection:
            begun = await connection.fetchrow(
                "DELETE FROM oidc_states WHERE digest = $1 AND expires_at > now() RETURNING redirect_uri, session_id",
                self._digest(state),
            )
        if begun is None or begun["redirect_uri"] != redirect_uri:
            raise refusal(
                InvalidCredentials,
                "this login was not begun here, was finished before, or took longer than 10 minutes: start again",
            )
        nonce, verifier = self._derived(state)
        who = await provider.exchange(code=code, redirect_uri=redirect_uri, nonce=nonce, verifier=verifier)
        if begun["session_id"] is not None:
            return await self._tied(who, begun["session_id"], address)
        return await self._enter(who, address)

    async def _tied(self, who: Identity, session: UUID, address: str) -> Issued:
        """Ties an identity to the account of a session, which is over with that: tokens of a new one."""
        async with self._pool.acquire() as connection, connection.transaction():
            await self._lock(connection, who)
            row = await connection.fetchrow(_BY_SESSION, session)
            if row is None or row["refused"]:
                raise refusal(InvalidToken, "the session that began this is over: log in again")
            held = await connection.fetchrow(_BY_IDENTITY, who.issuer, who.subject)
            if held is not None and held["id"] != row["id"]:
                raise refusal(Conflict, "this login at the identity provider is tied to another account")
            if held is None:
                await self._tie(connection, who, row, address)
            await sessions.end(connection, session)
            return await self._sessions.begin(connection, row["id"], "oidc", address)

    async def _lock(self, connection: Any, who: Identity) -> None:
        """Of two first logins of one person at once, the second finds what the first made."""
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", who.subject)

    async def _enter(self, who: Identity, address: str) -> Issued:
        async with self._pool.acquire() as connection, connection.transaction():
            await self._lock(connection, who)
            row = await self._user(connection, who, address)
            if row is not None and not row["refused"]:
                return await self._sessions.begin(connection, row["id"], "oidc", address)
            actor = anonymous(who.email or who.subject, address)
            organisation = row["organisation_id"] if row is not None else None
            detail = {"issuer": who.issuer, "subject": who.subject}
            await audit.record(connection, actor, "login.refused", actor.name, organisation, detail)
        # After the commit: the refusal stays in the log.
        if row is not None:
            raise refusal(PermissionDenied, "this account is disabled; ask an administrator")
        raise refusal(
            PermissionDenied,
            "there is no account for this login; ask an administrator. Whoever has one with a password ties it to the "
            "identity provider: POST /auth/v1/oidc/link"
            if who.email
            else "the identity provider has not verified the e-mail of this login, and no account is tied to it",
        )

    async def _user(self, connection: Any, who: Identity, address: str) -> Any:
        """The user of an identity: tied, or known by e-mail, or new. None when nobody may be made of it."""
        row = await connection.fetchrow(_BY_IDENTITY, who.issuer, who.subject)
        if row is not None or not who.email:
            return row
        asked = who.email, fields.domain_of(who.email), self._options.oidc_organisation
        row = await connection.fetchrow(_BY_ADDRESS, *asked)
        if row is None and await self._join(connection, who, address):
            row = await connection.fetchrow(_BY_ADDRESS, *asked)
        if row is not None:
            await self._tie(connection, who, row, address)
        return row

    async def _join(self, connection: Any, who: Identity, address: str) -> bool:
        """Makes a user, when the configuration names an organisation for newcomers and nobody removed this one.

        Not of an address at a domain that other organisations have.
        """
        name = self._options.oidc_organisation
        removed = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM oidc_identities WHERE issuer = $1 AND subject = $2)", who.issuer, who.subject
        )
        if not name or removed:
            return False
        home: UUID | None = await connection.fetchval(
            "SELECT id FROM organisations WHERE lower(name) = lower($1)", name
        )
        if home is None:
            raise refusal(NotFound, "the organisation that new users join (auth.oidc_organisation) does not exist")
        elsewhere = await connection.fetchval(
            "SELECT bool_or(id <> $1) AND NOT bool_or(id = $1) FROM organisations WHERE $2 = ANY(domains)",
            home,
            fields.domain_of(who.email),
        )
        if elsewhere:
            return False
        made = await connection.fetchval(
            "INSERT INTO users (organisation_id, email, role) VALUES ($1, $2, $3) "
            "ON CONFLICT (email) WHERE deleted_at IS NULL AND NOT service_account DO NOTHING RETURNING id",
            home,
            who.email,
            self._options.oidc_role,
        )
        if made is not None:
            detail = {"role": self._options.oidc_role, "issuer": who.issuer}
            await audit.record(connection, anonymous(who.email, address), "user.create", who.email, home, detail)
        return True

    async def _tie(self, connection: Any, who: Identity, row: Any, address: str) -> None:
        await connection.execute(
            "INSERT INTO oidc_identities (issuer, subject, user_id) VALUES ($1, $2, $3) "
            "ON CONFLICT (issuer, subject) DO UPDATE SET user_id = excluded.user_id",
            who.issuer,
            who.subject,
            row["id"],
        )
        detail = {"issuer": who.issuer, "subject": who.subject}
        actor = anonymous(who.email, address)
        await audit.record(connection, actor, "user.identity", row["email"], row["organisation_id"], detail)

    def _need(self) -> Provider:
        if self._provider is None:
            raise refusal(NotFound, "no identity provider is configured (auth.oidc_issuer)")
        return self._provider

    def _digest(self, state: str) -> bytes:
        return self._pepper.state_secret("digest", state)

    def _derived(self, state: str) -> tuple[str, str]:
        """Nonce and PKCE verifier (43 characters each)."""
        nonce, verifier = (
            base64.urlsafe_b64encode(self._pepper.state_secret(purpose, state)).rstrip(b"=").decode()
            for purpose in ("nonce", "verifier")
        )
        return nonce, verifier
