"""What the main process counts, where its workers read it: a page of memory that both hold."""

import os
import zlib
from collections.abc import Mapping
from typing import Any

import orjson

PAGE = 4096
"""Size of the page (bytes)."""
READS = 5
"""Attempts to read a page that is being written."""
_SUM = 4


class Board:
    """One process writes, any number read. Nobody waits for anybody."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: of a board that another process has made; None: a new one."""
        self._descriptor = os.memfd_create("helixflow-board", 0) if descriptor is None else descriptor
        os.set_inheritable(self._descriptor, False)

    def fileno(self) -> int:
        """The descriptor, to hand down to a process."""
        return self._descriptor

    def write(self, facts: Mapping[str, Any]) -> None:
        """Replaces what stands there. Raises ValueError for more than a page."""
        text = orjson.dumps(facts).ljust(PAGE - _SUM)
        if len(text) > PAGE - _SUM:
            raise ValueError(f"{len(text)} bytes do not fit on the board")
        os.pwrite(self._descriptor, zlib.crc32(text).to_bytes(_SUM, "big") + text, 0)

    def read(self) -> dict[str, Any]:
        """What stands there; empty when nothing was written yet, or whenever one looks somebody is just writing."""
        for _ in range(READS):
            page = os.pread(self._descriptor, PAGE, 0)
            text = page[_SUM:]
            if text and int.from_bytes(page[:_SUM], "big") == zlib.crc32(text):
                facts: dict[str, Any] = orjson.loads(text)
                return facts
        return {}

    def close(self) -> None:
        """Closes it in this process."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
