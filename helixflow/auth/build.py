"""Puts the auth-service together: what its methods are, what runs beside them, what the first start made."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helixflow import log
from helixflow.auth import audit, first_start, purge
from helixflow.auth.admin import AdminHandlers
from helixflow.auth.events import Events
from helixflow.auth.factor_login import FactorLogin
from helixflow.auth.factors import Factors
from helixflow.auth.first_start import FirstLogin
from helixflow.auth.handlers import AuthHandlers, Method, Unary, Ways
from helixflow.auth.login import Login
from helixflow.auth.memory import Memory
from helixflow.auth.oidc import Provider
from helixflow.auth.oidc_login import OidcLogin
from helixflow.auth.passwords import Passwords
from helixflow.auth.pepper import Pepper, open_pepper
from helixflow.auth.refusals import Refusals
from helixflow.auth.sessions import Sessions
from helixflow.auth.signing import Signer
from helixflow.auth.throttle import Throttle
from helixflow.auth.touch import LastUses
from helixflow.config import Config
from helixflow.db.pool import Pool
from helixflow.errors import StartError
from helixflow.ledger import maintenance
from helixflow.ledger.sealer import Sealer
from helixflow.ledger.writer import Writer
from helixflow.limits.fallback import Counters
from helixflow.limits.remote import lease_handler, prices_handler
from helixflow.limits.settings import of_new_keys
from helixflow.pki.errors import PkiError
from helixflow.pki.layout import Layout
from helixflow.rpc import messages
from helixflow.rpc.server import Caller

AGAIN_S = 1.0
"""A background task that failed is begun anew after this time (seconds)."""

Task = Callable[[], Awaitable[Any]]

logger = log.get("auth")


@dataclass(frozen=True, slots=True)
class Built:
    """A service that runs, but does not listen yet."""

    methods: dict[str, Method]
    """Handlers of AuthService and AdminService, for `helixflow.rpc.server.Server`."""
    first: FirstLogin | None = field(repr=False)
    """How the owner gets in, when this was the first start of its database, or nobody has logged in since."""
    events: Events
    _stack: contextlib.AsyncExitStack

    async def close(self) -> None:
        """Ends streams, background tasks and connections of its own; the pool stays its owner's."""
        self.events.close()
        await self._stack.aclose()


async def build(config: Config, pool: Pool) -> Built:
    """Prepares everything over a migrated database and begins the background tasks.

    Raises PepperError, SigningKeyError or ConfigError when the service cannot start, and the database's errors.
    """
    async with contextlib.AsyncExitStack() as stack:
        async with pool.acquire() as connection, connection.transaction():
            pepper = await open_pepper(connection, config.auth.pepper)
        sealer = Sealer(pool, pepper.ledger_key(), config.auth.pepper.parent)
        audit.seal_with(sealer.keys.audit)
        async with pool.acquire() as connection:
            signer = await Signer.open(connection, Layout(config.certs).jwt_private, config.auth)
        provider = Provider(config.auth) if config.auth.oidc_issuer else None
        if provider is not None:
            stack.push_async_callback(provider.close)
        hashes = await asyncio.to_thread(Passwords, config.auth.password_checks)
        stack.callback(hashes.close)
        counters = Counters(config.limits, pool)
        stack.push_async_callback(counters.close)
        events = Events(pool.target, config.database)
        memory = Memory(config.gateway.key_grace_s)
        factors = Factors(pepper, config.auth.factor_issuer)
        begun, refused = Sessions(config.auth, pepper, signer), Refusals(pool)
        rules, first_file = Throttle.of(config.auth), config.auth.pepper.parent / first_start.FILE
        password = Login(
            pool,
            hashes,
            rules,
            begun,
            refused,
            factors=factors,
            on_change=lambda email: first_start.discard(first_file, email),
        )
        handlers = AuthHandlers(
            pool,
            pepper,
            signer,
            ways=Ways(
                begun,
                password,
                FactorLogin(pool, hashes, password, factors, rules, refused),
                OidcLogin(pool, config.auth, pepper, begun, provider),
            ),
            events=events,
            memory=memory,
            elsewhere=_elsewhere(config, pool, pepper, counters),
            development=config.development,
        )
        admin = _administration(config, pool, pepper, signer, hashes, sealer)
        first = await _first_start(config, pool, pepper, hashes, first_file)
        await _begin(
            stack,
            {
                "signing key": lambda: signer.watch(pool),
                "events": events.run,
                "memory": lambda: memory.follow(events),
                "refused logins": refused.run,
                "refused acts": admin.refused.run,
                "purge": lambda: purge.run(pool),
                "limits": counters.run,
                "seals": sealer.run,
                "ledger": lambda: maintenance.run(
                    pool, config.ledger, pepper.ledger_key(), config.auth.audit_keep_days
                ),
            },
        )
        return Built({**handlers.methods(), **admin.methods()}, first, events, stack.pop_all())


def _administration(
    config: Config, pool: Pool, pepper: Pepper, signer: Signer, hashes: Passwords, sealer: Sealer
) -> AdminHandlers:
    return AdminHandlers(
        pool,
        pepper,
        signer,
        hashes,
        currency=config.limits.currency,
        development=config.development,
        new_keys=of_new_keys(config),
        sealer=sealer,
        one_time_s=config.auth.one_time_ttl_s,
    )


async def _first_start(config: Config, pool: Pool, pepper: Pepper, hashes: Passwords, path: Path) -> FirstLogin | None:
    async with pool.acquire() as connection, connection.transaction():
        try:
            made = await first_start.first_start(
                connection, hashes, config.auth.owner, path, config.auth.first_password_ttl_s
            )
            found = made or await first_start.left_over(connection, path)
        except PkiError as error:
            raise StartError(str(error)) from None
        if config.development and await first_start.development_key(connection, pepper):
            logger.info("the key of the development profile was made")
    return found


def _elsewhere(config: Config, pool: Pool, pepper: Pepper, counters: Counters) -> Mapping[str, Unary]:
    """Methods of AuthService that limiter and ledger answer."""
    writer = Writer(pool, pepper.ledger_key(), LastUses(pool).note)

    async def append(request: Any, _caller: Caller) -> Any:
        written, known = await writer.append(request.spool, list(request.records))
        return messages.AppendUsageReply(written=written, known=known)

    return {
        "Prices": prices_handler(pool, config.limits.currency),
        "Lease": lease_handler(counters),
        "AppendUsage": append,
    }


async def _begin(stack: contextlib.AsyncExitStack, tasks: Mapping[str, Task]) -> None:
    """Begins background tasks, which end with the stack."""

    async def end(task: "asyncio.Task[None]") -> None:
        task.cancel()
        await asyncio.wait({task})

    for name, task in tasks.items():
        stack.push_async_callback(end, asyncio.create_task(_always(name, task), name=name))


async def _always(name: str, task: Task) -> None:
    """Runs a task that should never end, and again when it does: the service goes on without it meanwhile."""
    while True:
        try:
            await task()
        except Exception:
            logger.exception("a background task failed; it begins anew", task=name)
        await asyncio.sleep(AGAIN_S)
