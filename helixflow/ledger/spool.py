"""The gateway worker's spool: what has been accepted and what has ended, on the disk before anybody is told.

`begin` and `end` write to the kernel before they return, so that a killed process loses nothing; a thread brings it to
the disk in groups, so that a power failure loses at most `ledger.fsync_ms`. A lock on the folder says that its worker
lives.
"""

import errno
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helixflow import core_rs, log
from helixflow.config import LedgerConfig
from helixflow.core_rs import LedgerFull
from helixflow.ledger import frames
from helixflow.ledger.record import Begin, Content, Row
from helixflow.refusals import refusal

SEGMENT_BYTES: Final = 16 << 20
SEGMENTS_MIN: Final = 8
"""A small spool has smaller segments, at least so many: a full one is deleted only as a whole."""
BEGIN_BYTES: Final = 1024
"""Room for the begin of another request."""
END_BYTES: Final = 1024
"""Kept free for the end of each request under way: what was accepted must find room."""
HIGH: Final = 0.8
"""Part of the spool that raises the first alarm."""
_ALARMS: Final = ("", "high", "disk", "full")
"""From calm to worst: each is told once on the way up."""
RETRY_S: Final = 1.0
"""A disk that failed is tried again this often (seconds)."""

logger = log.get("ledger")


@dataclass(slots=True)
class SpoolStats:
    """Counters since the start."""

    begun: int = 0
    ended: int = 0
    refused: int = 0
    """Requests that were refused for want of room or a disk."""
    unrecorded: int = 0
    """Requests that were served without a record (`ledger.when_full` = serve)."""
    contents_dropped: int = 0
    """Texts that found no room; their requests are recorded."""


