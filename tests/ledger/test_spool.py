"""The spool: nothing that was accepted is lost, nothing keeps room for ever."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from helixflow import core_rs
from helixflow.core_rs import LedgerFull
from helixflow.ledger import frames
from helixflow.ledger.adopt import Orphan
from helixflow.ledger.content import content
from helixflow.ledger.record import Begin, Content, Row, decode, encode
from helixflow.ledger.spool import Spool

from .support import begin, ledger_options

MIB = 1 << 20
Make = Callable[..., Spool]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Spool] = []

    def one(**values: Any) -> Spool:
        made.append(Spool(tmp_path / "spool", ledger_options(**values)))
        return made[-1]

    yield one
    for spool in made:
        spool.close()


def end(spool: Spool, begun: Begin, kept: Content | None = None) -> Row:
    ended = begun.row(finish="stop", status=200)
    spool.end(ended, kept)
    return ended


def adopted(folder: Path) -> list[Row | Content]:
    """What the next one makes of a spool; the spool is gone afterwards."""
    orphan = Orphan.take(folder)
    assert orphan is not None
    found = [decode(data) for data in orphan.records()]
    orphan.shipped()
    orphan.finish()
    orphan.close()
    assert not folder.exists()
    return found


def test_what_has_ended_and_what_has_not(make: Make) -> None:
    spool = make()
    first, second, third = begin(), begin(), begin()
    for each in (first, second, third):
        spool.begin(each)
    ended = [end(spool, third), end(spool, first)]
    assert spool.pending == 1
    spool.close()
    assert adopted(spool.folder) == [*ended, second.interrupted()]


def test_an_end_counts_once_and_needs_its_beginning(make: Make) -> None:
    spool = make()
    begun = begin()
    end(spool, begun)
    spool.begin(begun)
    ended = end(spool, begun)
    end(spool, begun)
    spool.close()
    assert adopted(spool.folder) == [ended]


def test_texts_travel_behind_their_row(make: Make) -> None:
    spool = make()
    begun = begin()
    spool.begin(begun)
    kept = content(begun, "question", "answer", (), 7)
    ended = end(spool, begun, kept)
    spool.close()
    assert adopted(spool.folder) == [ended, kept]


def test_a_living_worker_keeps_its_spool(make: Make) -> None:
    spool = make()
    assert Orphan.take(spool.folder) is None
    spool.close()
    taken = Orphan.take(spool.folder)
    assert taken is not None
    assert Orphan.take(spool.folder) is None
    taken.close()
    again = Orphan.take(spool.folder)
    assert again is not None
    again.close()


def test_folders_that_never_became_a_spool_go_away(tmp_path: Path) -> None:
    folder, lock = frames.make_folder(tmp_path)
    os.close(lock)
    unborn = tmp_path / f"{frames.UNBORN}{folder.name}"
    unborn.mkdir()
    (tmp_path / "not-ours").mkdir()
    for path in frames.spools(tmp_path):
        assert Orphan.take(path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["not-ours"]
    assert Orphan.take(folder) is None


@pytest.mark.parametrize("cut", [1, 8, 9, 100])
def test_a_torn_tail_is_cut(make: Make, cut: int) -> None:
    spool = make()
    first, second = begin(), begin()
    spool.begin(first)
    spool.begin(second)
    ended = end(spool, first)
    end(spool, second)
    spool.close()
    path = frames.segment_path(spool.folder, 1)
    os.truncate(path, path.stat().st_size - cut)
    assert adopted(spool.folder) == [ended, second.interrupted()]
    assert list(spool.folder.parent.iterdir()) == []


@pytest.mark.parametrize("zeros", [3, 8, 9, 5000, 200_000])
def test_zeros_behind_the_end_are_no_rows(make: Make, zeros: int) -> None:
    # What a power failure leaves when the size of a file reached the disk and its data did not.
    spool = make()
    begun = begin()
    spool.begin(begun)
    ended = end(spool, begun)
    spool.close()
    with frames.segment_path(spool.folder, 1).open("ab") as file:
        file.write(bytes(zeros))
    assert adopted(spool.folder) == [ended]
    assert list(spool.folder.parent.iterdir()) == []


def test_a_damaged_segment_is_set_aside(make: Make) -> None:
    spool = make()
    begun = [begin() for _ in range(3)]
    for each in begun:
        spool.begin(each)
    ended = [end(spool, each) for each in begun]
    spool.close()
    path = frames.segment_path(spool.folder, 1)
    data = bytearray(path.read_bytes())
    data[-len(encode(ended[2])) - 20] ^= 1  # in the second end
    path.write_bytes(data)
    assert adopted(spool.folder) == [ended[0], begun[1].interrupted(), begun[2].interrupted()]
    left = list(spool.folder.parent.iterdir())
    assert [each.name for each in left] == [f"damaged-{spool.id}-000001.log"]
    assert left[0].read_bytes() == data


def test_a_full_spool_refuses_but_takes_every_end(make: Make) -> None:
    spool = make(spool_max_bytes=MIB)
    begun: list[Begin] = []

    def fill() -> None:
        while True:
            each = begin()
            spool.begin(each)
            begun.append(each)

    with pytest.raises(LedgerFull) as refused:
        fill()
    assert refused.value.http_status == 503
    assert 500 < len(begun) < 1024
    ended = [end(spool, each) for each in begun]
    assert (spool.stats.refused, spool.pending) == (1, 0)
    assert spool.held <= MIB
    spool.close()
    assert adopted(spool.folder) == ended


def test_a_full_spool_can_serve_unrecorded(make: Make) -> None:
    spool = make(spool_max_bytes=MIB, when_full="serve")
    begun = [begin() for _ in range(2000)]
    for each in begun:
        spool.begin(each)
    assert spool.stats.unrecorded == 2000 - spool.stats.begun > 0
    for each in begun:
        end(spool, each)
    spool.close()
    assert len(adopted(spool.folder)) == spool.stats.begun == spool.stats.ended


def test_texts_are_given_up_before_rows(make: Make) -> None:
    spool = make(spool_max_bytes=MIB)
    begun = [begin() for _ in range(12)]
    for each in begun:
        spool.begin(each)
    for each in begun:
        end(spool, each, content(each, "x" * 65536, "y" * 65536, (), 1))
    spool.close()
    found = adopted(spool.folder)
    assert sum(isinstance(each, Row) for each in found) == 12
    assert sum(isinstance(each, Content) for each in found) == 12 - spool.stats.contents_dropped == 7


def test_a_long_request_keeps_no_segment(make: Make) -> None:
    spool = make(spool_max_bytes=MIB)
    long = begin()
    spool.begin(long)
    while spool.number < 6:
        each = begin()
        spool.begin(each)
        end(spool, each)
    spool.release(spool.number, set())
    # Its thread removes them behind the next fsync.
    wait_for(lambda: frames.segments(spool.folder) == [spool.number])
    assert spool.held < MIB // 4
    assert frames.segment_path(spool.folder, spool.number).read_bytes().count(long.id) == 1
    spool.close()
    assert adopted(spool.folder)[-1] == long.interrupted()


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not done():
        assert time.monotonic() < until
        time.sleep(0.001)


class Disk:
    """A disk that fails, for the segments of one spool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.sync_fails = False
        self._write, self._sync = core_rs.append, os.fdatasync
        monkeypatch.setattr("helixflow.ledger.spool.core_rs.append", self.write)
        monkeypatch.setattr("helixflow.ledger.spool.os.fdatasync", self.sync)

    def write(self, file: int, data: bytes) -> int:
        if self.room is None or "/spool/" not in str(Path(f"/proc/self/fd/{file}").readlink()):
            return self._write(file, data)
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(file, data[: self.room])
        self.room -= written
        return written

    def sync(self, file: int) -> None:
        if self.sync_fails:
            raise OSError(errno.EIO, "Input/output error")
        self._sync(file)


