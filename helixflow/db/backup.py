"""Backup and restore of the schema `helixflow`: one tar file of COPY data with a manifest of hashes.

Not pg_dump: the wheel's cannot speak TLS, and a dump of one major version need not load into another. COPY text does.
The schema itself is not in the file; the migrations make it, and the manifest says which.
"""

import graphlib
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import asyncpg

from helixflow.db.errors import BackupError
from helixflow.db.migrate import Applied, Migration, ledger, lock, migrate_locked, unlock
from helixflow.db.setup import quoted

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_MAX = 16 << 20
CHUNK = 1 << 20
SCHEMA_TABLE = "migrations"
"""Belongs to the schema, not to the data."""

_TABLES = """
SELECT c.relname AS name, array_agg(a.attname::text ORDER BY a.attnum) AS columns
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
WHERE n.nspname = 'helixflow' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
GROUP BY c.relname ORDER BY c.relname
"""
_REFERENCES = """
SELECT DISTINCT t.relname AS name, r.relname AS needs
FROM pg_constraint k JOIN pg_class t ON t.oid = k.conrelid JOIN pg_class r ON r.oid = k.confrelid
JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE k.contype = 'f' AND n.nspname = 'helixflow' AND t.oid <> r.oid
"""
# The session's time zone, UTC here, decides how the bounds of a time are written.
_PARTITIONS = """
SELECT c.relname::text AS name, p.relname::text AS parent, pg_get_expr(c.relpartbound, c.oid) AS bounds
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'helixflow' AND c.relispartition AND c.relkind = 'r' ORDER BY c.relname
"""
_BOUNDS = re.compile(r"DEFAULT|FOR VALUES FROM \('[0-9 :+.-]+'\) TO \('[0-9 :+.-]+'\)")
_SEQUENCES = "SELECT sequencename::text AS name FROM pg_sequences WHERE schemaname = 'helixflow' ORDER BY 1"


