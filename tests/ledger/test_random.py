"""Whatever happens in whatever order: one row for each request that was accepted."""

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.core_rs import LedgerFull, Unavailable
from helixflow.ledger import frames, shipper
from helixflow.ledger.record import INTERRUPTED, Begin, Row
from helixflow.ledger.shipper import Shipper
from helixflow.ledger.spool import Spool

from .support import Store, begin, ledger_options, names, until

STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["begin", "end"]), st.integers(1, 40)),
        st.tuples(st.sampled_from(["lose reply", "away", "ship", "drain"]), st.just(0)),
        st.tuples(st.just("crash"), st.integers(0, 300)),
    ),
    max_size=40,
)


@dataclass
class World:
    """One worker after another on one folder, and the store they all ship to."""

    root: Path
    batch_rows: int
    store: Store = field(default_factory=Store)
    begun: dict[bytes, Begin] = field(default_factory=dict)
    ended: dict[bytes, Row] = field(default_factory=dict)
    running: list[Begin] = field(default_factory=list)

    def start(self) -> None:
        options = ledger_options(spool_max_bytes=1 << 20, batch_rows=self.batch_rows)
        self.spool = Spool(self.root, options)
        self.spool._segment = self.spool._limit = 2000  # many segments
        self.shipper = Shipper(self.spool, self.store.append, options)
        self.task = asyncio.create_task(self.shipper.run())

    async def crash(self, torn: int) -> None:
        """The process ends at once; what it was writing then is on the disk in part, or was never written."""
        self.task.cancel()
        await asyncio.wait({self.task})
        last = frames.segment_path(self.spool.folder, self.spool.number)
        self.spool.close()
        if self.spool.folder.exists() and torn:
            half = frames.frame(frames.BEGIN, begin())
            with last.open("ab") as file:
                file.write((half * 2)[: min(torn, len(half) - 1)])
        self.running.clear()
        self.start()

    async def step(self, kind: str, number: int) -> None:
        if kind == "begin":
            for _ in range(number):
                each = begin()
                try:
                    self.spool.begin(each)
                except LedgerFull:
                    break
                self.begun[each.id] = each
                self.running.append(each)
        elif kind == "end":
            for _ in range(min(number, len(self.running))):
                each = self.running.pop(number % len(self.running))
                self.ended[each.id] = each.row(finish="stop", status=200)
                self.spool.end(self.ended[each.id])
        elif kind == "lose reply":
            self.store.after.append(Unavailable("lost"))
        elif kind == "away":
            self.store.before.append(Unavailable("away"))
        elif kind == "ship":
            await asyncio.sleep(0.002)
        elif kind == "drain":
            await self.shipper.drain(5)
            await asyncio.wait({self.task})
            self.running.clear()
            self.start()
        else:
            await self.crash(number)

    async def finish(self) -> None:
        await self.crash(0)
        await until(lambda: names(self.root) == [self.spool.id])  # those before it are done with
        await self.shipper.drain(5)
        await asyncio.wait({self.task})


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipper, "ADOPT_S", 0.001)
    monkeypatch.setattr(shipper, "RETRY_MIN_S", 0.0001)
    monkeypatch.setattr(shipper, "RETRY_MAX_S", 0.001)


@settings(deadline=None, max_examples=80)
@given(STEPS, st.integers(1, 30))
def test_one_row_each(steps: list[tuple[str, int]], batch_rows: int) -> None:
    async def scenario(root: Path) -> None:
        world = World(root, batch_rows)
        world.start()
        for kind, number in steps:
            await world.step(kind, number)
        await world.finish()
        assert world.store.rows.keys() == world.begun.keys()
        assert world.store.written == len(world.begun)
        for each in world.begun.values():
            found = world.store.rows[each.id]
            assert found == world.ended.get(each.id, each.interrupted())
            assert (found.finish == INTERRUPTED) == (each.id not in world.ended)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Path(folder)))
        assert names(Path(folder)) == []
