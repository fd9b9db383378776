"""Room on the disk: whoever writes a folder warns before it is full, and again every hour while it is not better."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from helixflow import log

LOOK_S = 10.0
"""The disk is looked at this often (seconds)."""
AGAIN_S = 3600.0

logger = log.get("disk")


class Room:
    """Free space around one folder."""

    def __init__(self, folder: Path, least: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`least`: free bytes below which it warns; 0: never."""
        self._folder = folder
        self._least = least
        self._clock = clock
        self._look_at = 0.0
        self._told = -AGAIN_S
        self.low = False

    def look(self) -> None:
        """Call it as often as you like; it looks every `LOOK_S`."""
        now = self._clock()
        if not self._least or now < self._look_at:
            return
        self._look_at = now + LOOK_S
        try:
            status = os.statvfs(self._folder)
        except OSError:
            return  # whoever writes there says what is wrong
        free = status.f_bavail * status.f_frsize
        if free < self._least and (not self.low or now - self._told >= AGAIN_S):
            hint = "make room before it is full: requests are refused then"
            logger.warning("little room is left on the disk", folder=str(self._folder), free_bytes=free, hint=hint)
            self._told = now
        elif free >= self._least and self.low:
            logger.info("there is room on the disk again", folder=str(self._folder), free_bytes=free)
        self.low = free < self._least

    async def run(self) -> None:
        """Looks for ever, from an event loop."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)
