"""A gateway in front of a scripted auth-service, and a client of it."""

from collections.abc import Iterator

import httpx
import pytest

from helixflow.pki.layout import Layout
from tests.gateway.accounts import Stage, stage


@pytest.fixture(scope="module")
def running(pki: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(pki, tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest.fixture
def here(running: Stage) -> Stage:
    return running.reset()


@pytest.fixture
def client(here: Stage) -> Iterator[httpx.Client]:
    with here.client() as made:
        yield made
