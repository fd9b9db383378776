"""Who hashes next: fair over addresses, bounded, with an end to the waiting."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.auth import turns
from helixflow.auth.turns import Turns
from helixflow.core_rs import QueueFull

from .support import run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Crowd:
    """Clients of a queue whose turns end when the test says so."""

    def __init__(self, places: int = 1) -> None:
        self.clock = Clock()
        self.turns = Turns(places, self.clock)
        self.served: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.Event] = []

    async def come(self, address: str, name: str = "") -> "asyncio.Task[None]":
        async def one() -> None:
            async with self.turns.turn(address):
                self.served.append(name or address)
                self._ends.append(asyncio.Event())
                await self._ends[-1].wait()

        task = asyncio.create_task(one())
        self.tasks.append(task)
        await self.settle()
        return task

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    async def end_one(self, seconds: float = 0.1) -> None:
        self.clock.now += seconds
        self._ends[len(self.served) - 1].set()
        await self.settle()

    async def end_all(self) -> None:
        while not all(task.done() for task in self.tasks):
            for end in self._ends:
                end.set()
            await self.settle()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert (self.turns._running, self.turns._waiting, self.turns._lanes) == (0, 0, {})


def check(case: Callable[[], Awaitable[None]]) -> None:
    run(case())


def test_clients_take_turns_however_many_each_sends() -> None:
    async def case() -> None:
        crowd = Crowd()
        for _ in range(7):
            await crowd.come("192.0.2.66")
        for name in ("a", "b"):
            await crowd.come(f"192.0.2.{name}", name)
        for _ in range(4):
            await crowd.end_one()
        assert crowd.served == ["192.0.2.66", "192.0.2.66", "a", "b", "192.0.2.66"]
        await crowd.end_all()

    check(case)


def test_one_client_has_a_short_lane_and_is_told_when_to_come_back() -> None:
    async def case() -> None:
        crowd = Crowd()
        for number in range(1 + turns.LANE):
            await crowd.come(f"2001:db8::{number}")
        with pytest.raises(QueueFull, match="too many logins") as caught:
            await (await crowd.come("2001:db8::ffff"))
        assert (caught.value.http_status, caught.value.retry_after_s) == (429, 1)
        waiting = await crowd.come("192.0.2.1", "other")
        await crowd.end_one(100.0)
        await crowd.end_one(100.0)
        assert crowd.served[2] == "other"
        assert not waiting.done()
        for _ in range(3):
            await crowd.come("2001:db8::1")
        with pytest.raises(QueueFull) as caught:
            await (await crowd.come("2001:db8::1"))
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 100, "hashes take long here"
        await crowd.end_all()

    check(case)


def test_a_full_queue_makes_room_for_who_has_least_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "WAITING", 6)

    async def case() -> None:
        crowd = Crowd()
        await crowd.come("192.0.2.1")
        greedy = [await crowd.come("192.0.2.66") for _ in range(6)]
        newcomer = await crowd.come("192.0.2.2", "newcomer")
        assert [task.done() for task in greedy] == [False] * 5 + [True]
        with pytest.raises(QueueFull):
            await greedy[-1]
        await crowd.end_one()
        await crowd.end_one()
        assert crowd.served[-1] == "newcomer"
        assert not newcomer.done()
        for number in range(10, 14):
            await crowd.come(f"192.0.2.{number}")
        # Everybody has one: nobody has to go for another.
        refused = [await crowd.come(f"192.0.2.{number}") for number in range(20, 30)]
        outcomes = {type(task.exception()) for task in refused if task.done()}
        assert (outcomes, refused[-1].done()) == ({QueueFull}, True)
        await crowd.end_all()

    check(case)


def test_nobody_waits_longer_than_a_gateway_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "WAIT_S", 0.01)

    async def case() -> None:
        crowd = Crowd()
        await crowd.come("192.0.2.1")
        with pytest.raises(QueueFull):
            await (await crowd.come("192.0.2.2"))
        assert crowd.turns._waiting == 0
        await crowd.end_all()

    check(case)


def test_a_client_that_goes_away_leaves_its_place_to_the_next() -> None:
    async def case() -> None:
        crowd = Crowd()
        first = await crowd.come("192.0.2.1")
        gone, other = await crowd.come("192.0.2.2", "gone"), await crowd.come("192.0.2.3", "other")
        # One that waits, and one that goes in the moment its turn comes.
        gone.cancel()
        await crowd.settle()
        late = await crowd.come("192.0.2.4", "late")
        await crowd.end_one()
        assert crowd.served == ["192.0.2.1", "other"]
        crowd._ends[1].set()
        await asyncio.sleep(0)
        late.cancel()
        await crowd.settle()
        await asyncio.gather(first, other, gone, late, return_exceptions=True)
        assert (crowd.turns._running, crowd.turns._waiting) == (0, 0)

    check(case)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60), st.integers(1, 3))
def test_places_are_neither_lost_nor_made(steps: list[tuple[int, bool]], places: int) -> None:
    async def case() -> None:
        crowd = Crowd(places)
        inside = 0
        for client, cancel in steps:
            task = await crowd.come(f"192.0.2.{client}")
            if cancel:
                task.cancel()
                await crowd.settle()
            inside = crowd.turns._running
            assert inside <= places
            assert crowd.turns._waiting == sum(len(lane) for lane in crowd.turns._lanes.values())
            assert not crowd.turns._waiting or inside == places
        for task in crowd.tasks:
            task.cancel()
        outcomes = await asyncio.gather(*crowd.tasks, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {asyncio.CancelledError, QueueFull}
        assert (crowd.turns._running, crowd.turns._waiting) == (0, 0)

    check(case)
