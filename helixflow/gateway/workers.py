"""The main process of the gateway: its front door, and the workers behind it."""

import contextlib
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helixflow import log
from helixflow.config import Config
from helixflow.confine.environment import options as as_environment
from helixflow.core_rs import Front, TlsError
from helixflow.disk import Room
from helixflow.errors import EX_SOFTWARE
from helixflow.gateway import worker
from helixflow.gateway.board import Board
from helixflow.gateway.certificates import GatewayFiles, keep
from helixflow.gateway.front import open_front
from helixflow.gateway.services import DRAIN_S
from helixflow.liveness import (
    DUMP_S,
    LOOK_S,
    Pulse,
    Stacks,
    Watch,
    ask_for_stacks,
    is_traced,
)
from helixflow.pki.errors import PkiError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WATCH_S = 1.0
"""The certificate files are looked at this often (seconds); a change counts once it stood still that long."""
START_S = 30.0
"""A worker must accept connections within this time (seconds)."""
KILL_S = worker.CUT_S + DRAIN_S + 3.0
"""A worker that was told to cut everything must have ended within this time (seconds), its spool handed over or not."""
BACKOFF_S = (0.2, 10.0)
"""Shortest and longest pause before a worker that died is replaced (seconds)."""
STABLE_S = 30.0
LAST_BYTES_S = 2.0
"""Time for what the workers have said to reach clients, once they have ended (seconds)."""

logger = log.get("gateway")


@dataclass(eq=False)
class Child:
    """One worker as the main process sees it."""

    process: "subprocess.Popen[bytes]"
    path: Path
    control: socket.socket
    end: int
    """Readable once the process has ended (pidfd_open(2))."""
    born: float
    start_by: float
    stacks: Stacks
    watch: Watch
    ready: bool = False
    kill_at: float = math.inf
    """It stands still, and must have ended by then."""

    def look(self, now: float) -> None:
        """Ends a worker whose event loop stands still; first it gets time to write where."""
        if not self.ready:
            return
        if now >= self.kill_at:
            self.kill_at = math.inf
            self.process.kill()
        elif self.watch.look() and self.kill_at == math.inf and not is_traced(self.process.pid):
            silent_s = round(self.watch.silent_s, 1)
            logger.error("worker stands still; it is ended and replaced", pid=self.process.pid, silent_s=silent_s)
            self.kill_at = now + DUMP_S
            ask_for_stacks(self.process.pid)

    def stack(self) -> dict[str, str]:
        """Where it stood when a fatal signal ended it, for the log."""
        text = self.stacks.take()
        return {"stack": text} if text else {}

    def tell(self, order: bytes) -> None:
        """Sends an order; a worker that has died needs none."""
        try:
            self.control.send(order)
        except OSError:
            logger.debug("worker is gone", pid=self.process.pid)


