"""Servers for the session, whose databases are emptied for each test."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from helixflow.db import migrate
from helixflow.db.target import Target, connect
from helixflow.pki import issue
from helixflow.pki.layout import Layout
from tests.db.support import DEBIAN, Loop, Server, folder

from .support import copy


@pytest.fixture(autouse=True)
def _no_log_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command run in this process would tie the log to a captured stream that ends with its test."""
    monkeypatch.setattr("helixflow.log.setup", lambda *_, **_options: None)


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.close()


@pytest.fixture(scope="session")
def rotated(pki: Layout, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """As `pki`, with another pair for access tokens."""
    layout = copy(pki, tmp_path_factory.mktemp("rotated"))
    issue.rotate_tokens(layout)
    return layout


EMPTY = """
DO $$
DECLARE
    name text;
    filled boolean;
    found text[] := '{}';
BEGIN
    FOR name IN
        SELECT c.oid::regclass::text FROM pg_class c
        WHERE c.relnamespace = 'helixflow'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
            AND c.relname NOT IN ('meta', 'migrations')
    LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %s)', name) INTO filled;
        IF filled THEN
            found := found || name;
        END IF;
    END LOOP;
    IF found <> '{}' THEN
        EXECUTE format('TRUNCATE %s CASCADE', array_to_string(found, ', '));
    END IF;
    UPDATE helixflow.meta SET pepper_check = NULL;
END
$$
"""
"""Leaves a database as the migrations made it; a new one for each test would take five times as long."""


async def _execute(target: Target, statement: str | None) -> None:
    connection = await connect(target)
    try:
        if statement is None:
            await migrate.migrate(connection)
        else:
            await connection.execute(statement)
    finally:
        await connection.close()


@dataclass(frozen=True)
class Databases:
    """Migrated databases of one server: one that each test finds empty, one that tests share."""

    own: Target
    shared: Target


def _serve(loop: Loop, *, binaries: bool) -> Iterator[Databases]:
    with folder() as place:
        server = Server(place, DEBIAN if binaries else None, {})
        loop.run(server.embedded.start())
        try:
            made = Databases(server.database(), server.database())
            for target in (made.own, made.shared):
                asyncio.run(_execute(target, None))
            yield made
        finally:
            loop.run(server.embedded.stop())


@pytest.fixture(scope="session")
def wheel(loop: Loop) -> Iterator[Databases]:
    """On the wheel's PostgreSQL."""
    yield from _serve(loop, binaries=False)


@pytest.fixture(scope="session")
def debian(loop: Loop) -> Iterator[Databases]:
    """On Debian's PostgreSQL 15."""
    if not (DEBIAN / "postgres").exists():
        pytest.skip("postgresql-15 is not installed (as root, `make system` does it)")
    yield from _serve(loop, binaries=True)


def _emptied(made: Databases) -> Target:
    asyncio.run(_execute(made.own, EMPTY))
    return made.own


@pytest.fixture
def target(wheel: Databases) -> Target:
    """A migrated database without a row."""
    return _emptied(wheel)


@pytest.fixture
def shared(wheel: Databases) -> Target:
    """A migrated database for tests that change nothing that others could see."""
    return wheel.shared


@pytest.fixture(params=["wheel", "debian"])
def each(request: pytest.FixtureRequest) -> Target:
    """As `target`, on each kind of server in turn."""
    return _emptied(request.getfixturevalue(request.param))
