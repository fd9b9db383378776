"""From the spool into a store: order, repetition, refusals, the spools of the dead."""

import asyncio
import base64
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from helixflow.core_rs import DeadlineExceeded, InvalidRequest, Unavailable
from helixflow.ledger import frames, shipper
from helixflow.ledger.adopt import Orphan
from helixflow.ledger.content import content
from helixflow.ledger.record import INTERRUPTED, Begin, Row, decode
from helixflow.ledger.rejected import REJECTED
from helixflow.ledger.shipper import BATCH_BYTES, Shipper
from helixflow.ledger.spool import Spool

from .support import Store, begin, ledger_options, names, until


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipper, "ADOPT_S", 0.01)
    monkeypatch.setattr(shipper, "RETRY_MIN_S", 0.001)
    monkeypatch.setattr(shipper, "RETRY_MAX_S", 0.01)


class Worker:
    """A spool with its shipper at work."""

    def __init__(
        self, root: Path, append: shipper.Append, interrupted: shipper.Interrupted | None = None, **values: Any
    ) -> None:
        self.spool = Spool(root, ledger_options(**values))
        self.shipper = Shipper(self.spool, append, ledger_options(**values), interrupted)
        self.task = asyncio.create_task(self.shipper.run())

    def finished(self, count: int) -> list[Row]:
        rows = []
        for _ in range(count):
            each = begin()
            self.spool.begin(each)
            rows.append(each.row(finish="stop", status=200))
            self.spool.end(rows[-1])
        return rows

    async def drain(self, timeout_s: float = 10.0) -> bool:
        done = await self.shipper.drain(timeout_s)
        await asyncio.wait({self.task})
        return done