class Spool:
    """One worker's spool. Make it in the worker, after the fork; all methods but `close` belong to one thread."""

    def __init__(self, root: Path, options: LedgerConfig) -> None:
        """Makes a folder of its own below `root`. Raises OSError."""
        self.folder, self._lock = frames.make_folder(root)
        self.id = self.folder.name
        """UUID of the spool."""
        self.stats = SpoolStats()
        self._max = options.spool_max_bytes
        self._serve = options.when_full == "serve"
        self._period = options.fsync_ms / 1000
        self._segment = max(1 << 16, min(SEGMENT_BYTES, self._max // SEGMENTS_MIN))
        self._open: dict[bytes, tuple[int, bytes]] = {}  # id -> segment and frame of the begin, the oldest first
        self._unwritten: dict[bytes, bytes] = {}  # id -> frames of an end that the disk refused
        self._written = 0
        self._freed = 0  # the thread's; _written is the owner's
        self._alarm = ""
        self._tried_s = 0.0
        self._refusing = False
        self._released = 0
        self._number = 0
        self._offset = 0
        self._limit = 0
        self._named = 0
        self._file = -1
        self._retired: list[int] = []
        self._doomed: list[tuple[int, bool]] = []
        self._sizes: dict[int, int] = {}
        self._clean = True
        self._dirty = threading.Event()
        self._stop = threading.Event()
        self._sync_error: OSError | None = None
        self._closed = False
        try:
            self._next_segment()
        except BaseException:
            os.close(self._lock)
            raise
        self._thread = threading.Thread(target=self._sync_forever, name="ledger-fsync", daemon=True)
        self._thread.start()

    # --- requests -----------------------------------------------------------------

    def begin(self, begin: Begin) -> None:
        """Records that a request is accepted. Raises LedgerFull, unless requests are served unrecorded then."""
        frame = frames.frame(frames.BEGIN, begin)
        need = len(frame) + END_BYTES * (len(self._open) + 1)
        if self._written - self._freed + need > self._max:
            self._turn_away(f"the spool {self.folder} holds {self.held} of {self._max} bytes (ledger.spool_max_bytes)")
            return
        if (self._unwritten or self._sync_error) and not self.retry():
            self._turn_away(f"the spool {self.folder} cannot be written: {self._sync_error or 'the disk refuses'}")
            return
        try:
            self._write(frame)
        except OSError as error:
            self._turn_away(f"the spool {self.folder} cannot be written: {error.strerror}")
            return
        self._open[begin.id] = (self._number, frame)
        self.stats.begun += 1
        if self._alarm:
            self._calm()

    def end(self, row: Row, content: Content | None = None) -> None:
        """Records how a request ended. Never raises for want of room: that was kept.

        Does nothing for a request whose beginning is not recorded, and the second time.
        """
        if row.id not in self._open or row.id in self._unwritten:
            return
        frame = frames.frame(frames.ROW, row)
        if content is not None:
            text = frames.frame(frames.CONTENT, content)
            if self._written - self._freed + len(text) + END_BYTES * len(self._open) <= self._max:
                frame += text
            else:
                self.stats.contents_dropped += 1
        self.stats.ended += 1
        try:
            self._write(frame)
        except OSError as error:
            # The begin stays on the disk: whatever happens, the request will have a row.
            self._unwritten[row.id] = frame
            self._say("disk", f"the spool {self.folder} cannot be written: {error.strerror}")
            return
        del self._open[row.id]

    def retry(self) -> bool:
        """Writes what the disk refused before; True when nothing of it is left and the last fsync went well."""
        try:
            for key, frame in list(self._unwritten.items()):
                self._write(frame)
                del self._unwritten[key]
                self._open.pop(key, None)
        except OSError:
            return False
        return self._sync_error is None

    @property
    def held(self) -> int:
        """Bytes on the disk."""
        return self._written - self._freed

    @property
    def pending(self) -> int:
        """Requests that have begun and whose end is not on the disk."""
        return len(self._open)

    @property
    def high(self) -> bool:
        """Whether it holds more than it should (`HIGH`)."""
        return self.held > self._max * HIGH

    def refuses(self) -> bool:
        """Whether another request would be refused now. A disk that has refused is tried, once a second at most."""
        if self._serve:
            return False
        if self.held + BEGIN_BYTES + END_BYTES * (len(self._open) + 1) > self._max:
            return True
        if self._alarm not in ("disk", "full"):
            return False
        now = time.monotonic()
        if now - self._tried_s >= RETRY_S:
            self._tried_s = now
            self._refusing = not (self.retry() and self._disk_takes(BEGIN_BYTES + END_BYTES))
        return self._refusing

    def _disk_takes(self, size: int) -> bool:
        try:
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
                return core_rs.append(file.fileno(), bytes(size)) == size
        except OSError:
            return False

    def _turn_away(self, reason: str) -> None:
        self._say("full", reason)
        if self._serve:
            self.stats.unrecorded += 1
            return
        self.stats.refused += 1
        raise refusal(LedgerFull, "The record of requests cannot take another one now. Try again later.")

    def _say(self, alarm: str, reason: str) -> None:
        """Once for each kind of trouble, until it is over."""
        if _ALARMS.index(alarm) <= _ALARMS.index(self._alarm):
            return
        self._alarm = alarm
        if alarm == "high":
            logger.warning("the ledger's spool fills up: the auth-service or its database is away", reason=reason)
        else:
            then = "served without a record" if self._serve else "refused"
            logger.error("the ledger's spool takes no more", reason=reason, requests=then)

    def _calm(self) -> None:
        if self.held < self._max * HIGH and not self._unwritten and not self._sync_error:
            self._alarm = ""
            logger.info("the ledger's spool has room again", bytes=self.held)

    # --- segments -----------------------------------------------------------------

    def _write(self, frame: bytes) -> None:
        if self._offset >= self._limit:
            self._next_segment()
        written = core_rs.append(self._file, frame)
        if written != len(frame):
            # A full disk took a part. If it cannot be cut off again, it is the end of this segment.
            try:
                os.ftruncate(self._file, self._offset)
            except OSError:
                self._offset += written
                self._written += written
                self._limit = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._offset += written
        self._written += written
        if self._clean:
            self._clean = False
            self._dirty.set()

    def _next_segment(self) -> None:
        number = self._number + 1
        path = frames.segment_path(self.folder, number)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            self._retired.append(self._file)
            self._sizes[self._number] = self._offset
        self._number, self._offset, self._file = number, 0, file
        self._limit = self._segment
        if self.held > self._max * HIGH:
            self._say("high", f"the spool {self.folder} holds {self.held} of {self._max} bytes")

    def end_of(self, number: int) -> int | None:
        """Size of a segment that is complete; None for the one that is written to."""
        return self._sizes.get(number)

    @property
    def number(self) -> int:
        """The segment that is written to."""
        return self._number

    @property
    def tail(self) -> int:
        """Bytes in the segment that is written to."""
        return self._offset

    def release(self, upto: int, damaged: set[int]) -> None:
        """Lets go of the segments before `upto`: every row in them has been shipped.

        Requests in them that have not ended are written once more, so that no long one keeps a segment.
        """
        while self._released + 1 < upto:
            number = self._released + 1
            try:
                self._carry(number)
            except OSError:
                return
            self._released = number
            self._doomed.append((number, number in damaged))
            self._dirty.set()

    def _carry(self, number: int) -> None:
        for key, (segment, frame) in list(self._open.items()):
            if segment > number:
                return
            self._write(frame)
            del self._open[key]
            self._open[key] = (self._number, frame)

    # --- the thread ---------------------------------------------------------------

    def _sync_forever(self) -> None:
        while not self._stop.is_set():
            self._dirty.wait()
            self._stop.wait(RETRY_S if self._sync_error else self._period)
            self._dirty.clear()
            self._clean = True
            try:
                self._sync()
            except OSError as error:
                if self._sync_error is None:
                    logger.error("the ledger's spool cannot be synced", spool=str(self.folder), error=str(error))
                self._sync_error = error
                self._dirty.set()
            else:
                self._sync_error = None

    def _sync(self) -> None:
        doomed = self._doomed[:]  # what they held and is not over was written before they came here
        number, current = self._number, self._file
        os.fdatasync(current)
        while self._retired:
            os.fdatasync(self._retired[0])
            os.close(self._retired.pop(0))
        if number != self._named:
            os.fsync(self._lock)
            self._named = number
        for number, damaged in doomed:
            frames.discard(self.folder, number, damaged=damaged)
            self._freed += self._sizes.pop(number, 0)
            self._doomed.remove((number, damaged))

    def close(self, *, shipped: bool = False) -> None:
        """Brings everything to the disk and lets go of the folder. May be called twice.

        `shipped`: everything is in the ledger; the folder is removed, unless requests in it have not ended.
        """
        if self._closed:
            return
        self._closed = True
        self.retry()
        self._stop.set()
        self._dirty.set()
        self._thread.join()
        try:
            self._sync()
            if shipped and not self._open:
                frames.remove(self.folder)
        except OSError as error:
            logger.error("the ledger's spool was not closed cleanly", spool=str(self.folder), error=str(error))
        finally:
            for file in (*self._retired, self._file, self._lock):
                os.close(file)
            self._file = -1
