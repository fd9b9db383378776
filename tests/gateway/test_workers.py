"""The main process when the machine has nothing to give: it goes on, leaves nothing behind, and tries again."""

import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helixflow.gateway import certificates, workers
from helixflow.gateway.worker import DEFAULT_CONNECT
from helixflow.pki.errors import PkiError
from helixflow.pki.layout import Layout
from tests.gateway.conftest import make_config


@pytest.fixture
def main(pki: Layout, tmp_path: Path) -> Iterator[workers.Workers]:
    """A main process that has started nothing yet."""
    listener = socket.create_server(("127.0.0.1", 0))
    made = workers.Workers(make_config(pki, HELIX_HOME=str(tmp_path)), listener, DEFAULT_CONNECT, lambda: None)
    yield made
    listener.close()
    made._board.close()
    made._selector.close()
    made._folder.rmdir()
    for end in (made._wake_read, made._wake_write):
        end.close()


def open_now() -> set[str]:
    """Descriptors of this process."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def fails(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (socket, "socketpair"),
        (workers, "Stacks"),
        (subprocess, "Popen"),
        (os, "pidfd_open"),
        (os, "memfd_create"),
    ],
)
def test_a_worker_that_cannot_be_started_leaves_nothing_behind(
    main: workers.Workers, place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The files are gone, so that the worker is to get those in memory: every step is taken.
    monkeypatch.setattr(certificates.GatewayFiles, "verify", bad)
    started: list[Any] = []
    popen = subprocess.Popen

    def notes(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", notes)
    monkeypatch.setattr(place, name, fails)
    before = open_now()
    main._respawn()
    main._respawn()
    assert open_now() == before
    assert main._children == []
    assert main._respawn_at is not None
    assert len(started) == (2 if name == "pidfd_open" else 0)
    assert all(process.returncode == -9 for process in started), "nobody would watch it"


def bad(*_: Any, **__: Any) -> None:
    raise PkiError(None, "the files are gone")
