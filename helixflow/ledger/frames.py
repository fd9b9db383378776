"""The form of a spool on the disk: a folder of numbered segments, each a sequence of frames.

A frame is the length of its body (4 bytes, little-endian), the body's CRC-32 (4 bytes), and the body: a byte that tells
the kind, then the record. An empty body does not exist, so that a tail of zeros after a power failure is no frame.
"""

import contextlib
import fcntl
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from helixflow import log
from helixflow.ledger.record import Begin, Content, Row, encode

ROW: Final = 1
BEGIN: Final = 2
CONTENT: Final = 3

SUFFIX: Final = ".log"
UNBORN: Final = ".new-"
"""Prefix of a folder whose owner has not locked it yet."""
CHUNK: Final = 1 << 16
"""Bytes read at a time: what one walk through holds up the event loop by (0.3 ms)."""
FRAME_MAX: Final = 1 << 20
"""Longest body; a longer one is damage. The largest record has two texts of 65,536 characters."""

_HEAD: Final = struct.Struct("<IIB")
_SEEDS: Final = {kind: zlib.crc32(bytes([kind])) for kind in (ROW, BEGIN, CONTENT)}
_HEADER: Final = 8

logger = log.get("ledger")


def frame(kind: int, record: Row | Begin | Content) -> bytes:
    """One record as it stands in a segment."""
    payload = encode(record)
    return _HEAD.pack(len(payload) + 1, zlib.crc32(payload, _SEEDS[kind]), kind) + payload


def segment_path(folder: Path, number: int) -> Path:
    """Path of a segment."""
    return folder / f"{number:06}{SUFFIX}"


def segments(folder: Path) -> list[int]:
    """Numbers of the segments, in order."""
    return sorted(int(path.stem) for path in folder.glob(f"*{SUFFIX}") if path.stem.isdecimal())


def try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed; None when a living process has it, or it is gone.

    Raises OSError.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have removed it meanwhile, and another one may have that name.
        if folder.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def make_folder(root: Path) -> tuple[Path, int]:
    """A new spool folder below `root`, and the descriptor that holds it. Raises OSError.

    Nobody sees it under its name before it is locked, or they would take it for one whose owner has died.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        name = str(uuid.uuid4())
        unborn = root / f"{UNBORN}{name}"
        unborn.mkdir(mode=0o700)
        descriptor = try_lock(unborn)
        if descriptor is None:
            continue  # somebody who tidies up was faster
        try:
            unborn.rename(root / name)
        except FileNotFoundError:
            os.close(descriptor)
            continue
        sync_folder(root)
        return root / name, descriptor


def spools(root: Path) -> list[Path]:
    """The spool folders below `root`, whoever has them, those that were never finished included."""
    return [path for path in sorted(root.iterdir()) if _is_uuid(path.name.removeprefix(UNBORN)) and path.is_dir()]


def _is_uuid(name: str) -> bool:
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False


def sync_folder(folder: Path) -> None:
    """Makes names in a folder outlive a power failure. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Reader:
    """Reads the frames of one spool in order, each once. Not for two threads."""

    def __init__(self, folder: Path, first: int) -> None:
        """`first`: number of the segment to begin with."""
        self._folder = folder
        self.number = first
        """Segment of the frame that came last: nothing is left to read in those before it."""
        self.offset = 0
        """Where the next frame begins."""
        self._file: int | None = None
        self.damaged: set[int] = set()
        """Segments with frames that cannot be read although they are complete."""

    def read(self, end: int, *, last: bool) -> Iterator[tuple[int, bytes]]:
        """The frames (kind, record) of this segment up to offset `end`; holds at most CHUNK bytes, or one frame.

        `last`: the segment will not grow any more, so that half a frame is one that its writer could not finish.
        Leaving the iterator early is fine: the next one goes on after the last frame taken. Raises OSError.
        """
        while self.offset < end:
            data = self._pread(min(CHUNK, end - self.offset))
            if len(data) >= _HEADER:
                length = _HEAD.unpack_from(data.ljust(_HEAD.size, b"\0"))[0]
                if len(data) < _HEADER + length <= min(end - self.offset, FRAME_MAX):
                    data = self._pread(_HEADER + length)
            before = self.offset
            yield from self._walk(data)
            if self.offset == before:
                if last or self._sick(data, end):
                    self._leave(data, end)
                return

    def _walk(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        position, size = 0, len(data)
        start = self.offset
        while position + _HEAD.size <= size:
            length, crc, kind = _HEAD.unpack_from(data, position)
            stop = position + _HEADER + length
            if not 1 < length <= FRAME_MAX or stop > size:
                return
            payload = data[position + 9 : stop]
            if zlib.crc32(payload, _SEEDS.get(kind, 0)) != crc:
                return
            position = stop
            self.offset = start + stop
            yield kind, payload

    def _sick(self, data: bytes, end: int) -> bool:
        """Whether the next frame is wrong, rather than incomplete."""
        if len(data) < _HEADER:
            return False
        length = int.from_bytes(data[:4], "little")
        return not 1 < length <= FRAME_MAX or self.offset + _HEADER + length <= end

    def _leave(self, data: bytes, end: int) -> None:
        """Gives up the rest of the segment: a torn tail is normal after a crash, anything else is damage."""
        if self._sick(data, end) and data.strip(b"\0"):
            self.damaged.add(self.number)
            logger.error(
                "a segment of the spool is damaged; what follows is set aside",
                segment=str(segment_path(self._folder, self.number)),
                offset=self.offset,
                bytes=end - self.offset,
            )
        self.offset = end

    def _pread(self, size: int) -> bytes:
        if self._file is None:
            self._file = os.open(segment_path(self._folder, self.number), os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._file, size, self.offset)

    def size(self) -> int:
        """Bytes of the segment now. Raises OSError."""
        if self._file is None:
            self._file = os.open(segment_path(self._folder, self.number), os.O_RDONLY | os.O_CLOEXEC)
        return os.fstat(self._file).st_size

    def seek(self, number: int, offset: int = 0) -> None:
        """Goes on at another place."""
        self.close()
        self.number, self.offset = number, offset

    def close(self) -> None:
        """Closes the file that is open."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def discard(folder: Path, number: int, *, damaged: bool) -> None:
    """Removes a segment; a damaged one is moved beside the spools, for somebody to look at. Raises OSError."""
    path = segment_path(folder, number)
    with contextlib.suppress(FileNotFoundError):
        if damaged:
            path.rename(folder.parent / f"damaged-{folder.name}-{number:06}{SUFFIX}")
        else:
            path.unlink()


def remove(folder: Path) -> None:
    """Removes a spool of which everything is in the ledger. Raises OSError."""
    shutil.rmtree(folder)
