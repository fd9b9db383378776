"""AuthService: credentials, sessions, changes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from helixflow.auth import principals, sessions
from helixflow.auth.actors import cut_address
from helixflow.auth.desk import filled
from helixflow.auth.errors import database_errors
from helixflow.auth.events import Events
from helixflow.auth.login import Login
from helixflow.auth.memory import Memory
from helixflow.auth.oidc_login import OidcLogin
from helixflow.auth.pepper import Pepper
from helixflow.auth.principals import Principal
from helixflow.auth.sessions import Sessions
from helixflow.auth.signing import Signer
from helixflow.core_rs import InvalidApiKey, InvalidRequest, InvalidToken, Unavailable
from helixflow.db.pool import Pool
from helixflow.refusals import refusal
from helixflow.rpc import messages
from helixflow.rpc.server import Caller

SERVICE = "AuthService"
KIND_KEY, KIND_USER = 1, 2
"""Of helixflow.v1.PrincipalKind."""

ASK_S = 2.0
"""A database that does not answer by then counts as away for keys that are remembered (seconds)."""
AWAY_S = 1.0
"""After a failure, keys that are remembered are not asked for again this long (seconds)."""

_ELSEWHERE = ("Prices", "Lease", "AppendUsage")

Unary = Callable[[Any, Caller], Awaitable[Any]]
Method = Unary | Callable[[Any, Caller], AsyncIterator[Any]]


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways in, and what keeps people in."""

    sessions: Sessions
    password: Login
    oidc: OidcLogin


class AuthHandlers:
    """Answers AuthService."""

    def __init__(
        self,
        pool: Pool,
        pepper: Pepper,
        signer: Signer,
        *,
        ways: Ways,
        events: Events,
        memory: Memory,
        elsewhere: Mapping[str, Unary],
        development: bool,
    ) -> None:
        """`elsewhere`: handlers of Prices, Lease and AppendUsage. Raises ValueError when one is missing."""
        if set(elsewhere) != set(_ELSEWHERE):
            raise ValueError(f"handlers are needed for {', '.join(_ELSEWHERE)}")
        self._pool = pool
        self._pepper = pepper
        self._signer = signer
        self._ways = ways
        self._events = events
        self._memory = memory
        self._away_until = 0.0
        self._elsewhere = elsewhere
        self._development = development

    def methods(self) -> dict[str, Method]:
        """A handler for every method."""
        own: dict[str, Method] = {
            "Verify": self._verify,
            "Login": self._login,
            "Refresh": self._refresh,
            "Logout": self._logout,
            "Jwks": self._jwks,
            "OidcStart": self._oidc_start,
            "OidcFinish": self._oidc_finish,
            "Watch": self._watch,
            **self._elsewhere,
        }
        return {f"{SERVICE}/{name}": handler for name, handler in own.items()}

    async def _verify(self, request: Any, _caller: Caller) -> Any:
        kind = request.WhichOneof("credential")
        if kind == "key_digest":
            return await self._verify_key(request.key_digest)
        if kind == "access_token":
            # What is forged ends here: it costs no transaction.
            access = await self._signer.access(self._pool, request.access_token)
            async with self._pool.acquire() as connection:
                return principal_message(await principals.by_session(connection, access))
        raise refusal(InvalidRequest, "the request holds no credential", "credential")

    async def _verify_key(self, digest: bytes) -> Any:
        """Asks the database; while that is away, what it said before counts."""
        if self._memory.refused(digest) and self._events.listening.is_set():
            raise principals.unknown_key()
        known = self._memory.find(digest)
        generation = self._memory.generation
        if known is None or time.monotonic() >= self._away_until:
            try:
                with database_errors():
                    async with asyncio.timeout(ASK_S if known else None), self._pool.acquire() as connection:
                        found = await principals.by_key(connection, self._pepper, digest, development=self._development)
            except InvalidApiKey:
                self._memory.refuse(digest, generation)
                raise
            except (Unavailable, TimeoutError):
                self._away_until = time.monotonic() + AWAY_S
                # While we waited it may have changed.
                known = self._memory.find(digest)
                if known is None:
                    raise
            else:
                self._memory.keep(digest, found, generation)
                return principal_message(found)
        principal, age_s = known
        message = principal_message(principal)
        message.age_s = max(1, int(age_s))
        return message

    async def _login(self, request: Any, _caller: Caller) -> Any:
        address = cut_address(request.address)
        issued = await self._ways.password.login(request.email, request.password, request.new_password, address)
        return filled(messages.Tokens, issued)

    async def _refresh(self, request: Any, _caller: Caller) -> Any:
        async with self._pool.acquire() as connection:
            issued = await self._ways.sessions.refresh(connection, request.refresh_token, cut_address(request.address))
        return filled(messages.Tokens, issued)

    async def _logout(self, request: Any, _caller: Caller) -> Any:
        kind = request.WhichOneof("session")
        if kind is None:
            raise refusal(InvalidRequest, "the request names no session", "session")
        if kind == "refresh_token":
            async with self._pool.acquire() as connection:
                await self._ways.sessions.end_by_refresh(connection, request.refresh_token)
        else:
            await self._end_by_access(request.access_token)
        return messages.LogoutReply()

    async def _end_by_access(self, token: str) -> None:
        try:
            access = await self._signer.access(self._pool, token)
        except InvalidToken:
            return  # nobody is logged in by it, which is what was asked for
        async with self._pool.acquire() as connection:
            await sessions.end(connection, access.session_id)

    async def _jwks(self, _request: Any, _caller: Caller) -> Any:
        async with self._pool.acquire() as connection:
            return messages.JwksReply(json=await self._signer.jwks(connection))

    async def _oidc_start(self, request: Any, _caller: Caller) -> Any:
        session = await self._session_of(request.access_token) if request.access_token else None
        url, state = await self._ways.oidc.start(request.redirect_uri, session)
        return messages.OidcStartReply(url=url, state=state)

    async def _session_of(self, token: str) -> UUID | None:
        """The session of an access token. Raises InvalidToken."""
        access = await self._signer.access(self._pool, token)
        async with self._pool.acquire() as connection:
            return (await principals.by_session(connection, access)).session_id

    async def _oidc_finish(self, request: Any, _caller: Caller) -> Any:
        address = cut_address(request.address)
        issued = await self._ways.oidc.finish(request.code, request.state, request.redirect_uri, address)
        return filled(messages.Tokens, issued)

    async def _watch(self, _request: Any, _caller: Caller) -> AsyncIterator[Any]:
        async with contextlib.aclosing(self._events.watch()) as events:
            async for event in events:
                kind, _, value = event.partition(":")
                yield messages.Event(**{kind: value or True})


def principal_message(found: Principal) -> Any:
    """A `helixflow.v1.Principal`."""
    return messages.Principal(
        kind=KIND_KEY if found.key_id else KIND_USER,
        organisation_id=str(found.organisation_id),
        organisation=found.organisation,
        user_id=str(found.user_id),
        user=found.user,
        role=found.role,
        key_id=str(found.key_id or ""),
        key=found.key,
        session_id=str(found.session_id or ""),
        expires_at=found.expires_at,
        models=found.models,
        endpoints=found.endpoints,
        limits=[item.message() for item in found.limits],
        content=filled(messages.ContentPolicy, found.content),
        installation=found.installation,
        administers=found.administers,
        depends_on=found.depends_on,
    )
