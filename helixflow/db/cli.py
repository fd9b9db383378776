"""`helixflow db`: the database of an installation. What a command needs is imported when it runs."""

import argparse
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixflow.terminal import say

if TYPE_CHECKING:
    from helixflow.config import Config
    from helixflow.db.embedded import Embedded
    from helixflow.db.target import Target

Action = Callable[["Config", argparse.Namespace], Awaitable[int]]


def add_parser(subparsers: Any) -> None:
    """Adds `db` and its commands. Each sets `run`."""
    text = "run, prepare, migrate, back up and restore the database"
    db = subparsers.add_parser("db", help=text, description=text[0].upper() + text[1:] + ".")
    commands = db.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _command(
        commands,
        "run",
        _run,
        "run the embedded PostgreSQL in the foreground",
        "Run the embedded PostgreSQL in the foreground until SIGTERM or SIGINT; print its URL once it serves.",
    )
    _command(
        commands,
        "setup",
        _setup,
        "prepare your own server: role, database, grants (once, by an operator)",
        "Make the roles, the database and the schema that HELIX_DATABASE_URL and HELIX_DATABASE_OWNER_URL name, with "
        "the rights of HELIX_DATABASE_ADMIN_URL. Running it again is safe.",
    )
    _command(commands, "migrate", _migrate, "apply the migrations that are missing", "Apply the missing migrations.")
    status = _command(
        commands,
        "status",
        _status,
        "show server and migrations; exit status 1 when one is missing or does not fit",
        "Show server and migrations. Exit status 1 when a migration is missing or does not fit.",
    )
    status.add_argument("--json", action="store_true", help="as JSON")
    backup = _command(
        commands, "backup", _backup, "write all data into a new file", "Write one consistent state into a new file."
    )
    backup.add_argument("file", metavar="FILE", type=Path, help="the tar file to make")
    forget = _command(
        commands,
        "forget-pepper",
        _forget_pepper,
        "go on without a pepper that is lost for good",
        "Go on without a pepper (auth.pepper) that is lost for good: the next start of the auth-service makes one. "
        "Every API key is revoked and every session ended, which nothing could use any more.",
    )
    forget.add_argument("--revoke-all-keys", action="store_true", required=True, help="yes, all of them")
    restore = _command(
        commands,
        "restore",
        _restore,
        "fill an empty database from a backup",
        "Fill an empty database from a backup, all or nothing.",
    )
    restore.add_argument("file", metavar="FILE", type=Path, help="the backup")


def _command(commands: Any, name: str, action: Action, text: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description)
    parser.add_argument("--config", metavar="FILE", help="TOML file (default: HELIX_CONFIG)")
    parser.set_defaults(run=_start, action=action)
    return parser


def _start(options: argparse.Namespace) -> int:
    import asyncio

    from helixflow import log
    from helixflow.config import load
    from helixflow.errors import HelixError

    if options.config:
        os.environ["HELIX_CONFIG"] = options.config
    config = load()
    log.setup(config.log, "database", command=options.action is not _run)
    try:
        status: int = asyncio.run(options.action(config, options))
    except HelixError as error:
        if options.action is not _run or log.is_console(config.log):
            raise
        # Of a service, every line of the log is one that programs can read.
        log.get("database").error("cannot start", error=str(error))
        return error.exit_status
    return status


async def _run(config: "Config", _options: argparse.Namespace) -> int:
    import asyncio
    import signal

    from helixflow import log
    from helixflow.confine.harden import harden
    from helixflow.db.embedded import Embedded
    from helixflow.disk import Room
    from helixflow.errors import EX_SOFTWARE
    from helixflow.liveness import Pulse, write_stacks_at_the_end
    from helixflow.process import READY_FD, notify_ready

    harden()
    write_stacks_at_the_end()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)
    server = Embedded(config.database.directory, user=config.database.user, client=config.database.client)
    beating = asyncio.create_task(Pulse().run())
    room = asyncio.create_task(Room(server.directory, config.supervise.disk_warn_bytes).run())
    dsn = await server.start()
    try:
        # Before anybody hears that it is ready: the services may not migrate.
        await _upgrade_embedded(server)
        if READY_FD in os.environ:
            notify_ready(dsn)
        else:
            say(dsn, flush=True)
        ended, stopped = asyncio.create_task(server.wait()), asyncio.create_task(stop.wait())
        await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        failed = ended.done()
        if failed:
            log.get("database").error(
                "PostgreSQL ended by itself", status=ended.result(), directory=str(server.directory)
            )
        ended.cancel()
        stopped.cancel()
    finally:
        await server.stop()
        beating.cancel()
        room.cancel()
    return EX_SOFTWARE if failed else 0


