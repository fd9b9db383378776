"""Backup and restore: what comes back, and what is refused."""

import asyncio
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from helixflow import cli
from helixflow.db import backup, migrate
from helixflow.db.errors import BackupError
from helixflow.db.migrate import Migration
from helixflow.db.target import Target, connect

from .support import Server

# Names in an order that the references contradict, a reference to itself, a partitioned table, an identity.
SCHEMA = """
CREATE TABLE helixflow.z_owner (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, parent bigint REFERENCES helixflow.z_owner, name text NOT NULL,
    shout text GENERATED ALWAYS AS (upper(name)) STORED
);
CREATE TABLE helixflow.a_item (owner bigint NOT NULL REFERENCES helixflow.z_owner, "odd ""name" bytea, at timestamptz);
CREATE TABLE helixflow.months (at date NOT NULL, n int) PARTITION BY RANGE (at);
CREATE TABLE helixflow.months_1 PARTITION OF helixflow.months FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE helixflow.months_rest PARTITION OF helixflow.months DEFAULT;
"""
FILES = [migrate.read()[0], Migration(2, "content", "2" * 64, SCHEMA)]
CONTENT = """
INSERT INTO helixflow.z_owner (parent, name)
VALUES (NULL, E'tab\\t, newline\\n, \\\\slash, \\u00e4'), (1, ''), (2, 'x');
INSERT INTO helixflow.a_item SELECT 1 + n % 3, decode(md5(n::text), 'hex'), now() FROM generate_series(1, 5000) n;
INSERT INTO helixflow.months VALUES ('2026-01-05', 1), ('2027-01-05', NULL);
-- As the service does, long after the migration.
CREATE TABLE helixflow."months 2" PARTITION OF helixflow.months FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
INSERT INTO helixflow.months VALUES ('2026-02-05', 2);
"""
DIGESTS = [
    "SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM helixflow.z_owner t",
    "SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM helixflow.a_item t",
    "SELECT string_agg(tableoid::regclass || t::text, '|' ORDER BY t::text) FROM helixflow.months t",
    "SELECT installation::text FROM helixflow.meta",
]


async def _digests(connection: Any) -> list[object]:
    return [await connection.fetchval(query) for query in DIGESTS]


async def _saved(target: Target, path: Path) -> list[object]:
    connection = await connect(target)
    await migrate.migrate(connection, FILES)
    await connection.execute(CONTENT)
    manifest = await backup.backup(connection, path)
    assert {table["name"]: table["rows"] for table in manifest["tables"]} == {
        "a_item": 5000,
        "meta": 1,
        "months": 3,
        "z_owner": 3,
    }
    digests = await _digests(connection)
    await connection.close()
    return digests


async def _restored(target: Target, path: Path, files: list[Migration] = FILES) -> tuple[list[object], object]:
    connection = await connect(target)
    try:
        await backup.restore(connection, path, files)
        digests = await _digests(connection)
        await connection.execute("INSERT INTO helixflow.z_owner (name) VALUES ('next')")
        return digests, await connection.fetchval("SELECT max(id) FROM helixflow.z_owner")
    finally:
        await connection.close()


