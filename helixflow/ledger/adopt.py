"""Spools whose worker has died: every row in them, and one for each request that never ended."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from helixflow import log
from helixflow.ledger import frames
from helixflow.ledger.record import Begin, decode_begin, encode, id_of

logger = log.get("ledger")


class Orphan:
    """A spool that this process has taken over. Close it, whatever happens: another one can go on then."""

    def __init__(self, folder: Path, lock: int) -> None:
        """Use `take`."""
        self.folder = folder
        self.id = folder.name
        """UUID of the spool."""
        self.interrupted = 0
        """Requests that never ended."""
        self.unended: list[Begin] = []
        """These requests, as far as they can be read."""
        self._lock = lock
        self._numbers = frames.segments(folder)
        self._reader = frames.Reader(folder, self._numbers[0] if self._numbers else 0)
        self._begun: dict[bytes, tuple[int, bytes]] = {}  # id -> segment and record

    @classmethod
    def take(cls, folder: Path) -> "Orphan | None":
        """The spool, unless its worker lives, somebody else has it, or nothing is in it. Raises OSError."""
        lock = frames.try_lock(folder)
        if lock is None:
            return None
        try:
            orphan = cls(folder, lock)
            if orphan._numbers and not folder.name.startswith(frames.UNBORN):
                return orphan
            orphan.finish()
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None

    def records(self) -> Iterator[bytes]:
        """Every record to be shipped, in order; the interrupted ones last. Raises OSError."""
        for number in tuple(self._numbers):  # `shipped` shortens it meanwhile
            self._reader.seek(number)
            for kind, payload in self._reader.read(self._reader.size(), last=True):
                if kind == frames.BEGIN:
                    self._begun[id_of(payload)] = (number, payload)
                    continue
                if kind == frames.ROW:
                    self._begun.pop(id_of(payload), None)
                yield payload
        for _number, payload in self._begun.values():
            self.interrupted += 1
            yield self._interrupt(payload)

    def _interrupt(self, payload: bytes) -> bytes:
        try:
            begin = decode_begin(payload)
        except msgspec.MsgspecError:
            return payload  # the ledger refuses it, and so it is set aside, not lost
        self.unended.append(begin)
        return encode(begin.interrupted())

    def shipped(self) -> None:
        """Everything that `records` gave so far is in the ledger: lets go of what is needed no more. Raises OSError."""
        needed = min((number for number, _ in self._begun.values()), default=self._reader.number)
        while self._numbers and self._numbers[0] < min(needed, self._reader.number):
            number = self._numbers[0]
            frames.discard(self.folder, number, damaged=number in self._reader.damaged)
            del self._numbers[0]

    def finish(self) -> None:
        """Removes the spool: all of it is in the ledger. Raises OSError."""
        for number in self._reader.damaged:
            frames.discard(self.folder, number, damaged=True)
        frames.remove(self.folder)

    def close(self) -> None:
        """Lets go of it."""
        self._reader.close()
        os.close(self._lock)


def orphans(root: Path) -> Iterator[Orphan]:
    """Takes over the spools below `root` whose workers have died, one after another."""
    try:
        folders = frames.spools(root)
    except OSError as error:
        logger.error("the folder of the spools cannot be read", folder=str(root), error=str(error))
        return
    for folder in folders:
        try:
            orphan = Orphan.take(folder)
        except OSError as error:
            logger.error("a spool cannot be taken over", spool=str(folder), error=str(error))
            continue
        if orphan is not None:
            yield orphan