def scenario(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def test_in_order_in_batches_and_then_nothing_is_left(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store()
        worker = Worker(tmp_path, store.append, batch_rows=100)
        rows = worker.finished(1050)
        worker.spool.begin(begin())
        await until(lambda: store.written == 1050)
        assert list(store.rows.values()) == rows
        assert [count for _, count in store.calls] == [100] * 10 + [50]
        rows += worker.finished(3)
        assert not await worker.drain()
        assert list(store.rows.values()) == rows
        assert worker.spool.folder.exists()  # a request in it has not ended

        store.calls.clear()
        worker = Worker(tmp_path, store.append)
        await until(lambda: worker.shipper.stats.adopted == 1)
        assert store.written == 1054
        assert [each.finish for each in store.rows.values()].count(INTERRUPTED) == 1
        assert worker.shipper.stats.interrupted == 1
        assert await worker.drain()
        assert names(tmp_path) == []

    scenario(work)


def test_lost_replies_and_absences(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store()
        worker = Worker(tmp_path, store.append, batch_rows=10)
        store.before = [Unavailable("away"), OSError("a bug elsewhere"), DeadlineExceeded("slow")]
        store.after = [Unavailable("the reply was lost"), Unavailable("and again")]
        rows = worker.finished(25)
        await until(lambda: worker.shipper.stats.shipped == 25)
        assert list(store.rows.values()) == rows
        assert worker.shipper.stats.failures == 5
        assert await worker.drain()

    scenario(work)


def test_one_that_is_refused_does_not_stop_the_others(tmp_path: Path) -> None:
    async def work() -> None:
        store, bad = Store(), set[bytes]()

        async def append(spool: str, records: list[bytes]) -> None:
            if any(decode(data).id in bad for data in records):
                raise InvalidRequest("no")
            await store.append(spool, records)

        worker = Worker(tmp_path, append)
        rows = worker.finished(40)
        bad |= {rows[0].id, rows[17].id, rows[39].id}
        assert await worker.drain()
        assert list(store.rows.values()) == [each for each in rows if each.id not in bad]
        assert (worker.shipper.stats.rejected, worker.shipper.stats.shipped) == (3, 37)
        lines = [json.loads(line) for line in (tmp_path / REJECTED).read_text().splitlines()]
        assert [decode(base64.b64decode(line["record"])) for line in lines] == [rows[0], rows[17], rows[39]]
        assert {(line["spool"], line["reason"]) for line in lines} == {(worker.spool.id, "no")}

    scenario(work)


def test_batches_are_bounded_in_bytes(tmp_path: Path) -> None:
    async def work() -> None:
        sizes: list[int] = []

        async def append(_spool: str, records: list[bytes]) -> None:
            sizes.append(sum(map(len, records)))

        worker = Worker(tmp_path, append)
        for _ in range(20):
            each = begin()
            worker.spool.begin(each)
            worker.spool.end(each.row(finish="stop"), content(each, "\u0444" * 65536, "\u0444" * 65536, (), 1))
        assert await worker.drain()
        assert sum(sizes) > 20 * 262_144
        assert max(sizes) <= BATCH_BYTES
        assert len(sizes) < 5

    scenario(work)


def test_a_long_absence_costs_disk_not_memory(tmp_path: Path) -> None:
    async def work() -> None:
        away = True
        shipped = 0

        async def append(_spool: str, records: list[bytes]) -> None:
            nonlocal shipped
            if away:
                raise Unavailable("away")
            shipped += len(records)

        worker = Worker(tmp_path, append, spool_max_bytes=32 << 20)
        worker.finished(10)
        await until(lambda: worker.shipper.stats.failures > 0)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            worker.finished(1000)
            await asyncio.sleep(0)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert worker.spool.held > 6 << 20
        assert grown < 1 << 20
        away = False
        await until(lambda: shipped == 20_010)
        await until(lambda: worker.spool.held < 5 << 20)  # the segment in use
        assert await worker.drain()

    scenario(work)


def test_what_drain_leaves_is_shipped_by_the_next(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store()

        async def away(_spool: str, _records: list[bytes]) -> None:
            raise Unavailable("away")

        worker = Worker(tmp_path, away, batch_rows=10)
        rows = worker.finished(25)
        assert not await worker.drain(0.02)
        assert worker.task.cancelled()
        assert worker.spool.folder.exists()
        worker = Worker(tmp_path, store.append)
        rows += worker.finished(1)
        await until(lambda: store.written == 26 and worker.shipper.stats.adopted == 1)
        assert sorted(store.rows) == sorted(each.id for each in rows)
        assert await worker.drain()
        assert names(tmp_path) == []

    scenario(work)


def dead(root: Path, count: int, open_ones: int = 2) -> list[Begin]:
    """The spool of a worker that has died: small segments, some requests open from its beginning on."""
    spool = Spool(root, ledger_options(spool_max_bytes=1 << 20))
    begun = [begin() for _ in range(count)]
    for each in begun[:open_ones]:
        spool.begin(each)
    for each in begun[open_ones:]:
        spool.begin(each)
        spool.end(each.row(finish="stop"))
    assert spool.number > 2
    spool.close()
    return begun


def test_whose_requests_were_interrupted_is_told(tmp_path: Path) -> None:
    told: list[Begin] = []

    async def interrupted(begun: list[Begin]) -> None:
        told.extend(begun)
        raise Unavailable("nobody is there")  # does not hold the adoption up

    async def work() -> None:
        begun = [begin(), begin()]
        spool = Spool(tmp_path, ledger_options())
        for each in begun:
            spool.begin(each)
        spool.end(begun[0].row(finish="stop"))
        spool.close()
        store = Store()
        worker = Worker(tmp_path, store.append, interrupted)
        await until(lambda: worker.shipper.stats.adopted == 1)
        assert told == begun[1:]
        assert await worker.drain()

    scenario(work)


def test_two_adopters_never_share_a_spool(tmp_path: Path) -> None:
    async def work() -> None:
        begun = [each for _ in range(4) for each in dead(tmp_path, 1200)]
        stores = [Store(), Store()]
        workers = [Worker(tmp_path, store.append, batch_rows=50) for store in stores]
        await until(lambda: sum(worker.shipper.stats.adopted for worker in workers) == 4)
        assert not set(stores[0].rows) & set(stores[1].rows)
        assert {*stores[0].rows, *stores[1].rows} == {each.id for each in begun}
        own = {worker.spool.id for worker in workers}
        spools = [{spool for spool, _ in store.calls} - own for store in stores]
        assert not spools[0] & spools[1]
        for worker in workers:
            assert await worker.drain()
        assert names(tmp_path) == []

    scenario(work)


def test_segments_go_as_they_are_shipped(tmp_path: Path) -> None:
    begun = dead(tmp_path, 2500, 0)
    folder = next(tmp_path.iterdir())
    orphan = Orphan.take(folder)
    assert orphan is not None
    left = [frames.segments(folder)]
    found = []
    for data in orphan.records():
        found.append(decode(data).id)
        orphan.shipped()
        if frames.segments(folder) != left[-1]:
            left.append(frames.segments(folder))
    orphan.close()
    assert found == [each.id for each in begun]
    assert left == [list(range(first, left[0][-1] + 1)) for first in left[0]]
    assert len(left) > 4


@pytest.mark.parametrize("open_ones", [0, 2])
def test_an_adopter_that_dies_half_way(tmp_path: Path, open_ones: int) -> None:
    begun = dead(tmp_path, 1500, open_ones)
    folder = next(tmp_path.iterdir())
    seen: dict[bytes, Row] = {}
    for stop in (500, 900, 1300, 10_000):
        orphan = Orphan.take(folder)
        assert orphan is not None
        for number, data in enumerate(orphan.records()):
            found = decode(data)
            assert isinstance(found, Row)
            assert seen.setdefault(found.id, found) == found
            if number % 50 == 49:
                orphan.shipped()
            if number == stop:
                break
        orphan.close()
        # A request that is open from the beginning keeps every segment, or its adopter's successor would not know it.
        assert (frames.segments(folder)[0] == 1) == (open_ones > 0)
    assert sorted(seen) == sorted(each.id for each in begun)
    assert sum(each.finish == INTERRUPTED for each in seen.values()) == open_ones


def test_a_request_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    async def work() -> None:
        spool = Spool(tmp_path, ledger_options())
        spool.begin(begin(model="x" * 600))
        spool.close()
        store = Store()

        async def append(name: str, records: list[bytes]) -> None:
            try:
                await store.append(name, records)
            except ValueError as error:
                raise InvalidRequest(str(error)) from None

        worker = Worker(tmp_path, append)
        await until(lambda: worker.shipper.stats.adopted == 1)
        assert worker.shipper.stats.rejected == 1
        assert (tmp_path / REJECTED).exists()
        assert await worker.drain()

    scenario(work)


def test_others_have_their_turn(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store()
        worker = Worker(tmp_path, store.append, batch_rows=10_000)
        worker.finished(5000)
        turns = 0
        while store.written < 5000:
            turns += 1
            await asyncio.sleep(0)
        assert turns > 10
        assert await worker.drain()

    scenario(work)
