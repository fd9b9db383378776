"""Records that the ledger refuses: JSON lines beside the spools, bounded in size, and sent again by an operator.

`rejected.log` is written to; when it is full it becomes `rejected.log.1`, that one `.2`, and so on; the oldest goes.
Every worker of the machine shares the files, under a lock on their folder.
"""

import base64
import contextlib
import fcntl
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import orjson

from helixflow import log
from helixflow.core_rs import InvalidRequest
from helixflow.ledger.frames import FRAME_MAX
from helixflow.refusals import message_of

REJECTED: Final = "rejected.log"
RESENDING: Final = "resend"
"""Begin of the names of files that are being sent again."""
FILES: Final = 4
"""Files that are kept, the one that is written to included."""
BATCH_BYTES: Final = 3 << 20
"""Most bytes of one call, as the shipper's."""

Append = Callable[[str, list[bytes]], Awaitable[None]]

logger = log.get("ledger")


class BusyError(Exception):
    """Another process sends the records again."""


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


class Rejected:
    """The files below one folder of spools."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        """`max_bytes`: of all files together."""
        self.path = root / REJECTED
        self._root = root
        self._each = max(1, max_bytes // FILES)

    def add(self, spool: str, record: bytes, reason: str) -> None:
        """Sets a record aside. Raises OSError."""
        line = orjson.dumps(
            {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "spool": spool,
                "reason": reason,
                "record": base64.b64encode(record).decode(),
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        self._write(line)

    def _write(self, line: bytes) -> None:
        with _locked(self._root):
            if self.path.exists() and self.path.stat().st_size + len(line) > self._each:
                self._rotate()
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a line that a full disk has cut must not take this one with it
                os.write(file, line)
            finally:
                os.close(file)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{REJECTED}.{number}") if number else self.path

    def _rotate(self) -> None:
        last = self._numbered(FILES - 1)
        if last.exists():
            logger.error(
                "records that the ledger refused are lost: there are too many (ledger.rejected_max_bytes)",
                file=str(last),
                bytes=last.stat().st_size,
            )
            last.unlink()
        for number in range(FILES - 2, -1, -1):
            if self._numbered(number).exists():
                self._numbered(number).replace(self._numbered(number + 1))

    def take(self) -> list[Path]:
        """Moves the files aside to be sent again, the oldest record first, behind those that an earlier try left."""
        with _locked(self._root):
            left = sorted(self._root.glob(f"{RESENDING}-*.log"))
            first = int(left[-1].stem.removeprefix(f"{RESENDING}-")) + 1 if left else 1
            present = [self._numbered(number) for number in range(FILES - 1, -1, -1) if self._numbered(number).exists()]
            for number, path in enumerate(present, first):
                left.append(path.replace(self._root / f"{RESENDING}-{number:06}.log"))
        return left

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Held by whoever sends again. Raises BusyError."""
        lock = os.open(self._root / f"{RESENDING}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"another process sends the records of {self._root} again") from None
            yield
        finally:
            os.close(lock)


@dataclass(slots=True)
class Resent:
    """What sending again came to."""

    sent: int = 0
    """Records that are in the ledger now, or were before."""
    refused: int = 0
    """Records that were refused again; they are in `rejected.log` once more."""
    unreadable: int = 0
    """Lines that are no records; they stay in `rejected.log` too."""


async def resend(rejected: Rejected, append: Append, batch_rows: int) -> Resent:
    """Sends every record that was set aside. By its id each is in the ledger once, however often it is sent.

    A file is removed when all of it has been sent or set aside anew: whoever is killed, or finds no ledger, begins
    with it again. Raises BusyError, OSError, and what `append` raises but InvalidRequest.
    """
    done = Resent()
    with rejected.alone():
        for path in rejected.take():
            for spool, records in _batches(path, rejected, done, batch_rows):
                await _send(rejected, append, spool, records, done)
            path.unlink()
    return done


def _batches(path: Path, rejected: Rejected, done: Resent, batch_rows: int) -> Iterator[tuple[str, list[bytes]]]:
    """The records of a file, those of one spool together as long as they follow each other."""
    spool, records, size = "", list[bytes](), 0
    with path.open("rb") as file:
        for line in file:
            try:
                found = orjson.loads(line)
                name, record = str(found["spool"]), base64.b64decode(found["record"], validate=True)
            except (ValueError, TypeError, KeyError):
                done.unreadable += 1
                rejected._write(line if line.endswith(b"\n") else line + b"\n")
                continue
            full = len(records) >= batch_rows or size + len(record) > BATCH_BYTES - FRAME_MAX
            if records and (full or name != spool):
                yield spool, records
                records, size = [], 0
            spool = name
            records.append(record)
            size += len(record)
    if records:
        yield spool, records


async def _send(rejected: Rejected, append: Append, spool: str, records: Sequence[bytes], done: Resent) -> None:
    """Sends a batch; finds those that are refused by halves."""
    try:
        await append(spool, list(records))
    except InvalidRequest as error:
        if len(records) == 1:
            rejected.add(spool, records[0], message_of(error))
            done.refused += 1
            return
        half = len(records) // 2
        await _send(rejected, append, spool, records[:half], done)
        await _send(rejected, append, spool, records[half:], done)
    else:
        done.sent += len(records)
