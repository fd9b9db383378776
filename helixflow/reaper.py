"""Reaping: a process whose parent died becomes a child of process 1, and stays a zombie until that one waits for it."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

LOOK_S = 1.0
"""The reaper looks this often (seconds)."""


class Reaper:
    """Waits for children that this process has not started itself; inside a container `serve` is process 1."""

    def __init__(self, own: Callable[[], set[int | None]]) -> None:
        """`own`: process ids that somebody else in this process waits for."""
        self._own = own
        self._seen: set[int] = set()
        self.reaped = 0
        """Orphans that were waited for."""

    async def run(self) -> None:
        """Looks for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Reaps what had ended at the last look already: whoever started a child has waited for it by now."""
        ended = ended_children() - self._own()
        for pid in ended & self._seen:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
                self.reaped += 1
        self._seen = ended


def ended_children() -> set[int]:
    """Process ids of children of this process that have ended and have not been waited for."""
    ended = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            children = (thread / "children").read_text("ascii").split()
            ended |= {pid for pid in map(int, children) if _is_zombie(pid)}
    return ended


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return False
