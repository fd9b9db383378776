"""One set of certificates, and stacks that several tests share."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .accounts import platform
from .people import Site, own_certificates, settled
from .stack import GOLDEN, SCRIPTED, Stack, running


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PKI made by the command that operators use."""
    folder = tmp_path_factory.mktemp("pki") / "certs"
    command = [sys.executable, "-m", "helixflow", "pki", "init", "--dir", str(folder), "--key-type", "ecdsa-p256"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def scripted(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The scripted engine, 2 ms a step: for everything around an engine."""
    folder = tmp_path_factory.mktemp("scripted")
    with running(certs, folder, **SCRIPTED, HELIX_POOL_SCRIPT_STEP_MS="2") as stack:
        yield stack


@pytest.fixture(scope="session")
def demo(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The shipped demo model on the onnx engine."""
    with running(certs, tmp_path_factory.mktemp("demo")) as stack:
        yield stack


@pytest.fixture(scope="session")
def site(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Everything with accounts on, behind two gateways: two organisations, whose owners are logged in."""
    own = own_certificates(certs, tmp_path_factory.mktemp("site"))
    options = {
        "HELIX_AUTH_LOGIN_FREE_ATTEMPTS": "3",
        "HELIX_AUTH_LOGIN_FREE_PER_ADDRESS": "100000",  # all clients of these tests have one address
        "HELIX_GATEWAY_UNKNOWN_KEYS_PER_MINUTE": "100000",
        "HELIX_POOL_SCRIPT_STEP_MS": "1",
    }
    with platform(own, gateways=2, **options) as started, settled(started) as site:
        yield site


@pytest.fixture(scope="session")
def golden(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Stack]]:
    """A stack for a golden checkpoint, by name; started when first asked for."""
    stacks: dict[str, Stack] = {}
    with ExitStack() as exits:

        def get(name: str) -> Stack:
            if name not in stacks:
                folder = tmp_path_factory.mktemp(name)
                stacks[name] = exits.enter_context(running(certs, folder, HELIX_MODEL=str(GOLDEN / name)))
            return stacks[name]

        yield get