def test_round_trip(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "backup.tar"
    digests = asyncio.run(_saved(server.database(), path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["backup.tar"]
    assert asyncio.run(_restored(server.database(), path)) == (digests, 4)


def test_between_versions(wheel: Server, debian: Server, tmp_path: Path) -> None:
    for source, sink in ((wheel, debian), (debian, wheel)):
        path = tmp_path / f"{source.port}.tar"
        digests = asyncio.run(_saved(source.database(), path))
        assert asyncio.run(_restored(sink.database(), path)) == (digests, 4)


def test_a_newer_release_restores_the_old_schema_first(wheel: Server, tmp_path: Path) -> None:
    path = tmp_path / "backup.tar"
    digests = asyncio.run(_saved(wheel.database(), path))
    newer = [*FILES, Migration(3, "later", "3" * 64, "ALTER TABLE helixflow.meta ADD COLUMN extra int")]
    target = wheel.database()
    assert asyncio.run(_restored(target, path, newer))[0] == digests

    async def finish() -> list[int]:
        connection = await connect(target)
        done = [each.number for each in await migrate.migrate(connection, newer)]
        await connection.close()
        return done

    assert asyncio.run(finish()) == [3]


def test_refusals(wheel: Server, tmp_path: Path) -> None:
    path = tmp_path / "backup.tar"
    target = wheel.database()
    asyncio.run(_saved(target, path))

    async def attempt(
        message: str, files: list[Migration], applied: list[Migration], where: Target | None = None
    ) -> None:
        connection = await connect(where or wheel.database())
        await migrate.migrate(connection, applied)
        before = await connection.fetchval("SELECT installation FROM helixflow.meta")
        with pytest.raises(BackupError, match=message):
            await backup.restore(connection, path, files)
        assert await connection.fetchval("SELECT installation FROM helixflow.meta") == before
        await connection.close()

    empty = [wheel.database() for _ in range(2)]
    asyncio.run(attempt("not empty: a_item holds rows", FILES, FILES, target))
    asyncio.run(attempt("schema of migration 0002, the database that of 0001", FILES, FILES[:1], empty[0]))
    asyncio.run(attempt("which this release does not have so", FILES[:1], FILES[:1], empty[1]))

    async def again() -> None:
        connection = await connect(target)
        with pytest.raises(BackupError, match="exists already"):
            await backup.backup(connection, path)
        with pytest.raises(BackupError, match="cannot be written"):
            await backup.backup(connection, tmp_path / "no" / "folder.tar")
        await connection.close()
        fresh = await connect(empty_target)
        with pytest.raises(BackupError, match="nothing to back up"):
            await backup.backup(fresh, tmp_path / "none.tar")
        await fresh.close()

    empty_target = wheel.database()
    asyncio.run(again())
    assert [each.name for each in tmp_path.iterdir()] == ["backup.tar"]


def test_partitions_that_cannot_be_made(wheel: Server, tmp_path: Path) -> None:
    async def attempt(*statements: str, bounds: str | None = None) -> None:
        connection = await connect(target)
        await migrate.migrate(connection, FILES)
        for statement in statements:
            await connection.execute(statement)
        manifest = backup.inspect(path)
        for row in manifest["partitions"]:
            row["bounds"] = bounds or row["bounds"]
        with pytest.raises(BackupError, match="the partition months 2 of months cannot be made"):
            async with connection.transaction():
                await backup._make_partitions(connection, manifest)
        await connection.close()

    path = tmp_path / "backup.tar"
    asyncio.run(_saved(wheel.database(), path))
    target = wheel.database()
    bounds = "FOR VALUES FROM ('2026-05-01') TO ('2026-06-01')"
    asyncio.run(attempt(f'CREATE TABLE helixflow."months 2" PARTITION OF helixflow.months {bounds}'))
    target = wheel.database()
    asyncio.run(attempt(bounds="FOR VALUES FROM ('2026-02-01') TO ('2026-03-01'); DROP TABLE helixflow.meta"))


def test_damage_is_found(wheel: Server, tmp_path: Path) -> None:
    path = tmp_path / "backup.tar"
    asyncio.run(_saved(wheel.database(), path))
    whole = path.read_bytes()
    backup.inspect(path)
    spot = whole.index(b"newline")
    path.write_bytes(whole[:spot] + b"N" + whole[spot + 1 :])
    with pytest.raises(BackupError, match="the data of z_owner do not have the hash"):
        backup.inspect(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackupError, match=r"or is cut off|cannot be read"):
        backup.inspect(path)
    path.write_bytes(b"something else" * 100)
    with pytest.raises(BackupError, match="cannot be read as a backup"):
        backup.inspect(path)
    with tarfile.open(path, "w") as tar:
        text = json.dumps({"format": 2}).encode()
        info = tarfile.TarInfo("manifest.json")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    with pytest.raises(BackupError, match="has format 2"):
        backup.inspect(path)


def test_the_commands(
    wheel: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "backup.tar")
    monkeypatch.setenv("HELIX_DATABASE_URL", wheel.database().dsn())
    assert cli.main(["db", "migrate"]) == 0
    assert cli.main(["db", "backup", path]) == 0
    monkeypatch.setenv("HELIX_DATABASE_URL", wheel.database().dsn())
    assert cli.main(["db", "restore", path]) == 0
    assert cli.main(["db", "status"]) == 0
    assert re.search(r"\d+ rows of \d+ tables", capsys.readouterr().out)
    assert cli.main(["db", "backup", path]) == 1
    assert "exists already" in capsys.readouterr().err
