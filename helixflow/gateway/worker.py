"""One worker process: the application behind Granian on a Unix socket, told what to do by the main process."""

import asyncio
import contextlib
import importlib
import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from helixflow import config as configuration
from helixflow import log
from helixflow.config import Config
from helixflow.core_rs import CoreError
from helixflow.errors import EX_SOFTWARE, StartError
from helixflow.gateway.app import Gateway
from helixflow.gateway.board import Board
from helixflow.gateway.bridge import Bridge
from helixflow.gateway.certificates import use_kept
from helixflow.gateway.front import HEAD_BYTES
from helixflow.gateway.services import Services
from helixflow.liveness import BEAT_S, write_stacks_at_the_end
from helixflow.process import die_with_parent

READY: Final = b"r"
"""Worker to main: this worker accepts connections."""
BEAT: Final = b"b"
"""Worker to main: the event loop goes on."""
DRAIN: Final = b"d"
"""Main to worker: refuse new work as draining, exit once nothing runs."""
CUT: Final = b"c"
"""Main to worker: end what runs with an error, and exit."""

CUT_S = 2.0
"""Time for the last error events to reach their clients (seconds): those that do not read get none."""
OPEN_S = 20.0
"""Granian listens within this time (seconds)."""
KEPT_MS = 86_400_000
"""The front decides when its connections end (milliseconds): one that is closed as it sends costs a request."""
PLAN = "HELIXFLOW_WORKER"
"""Environment variable: what a worker is told at its start, as JSON."""
DEFAULT_CONNECT = "helixflow.gateway.bridge:Bridge.connect"

Connect = Callable[[Config], Bridge]

logger = log.get("gateway")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker is told; numbers of descriptors are those of its own process."""

    path: str
    """Where it listens."""
    control: int
    stacks: int
    board: int
    parent: int
    connect: str = DEFAULT_CONNECT
    """`module:name` of what makes its bridge."""
    kept: dict[str, int] = field(default_factory=dict)
    """Certificate files that it reads from memory instead: their contents by path."""

    def dumps(self) -> str:
        """As text."""
        return json.dumps(asdict(self))


class Listener(Server):
    """Granian on a Unix socket, for the front alone."""

    def __init__(self, app: Gateway, path: Path, config: Config) -> None:
        super().__init__(
            app,
            uds=path,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            backlog=config.gateway.backlog,
            backpressure=config.gateway.max_connections,
            http1_settings=HTTP1Settings(header_read_timeout=KEPT_MS, max_buffer_size=HEAD_BYTES),
            log_level=LogLevels.error,
            log_dictconfig={"loggers": {"_granian": {"handlers": [], "propagate": True}}},
        )


class Worker:
    """The life of a worker, between two processes."""

    def __init__(self, config: Config, control: socket.socket, connect: Connect, board: Board | None = None) -> None:
        """`control`: stream of one-byte messages. `board`: where the main process says what it counts."""
        self._config = config
        self._board = board
        self._control = control
        self._connect = connect
        self._stop = asyncio.Event()
        self._cut = asyncio.Event()
        self._bridge: Bridge | None = None

    async def serve(self, path: Path) -> None:
        """Runs the server from start to stop. Raises StartError when it does not come up."""
        loop = asyncio.get_running_loop()
        bridge = self._bridge = self._connect(self._config)
        services = await Services.open(self._config, self._board)
        app = Gateway(self._config, bridge, services)
        server: Any = Listener(app, path, self._config)
        serving = loop.create_task(server.serve())
        await _listening(path, serving)
        self._control.setblocking(False)
        loop.add_reader(self._control, self._hear)
        self._control.send(READY)
        self._beat()
        stop = loop.create_task(self._stop.wait())
        cut = loop.create_task(self._cut.wait())
        await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            raise StartError("the HTTP server ended by itself")
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
        if self._bridge is not None:
            self._bridge.drain(self._stop.set)
            if order == CUT:
                self._bridge.cut()
                self._cut.set()
                asyncio.get_running_loop().call_later(CUT_S, self._stop.set)


async def _listening(path: Path, serving: "asyncio.Task[None]") -> None:
    """Returns when connections are accepted. Raises StartError when Granian failed before that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(OPEN_S):
            # Granian tells nobody when it listens.
            while not serving.done():
                try:
                    _reader, writer = await asyncio.open_unix_connection(path)
                except OSError:
                    await asyncio.sleep(0.005)
                    continue
                writer.close()
                return
    raise StartError("the HTTP server did not start; the log above says why")


def main() -> None:
    """Serves until the main process says stop. Ends the process; never returns."""
    told = json.loads(os.environ.pop(PLAN))
    plan = Plan(**told)
    # The main process decides; a terminal's Ctrl-C or a service manager's TERM reaches the whole group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(plan.parent)
    config = configuration.load()
    log.setup(config.log, "api-gateway")
    write_stacks_at_the_end(plan.stacks)
    use_kept(plan.kept)
    module, _, name = plan.connect.partition(":")
    connect: Any = importlib.import_module(module)
    for part in name.split("."):
        connect = getattr(connect, part)
    status = EX_SOFTWARE
    try:
        with socket.socket(fileno=plan.control) as control:
            uvloop.run(Worker(config, control, connect, Board(plan.board)).serve(Path(plan.path)))
        status = 0
    except (StartError, CoreError, OSError) as error:
        logger.error("worker cannot serve", error=str(error))
    except Exception:
        logger.exception("worker failed")
    finally:
        log.flush()
        # Connections that nobody reads keep Granian's threads alive; nothing is left to wait for.
        os._exit(status)


if __name__ == "__main__":
    main()
