"""Numbered SQL migrations: forward only, each in a transaction, each exactly once.

A file is `migrations/NNNN_name.sql`. Its line `-- min-reader: NNNN` names the oldest release, by its last migration,
that can run beside it: one that only adds things names the last migration of the release before; one that changes or
removes what that release uses names itself, which is also what no such line means. The ledger `helixflow.migrations`,
which 0001 makes, holds the hash of every applied file. A session's advisory lock lets one migrator work at a time; the
others wait and then find nothing to do.
"""

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from helixflow.db.errors import MigrationError

FOLDER = Path(__file__).resolve().parent / "migrations"
LOCK = 0x48656C6978_01
"""Key of the advisory lock: "Helix", then 01 for migrations."""

WAIT_S = 120
"""A migrator waits this long (seconds) for another one."""

DDL_LOCK_MS = 5000
"""A migration waits this long (milliseconds) for a table: whoever comes after it waits as well."""

_READER = re.compile(r"^-- min-reader: (\d{4})$", re.MULTILINE)
_HAS_READERS = """
SELECT EXISTS (SELECT FROM pg_attribute
WHERE attrelid = 'helixflow.migrations'::regclass AND attname = 'min_reader' AND NOT attisdropped)
"""
_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_TRANSACTION = re.compile(
    r"^\s*(begin|start\s+transaction|commit|rollback)(\s+(work|transaction))?\s*;", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file."""

    number: int
    name: str
    sha256: str
    sql: str
    min_reader: int | None = None
    """A release whose last migration is this or a later one can run on the schema with it; None: not without it."""


@dataclass(frozen=True, slots=True)
class Applied:
    """One row of the ledger."""

    number: int
    name: str
    sha256: str
    applied_at: str | None = None
    """RFC 3339, UTC."""
    duration_ms: int = 0
    min_reader: int | None = None


def read(folder: Path = FOLDER) -> list[Migration]:
    """The migrations of this release, in order. Raises MigrationError when names or contents are wrong."""
    found: list[Migration] = []
    for path in sorted(folder.glob("*.sql")):
        match = _NAME.fullmatch(path.name)
        if not match:
            raise MigrationError(f"{path.name} is not the name of a migration: NNNN_name.sql")
        content = path.read_bytes()
        sql = content.decode()
        if _TRANSACTION.search(sql):
            raise MigrationError(f"{path.name} begins or ends a transaction; every migration already runs in one")
        found.append(
            Migration(int(match[1]), match[2], hashlib.sha256(content).hexdigest(), sql, _min_reader(path.name, sql))
        )
    for expected, each in enumerate(found, 1):
        if each.number != expected:
            raise MigrationError(
                f"migration {each.number:04}_{each.name} stands where {expected:04} should: "
                "numbers begin at 0001, without gaps or doubles"
            )
    return found


def _min_reader(name: str, sql: str) -> int | None:
    found = [int(number) for number in _READER.findall(sql)]
    if len(found) > 1 or any(not 1 <= number <= int(name[:4]) for number in found):
        raise MigrationError(f"{name}: `-- min-reader: NNNN` names, once, one of the migrations up to its own")
    return found[0] if found else None


def pending(files: Sequence[Migration], applied: Sequence[Applied]) -> list[Migration]:
    """What is left to apply. Raises MigrationError when the ledger does not fit the files.

    Migrations of a newer release fit when they say that this one can run beside them: an upgrade may be rolling.
    """
    for expected, row in enumerate(applied, 1):
        label = f"{row.number:04}_{row.name}"
        if row.number != expected:
            raise MigrationError(f"the ledger lacks migration {expected:04} but holds {label}: restore a backup")
        if row.number > len(files):
            if row.min_reader is not None and row.min_reader <= len(files):
                continue
            raise MigrationError(
                f"the database holds migration {label}, which this release does not know and cannot run beside: a "
                "newer release made it. Run that release, or restore a backup from before the upgrade"
            )
        if files[expected - 1].sha256 != row.sha256:
            raise MigrationError(
                f"migration {label} was changed after it had been applied: the database holds SHA-256 "
                f"{row.sha256[:12]}…, the file has {files[expected - 1].sha256[:12]}…. Restore the file; "
                "a change of the schema is a new migration"
            )
    return list(files[len(applied) :])


async def ledger(connection: Any) -> list[Applied]:
    """The applied migrations, in order; empty on a fresh database."""
    if await connection.fetchval("SELECT to_regclass('helixflow.migrations')") is None:
        return []
    # Not a list of columns: the first releases had no min_reader.
    rows = await connection.fetch("SELECT * FROM helixflow.migrations ORDER BY number")
    return [
        Applied(
            row["number"],
            row["name"],
            row["sha256"],
            row["applied_at"].isoformat(),
            row["duration_ms"],
            row.get("min_reader"),
        )
        for row in rows
    ]


async def lock(connection: Any, wait_s: float = WAIT_S) -> None:
    """Waits until this session alone migrates. Raises MigrationError after `wait_s` seconds."""
    await connection.execute(f"SET statement_timeout = 0; SET lock_timeout = {max(1, int(wait_s * 1000))}")
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
    except asyncpg.LockNotAvailableError:
        raise MigrationError(
            f"another process has been migrating for {wait_s:g} s; `helixflow db status` shows how far it is"
        ) from None


async def unlock(connection: Any) -> None:
    """Lets the next migrator in."""
    await connection.execute("SELECT pg_advisory_unlock($1)", LOCK)


async def migrate(
    connection: Any, files: Sequence[Migration] | None = None, *, upto: int | None = None, wait_s: float = WAIT_S
) -> list[Migration]:
    """Applies what is pending, at most to number `upto`; returns what this call applied.

    `connection` must belong to this call alone. Raises MigrationError.
    """
    files = read() if files is None else files
    await lock(connection, wait_s)
    try:
        return await migrate_locked(connection, files, upto)
    finally:
        if not connection.is_closed():
            await unlock(connection)


async def migrate_locked(connection: Any, files: Sequence[Migration], upto: int | None = None) -> list[Migration]:
    """As `migrate`, for a session that holds the lock."""
    todo = [each for each in pending(files, await ledger(connection)) if upto is None or each.number <= upto]
    for migration in todo:
        await _apply(connection, migration)
    return todo


async def _apply(connection: Any, migration: Migration) -> None:
    began = time.monotonic()
    label = f"{migration.number:04}_{migration.name}"
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = {DDL_LOCK_MS}")
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO helixflow.migrations (number, name, sha256, duration_ms) VALUES ($1, $2, $3, $4)",
                migration.number,
                migration.name,
                migration.sha256,
                int((time.monotonic() - began) * 1000),
            )
            if migration.min_reader is not None and await connection.fetchval(_HAS_READERS):
                await connection.execute(
                    "UPDATE helixflow.migrations SET min_reader = $2 WHERE number = $1",
                    migration.number,
                    migration.min_reader,
                )
    except asyncpg.LockNotAvailableError:
        raise MigrationError(
            f"migration {label} waited {DDL_LOCK_MS} ms for a table in use and gave up, so as not to block others; "
            "nothing of it stays. Run `helixflow db migrate` again, at a quieter time when it keeps failing"
        ) from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise MigrationError(
            f"migration {label} is not allowed: {error}. An operator runs `helixflow db setup` once"
        ) from None
    except asyncpg.PostgresError as error:
        raise MigrationError(f"migration {label} failed, nothing of it stays: {error}") from None
