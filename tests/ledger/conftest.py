"""The servers of the database's tests, and databases with the schema on them."""

import pytest

from tests.db.conftest import debian, loop, server, wheel
from tests.db.support import Server

from .support import Databases

__all__ = ["debian", "loop", "server", "wheel"]


@pytest.fixture(scope="session")
def on_wheel(wheel: Server) -> Databases:
    return Databases(wheel)


@pytest.fixture(scope="session")
def on_debian(debian: Server) -> Databases:
    return Databases(debian)


@pytest.fixture(params=["on_wheel", "on_debian"])
def databases(request: pytest.FixtureRequest) -> Databases:
    """Each kind of server in turn."""
    found: Databases = request.getfixturevalue(request.param)
    return found
