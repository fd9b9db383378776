"""One worker process: the application behind Granian on the shared listener, told what to do by the main process."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop
from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server.embed import Server

from helixflow import log
from helixflow.config import Config
from helixflow.core_rs import CoreError
from helixflow.errors import EX_SOFTWARE, StartError
from helixflow.gateway.app import Gateway
from helixflow.gateway.bridge import Bridge
from helixflow.gateway.certificates import GatewayFiles
from helixflow.gateway.services import Services
from helixflow.liveness import BEAT_S
from helixflow.process import die_with_parent

READY: Final = b"r"
"""Worker to main: this worker accepts connections."""
BEAT: Final = b"b"
"""Worker to main: the event loop goes on."""
RETIRE: Final = b"t"
"""Main to worker: accept nothing more, finish what runs, however long it takes, and exit."""
DRAIN: Final = b"d"
"""Main to worker: refuse new work as draining, exit once nothing runs."""
CUT: Final = b"c"
"""Main to worker: end what runs with an error, and exit."""

CUT_S = 2.0
"""Time for the last error events to reach their clients (seconds): those that do not read get none."""
HAND_OVER_S = 1.0
"""A retiring worker still answers the first request of connections it has accepted, for this long (seconds)."""
HEADER_BYTES = 65536
SEND_BYTES = 16384
"""Of an HTTP/2 stream that its client does not read, so much is kept below the application (bytes)."""

Connect = Callable[[Config], Bridge]

logger = log.get("gateway")


class Listener(Server):
    """Granian on a socket that the main process has bound: no connection is lost when workers are swapped."""

    def __init__(self, app: Gateway, listener: socket.socket, config: Config) -> None:
        self._listener = listener
        options = config.gateway
        files = GatewayFiles.of(config)
        super().__init__(
            app,
            str(options.listen.host),
            options.listen.port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.auto,
            websockets=False,
            backlog=options.backlog,
            backpressure=options.max_connections,
            http1_settings=HTTP1Settings(max_buffer_size=HEADER_BYTES),
            http2_settings=HTTP2Settings(
                keep_alive_interval=30_000,
                max_concurrent_streams=1000,
                max_headers_size=HEADER_BYTES,
                max_send_buffer_size=SEND_BYTES,
            ),
            log_level=LogLevels.error,
            log_dictconfig={"loggers": {"_granian": {"handlers": [], "propagate": True}}},
            ssl_cert=None if options.plain_http else files.cert,
            ssl_key=None if options.plain_http else files.key,
        )

    def build_ssl_context(self, cert: Path | None, key: Path | None, *options: Any) -> None:
        """As Granian's own, for what a worker keeps in memory: a file there has no path of its own to resolve."""
        if cert is None or key is None or not cert.is_relative_to("/proc/self/fd"):
            super().build_ssl_context(cert, key, *options)
            return
        password, protocol, *_clients = options
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password)
        # The stub knows only how it is set without TLS.
        self.ssl_ctx = (True, str(cert), str(key), password, str(protocol), None, [], False)  # type: ignore[assignment]

    def _init_shared_socket(self) -> None:
        self._number = self._listener.detach()
        # The stub knows neither the third argument nor that the attribute is ever set.
        self._shd = SocketHolder(self._number, False, self.backlog)  # type: ignore[call-arg, assignment]

    async def hand_over(self, cut: asyncio.Event) -> None:
        """Accepts nothing more, but gives what was accepted time to send its request, unless `cut` is set.

        Granian closes a connection that has sent nothing yet as soon as it is told to stop. So its descriptor stands
        for a socket that nobody connects to meanwhile; the real one is back before Granian lets go of it.
        """
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind("")
            silent.listen(1)
            silent.setblocking(False)
            kept = os.dup(self._number)
            os.dup2(silent.fileno(), self._number, inheritable=False)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HAND_OVER_S):
                    await cut.wait()
            os.dup2(kept, self._number, inheritable=False)
            os.close(kept)


def run(config: Config, listener: socket.socket, control: socket.socket, parent: int, connect: Connect) -> None:
    """Serves until the main process says stop. Ends the process; never returns.

    `listener`: shared with the other workers. `control`: stream of one-byte messages.
    """
    die_with_parent(parent)
    # The main process decides; a terminal's Ctrl-C or a service manager's TERM reaches the whole group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    status = EX_SOFTWARE
    try:
        uvloop.run(Worker(config, control, connect).serve(listener))
        status = 0
    except (StartError, CoreError, OSError) as error:
        logger.error("worker cannot serve", error=str(error))
    except Exception:
        logger.exception("worker failed")
    finally:
        log.flush()
        # Connections that nobody reads keep Granian's threads alive; nothing is left to wait for.
        os._exit(status)


class Worker:
    """The life of a worker, between two processes."""

    def __init__(self, config: Config, control: socket.socket, connect: Connect) -> None:
        self._config = config
        self._control = control
        self._connect = connect
        self._stop = asyncio.Event()
        self._cut = asyncio.Event()
        self._retiring = False
        self._bridge: Bridge | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Runs the server from start to stop. Raises StartError when it does not come up."""
        loop = asyncio.get_running_loop()
        bridge = self._bridge = self._connect(self._config)
        services = await Services.open(self._config)
        app = Gateway(self._config, bridge, services)
        server: Any = Listener(app, listener, self._config)
        serving = loop.create_task(server.serve())
        await _accepting(server, serving)
        self._control.setblocking(False)
        loop.add_reader(self._control, self._hear)
        self._control.send(READY)
        self._beat()
        stop = loop.create_task(self._stop.wait())
        cut = loop.create_task(self._cut.wait())
        await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            raise StartError("the HTTP server ended by itself")
        if self._retiring:
            await server.hand_over(self._cut)
        server.stop()
        await asyncio.wait({serving, cut}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await asyncio.wait({serving}, timeout=CUT_S)
        await services.close()
        bridge.close()

    def _beat(self) -> None:
        # A full socket means that the main process does not look.
        with contextlib.suppress(OSError):
            self._control.send(BEAT)
        asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _hear(self) -> None:
        try:
            said = self._control.recv(16)
        except BlockingIOError:
            return
        if not said:
            os._exit(EX_SOFTWARE)  # the main process has died
        for order in said:
            self._obey(bytes([order]))

    def _obey(self, order: bytes) -> None:
        if order == RETIRE:
            self._retiring = True
            self._stop.set()
        elif self._bridge is not None:
            self._bridge.drain(self._stop.set)
            if order == CUT:
                self._bridge.cut()
                self._cut.set()
                asyncio.get_running_loop().call_later(CUT_S, self._stop.set)


async def _accepting(server: Any, serving: "asyncio.Task[None]") -> None:
    """Returns when the listener is open. Raises StartError when Granian failed before that."""
    for _step in range(1000):
        await asyncio.sleep(0)
        if serving.done() or server.interrupt_children:
            break
        if server.wrks:
            # The worker's task listens in its first step; one more round tells whether that step failed.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if not server.interrupt_children:
                return
            break
    with contextlib.suppress(Exception):
        server.stop()
    raise StartError("the HTTP server did not start; the log above says why")
