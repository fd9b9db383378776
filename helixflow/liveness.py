"""Signs of life: a loop that works beats, and whoever watches it finds it when it stands still.

The beat is written by the loop itself, so that a blocked one is silent. Time counts only while the watcher was awake: a
machine that slept, or a clock that jumped, makes nobody look dead.
"""

import asyncio
import contextlib
import faulthandler
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

BEAT_FD = "HELIXFLOW_BEAT_FD"
"""Environment variable: the descriptor of a pipe into which a service writes a byte every `BEAT_S`."""
STACK_FD = "HELIXFLOW_STACK_FD"
"""Environment variable: the descriptor of a file in memory that takes the stacks of a process that is ended."""

BEAT_S = 1.0
"""Time between two beats (seconds)."""
LOOK_S = 0.5
"""Whoever watches looks this often (seconds)."""
DUMP_S = 1.0
"""A process that was told to write its stacks and to end has this long for it (seconds)."""
STACK_BYTES = 32_768
"""So much of the stacks is logged."""

_BYTE = b"."


class Systemd:
    """Messages to the service manager (sd_notify(3)). Does nothing without NOTIFY_SOCKET."""

    def __init__(self) -> None:
        self._path = os.environ.get("NOTIFY_SOCKET", "")
        if self._path.startswith("@"):
            self._path = "\0" + self._path[1:]
        self.watchdog_s = self._watchdog()
        """The manager expects a beat this often (seconds); 0: it does not watch."""

    def tell(self, text: str) -> None:
        """Sends one message. A manager that does not listen is no reason to fail."""
        if not self._path:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as s:
            s.sendto(text.encode(), self._path)

    def _watchdog(self) -> float:
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = os.environ.get("WATCHDOG_USEC", "")
        return int(usec) / 1e6 if self._path and mine and usec.isdecimal() else 0.0


class Pulse:
    """The beats of this process: to its supervisor, and to systemd when that started it."""

    def __init__(self) -> None:
        """Takes over what the environment names."""
        number = os.environ.pop(BEAT_FD, None)
        self._descriptor = int(number) if number else None
        if self._descriptor is not None:
            os.set_blocking(self._descriptor, False)
            os.set_inheritable(self._descriptor, False)
        self._systemd = Systemd()
        self.interval_s = min(BEAT_S, self._systemd.watchdog_s / 2 or BEAT_S)
        """A loop beats this often (seconds)."""

    def beat(self) -> None:
        """Says that the loop goes on. Never waits."""
        if self._descriptor is not None:
            # A full pipe means that nobody looks; a closed one, that the supervisor is about to end.
            with contextlib.suppress(OSError):
                os.write(self._descriptor, _BYTE)
        if self._systemd.watchdog_s:
            self._systemd.tell("WATCHDOG=1")

    def close(self) -> None:
        """Beats to no supervisor any more: for a child, whose life is not this process's."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    async def run(self) -> None:
        """Beats from the running event loop, for ever."""
        while True:
            self.beat()
            await asyncio.sleep(self.interval_s)


class Watch:
    """How long somebody has been silent, counted while the watcher was awake."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit_s`: silence (seconds) that means a standstill; 0: never."""
        self._limit_s = limit_s
        self._clock = clock
        self._looked = clock()
        self.silent_s = 0.0

    def heard(self) -> None:
        """There was a beat."""
        self.silent_s = 0.0

    def look(self) -> bool:
        """Call it every `LOOK_S`. True once the silence is longer than the limit."""
        now = self._clock()
        # A longer gap between two looks is the watcher's own absence.
        self.silent_s += min(max(0.0, now - self._looked), 2 * LOOK_S)
        self._looked = now
        return 0 < self._limit_s <= self.silent_s


class Stacks:
    """A file in memory that a process writes its stacks to when it is told to end: no reader can hold that up."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("helixflow-stacks", 0)

    def fileno(self) -> int:
        """The descriptor, to hand down to the process."""
        return self._descriptor

    def take(self) -> str:
        """What was written, at most `STACK_BYTES`; closes the file."""
        try:
            return os.pread(self._descriptor, STACK_BYTES, 0).decode("utf-8", "replace").strip()
        finally:
            self.close()

    def close(self) -> None:
        """Closes the file in this process."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def write_stacks_at_the_end(descriptor: int | None = None) -> None:
    """From now on a fatal signal (SIGABRT, SIGSEGV, …) writes the stacks of all threads, without needing the GIL.

    `descriptor`: where to; None: the file that the environment names, else standard error.
    """
    if descriptor is None:
        number = os.environ.pop(STACK_FD, None)
        descriptor = int(number) if number else None
    if descriptor is not None:
        os.set_inheritable(descriptor, False)
        faulthandler.enable(descriptor, all_threads=True)
    elif sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.enable(sys.__stderr__.fileno(), all_threads=True)


def is_traced(pid: int) -> bool:
    """Whether a debugger holds the process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in lines)


def ask_for_stacks(pid: int) -> None:
    """Tells a process that stands still to write its stacks and to end; also one that was stopped (SIGSTOP).

    SIGABRT is delivered when the process goes on, before any of its code runs. Give it `DUMP_S`, then kill it.
    """
    for number in (signal.SIGABRT, signal.SIGCONT):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
