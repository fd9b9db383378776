"""A server for the session, with a database for each test."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from helixflow.db import migrate
from helixflow.db.embedded import ROLE
from helixflow.db.target import Target, connect
from tests.db.support import DEBIAN, Loop, Server, folder

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _no_log_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command run in this process would tie the log to a captured stream that ends with its test."""
    monkeypatch.setattr("helixflow.log.setup", lambda *_: None)


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.close()


async def _migrated(target: Target) -> None:
    connection = await connect(target)
    try:
        await migrate.migrate(connection)
    finally:
        await connection.close()


def _serve(loop: Loop, binaries: bool) -> Iterator[tuple[Server, Target]]:
    with folder() as place:
        server = Server(place, DEBIAN if binaries else None, {})
        loop.run(server.embedded.start())
        try:
            template = server.database()
            asyncio.run(_migrated(template))
            yield server, template
        finally:
            loop.run(server.embedded.stop())


@pytest.fixture(scope="session")
def wheel(loop: Loop) -> Iterator[tuple[Server, Target]]:
    """The wheel's PostgreSQL, and a migrated database to copy."""
    yield from _serve(loop, binaries=False)


@pytest.fixture(scope="session")
def debian(loop: Loop) -> Iterator[tuple[Server, Target]]:
    """Debian's PostgreSQL 15, and a migrated database to copy."""
    if not (DEBIAN / "postgres").exists():
        pytest.skip("postgresql-15 is not installed (as root, `make system` does it)")
    yield from _serve(loop, binaries=True)


def _fresh(made: tuple[Server, Target]) -> Target:
    server, template = made
    name = f"auth_{next(_numbers)}"
    asyncio.run(server.execute(f"CREATE DATABASE {name} OWNER {ROLE} TEMPLATE {template.database}"))
    return replace(template, database=name)


@pytest.fixture
def target(wheel: tuple[Server, Target]) -> Target:
    """A migrated database of the test's own."""
    return _fresh(wheel)


@pytest.fixture(params=["wheel", "debian"])
def each(request: pytest.FixtureRequest) -> Target:
    """As `target`, on each kind of server in turn."""
    return _fresh(request.getfixturevalue(request.param))