@pytest.mark.parametrize("part", [0, 1, 50])
def test_a_full_disk_loses_nothing(make: Make, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    disk = Disk(monkeypatch)
    spool = make()
    first, second, third = begin(), begin(), begin()
    spool.begin(first)
    spool.begin(second)
    disk.room = part
    ended = end(spool, first)
    with pytest.raises(LedgerFull):
        spool.begin(third)
    assert spool.pending == 2
    assert not spool.retry()
    disk.room = None
    spool.begin(third)
    assert spool.pending == 2
    more = end(spool, third)
    spool.close()
    assert adopted(spool.folder) == [ended, more, second.interrupted()]


def test_it_says_beforehand_that_it_would_refuse(make: Make) -> None:
    spool = make(spool_max_bytes=1 << 20)
    assert [spool.high, spool.refuses()] == [False, False]
    text = Content(bytes(16), begin().at_us, None, "x" * 60_000, "", begin().at_us)
    while not spool.refuses():
        begun = begin()
        spool.begin(begun)  # as long as it does not say so, there is room
        end(spool, begun, replace(text, id=begun.id))
        assert spool.high == (spool.held > 0.8 * (1 << 20))
    assert [spool.high, spool.refuses()] == [True, True]
    assert make(spool_max_bytes=1 << 20, when_full="serve").refuses() is False


def test_a_disk_that_has_refused_is_tried(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixflow.ledger.spool.RETRY_S", 0.0)
    disk = Disk(monkeypatch)
    spool = make()
    disk.room = 0
    assert not spool.refuses(), "nobody has tried to write"
    with pytest.raises(LedgerFull):
        spool.begin(begin())
    assert spool.refuses()
    disk.room = None
    assert not spool.refuses(), "without another request"
    assert frames.segments(spool.folder) == [1]


def test_a_torn_write_that_stays_ends_its_segment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    spool = make()
    first = begin()
    spool.begin(first)

    def refuse(_file: int, _size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("helixflow.ledger.spool.os.ftruncate", refuse)
        disk.room = 50
        ended = end(spool, first)
    disk.room = None
    assert spool.retry()
    assert frames.segments(spool.folder) == [1, 2]
    spool.close()
    assert adopted(spool.folder) == [ended]


def test_a_disk_that_does_not_sync_refuses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixflow.ledger.spool.RETRY_S", 0.001)
    disk = Disk(monkeypatch)
    spool = make()
    first = begin()
    disk.sync_fails = True
    spool.begin(first)
    wait_for(lambda: not spool.retry())
    with pytest.raises(LedgerFull):
        spool.begin(begin())
    disk.sync_fails = False
    wait_for(spool.retry)
    spool.begin(begin())
    assert spool.pending == 2


def test_nothing_is_written_after_the_end(make: Make) -> None:
    spool = make()
    begun = begin()
    spool.begin(begun)
    spool.close()
    spool.close()
    with pytest.raises(LedgerFull):
        spool.begin(begin())
    end(spool, begun)
    assert adopted(spool.folder) == [begun.interrupted()]
