"""The commands as a user types them, against a scripted auth-service."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import structlog

from helixflow import log
from helixflow.cli import main
from helixflow.pki.layout import Layout
from tests.admin.scripted import Scripted


@pytest.fixture(scope="package", autouse=True)
def quiet() -> Iterator[None]:
    """The scripted service logs to the test process: nothing of it belongs to the command."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="package")
def running(pki: Layout) -> Iterator[Scripted]:
    service = Scripted(pki).start()
    yield service
    service.stop()


@pytest.fixture
def service(running: Scripted) -> Scripted:
    """The auth-service, with no answers scripted."""
    running.reset()
    return running


@dataclass
class Typed:
    """What a command printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Shell:
    """Runs commands in this process."""

    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> Typed:
        self.capture.readouterr()
        try:
            status = main(arguments)
        except SystemExit as ended:  # argparse
            status = int(str(ended.code))
        captured = self.capture.readouterr()
        return Typed(status, captured.out, captured.err)


@pytest.fixture
def shell(service: Scripted, pki: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Commands that find the scripted auth-service."""
    monkeypatch.setenv("HELIX_CERTS", str(pki.directory))
    monkeypatch.setenv("HELIX_AUTH_LISTEN", service.address)
    monkeypatch.delenv("SUDO_USER", raising=False)
    # It would tie the loggers of the whole test process to the stream that this test captures.
    monkeypatch.setattr(log, "setup", lambda *_arguments, **_options: None)
    return Shell(capsys)
