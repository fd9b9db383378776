"""AuthService: credentials, sessions, changes."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from helixflow.addresses import Budget
from helixflow.auth import principals, sessions
from helixflow.auth.actors import cut_address
from helixflow.auth.desk import filled
from helixflow.auth.errors import database_errors
from helixflow.auth.events import Events
from helixflow.auth.factor_login import FactorLogin
from helixflow.auth.login import Login
from helixflow.auth.memory import Memory
from helixflow.auth.oidc_login import OidcLogin
from helixflow.auth.pepper import Pepper
from helixflow.auth.principals import Principal
from helixflow.auth.sessions import Sessions
from helixflow.auth.signing import Signer
from helixflow.core_rs import InvalidApiKey, InvalidRequest, InvalidToken, RateLimitExceeded, Unavailable
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

STRANGERS_BURST, STRANGERS_PER_S = 60, 1.0
"""Refresh tokens that are none, which an address may present at once and each second."""
BEGUN_BURST, BEGUN_PER_S = 200, 2.0
"""Likewise logins through a provider that it may begin."""

_ELSEWHERE = ("Prices", "Lease", "AppendUsage")

Unary = Callable[[Any, Caller], Awaitable[Any]]
Method = Unary | Callable[[Any, Caller], AsyncIterator[Any]]


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways in, and what keeps people in."""

    sessions: Sessions
    password: Login
    factor: FactorLogin
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
        self._strangers = Budget(STRANGERS_BURST, STRANGERS_PER_S)
        self._begun = Budget(BEGUN_BURST, BEGUN_PER_S)
        self._elsewhere = elsewhere
        self._development = development

    def methods(self) -> dict[str, Method]:
        """A handler for every method."""
        own: dict[str, Method] = {
            "Verify": self._verify,
            "Login": self._login,
            "Refresh": self._refresh,
            "Logout": self._logout,
            "EnrolFactor": self._enrol_factor,
            "ConfirmFactor": self._confirm_factor,
            "RemoveFactor": self._remove_factor,
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
        issued = await self._ways.password.login(
            request.email, request.password, request.new_password, address, code=request.code, keys=request.keys
        )
        return filled(messages.Tokens, issued)

    async def _enrol_factor(self, request: Any, _caller: Caller) -> Any:
        made = await self._ways.factor.enrol(*_factor(request))
        return filled(messages.FactorSecret, made)

    async def _confirm_factor(self, request: Any, _caller: Caller) -> Any:
        return messages.RecoveryCodes(codes=await self._ways.factor.confirm(*_factor(request)))

    async def _remove_factor(self, request: Any, _caller: Caller) -> Any:
        await self._ways.factor.remove(*_factor(request))
        return messages.RemoveFactorReply()

    async def _refresh(self, request: Any, _caller: Caller) -> Any:
        address = cut_address(request.address)
        if not sessions.plausible(request.refresh_token):
            raise sessions.refused()
        with self._asking(address):
            async with self._pool.acquire() as connection:
                issued = await self._ways.sessions.refresh(connection, request.refresh_token, address)
        return filled(messages.Tokens, issued)

    @contextlib.contextmanager
    def _asking(self, address: str) -> Iterator[None]:
        """Lets an address ask in vain for so long: what it costs is given back unless the token was none.

        Raises RateLimitExceeded.
        """
        self._spend(self._strangers, address)
        try:
            yield
        except InvalidToken:
            raise
        except BaseException:
            self._strangers.give_back(address)
            raise
        self._strangers.give_back(address)

    @staticmethod
    def _spend(budget: Budget, address: str) -> None:
        wait_s = budget.take(address)
        if wait_s:
            error = refusal(RateLimitExceeded, "too many of these from your address; try again later")
            error.retry_after_s = math.ceil(wait_s)
            raise error

    async def _logout(self, request: Any, _caller: Caller) -> Any:
        kind = request.WhichOneof("session")
        if kind is None:
            raise refusal(InvalidRequest, "the request names no session", "session")
        address = cut_address(request.address)
        if kind == "refresh_token":
            if sessions.plausible(request.refresh_token):
                self._spend(self._strangers, address)
                async with self._pool.acquire() as connection:
                    if await self._ways.sessions.end_by_refresh(connection, request.refresh_token, address):
                        self._strangers.give_back(address)
        else:
            await self._end_by_access(request.access_token, address)
        return messages.LogoutReply()

    async def _end_by_access(self, token: str, address: str) -> None:
        try:
            access = await self._signer.access(self._pool, token)
        except InvalidToken:
            return  # nobody is logged in by it, which is what was asked for
        async with self._pool.acquire() as connection:
            await sessions.log_out(connection, access.session_id, address)

    async def _jwks(self, _request: Any, _caller: Caller) -> Any:
        async with self._pool.acquire() as connection:
            return messages.JwksReply(json=await self._signer.jwks(connection))

    async def _oidc_start(self, request: Any, _caller: Caller) -> Any:
        # Each begun login is a row, and a question to the provider.
        self._spend(self._begun, cut_address(request.address))
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


def _factor(request: Any) -> tuple[str, str, str, str]:
    return request.email, request.password, request.code, cut_address(request.address)


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
