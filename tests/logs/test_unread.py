"""A log that is open and not read, as after Ctrl-S or under a collector that hangs: everything goes on, and ends."""

import os
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

import httpx
import pytest

from helixflow.pki.layout import Layout
from helixflow.process import READY_FD
from tests.logs.support import Unread, lines

KEY = {"Authorization": "Bearer demo-key"}
DEVELOPMENT = {"HELIX_PROFILE": "development", "HELIX_GATEWAY_ACCOUNTS": "false"}


def client(pki: Layout, port: int) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(pki.ca_cert))
    return httpx.Client(base_url=f"https://localhost:{port}", verify=context, headers=KEY, timeout=20)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("level", ["info", "debug"])
def test_a_gateway_answers_and_ends(pki: Layout, level: str) -> None:
    command = [sys.executable, "-m", "tests.gateway.fake_server"]
    options = {"HELIX_CERTS": str(pki.directory), "HELIX_GATEWAY_LISTEN": "127.0.0.1:0", "HELIX_LOG_LEVEL": level}
    unread = Unread(*command, **DEVELOPMENT, **options, **{READY_FD: "3"})
    try:
        port = int(unread.told.readline().decode().rpartition(":")[2])
        with client(pki, port) as http:
            for _ in range(2000):
                assert http.get("/v1/models").status_code == 200
            assert http.get("/health").status_code == 200
        unread.process.terminate()
        assert unread.process.wait(15) == 0
        found = lines(unread.rest())
    finally:
        unread.end()
    assert sum(line["event"] == "request" for line in found) > 100, "the pipe is full of lines"
    assert not any(line.get("route") == "/health" for line in found), "health checks are not logged"


@pytest.mark.timeout(240)
def test_every_service_under_the_supervisor_answers_and_ends(pki: Layout, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    unread = Unread(
        sys.executable, "-m", "helixflow", "serve",
        **DEVELOPMENT,
        HELIX_CERTS=str(pki.directory),
        HELIX_HOME=str(tmp_path),
        HELIX_ENGINES=str(tmp_path / "engines"),
        HELIX_POOL_ENGINE="scripted",
        HELIX_POOL_LISTEN="127.0.0.1:0",
        HELIX_GATEWAY_LISTEN=f"127.0.0.1:{port}",
        HELIX_LOG_LEVEL="debug",
    )  # fmt: skip
    try:
        with client(pki, port) as http:
            until_ready(http, unread)
            for _ in range(400):
                body = {"model": "gpt-4", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
                assert http.post("/v1/chat/completions", json=body).status_code == 200
        os.kill(unread.process.pid, signal.SIGTERM)
        assert unread.process.wait(40) == 0
    finally:
        unread.end()


def until_ready(http: httpx.Client, unread: Unread) -> None:
    """Polls another process, which sends no event but to a log that nobody reads."""
    deadline = time.monotonic() + 90
    while True:
        try:
            if http.get("/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline
        assert unread.process.poll() is None
        time.sleep(0.05)
