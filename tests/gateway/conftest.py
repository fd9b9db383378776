"""A worker in a thread of the test process: the whole HTTP side, real Granian, real TLS, port 0."""

import asyncio
import contextlib
import logging
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import uvloop

from helixflow import config
from helixflow.config import Config
from helixflow.core_rs import Front
from helixflow.gateway import worker
from helixflow.gateway.bridge import Bridge
from helixflow.gateway.front import open_front
from helixflow.gateway.server import bind
from helixflow.pki.layout import Layout
from tests.gateway.fake import FakeClient, connect

KEY = {"Authorization": "Bearer demo-key"}


def make_config(pki: Layout, **options: str) -> Config:
    """A configuration from environment variables; the development profile unless said otherwise."""
    environ = {
        "HELIX_PROFILE": "development",
        "HELIX_GATEWAY_ACCOUNTS": "false",
        "HELIX_CERTS": str(pki.directory),
        "HELIX_GATEWAY_LISTEN": "127.0.0.1:0",
        **options,
    }
    return config.load(None, environ)


@dataclass
class Served:
    """A worker that serves in a thread."""

    config: Config
    context: ssl.SSLContext
    port: int = 0
    loop: Any = None
    fake: FakeClient = field(init=False)
    bridge: Bridge = field(init=False)
    front: Front = field(init=False)

    @property
    def url(self) -> str:
        scheme = "http" if self.config.gateway.plain_http else "https"
        return f"{scheme}://localhost:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.context, timeout=10, **options)

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the worker's loop and returns its result."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(5)

    def wait(self, event: asyncio.Event, timeout_s: float = 5.0) -> None:
        """Waits for an event of the worker's loop, then clears it."""

        async def run() -> None:
            async with asyncio.timeout(timeout_s):
                await event.wait()
            event.clear()

        asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout_s + 1)

    def raw(self, protocol: str = "http/1.1") -> ssl.SSLSocket:
        """A TLS connection for tests that speak HTTP/1.1 by hand."""
        context = ssl.create_default_context(cafile=str(self.config.certs / "helixflow-ca.pem"))
        context.set_alpn_protocols([protocol])
        plain = socket.create_connection(("127.0.0.1", self.port), 5)
        return context.wrap_socket(plain, server_hostname="localhost")


@contextlib.contextmanager
def serving(pki: Layout, **options: str) -> Iterator[Served]:
    """Serves with these options until the block ends."""
    loaded = make_config(pki, **options)
    served = Served(loaded, ssl.create_default_context(cafile=str(pki.ca_cert)))
    listener = bind(loaded.gateway.listen, loaded.gateway.backlog)
    served.port = listener.getsockname()[1]
    mine, theirs = socket.socketpair()

    def watched(with_config: Config) -> Bridge:
        served.bridge = connect(with_config)
        served.fake = served.bridge.admit()  # type: ignore[assignment]
        served.loop = asyncio.get_running_loop()
        return served.bridge

    with tempfile.TemporaryDirectory(prefix="hf-") as folder, mine, theirs:
        path = Path(folder) / "worker.sock"
        thread = threading.Thread(target=uvloop.run, args=(worker.Worker(loaded, theirs, watched).serve(path),))
        thread.start()
        mine.settimeout(10)
        assert mine.recv(1) == worker.READY
        front = served.front = open_front(loaded, listener)
        front.set_workers([str(path)])
        yield served
        mine.send(worker.CUT)
        thread.join(10)
        front.close()
    assert not thread.is_alive()
    assert served.fake.closed


@pytest.fixture(scope="package", autouse=True)
def quiet() -> Iterator[None]:
    """The worker in the thread logs to the test process: errors only."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def served(pki: Layout) -> Iterator[Served]:
    """A gateway in the development profile."""
    with serving(pki, HELIX_GATEWAY_KEEPALIVE_S="0.1", HELIX_GATEWAY_MAX_BODY_BYTES="200000") as running:
        yield running


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[httpx.Client]:
    """HTTP/1.1, with the development key."""
    with served.client(headers=KEY) as made:
        yield made
