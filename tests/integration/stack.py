"""Real services for tests: pool and gateway as processes of their own, on ports of the system's choice."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from helixflow.process import PARENT_PID, READY_FD

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
HEADERS = {"Authorization": "Bearer demo-key"}
START_S = 25.0
SCRIPTED = {"HELIX_POOL_ENGINE": "scripted", "HELIX_POOL_MAX_LEN": "4096"}
"""The scripted engine, with room for long answers."""


def environment(certs: Path, home: Path, **options: str) -> dict[str, str]:
    """The environment of a test service: development profile, own state, nothing of the caller's HELIX_ values."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HELIX_")},
        "HELIX_PROFILE": "development",
        "HELIX_HOME": str(home),
        "HELIX_CERTS": str(certs),
        "HELIX_ENGINES": str(home / "engines"),
        "HELIX_GATEWAY_LISTEN": "127.0.0.1:0",
        "HELIX_GATEWAY_ACCOUNTS": "false",
        "HELIX_POOL_LISTEN": "127.0.0.1:0",
        "HELIX_POOL_THREADS": "1",
        **options,
    }


@dataclass
class Process:
    """One `helixflow` command in the foreground of its own session."""

    arguments: tuple[str, ...]
    environ: Mapping[str, str]
    log: Path
    address: str = ""
    popen: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> "Process":
        """Starts it and waits until it says that it serves."""
        reader, writer = os.pipe()
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "helixflow", *self.arguments],
                env={**self.environ, READY_FD: str(writer), PARENT_PID: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
                start_new_session=True,
            )
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            self.address = pipe.readline().decode().strip()
        if not self.address:
            self.popen.wait(START_S)
            raise AssertionError(f"{self.arguments} did not start:\n{self.text()[-4000:]}")
        return self

    def text(self) -> str:
        """Everything it has printed."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Signals it and waits for its end; returns the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Waits for its end; kills it and fails when it does not come."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"{self.arguments} did not end:\n{self.text()[-4000:]}") from None


@dataclass
class Stack:
    """A gateway in front of one pool."""

    certs: Path
    pool: Process
    gateway: Process

    @property
    def url(self) -> str:
        """Base address of the HTTPS endpoint."""
        return f"https://localhost:{self.gateway.address.rpartition(':')[2]}"

    @property
    def ca(self) -> str:
        """File of the certificate authority."""
        return str(self.certs / "helixflow-ca.pem")

    def client(self, **options: Any) -> httpx.Client:
        """A client that trusts the CA and presents the development key."""
        return httpx.Client(base_url=self.url, verify=context(self.certs), headers=HEADERS, timeout=25, **options)


def context(certs: Path) -> Any:
    """A TLS context that trusts the stack's CA only."""
    import ssl

    return ssl.create_default_context(cafile=str(certs / "helixflow-ca.pem"))


@contextlib.contextmanager
def running(certs: Path, folder: Path, **options: str) -> Iterator[Stack]:
    """A pool and a gateway with `options` as their environment; both are stopped at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    environ = environment(certs, folder, **options)
    pool = Process(("pool",), environ, folder / "pool.log").start()
    try:
        environ = {**environ, "HELIX_GATEWAY_POOLS": pool.address}
        gateway = Process(("gateway",), environ, folder / "gateway.log").start()
        try:
            stack = Stack(certs, pool, gateway)
            until(lambda: ready(stack), "the gateway is ready")
            yield stack
        finally:
            gateway.stop()
    finally:
        pool.stop()


def ready(stack: Stack) -> bool:
    """Whether the gateway reaches a pool that has a model."""
    with stack.client() as client:
        return client.get("/ready").status_code == 200


def until(condition: Any, what: str, timeout_s: float = 15.0) -> None:
    """Polls another process's state, which sends no event; fails with `what` in the message."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
