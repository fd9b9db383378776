"""The main process of the gateway: keeps its workers, swaps them for new certificates, drains them at the end."""

import math
import multiprocessing
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from helixflow import log
from helixflow.config import Config
from helixflow.disk import Room
from helixflow.errors import EX_SOFTWARE
from helixflow.gateway import worker
from helixflow.gateway.certificates import GatewayFiles, use_kept
from helixflow.gateway.services import DRAIN_S
from helixflow.liveness import (
    DUMP_S,
    LOOK_S,
    Pulse,
    Stacks,
    Watch,
    ask_for_stacks,
    is_traced,
    write_stacks_at_the_end,
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

logger = log.get("gateway")


@dataclass(eq=False)
class Child:
    """One worker as the main process sees it."""

    process: BaseProcess
    control: socket.socket
    born: float
    start_by: float
    stacks: Stacks
    watch: Watch
    ready: bool = False
    kill_at: float = math.inf
    """It stands still, and must have ended by then."""

    def look(self, now: float) -> None:
        """Ends a worker whose event loop stands still; first it gets time to write where."""
        pid = self.process.pid
        if pid is None or not self.ready:
            return
        if now >= self.kill_at:
            self.kill_at = math.inf
            self.process.kill()
        elif self.watch.look() and self.kill_at == math.inf and not is_traced(pid):
            silent_s = round(self.watch.silent_s, 1)
            logger.error("worker stands still; it is ended and replaced", pid=pid, silent_s=silent_s)
            self.kill_at = now + DUMP_S
            ask_for_stacks(pid)

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

    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        connect: worker.Connect,
        on_ready: Callable[[], None],
    ) -> None:
        """`on_ready` is called once, when all workers accept connections for the first time."""
        self._config = config
        self._listener = listener
        self._connect = connect
        self._on_ready: Callable[[], None] | None = on_ready
        self._files = GatewayFiles.of(config)
        self._pulse = Pulse()
        self._room = Room(config.ledger.spool, config.supervise.disk_warn_bytes)
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._current: list[Child] = []
        self._next: list[Child] = []
        self._old: list[Child] = []
        self._respawn_at: float | None = None
        self._backoff = BACKOFF_S[0]
        self._swap_again = False
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
        self._next = [self._spawn() for _ in range(self._config.gateway.workers)]
        try:
            while self._children or (self._respawn_at is not None and not self._draining):
                for key, _events in self._selector.select(self._timeout()):
                    key.data()
                self._on_time()
        finally:
            # After a failure of this loop nobody would tell them anything, and the interpreter waits for them.
            for child in self._children:
                child.process.kill()
        signal.set_wakeup_fd(-1)
        return self._status

    @property
    def _children(self) -> list[Child]:
        return [*self._current, *self._next, *self._old]

    @property
    def _starting(self) -> list[Child]:
        return [child for child in (*self._current, *self._next) if not child.ready]

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
            if child in self._next and all(other.ready for other in self._next):
                self._promote()

    def _on_exit(self, child: Child) -> None:
        child.process.join()
        self._selector.unregister(child.process.sentinel)
        if child.control.fileno() in self._selector.get_map():
            self._selector.unregister(child.control)
        child.control.close()
        status = child.process.exitcode
        stack = child.stack()
        if stack:
            logger.error("worker ended by a fatal signal", pid=child.process.pid, status=status, **stack)
        if child in self._old:
            self._old.remove(child)
        elif child in self._next:
            self._next.remove(child)
            if not self._draining:
                self._swap_failed(status)
        else:
            self._current.remove(child)
            if not self._draining:
                logger.error("worker died", pid=child.process.pid, status=status, restart_in_s=self._backoff)
                self._respawn_at = time.monotonic() + self._backoff
                stable = time.monotonic() - child.born > STABLE_S
                self._backoff = BACKOFF_S[0] if stable else min(self._backoff * 2, BACKOFF_S[1])

    def _timeout(self) -> float:
        times = [self._look_at, self._watch_at, self._respawn_at, self._cut_at, self._kill_at]
        times += [child.start_by for child in self._starting]
        return max(0.0, min(at for at in times if at is not None) - time.monotonic())

    def _on_time(self) -> None:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + min(LOOK_S, self._pulse.interval_s)
            self._pulse.beat()
            self._room.look()
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
        for child in self._starting:
            if now >= child.start_by:
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
        missing = self._config.gateway.workers - len(self._current)
        self._current += [self._spawn(kept) for _ in range(missing)]

    def _spawn(self, kept: Mapping[Path, bytes] | None = None) -> Child:
        """`kept`: contents of certificate files that it shall read instead of the files."""
        mine, theirs = socket.socketpair()
        stacks = Stacks()
        process = multiprocessing.get_context("fork").Process(
            target=self._become_worker, args=(theirs, stacks, os.getpid(), kept or {}), name="gateway-worker"
        )
        # A signal between fork and the worker's own setting would reach the main process twice.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        theirs.close()
        now = time.monotonic()
        child = Child(process, mine, now, now + START_S, stacks, Watch(self._config.supervise.stall_timeout_s))
        self._selector.register(mine, selectors.EVENT_READ, lambda: self._on_message(child))
        self._selector.register(process.sentinel, selectors.EVENT_READ, lambda: self._on_exit(child))
        return child

    def _become_worker(self, control: socket.socket, stacks: Stacks, parent: int, kept: Mapping[Path, bytes]) -> None:
        """Runs in the new process: lets go of what belongs to the main process."""
        use_kept(kept)
        write_stacks_at_the_end(stacks.fileno())
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._selector.close()
        for other in self._children:
            other.control.close()
            other.stacks.close()
        self._pulse.close()
        self._wake_read.close()
        self._wake_write.close()
        worker.run(self._config, self._listener, control, parent, self._connect)

    def _promote(self) -> None:
        """The new workers take over; the old ones finish what they have."""
        replaced, self._current, self._next = self._current, self._next, []
        for child in replaced:
            child.tell(worker.RETIRE)
        self._old += replaced
        if self._on_ready is not None:
            self._on_ready()
            self._on_ready = None
        else:
            logger.info("new certificates in use", workers=len(self._current), finishing=len(self._old))
        if self._swap_again:
            self._swap_again = False
            self._swap("another change")

    def _swap_failed(self, status: int | None) -> None:
        for child in self._next:
            child.tell(worker.CUT)
        self._old += self._next
        self._next = []
        if self._current:
            logger.error("new workers did not start; the old ones stay", status=status)
        else:
            logger.error("the gateway did not start", status=status)
            self._status = EX_SOFTWARE

    # --- certificates ---------------------------------------------------------

    def _watch(self) -> None:
        stamp = self._files.stamp()
        settled = stamp == self._seen
        self._seen = stamp
        if settled and stamp != self._stamp:
            self._swap("files changed")

    def _swap(self, why: str) -> None:
        """Verifies the files, then starts new workers on them. With bad files the old ones stay."""
        if self._draining:
            return
        if self._next:
            self._swap_again = True
            return
        self._stamp = self._seen = self._files.stamp()
        try:
            self._files.verify(had_crl=self._has_crl)
        except PkiError as error:
            logger.error("new certificates refused; the old ones stay in use", why=why, error=str(error))
            return
        self._has_crl = self._files.layout.crl.exists()
        self._good = self._files.contents()
        logger.info("loading new certificates", why=why)
        self._next = [self._spawn() for _ in range(self._config.gateway.workers)]

    # --- end ------------------------------------------------------------------

    def _stop(self) -> None:
        """First time: drain. Second time: cut."""
        if self._draining:
            if self._cut_at is not None:
                self._cut()
            return
        self._draining = True
        self._listener.close()
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
