"""The process of the auth-service: finds its database, brings the schema up to date, serves gRPC, stops in order."""

import asyncio
import contextlib
import functools
import inspect
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import asyncpg
import uvloop

from helixflow import core_rs, log
from helixflow.auth.build import Built, build
from helixflow.auth.errors import database_errors
from helixflow.auth.first_start import FirstLogin
from helixflow.config import Config
from helixflow.core_rs import CoreError, TlsFiles, Unavailable
from helixflow.db import migrate, roles
from helixflow.db.embedded import Embedded
from helixflow.db.errors import DatabaseUnavailableError, MigrationError
from helixflow.db.pool import Pool, tls_of
from helixflow.db.target import Target, connect
from helixflow.errors import StartError
from helixflow.liveness import Pulse
from helixflow.pki.layout import Layout, Role
from helixflow.process import notify_ready
from helixflow.refusals import refusal
from helixflow.rpc.server import Caller, Server
from helixflow.terminal import say

SERVICE = "auth-service"
CALLERS = frozenset({"api-gateway"})
OPERATORS = frozenset({"api-gateway", SERVICE})
"""The command line presents the auth-service's own client certificate: whoever can read it is the operator."""

WAIT_S = (0.1, 2.0)
"""Shortest and longest pause before a database that does not answer is tried again (seconds)."""

_FIRST = """
The owner is {first.owner}, with the one-time password

    {shown}

It must be changed at the first login and is valid until {first.until}. {where}
"""
_IN_FILE = "(in {path}, which only this account can read)"

logger = log.get("auth")

Handler = Callable[[Any, Caller], Any]


def run(config: Config) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status. SIGHUP loads new certificates.

    Raises StartError or DatabaseError when it cannot start. A database that does not answer yet is waited for.
    """
    return uvloop.run(_serve(config))


async def _serve(config: Config) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    beating = loop.create_task(Pulse().run())
    try:
        return await _serve_until(stop, config)
    finally:
        beating.cancel()


async def _serve_until(stop: asyncio.Event, config: Config) -> int:
    loop = asyncio.get_running_loop()
    starting, stopping = loop.create_task(_open(config)), loop.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return 0
    pool = starting.result()
    try:
        built = await build(config, pool)
        try:
            await _until(stop, config, built)
        finally:
            await built.close()
    finally:
        stopping.cancel()
        await pool.close()
    return 0


async def _until(stop: asyncio.Event, config: Config, built: Built) -> None:
    methods = {name: guarded(handler) for name, handler in built.methods.items()}
    callers = {name: OPERATORS if name.startswith("AdminService/") else CALLERS for name in methods}
    server = Server(methods, callers)
    try:
        address = server.start(str(config.auth.listen), _tls(config))
    except CoreError as error:
        raise StartError(f"the auth-service cannot start: {error}") from error
    try:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, server)
        server.set_serving(True)
        logger.info("ready", address=address)
        notify_ready(address)
        if built.first is not None:
            say(first_words(built.first, terminal=sys.stdout.isatty()), flush=True)
        await stop.wait()
        server.set_serving(False)
        logger.info("stopping")
    finally:
        await server.stop(config.auth.drain_timeout_s)


def first_words(first: FirstLogin, *, terminal: bool) -> str:
    """How the owner gets in, for whoever sees standard output.

    A terminal shows the password; what may be kept as a log only says where it stands.
    """
    where = f"It stands in {first.path} until then."
    if terminal:
        return _FIRST.format(first=first, shown=first.password, where=where)
    return _FIRST.format(first=first, shown=_IN_FILE.format(path=first.path), where="").rstrip() + "\n"


async def _open(config: Config) -> Pool:
    """The connection pool of a database whose schema is up to date. Waits while the server does not answer."""
    options = config.database
    embedded = not options.url
    target = Embedded(options.directory, user=options.user).service_target if embedded else Target.parse(options.url)
    pause, told = WAIT_S[0], False
    while True:
        try:
            connection = await connect(
                target,
                tls=tls_of(options, target),
                timeout_s=options.connect_timeout_ms / 1000,
                application_name="helixflow auth-service (migrations)",
                timezone="UTC",
            )
            try:
                await _bring_up_to_date(connection, embedded=embedded)
            finally:
                await connection.close()
            break
        except DatabaseUnavailableError as error:
            if not told:
                hint = {} if options.url else {"hint": "without HELIX_DATABASE_URL, `helixflow db run` must run"}
                logger.warning("waiting for the database", error=str(error), **hint)
                told = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, WAIT_S[1])
    return await Pool.open(options, target, name="helixflow auth-service")


async def _bring_up_to_date(connection: Any, *, embedded: bool) -> None:
    """Migrates, where one role is everybody; else sees that its owner has.

    Raises MigrationError, and DatabaseUnavailableError while the embedded server is still being migrated.
    """
    if not embedded and await roles.owned(connection) is not False:
        logger.warning(
            "the services own their tables in the database: whoever takes them over can change what is chained",
            hint="set HELIX_DATABASE_OWNER_URL, run `helixflow db setup` and `helixflow db migrate`",
        )
        for applied in await migrate.migrate(connection):
            logger.info("migration applied", number=applied.number, name=applied.name)
        return
    try:
        missing = migrate.pending(migrate.read(), await migrate.ledger(connection))
    except asyncpg.InsufficientPrivilegeError:
        missing = migrate.read()
    if not missing:
        return
    label = f"migration {missing[0].number:04}_{missing[0].name} is missing"
    if embedded:
        raise DatabaseUnavailableError(f"{label}: `helixflow db run` of this release applies it")
    raise MigrationError(f"{label}: run `helixflow db migrate` with HELIX_DATABASE_OWNER_URL")


def guarded(handler: Handler) -> Handler:
    """The handler, with the database's failures as errors that callers understand: unavailable, or too slow."""
    if inspect.isasyncgenfunction(handler):

        @functools.wraps(handler)
        async def stream(request: Any, caller: Caller) -> AsyncIterator[Any]:
            with _translated():
                async for message in handler(request, caller):
                    yield message

        return stream

    @functools.wraps(handler)
    async def call(request: Any, caller: Caller) -> Any:
        with _translated():
            return await handler(request, caller)

    return call


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        with database_errors():
            yield
    except TimeoutError:
        raise refusal(Unavailable, "the database took too long to answer; try again in a moment") from None


def _tls(config: Config) -> TlsFiles:
    layout = Layout(config.certs)
    own = layout.pair(SERVICE, Role.SERVER)
    return TlsFiles(str(layout.ca_cert), str(own.cert), str(own.key), str(layout.crl))


def _reload(server: Server) -> None:
    try:
        server.reload_tls()
    except core_rs.TlsError as error:
        logger.error("certificates not reloaded; the old ones stay", reason=str(error))
    else:
        logger.info("certificates reloaded")