class Workers:
    """A loop over signals, messages of workers, their ends, and the clock. One thread."""

    def __init__(self, config: Config, listener: socket.socket, connect: str, on_ready: Callable[[], None]) -> None:
        """`on_ready` is called once, when all workers accept connections for the first time."""
        self._config = config
        self._listener = listener
        self._connect = connect
        self._on_ready = on_ready
        self._front: Front | None = None
        self._board = Board()
        self._folder = Path(tempfile.mkdtemp(prefix="helixflow-gateway-"))
        self._files = GatewayFiles.of(config)
        self._pulse = Pulse()
        self._room = Room(config.ledger.spool, config.supervise.disk_warn_bytes)
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._children: list[Child] = []
        self._born = 0
        self._respawn_at: float | None = None
        self._backoff = BACKOFF_S[0]
        self._stamp = self._seen = self._files.stamp()
        self._good = self._files.contents()
        self._has_crl = self._files.layout.crl.exists()
        self._watch_at = time.monotonic() + WATCH_S
        self._look_at = time.monotonic() + LOOK_S
        self._draining = False
        self._status = 0
        self._cut_at: float | None = None
        self._kill_at: float | None = None

    def run(self) -> int:
        """Serves until a signal ends it, or the first workers do not start. Returns the exit status."""
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda _number, _frame: None)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_signal)
        try:
            self._fill()
            while self._children or (self._respawn_at is not None and not self._draining):
                for key, _events in self._selector.select(self._timeout()):
                    key.data()
                self._on_time()
            self._last_bytes()
        finally:
            for child in self._children:
                child.process.kill()
            shutil.rmtree(self._folder, ignore_errors=True)
            signal.set_wakeup_fd(-1)
            self._board.close()
        return self._status

    # --- events ---------------------------------------------------------------

    def _on_signal(self) -> None:
        for number in self._wake_read.recv(64):
            if number == signal.SIGHUP:
                self._swap("SIGHUP")
            elif number in (signal.SIGINT, signal.SIGTERM):
                self._stop()

    def _on_message(self, child: Child) -> None:
        if child.control.fileno() < 0:
            return  # its end was in the same batch of events, and came first
        try:
            said = child.control.recv(16)
        except OSError:
            said = b""
        if not said:
            self._selector.unregister(child.control)
        if worker.BEAT in said:
            child.watch.heard()
        if worker.READY in said:
            child.watch.heard()
            child.ready = True
            self._promote()

    def _on_exit(self, child: Child) -> None:
        status = child.process.wait()
        self._selector.unregister(child.end)
        os.close(child.end)
        if child.control.fileno() in self._selector.get_map():
            self._selector.unregister(child.control)
        child.control.close()
        child.path.unlink(missing_ok=True)
        self._children.remove(child)
        self._tell_front()
        stack = child.stack()
        if stack:
            logger.error("worker ended by a fatal signal", pid=child.process.pid, status=status, **stack)
        if self._draining:
            if self._front is not None and not self._children:
                # Until now whoever asked was told that we drain.
                self._front.drain()
            return
        if self._front is None:
            logger.error("the gateway did not start", status=status)
            self._status = EX_SOFTWARE
            self._draining = True
            for other in self._children:
                other.tell(worker.CUT)
            return
        logger.error("worker died", pid=child.process.pid, status=status, restart_in_s=self._backoff)
        self._respawn_at = time.monotonic() + self._backoff
        stable = time.monotonic() - child.born > STABLE_S
        self._backoff = BACKOFF_S[0] if stable else min(self._backoff * 2, BACKOFF_S[1])

    def _timeout(self) -> float:
        times = [self._look_at, self._watch_at, self._respawn_at, self._cut_at, self._kill_at]
        times += [child.start_by for child in self._children if not child.ready]
        return max(0.0, min(at for at in times if at is not None) - time.monotonic())

    def _on_time(self) -> None:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + min(LOOK_S, self._pulse.interval_s)
            self._pulse.beat()
            self._room.look()
            if self._front is not None:
                self._board.write({"connections": self._front.connections(), **self._front.stats()})
            for child in self._children:
                child.look(now)
        if now >= self._watch_at:
            self._watch_at = now + WATCH_S
            self._watch()
        if self._respawn_at is not None and now >= self._respawn_at:
            self._respawn_at = None
            self._respawn()
        if self._cut_at is not None and now >= self._cut_at:
            self._cut()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            for child in self._children:
                logger.error("worker did not stop; killed", pid=child.process.pid)
                child.process.kill()
        for child in self._children:
            if not child.ready and now >= child.start_by:
                child.start_by = math.inf
                logger.error("worker did not start in time; killed", pid=child.process.pid, timeout_s=START_S)
                child.process.kill()

    # --- workers --------------------------------------------------------------

    def _respawn(self) -> None:
        """Replaces workers that died. With certificates in memory when the files are gone, or wrong by now."""
        if self._draining:
            return
        kept: dict[Path, bytes] = {}
        try:
            self._files.verify(had_crl=self._has_crl)
        except PkiError as error:
            kept = self._good
            logger.error("certificates cannot be used; a new worker takes those in memory", error=str(error))
        try:
            self._fill(kept)
        except OSError as error:
            # No process, memory or descriptor to be had now: those that serve go on.
            logger.error("a worker cannot be started", error=str(error), again_in_s=self._backoff)
            self._respawn_at = time.monotonic() + self._backoff
            self._backoff = min(self._backoff * 2, BACKOFF_S[1])

    def _fill(self, kept: dict[Path, bytes] | None = None) -> None:
        """Starts the workers that are missing. `kept`: what they read instead of certificate files."""
        for _ in range(self._config.gateway.workers - len(self._children)):
            with contextlib.ExitStack() as held:
                numbers = keep(kept or {})
                for number in numbers.values():
                    held.callback(os.close, number)
                self._spawn(numbers)

    def _spawn(self, kept: dict[str, int]) -> None:
        """Starts one worker. Raises OSError and then leaves nothing behind, for it is tried again and again."""
        with contextlib.ExitStack() as undo:
            mine, theirs = socket.socketpair()
            undo.callback(mine.close)
            with theirs:
                stacks = Stacks()
                undo.callback(stacks.close)
                plan, process = self._start(theirs.fileno(), stacks.fileno(), kept)
            undo.callback(process.wait)
            undo.callback(process.kill)
            end = os.pidfd_open(process.pid)
            undo.pop_all()
        now = time.monotonic()
        watch = Watch(self._config.supervise.stall_timeout_s)
        child = Child(process, Path(plan.path), mine, end, now, now + START_S, stacks, watch)
        self._children.append(child)
        self._selector.register(mine, selectors.EVENT_READ, lambda: self._on_message(child))
        self._selector.register(child.end, selectors.EVENT_READ, lambda: self._on_exit(child))

    def _start(self, control: int, stacks: int, kept: dict[str, int]) -> tuple[worker.Plan, "subprocess.Popen[bytes]"]:
        """The process of a worker, and what it was told."""
        self._born += 1
        path = self._folder / f"{self._born}.sock"
        board = self._board.fileno()
        plan = worker.Plan(str(path), control, stacks, board, os.getpid(), self._connect, kept)
        process = subprocess.Popen(
            [sys.executable, "-m", "helixflow.gateway.worker"],
            env={**_general(), **as_environment("gateway", self._config), worker.PLAN: plan.dumps()},
            stdin=subprocess.DEVNULL,
            pass_fds=(control, stacks, board, *kept.values()),
        )
        return plan, process

    def _promote(self) -> None:
        """A worker is ready: it gets requests. The front opens with the last of the first."""
        if self._front is not None:
            self._tell_front()
        elif not self._draining and all(child.ready for child in self._children):
            try:
                self._front = open_front(self._config, self._listener)
            except TlsError as error:
                logger.error("the gateway did not start", error=str(error))
                self._status = EX_SOFTWARE
                self._stop()
                return
            self._tell_front()
            self._on_ready()

    def _tell_front(self) -> None:
        if self._front is not None:
            self._front.set_workers([str(child.path) for child in self._children if child.ready])

    # --- certificates ---------------------------------------------------------

    def _watch(self) -> None:
        stamp = self._files.stamp()
        settled = stamp == self._seen
        self._seen = stamp
        if settled and stamp != self._stamp:
            self._swap("files changed")

    def _swap(self, why: str) -> None:
        """Verifies the files, then takes them for new connections. With bad files the old ones stay."""
        if self._draining or self._front is None:
            return
        self._stamp = self._seen = self._files.stamp()
        try:
            self._files.verify(had_crl=self._has_crl)
            self._front.reload()
        except (PkiError, TlsError) as error:
            logger.error("new certificates refused; the old ones stay in use", why=why, error=str(error))
            return
        self._has_crl = self._files.layout.crl.exists()
        self._good = self._files.contents()
        logger.info("new certificates in use", why=why)

    # --- end ------------------------------------------------------------------

    def _stop(self) -> None:
        """First time: drain. Second time: cut."""
        if self._draining:
            if self._cut_at is not None:
                self._cut()
            return
        self._draining = True
        limit = self._config.gateway.drain_timeout_s
        self._cut_at = time.monotonic() + limit
        logger.info("draining", timeout_s=limit)
        for child in self._children:
            child.tell(worker.DRAIN)

    def _cut(self) -> None:
        self._cut_at = None
        self._kill_at = time.monotonic() + KILL_S
        logger.warning("cutting what still runs")
        for child in self._children:
            child.tell(worker.CUT)

    def _last_bytes(self) -> None:
        """Lets answers that the workers have finished reach their clients."""
        front = self._front
        if front is None:
            self._listener.close()
            return
        until = time.monotonic() + LAST_BYTES_S
        while front.connections() and time.monotonic() < until:
            time.sleep(0.01)
        front.close()


def _general() -> dict[str, str]:
    """The environment without what the configuration says better."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HELIX_")}
