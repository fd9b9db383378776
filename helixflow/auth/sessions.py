"""Sessions of people: an access token for minutes, a refresh token that is exchanged each time it is used."""

import base64
import secrets
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from helixflow.auth import audit
from helixflow.auth.actors import anonymous
from helixflow.auth.factors import MISSING
from helixflow.auth.pepper import Pepper
from helixflow.auth.signing import Signer
from helixflow.config import AuthConfig
from helixflow.core_rs import InvalidToken
from helixflow.refusals import refusal

PREFIX = "hr-"
TOKEN_BYTES = 32
LONGEST_TOKEN = 100

_PRESENTED = f"""
SELECT t.session_id, t.used_at IS NOT NULL AS used, t.expires_at > now() AND s.expires_at > now() AS alive,
    s.revoked_at IS NOT NULL AS revoked, u.id AS user_id, u.email, u.organisation_id,
    u.disabled OR u.deleted_at IS NOT NULL OR o.suspended OR (s.method = 'password' AND {MISSING}) AS refused
FROM refresh_tokens t
JOIN sessions s ON s.id = t.session_id
JOIN users u ON u.id = s.user_id
JOIN organisations o ON o.id = u.organisation_id
LEFT JOIN second_factors f ON f.user_id = u.id
WHERE t.digest = $1
FOR NO KEY UPDATE OF t, s
"""  # noqa: S608 - the text above


@dataclass(frozen=True, slots=True)
class Issued:
    """The tokens of a session; lifetimes in seconds. Then what a new password ended, and recovery codes left."""

    access_token: str = field(repr=False)
    expires_in: int
    refresh_token: str = field(repr=False)
    refresh_expires_in: int
    sessions_ended: int | None = None
    keys_revoked: int | None = None
    keys_kept: int | None = None
    recovery_codes_left: int | None = None


class Sessions:
    """Begins, continues and ends sessions."""

    def __init__(self, options: AuthConfig, pepper: Pepper, signer: Signer) -> None:
        self._options = options
        self._pepper = pepper
        self._signer = signer

    async def begin(self, connection: Any, user_id: UUID, method: str, address: str, *, factor: str = "") -> Issued:
        """A new session, in the caller's transaction. `method`: `password` or `oidc`; `factor`: what was shown too."""
        session: UUID = await connection.fetchval(
            "INSERT INTO sessions (user_id, method, address, expires_at) "
            "VALUES ($1, $2, $3, now() + make_interval(secs => $4)) RETURNING id",
            user_id,
            method,
            address,
            float(self._options.refresh_ttl_s),
        )
        row = await connection.fetchrow(
            "UPDATE users SET last_login_at = now() WHERE id = $1 RETURNING email, organisation_id", user_id
        )
        detail = {"session": session, "method": method} | ({"second_factor": factor} if factor else {})
        actor = anonymous(row["email"], address)
        await audit.record(connection, actor, "login.succeeded", row["email"], row["organisation_id"], detail)
        return await self._issue(connection, user_id, session)

    async def refresh(self, connection: Any, token: str, address: str) -> Issued:
        """Exchanges a refresh token, in a transaction of its own.

        Of several exchanges of one token at once, one gets new tokens and the next ends the session: somebody else has
        a copy. Raises InvalidToken.
        """
        if not plausible(token):
            raise refused()
        async with connection.transaction():
            row = await connection.fetchrow(_PRESENTED, self._pepper.refresh_digest(token))
            if row is not None and row["used"]:
                await self._reused(connection, row, address)
            elif row is not None and row["alive"] and not row["revoked"] and not row["refused"]:
                return await self._exchange(connection, row, token)
        raise refused()

    async def end_by_refresh(self, connection: Any, token: str, address: str = "") -> bool:
        """Ends the session of a refresh token. An unknown one is ignored: its session is over in any case.

        True when there was such a token.
        """
        session = plausible(token) and await connection.fetchval(
            "SELECT session_id FROM refresh_tokens WHERE digest = $1", self._pepper.refresh_digest(token)
        )
        if session:
            await log_out(connection, session, address)
        return bool(session)

    async def _exchange(self, connection: Any, row: Any, token: str) -> Issued:
        await connection.execute(
            "UPDATE refresh_tokens SET used_at = now() WHERE digest = $1", self._pepper.refresh_digest(token)
        )
        await connection.execute(
            "UPDATE sessions SET last_used_at = now(), expires_at = now() + make_interval(secs => $2) WHERE id = $1",
            row["session_id"],
            float(self._options.refresh_ttl_s),
        )
        return await self._issue(connection, row["user_id"], row["session_id"])

    async def _issue(self, connection: Any, user_id: UUID, session: UUID) -> Issued:
        token = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(TOKEN_BYTES)).rstrip(b"=").decode()
        await connection.execute(
            "INSERT INTO refresh_tokens (digest, session_id, expires_at) "
            "VALUES ($1, $2, now() + make_interval(secs => $3))",
            self._pepper.refresh_digest(token),
            session,
            float(self._options.refresh_ttl_s),
        )
        return Issued(
            access_token=self._signer.issue(user_id, session),
            expires_in=self._options.access_ttl_s,
            refresh_token=token,
            refresh_expires_in=self._options.refresh_ttl_s,
        )

    async def _reused(self, connection: Any, row: Any, address: str) -> None:
        if await end(connection, row["session_id"]):
            detail = {"session": row["session_id"], "reason": "a refresh token was used twice"}
            actor = anonymous(row["email"], address)
            await audit.record(connection, actor, "session.reuse", row["email"], row["organisation_id"], detail)


async def end(connection: Any, session: UUID) -> bool:
    """Ends one session. True when it was not over yet."""
    return bool(
        await connection.fetchval(
            "UPDATE sessions SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL RETURNING true", session
        )
    )


async def log_out(connection: Any, session: UUID, address: str) -> None:
    """Ends a session at the wish of who holds it, in a transaction of its own."""
    async with connection.transaction():
        if await end(connection, session):
            row = await connection.fetchrow(
                "SELECT u.email, u.organisation_id FROM users u JOIN sessions s ON s.user_id = u.id WHERE s.id = $1",
                session,
            )
            detail = {"session": session, "reason": "logout"}
            actor = anonymous(row["email"], address)
            await audit.record(connection, actor, "session.end", row["email"], row["organisation_id"], detail)


async def end_all(connection: Any, user_id: UUID) -> int:
    """Ends every session of a user; returns how many."""
    rows = await connection.fetch(
        "UPDATE sessions SET revoked_at = now() WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > now() "
        "RETURNING id",
        user_id,
    )
    return len(rows)


def plausible(token: str) -> bool:
    """Whether it can be a refresh token at all."""
    return token.startswith(PREFIX) and len(token) <= LONGEST_TOKEN and token.isascii()


def refused() -> InvalidToken:
    """The refusal of a refresh token, whatever is wrong with it."""
    return refusal(InvalidToken, "the refresh token is not valid, or was used before: log in again")