async def backup(connection: Any, path: Path) -> dict[str, Any]:
    """Writes one consistent state to a new file; returns its manifest. Services may go on.

    Raises BackupError, also when the file exists.
    """
    if path.exists():  # noqa: ASYNC240 - a command of its own: nothing else runs on the loop
        raise BackupError(f"{path} exists already; backups are never overwritten")
    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            manifest = await _write(connection, file, path.parent)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, does not replace what appeared meanwhile.
        os.link(partial, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise BackupError(f"{path} cannot be written: {error.strerror}") from None
    except asyncpg.PostgresError as error:
        raise BackupError(f"the database cannot be read: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return manifest


async def _write(connection: Any, file: BinaryIO, scratch: Path) -> dict[str, Any]:
    await connection.execute("SET statement_timeout = 0")
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute("SET LOCAL timezone = 'UTC'")
        applied = await ledger(connection)
        if not applied:
            raise BackupError("there is nothing to back up: the database has no HelixFlow schema")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "server": str(connection.get_server_version().major),
            "installation": str(await connection.fetchval("SELECT installation FROM helixflow.meta")),
            "migrations": [{"number": row.number, "name": row.name, "sha256": row.sha256} for row in applied],
            "tables": [],
            "partitions": [dict(row) for row in await connection.fetch(_PARTITIONS)],
            "sequences": {},
        }
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for table in await connection.fetch(_TABLES):
                if table["name"] != SCHEMA_TABLE:
                    manifest["tables"].append(await _write_table(connection, tar, table, scratch))
            for row in await connection.fetch(_SEQUENCES):
                state = await connection.fetchrow(
                    f"SELECT last_value, is_called FROM helixflow.{quoted(row['name'])}"  # noqa: S608 - from the catalogue
                )
                manifest["sequences"][row["name"]] = [state["last_value"], state["is_called"]]
            content = json.dumps(manifest, indent=1).encode()
            with tempfile.TemporaryFile(dir=scratch) as spool:
                spool.write(content)
                _add(tar, MANIFEST, spool)
    return manifest


async def _write_table(connection: Any, tar: tarfile.TarFile, table: Any, scratch: Path) -> dict[str, Any]:
    """One table as a member; the tar header wants its size first, hence the scratch file."""
    columns = list(table["columns"])
    names = ", ".join(quoted(name) for name in columns)
    query = f"SELECT {names} FROM helixflow.{quoted(table['name'])}"  # noqa: S608 - names from the catalogue
    digest = hashlib.sha256()
    with tempfile.TemporaryFile(dir=scratch) as spool:

        async def keep(data: bytes) -> None:
            digest.update(data)
            spool.write(data)

        # A query, not the table: COPY of a partitioned table needs one.
        status = await connection.copy_from_query(query, output=keep)
        size = _add(tar, f"data/{table['name']}", spool)
    rows = int(status.split()[-1])
    return {"name": table["name"], "columns": columns, "rows": rows, "bytes": size, "sha256": digest.hexdigest()}


def _add(tar: tarfile.TarFile, name: str, spool: Any) -> int:
    info = tarfile.TarInfo(name)
    info.size = spool.tell()
    info.mode = 0o600
    spool.seek(0)
    tar.addfile(info, spool)
    return info.size


def inspect(path: Path) -> dict[str, Any]:
    """The manifest of a whole, undamaged backup. Raises BackupError."""
    try:
        with tarfile.open(path, "r:") as tar:
            return _inspect(path, tar)
    except (OSError, tarfile.TarError) as error:
        raise BackupError(f"{path} cannot be read as a backup: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise BackupError(f"{path} is not a backup of HelixFlow, or is cut off: {error}") from None


def _inspect(path: Path, tar: tarfile.TarFile) -> dict[str, Any]:
    info = tar.getmember(MANIFEST)
    if info.size > MANIFEST_MAX:
        raise BackupError(f"{path}: the manifest is larger than {MANIFEST_MAX} bytes")
    manifest: dict[str, Any] = json.load(_member(tar, MANIFEST))
    if manifest["format"] != FORMAT:
        raise BackupError(f"{path} has format {manifest['format']}; this release reads {FORMAT}: use a newer release")
    for table in manifest["tables"]:
        member = _member(tar, f"data/{table['name']}")
        digest = hashlib.sha256()
        while chunk := member.read(CHUNK):
            digest.update(chunk)
        if digest.hexdigest() != table["sha256"]:
            raise BackupError(f"{path} is damaged: the data of {table['name']} do not have the hash of the manifest")
    return manifest


def _member(tar: tarfile.TarFile, name: str) -> Any:
    file = tar.extractfile(name)
    if file is None:
        raise BackupError(f"the backup's member {name} is not a file")
    return file


async def restore(connection: Any, path: Path, files: Sequence[Migration]) -> dict[str, Any]:
    """Fills an empty database from a backup, all or nothing; returns the manifest.

    A fresh database is first migrated to the backup's schema; one with a schema must have the same, and no data.
    Raises BackupError or MigrationError.
    """
    manifest = inspect(path)
    await lock(connection)
    try:
        await _same_schema(connection, manifest, files)
        async with connection.transaction():
            await _fill(connection, path, manifest)
    except asyncpg.PostgresError as error:
        raise BackupError(f"{path} cannot be restored, and nothing of it stays: {error}") from None
    finally:
        if not connection.is_closed():
            await unlock(connection)
    return manifest


async def _same_schema(connection: Any, manifest: dict[str, Any], files: Sequence[Migration]) -> None:
    wanted = [(row["number"], row["sha256"]) for row in manifest["migrations"]]
    known = [(file.number, file.sha256) for file in files]
    if known[: len(wanted)] != wanted:
        raise BackupError(
            f"the backup has the schema of migration {wanted[-1][0]:04}, which this release does not have so: "
            "restore with the release that made it, or a newer one"
        )
    applied: list[Applied] = await ledger(connection)
    if not applied:
        await migrate_locked(connection, files, upto=len(wanted))
    elif [(row.number, row.sha256) for row in applied] != wanted:
        raise BackupError(
            f"the backup has the schema of migration {wanted[-1][0]:04}, the database that of {applied[-1].number:04}: "
            "restore into a new, empty database, then run `helixflow db migrate`"
        )


async def _fill(connection: Any, path: Path, manifest: dict[str, Any]) -> None:
    present = {row["name"]: list(row["columns"]) for row in await connection.fetch(_TABLES)}
    del present[SCHEMA_TABLE]
    saved = {table["name"]: table for table in manifest["tables"]}
    if {name: table["columns"] for name, table in saved.items()} != present:
        raise BackupError("the tables of the backup and of the database differ: somebody changed the schema by hand")
    await _make_partitions(connection, manifest)
    names = ", ".join(f"helixflow.{quoted(name)}" for name in sorted(present))
    await connection.execute(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")
    for name in sorted(present):
        if name != "meta" and await connection.fetchval(f"SELECT EXISTS (SELECT FROM helixflow.{quoted(name)})"):  # noqa: S608
            raise BackupError(f"the database is not empty: {name} holds rows. Restore into a new, empty database")
    await connection.execute("DELETE FROM helixflow.meta")
    needs: dict[str, set[str]] = {name: set() for name in present}
    for row in await connection.fetch(_REFERENCES):
        if row["name"] in needs and row["needs"] in needs:
            needs[row["name"]].add(row["needs"])
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        raise BackupError(f"tables refer to each other in a circle: {', '.join(error.args[1])}") from None
    with tarfile.open(path, "r:") as tar:
        for name in order:
            status = await connection.copy_to_table(
                name, schema_name="helixflow", columns=present[name], source=_chunks(_member(tar, f"data/{name}"))
            )
            if int(status.split()[-1]) != saved[name]["rows"]:
                raise BackupError(f"{name}: {status.split()[-1]} rows arrived of {saved[name]['rows']}")
    for name, (value, called) in manifest["sequences"].items():
        await connection.execute("SELECT setval($1::regclass, $2, $3)", f"helixflow.{quoted(name)}", value, called)


async def _make_partitions(connection: Any, manifest: dict[str, Any]) -> None:
    """Those that the migrations do not make: the service does, as time goes by."""
    await connection.execute("SET LOCAL timezone = 'UTC'")
    present = {row["name"]: (row["parent"], row["bounds"]) for row in await connection.fetch(_PARTITIONS)}
    for row in manifest.get("partitions", []):
        name, parent, bounds = row["name"], row["parent"], row["bounds"]
        if present.get(name) == (parent, bounds):
            continue
        if name in present or not _BOUNDS.fullmatch(bounds):
            raise BackupError(f"the partition {name} of {parent} cannot be made as the backup has it: {bounds}")
        await connection.execute(
            f"CREATE TABLE helixflow.{quoted(name)} PARTITION OF helixflow.{quoted(parent)} {bounds}"
        )


async def _chunks(member: Any) -> AsyncIterator[bytes]:
    while chunk := member.read(CHUNK):
        yield chunk
