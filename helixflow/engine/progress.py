"""Progress of long work: a callback for the one who works, a bar or plain lines for the one who waits."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done (any unit)."""

WIDTH = 28
PLAIN_EVERY_S = 5.0


def silent(what: str, done: int, total: int) -> None:
    """Shows nothing."""


class Bar:
    """A bar that redraws itself on a terminal; elsewhere a line per stage and every few seconds."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._what = ""
        self._last = 0.0
        self._finished = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """See `Progress`."""
        now, finished = self._clock(), done >= total
        if finished and self._finished == what:
            return
        self._finished = what if finished else ""
        share = done / total if total else 1.0
        if self._terminal:
            if what != self._what or finished or now - self._last >= 0.1:
                filled = int(WIDTH * share)
                bar = "#" * filled + "-" * (WIDTH - filled)
                end = "\n" if finished else ""
                self._stream.write(f"\r\x1b[K{what} [{bar}] {share:4.0%}{end}")
                self._last = now
        elif what != self._what or finished or now - self._last >= PLAIN_EVERY_S:
            self._stream.write(f"{what} {share:.0%}\n")
            self._last = now
        self._stream.flush()
        self._what = what