async def _upgrade_embedded(server: "Embedded") -> None:
    from helixflow import log
    from helixflow.db import roles
    from helixflow.db.embedded import READER_ROLE, SERVICE_ROLE
    from helixflow.db.target import connect

    connection = await connect(server.target, application_name="helixflow db run", timezone="UTC")
    try:
        for applied in await roles.upgrade(connection, SERVICE_ROLE, READER_ROLE):
            log.get("database").info("migration applied", number=applied.number, name=applied.name)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def _target(config: "Config") -> AsyncIterator["Target"]:
    """The database as its owner: of the URL; else the embedded one, started for this command when it does not run."""
    from helixflow.db.embedded import Embedded
    from helixflow.db.errors import AlreadyRunningError
    from helixflow.db.target import Target

    if config.database.url:
        yield Target.parse(config.database.owner_url or config.database.url)
        return
    server = Embedded(config.database.directory, user=config.database.user)
    with contextlib.suppress(AlreadyRunningError):
        await server.start()
    try:
        yield server.target
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def _connection(config: "Config") -> AsyncIterator[tuple["Target", Any]]:
    from helixflow.db.pool import tls_of
    from helixflow.db.target import connect

    async with _target(config) as target:
        connection = await connect(
            target,
            tls=tls_of(config.database, target),
            timeout_s=config.database.connect_timeout_ms / 1000,
            application_name="helixflow db",
            timezone="UTC",
        )
        try:
            yield target, connection
        finally:
            await connection.close()


async def _setup(config: "Config", _options: argparse.Namespace) -> int:
    from helixflow.db import setup
    from helixflow.db.errors import UrlError
    from helixflow.db.pool import tls_of
    from helixflow.db.target import Target

    if not config.database.url or not config.database.admin_url:
        raise UrlError(
            "set HELIX_DATABASE_URL to what the services will use and HELIX_DATABASE_ADMIN_URL to an administrator's "
            "URL; the embedded server needs no set-up"
        )
    admin, service = Target.parse(config.database.admin_url), Target.parse(config.database.url)
    owner = Target.parse(config.database.owner_url) if config.database.owner_url else None
    tls = tls_of(config.database, service)
    for line in await setup.prepare(admin, service, tls_of(config.database, admin), tls, owner):
        say(line)
    if owner is None:
        say("warning: the services' role will own the tables; set HELIX_DATABASE_OWNER_URL to keep the two apart")
    say("next: helixflow db migrate")
    return 0


async def _migrate(config: "Config", _options: argparse.Namespace) -> int:
    from helixflow.db import roles

    async with _connection(config) as (_, connection):
        done = await roles.upgrade(connection, *await _roles(config, connection))
    for each in done:
        say(f"applied {each.number:04}_{each.name}")
    if not done:
        say("nothing to do: every migration is applied")
    return 0


async def _roles(config: "Config", connection: Any) -> tuple[str, str | None]:
    """The roles of services and readers."""
    from helixflow.db.embedded import READER_ROLE, SERVICE_ROLE
    from helixflow.db.setup import reader_of
    from helixflow.db.target import Target

    if not config.database.url:
        return SERVICE_ROLE, READER_ROLE
    reader = reader_of(Target.parse(config.database.owner_url or config.database.url))
    there = await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", reader)
    return Target.parse(config.database.url).user, reader if there else None


async def _status(config: "Config", options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from helixflow.db import migrate
    from helixflow.db.errors import MigrationError

    async with _connection(config) as (target, connection):
        applied = await migrate.ledger(connection)
        version = connection.get_server_version()
    problem, todo = "", []
    try:
        todo = migrate.pending(migrate.read(), applied)
    except MigrationError as error:
        problem = str(error)
    status = {
        "database": str(target),
        "embedded": not config.database.url,
        "server": f"{version.major}.{version.minor}",
        "applied": [asdict(row) for row in applied],
        "pending": [f"{each.number:04}_{each.name}" for each in todo],
        "problem": problem,
    }
    if options.json:
        say(json.dumps(status, indent=2))
    else:
        say(f"database  {target}{' (embedded)' if not config.database.url else ''}, PostgreSQL {status['server']}")
        for row in applied:
            say(f"applied   {row.number:04}_{row.name}  {row.applied_at}  {row.duration_ms} ms")
        for each in todo:
            say(f"pending   {each.number:04}_{each.name}")
        if problem:
            say(f"problem   {problem}")
    return 1 if todo or problem else 0


async def _backup(config: "Config", options: argparse.Namespace) -> int:
    from helixflow.db import backup

    async with _connection(config) as (_, connection):
        manifest = await backup.backup(connection, options.file)
    rows = sum(table["rows"] for table in manifest["tables"])
    say(f"{options.file}: {rows} rows of {len(manifest['tables'])} tables, schema {_schema(manifest)}")
    return 0


async def _forget_pepper(config: "Config", _options: argparse.Namespace) -> int:
    from helixflow.auth.pepper import forget

    async with _connection(config) as (target, connection), connection.transaction():
        keys, sessions = await forget(connection, config.auth.pepper)
    say(f"{target}: the pepper is forgotten, {keys} keys are revoked, {sessions} sessions ended")
    say(
        "next: start the auth-service, then issue keys; `audit verify` checks what comes from now on, of what was "
        "before only that nothing is missing; second factors cannot be read any more: `helixflow user reset-factor`"
    )
    return 0


async def _restore(config: "Config", options: argparse.Namespace) -> int:
    from helixflow.db import backup, migrate, roles

    async with _connection(config) as (target, connection):
        manifest = await backup.restore(connection, options.file, migrate.read())
        await roles.grant(connection, *await _roles(config, connection))
    rows = sum(table["rows"] for table in manifest["tables"])
    say(f"{target}: {rows} rows of {manifest['created']} restored, schema {_schema(manifest)}")
    return 0


def _schema(manifest: dict[str, Any]) -> str:
    last = manifest["migrations"][-1]
    return f"{last['number']:04}_{last['name']}"
