"""The limiter and its store: lost answers, no answers, clocks that are wrong, memory, the end."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import pytest

from helixflow.core_rs import InsufficientQuota, RateLimitExceeded
from helixflow.limits.limiter import Reservation
from helixflow.limits.model import Metric, SubjectLimits
from helixflow.limits.store import Call, Grant, Granted

from .support import (
    KEY,
    ModelStore,
    World,
    item,
    limiter,
    limits,
    passes,
    run,
    until,
)


@pytest.mark.parametrize("lost", ["lose_call", "lose_answer"])
def test_a_lost_answer_leaks_nothing(lost: str) -> None:
    chosen = limits(tokens_per_month=1000, concurrent_requests=4, cost_per_day=1000)

    async def work(world: World) -> None:
        done = await world.first.reserve(chosen, 400, 0)
        done.settle(100, 7)
        setattr(world.way, lost, True)
        found = await world.first.reserve(chosen, 700, 0)  # from the share of the one gateway that lives
        states = [world.first.away]
        found.settle(200, 13)
        await world.passes(5)
        setattr(world.way, lost, False)
        await world.passes(2)
        assert [*states, world.first.away] == [True, False]
        assert world.first.fallbacks == 1
        assert world.total(Metric.TOKENS_PER_MONTH) == 300
        assert world.total(Metric.COST_PER_DAY) == 20
        assert world.total(Metric.CONCURRENT_REQUESTS) == 0
        await world.second.reserve(chosen, 700, 0)

    run(work)


def test_without_the_store_each_gateway_has_its_share() -> None:
    chosen = limits(tokens_per_minute=1000, tokens_per_day=900)

    async def work(world: World) -> None:
        others = [
            await limiter(n, world.store.lease, world.clock).reserve(limits(tokens_per_day=900), 200, 0) for n in (1, 2)
        ]
        await world.first.reserve(limits(tokens_per_day=900), 100, 0)
        world.way.lose_call = True
        world.clock.now += 60
        world.first.tick()
        await world.first.settled()
        assert world.first.gateways == 3
        began = world.first.calls
        # A third of the new minute, 334 rounded up; a third of what the day had left, 134.
        await world.first.reserve(limits(tokens_per_minute=1000), 200, 0)
        with pytest.raises(RateLimitExceeded):
            await world.first.reserve(limits(tokens_per_minute=1000), 135, 0)
        await world.first.reserve(chosen, 134, 0)
        with pytest.raises(InsufficientQuota, match="day"):
            await world.first.reserve(limits(tokens_per_day=900), 1, 0)
        assert world.first.calls == began  # nobody waited
        world.clock.now += 120
        found = await world.first.reserve(limits(tokens_per_minute=1000), 334, 0)  # the next minute
        found.settle(34, 0)
        await world.first.reserve(limits(tokens_per_minute=1000), 300, 0)
        with pytest.raises(RateLimitExceeded):
            await world.first.reserve(limits(tokens_per_minute=1000), 1, 0)
        for other in others:
            other.cancel()

    run(work)


def test_a_lease_that_hangs_is_given_up() -> None:
    async def work(world: World) -> None:
        async def hang(call: Call) -> Granted:
            await asyncio.Event().wait()
            raise AssertionError

        waiting = limiter(0, hang, world.clock, lease_timeout_ms=20)
        found = await waiting.reserve(limits(tokens_per_minute=10), 10, 0)
        assert (waiting.away, waiting.fallbacks, waiting.calls) == (True, 1, 1)
        found.cancel()

    run(work)


def test_a_broken_store_leaves_nobody_waiting() -> None:
    async def work(world: World) -> None:
        async def broken(call: Call) -> Granted:
            raise KeyError("a defect")

        waiting = limiter(0, broken, world.clock)
        assert await waiting.reserve(limits(tokens_per_minute=10), 10, 0)
        assert waiting.away

    run(work)


def test_a_client_that_leaves_while_it_waits() -> None:
    chosen = limits(tokens_per_minute=100)

    async def work(world: World) -> None:
        entered, let_go = asyncio.Event(), asyncio.Event()

        async def slow(call: Call) -> Granted:
            entered.set()
            await let_go.wait()
            return await world.store.lease(call)

        waiting = limiter(0, slow, world.clock)
        leaving = asyncio.create_task(waiting.reserve(chosen, 100, 0))
        behind = asyncio.create_task(waiting.reserve(chosen, 90, 0))
        await entered.wait()
        leaving.cancel()
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        found = await behind
        assert waiting.try_reserve(chosen, 10, 0) is not None  # nobody waits any more
        found.cancel()

    run(work)


def test_two_are_let_in_and_one_throws_the_other_out() -> None:
    chosen = limits(tokens_per_minute=100)

    async def work(world: World) -> None:
        async def first() -> Reservation:
            found = await world.first.reserve(chosen, 50, 0)
            second.cancel()  # its reservation was made with this one's; its task has not run yet
            return found

        both = asyncio.create_task(first())
        second = asyncio.create_task(world.first.reserve(chosen, 50, 0))
        await asyncio.wait({both, second})
        assert second.cancelled()
        both.result().cancel()
        await world.passes(0.3)
        assert world.total() == 0

    run(work)


def test_who_comes_later_is_served_later() -> None:
    chosen = limits(tokens_per_minute=128_000)

    async def work(world: World) -> None:
        order: list[int] = []
        entered, let_go = asyncio.Event(), asyncio.Event()

        async def slow(call: Call) -> Granted:
            entered.set()
            await let_go.wait()
            return await world.store.lease(call)

        async def one(number: int, tokens: int) -> None:
            await waiting.reserve(chosen, tokens, 0)
            order.append(number)

        waiting = limiter(0, slow, world.clock)
        tasks = [asyncio.create_task(one(0, 100))]
        await entered.wait()
        # After the first call 1,000 are in hand: enough for the last one, but it is not its turn.
        tasks += [asyncio.create_task(one(1, 1500)), asyncio.create_task(one(2, 10))]
        await asyncio.sleep(0)
        let_go.set()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2]
        assert waiting.calls == 2

    run(work)


def test_nobody_overtakes_those_who_wait() -> None:
    chosen = limits(tokens_per_minute=128_000)

    async def work(world: World) -> None:
        await world.first.reserve(chosen, 100, 0)
        waiting = asyncio.create_task(world.first.reserve(chosen, 1500, 0))
        await asyncio.sleep(0)
        assert world.first.try_reserve(chosen, 10, 0) is None
        await waiting
        assert world.first.try_reserve(chosen, 10, 0)

    run(work)


def test_what_is_told_while_a_batch_is_in_doubt() -> None:
    chosen = limits(tokens_per_day=1000)

    async def work(world: World) -> None:
        calls: list[Call] = []

        async def recorded(call: Call) -> Granted:
            calls.append(call)
            return await world.way(call)

        gateway = limiter(0, recorded, world.clock)
        first, second = await gateway.reserve(chosen, 100, 0), await gateway.reserve(chosen, 300, 0)
        first.settle(60, 0)
        world.way.lose_answer = True
        await passes(world.clock, 0.1, gateway)
        second.settle(200, 0)
        await passes(world.clock, 2, gateway)
        world.way.lose_answer = False
        doubtful = [call for call in calls if call.batch == calls[-1].batch]
        await passes(world.clock, 2, gateway)
        again = calls[calls.index(doubtful[-1]) + 1]
        assert len(doubtful) >= 2
        assert {call.items[0].spent for call in (*doubtful, again)} == {60}
        assert again.batch == doubtful[0].batch
        assert again.items[0].held >= 200  # used, but in no batch yet
        assert world.total(Metric.TOKENS_PER_DAY) == 260

    run(work)


def test_doubt_outlives_being_forgotten_and_clocks_that_go_back() -> None:
    chosen = limits(tokens_per_day=1000, tokens_per_minute=1000)

    async def work(world: World) -> None:
        (await world.first.reserve(chosen, 100, 0)).settle(60, 0)
        world.way.lose_answer = True
        await world.passes(0.1)
        for _ in range(300):
            world.clock.now += 1
            world.first.tick()
            await world.first.settled()
        world.clock.now -= 300
        (await world.first.reserve(chosen, 100, 0)).settle(40, 0)
        world.way.lose_answer = False
        await world.passes(5)
        assert not world.first.away
        assert world.total(Metric.TOKENS_PER_DAY) == 100
        assert world.total() == 100

    run(work)


def test_a_wrong_clock_follows_the_stores() -> None:
    chosen = limits(tokens_per_minute=100, tokens_per_day=1000)

    async def work(world: World) -> None:
        for number, error in enumerate((-7200.0, 90.0, 40 * 86_400.0)):
            wrong = limiter(3 + number, world.store.lease, lambda error=error: world.clock.now + error)  # type: ignore[misc]
            found = await wrong.reserve(chosen, 30, 0)
            assert wrong.now() == pytest.approx(world.clock.now, abs=0.01)
            assert world.total() == 30 * (number + 1)
            assert found.headers()
        with pytest.raises(RateLimitExceeded):
            await world.first.reserve(chosen, 11, 0)

    run(work)


def test_a_clock_that_is_set_back_stops_nothing() -> None:
    async def work(world: World) -> None:
        found = await world.first.reserve(limits(tokens_per_minute=100, concurrent_requests=1), 100, 0)
        world.clock.now -= 3600
        await world.passes(5)
        again = await world.first.reserve(limits(tokens_per_minute=100), 100, 0)
        found.settle(1, 0)
        again.settle(1, 0)
        await world.passes(0.3)
        assert world.total(Metric.CONCURRENT_REQUESTS) == 0

    run(work)


def test_what_nobody_asks_for_is_forgotten() -> None:
    async def work(world: World) -> None:
        kept = [
            await world.first.reserve(
                limits(f"{KEY[:-4]}{number:04}", tokens_per_day=1000, requests_per_minute=9), 10, 0
            )
            for number in range(1500)
        ]
        assert world.first.known == 4500
        for each in kept[1:]:
            each.settle(5, 0)
        for _ in range(40):
            world.clock.now += 5
            world.first.tick()
            await world.first.settled()
        assert world.first.known == 1  # the day's counter of the request that still runs
        assert world.store.total(item(f"{KEY[:-4]}0007", Metric.TOKENS_PER_DAY)) == 5
        kept[0].settle(6, 0)
        await world.passes(0.5)
        assert world.store.total(item(f"{KEY[:-4]}0000", Metric.TOKENS_PER_DAY)) == 6
        # Known again, with what was used before.
        with pytest.raises(InsufficientQuota):
            await world.first.reserve(limits(f"{KEY[:-4]}0007", tokens_per_day=1000), 996, 0)

    run(work)


def test_more_subjects_than_a_call_holds() -> None:
    async def work(world: World) -> None:
        chosen: list[tuple[SubjectLimits, ...]] = [
            limits(f"{KEY[:-4]}{number:04}", tokens_per_minute=100) for number in range(2500)
        ]
        found = await asyncio.gather(*(world.first.reserve(each, 10, 0) for each in chosen))
        for each in found:
            each.settle(3, 0)
        await world.passes(4)
        assert all(world.store.total(item(each[0].subject)) == 3 for each in chosen)

    run(work)


def test_run_and_close() -> None:
    async def work(world: World) -> None:
        running = asyncio.create_task(world.first.run())
        chosen = limits(tokens_per_minute=128_000)
        found = await world.first.reserve(chosen, 100, 0)
        held = await world.first.reserve(chosen, 100, 0)
        found.settle(10, 0)
        await until(lambda: world.total() == 10 + 100 + 1000)  # the hand is trimmed by `run` alone
        running.cancel()
        await asyncio.wait({running})
        await world.first.close()
        assert world.total() == 110
        held.settle(1, 0)

    run(work)


class PartlyAway:
    """A store that counts minutes, and budgets when it is told to."""

    def __init__(self, world: World) -> None:
        self.counted = False
        self._minutes = ModelStore(world.clock)
        self._budgets = world.store

    async def __call__(self, call: Call) -> Granted:
        parts = [tuple(each for each in call.items if each.metric.budget is budget) for budget in (False, True)]
        answer = await self._minutes.lease(replace(call, items=parts[0]))
        minutes = iter(answer.grants)
        days: Iterator[Grant] = repeat(Grant(0, 0, uncounted=True))
        if self.counted:
            days = iter((await self._budgets.lease(replace(call, items=parts[1]))).grants)
        return replace(answer, grants=tuple(next(days if each.metric.budget else minutes) for each in call.items))


def test_budgets_that_are_not_counted_have_a_share() -> None:
    chosen = limits(tokens_per_minute=100, tokens_per_day=100)

    async def work(world: World) -> None:
        store = PartlyAway(world)
        partly = limiter(0, store, world.clock)
        (await partly.reserve(chosen, 60, 0)).settle(50, 0)
        assert not partly.away
        with pytest.raises(RateLimitExceeded, match="minute"):
            await partly.reserve(limits(tokens_per_minute=100), 51, 0)
        world.clock.now += 60
        with pytest.raises(InsufficientQuota, match="day"):
            await partly.reserve(chosen, 51, 0)
        (await partly.reserve(chosen, 50, 0)).settle(20, 0)
        store.counted = True
        await passes(world.clock, 4, partly)
        assert world.total(Metric.TOKENS_PER_DAY) == 70

    run(work)


def test_many_uncounted_budgets_leave_room_for_minutes() -> None:
    async def work(world: World) -> None:
        store = PartlyAway(world)
        partly = limiter(0, store, world.clock)
        chosen = [limits(f"{KEY[:-4]}{number:04}", tokens_per_day=100) for number in range(1500)]
        for found in await asyncio.gather(*(partly.reserve(each, 10, 0) for each in chosen)):
            found.settle(3, 0)
        async with asyncio.timeout(5):
            await passes(world.clock, 4, partly)
            assert await partly.reserve(limits(tokens_per_minute=100), 10, 0)
            store.counted = True
            await passes(world.clock, 10, partly)
        assert all(world.store.total(item(each[0].subject, Metric.TOKENS_PER_DAY)) == 3 for each in chosen)

    run(work)
