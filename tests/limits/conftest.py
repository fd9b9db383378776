"""The servers of the database's tests, with the schema on them, and a Redis."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.db.conftest import debian, loop, wheel
from tests.db.support import Server

from .support import Databases, Redis

__all__ = ["debian", "loop", "wheel"]


@pytest.fixture(scope="session")
def on_wheel(wheel: Server) -> Databases:
    return Databases(wheel)


@pytest.fixture(scope="session")
def on_debian(debian: Server) -> Databases:
    return Databases(debian)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A Redis of the test's own, to be stopped at will."""
    _installed()
    server = Redis(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    _installed()
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["on_wheel", "on_debian", "shared_redis"])
def backend(request: pytest.FixtureRequest) -> Databases | Redis:
    """Each kind of server in turn."""
    found: Databases | Redis = request.getfixturevalue(request.param)
    return found


def _installed() -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (as root, `make system` does it)")
