"""The limiter of a gateway: what is admitted, what comes back, what clients are told."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import pytest

from helixflow.core_rs import CoreError, InsufficientQuota, RateLimitExceeded
from helixflow.limits.limiter import UNLIMITED, Reservation
from helixflow.limits.model import Metric, SubjectLimits
from helixflow.limits.store import Call, Grant, Granted

from .support import KEY, ORGANISATION, START, USER, Clock, Lossy, ModelStore, item, limiter, limits, passes, until


class World:
    """Gateways around one store, and a clock moved by hand."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = ModelStore(self.clock)
        self.way = Lossy(self.store)
        self.first = limiter(0, self.way, self.clock)
        self.second = limiter(1, self.store.lease, self.clock)

    def total(self, metric: Metric = Metric.TOKENS_PER_MINUTE, subject: str = KEY) -> int:
        """Used and held of the window at `START`, as the store sees it."""
        return self.store.total(item(subject, metric))

    async def passes(self, seconds: float) -> None:
        await passes(self.clock, seconds, self.first, self.second)


def run(work: Callable[[World], Any]) -> None:
    asyncio.run(work(World()))


def test_without_limits_nothing_is_asked() -> None:
    async def work(world: World) -> None:
        for nothing in ((), limits()):
            found = world.first.try_reserve(nothing, 10**9, 10**9) or await world.first.reserve(nothing, 10**9, 10**9)
            await found.adjust(10**10, 0)
            found.settle(1, 1)
            found.cancel()
            assert found.headers() == []
            assert not found.counts_tokens
        assert world.first.try_reserve((), 1, 1) is UNLIMITED
        assert world.first.headers(()) == []
        assert world.first.calls == 0

    run(work)


def test_the_fast_path_takes_from_the_hand() -> None:
    chosen = limits(tokens_per_minute=128_000, requests_per_minute=12_800)

    async def work(world: World) -> None:
        assert world.first.try_reserve(chosen, 100, 0) is None
        first = await world.first.reserve(chosen, 100, 0)
        assert world.first.calls == 1
        more = [world.first.try_reserve(chosen, 100, 0) for _ in range(10)]
        assert all(more)
        assert world.first.try_reserve(chosen, 1, 0) is None  # ten were in hand
        assert world.first.calls == 1
        assert world.total() == 1100
        for each in (first, *more):
            assert isinstance(each, Reservation)
            each.settle(40, 0)
            each.settle(99, 0)
            each.cancel()
        await world.passes(0.5)
        assert world.total() == 11 * 40
        assert world.total(Metric.REQUESTS_PER_MINUTE) == 11

    run(work)


def test_refunds_and_overruns_are_exact() -> None:
    chosen = limits(tokens_per_minute=1000, tokens_per_day=5000, cost_per_month=10**15, concurrent_requests=3)

    async def work(world: World) -> None:
        done = await world.first.reserve(chosen, 300, 3000)
        longer = await world.first.reserve(chosen, 300, 3000)
        cancelled = await world.first.reserve(chosen, 300, 3000)
        with pytest.raises(RateLimitExceeded, match="3 requests at a time"):
            await world.second.reserve(chosen, 1, 1)
        done.settle(7, 70)
        longer.settle(350, 3500)
        cancelled.cancel()
        await world.passes(0.3)
        assert [world.total(Metric(number)) for number in (2, 3, 4, 7)] == [357, 0, 357, 3570]
        found = await world.second.reserve(chosen, 643, 0)
        with pytest.raises(RateLimitExceeded):
            await world.first.reserve(chosen, 1, 0)
        found.cancel()

    run(work)


def test_what_is_refused_and_what_is_said() -> None:
    async def work(world: World) -> None:
        world.clock.now += 15.5
        cases: list[tuple[dict[str, int], type[CoreError], int, str]] = [
            (
                {"requests_per_minute": 1},
                RateLimitExceeded,
                45,
                r"limit of 1 requests per minute of this API key.*in 45s",
            ),
            ({"tokens_per_minute": 150}, RateLimitExceeded, 45, r"150 tokens per minute.*needs 100, 50 left"),
            ({"concurrent_requests": 1}, RateLimitExceeded, 1, r"1 requests at a time.*in 1s"),
            ({"tokens_per_day": 1000, "tokens_per_month": 150}, InsufficientQuota, 1439985, r"150 tokens per month"),
            ({"tokens_per_day": 150}, InsufficientQuota, 57585, r"tokens per day.*in 15h59m45s"),
            ({"cost_per_day": 1_500_000_000}, InsufficientQuota, 57585, r"1\.5 per day.*needs 1, 0\.5 left"),
            ({"cost_per_month": 1_500_000_000}, InsufficientQuota, 1439985, r"1\.5 per month"),
        ]
        for number, (values, kind, seconds, message) in enumerate(cases):
            chosen = limits(f"{KEY[:-2]}{number:02}", **values)
            await world.first.reserve(chosen, 100, 10**9)
            with pytest.raises(kind, match=message) as caught:
                await world.first.reserve(chosen, 100, 10**9)
            assert caught.value.retry_after_s == seconds
            assert caught.value.http_status == 429

    run(work)


def test_what_can_never_be_admitted() -> None:
    async def work(world: World) -> None:
        for values in ({"tokens_per_minute": 99}, {"tokens_per_month": 99}):
            with pytest.raises(InsufficientQuota, match=r"needs 100, but .* is 99 .* can never be admitted") as caught:
                await world.first.reserve(limits(ORGANISATION, **values), 100, 0)
            assert caught.value.param == "max_tokens"
        for name in ("requests_per_minute", "concurrent_requests", "tokens_per_minute", "cost_per_month"):
            with pytest.raises(InsufficientQuota, match=r"limit of this user is 0 .* never") as caught:
                await world.first.reserve(limits(USER, **{name: 0}), 100, 1)
            assert caught.value.param is None
        assert world.first.calls == 0
        free = await world.first.reserve(limits(cost_per_day=0), 100, 0)  # a model without a price
        with pytest.raises(InsufficientQuota, match="never"):
            await free.adjust(100, 1)
        running = await world.first.reserve(limits(tokens_per_minute=100), 50, 0)
        with pytest.raises(InsufficientQuota, match="needs 101"):
            await running.adjust(101, 0)
        assert running.tokens == 50

    run(work)


def test_headers_come_from_the_narrowest_subject() -> None:
    chosen = (
        *limits(KEY, requests_per_minute=100, tokens_per_minute=10_000),
        *limits(ORGANISATION, requests_per_minute=1000, tokens_per_minute=500),
    )

    async def work(world: World) -> None:
        world.clock.now += 15.5
        found = await world.first.reserve(chosen, 120, 0)
        expected = {
            "limit-requests": "100",
            "limit-tokens": "500",
            "remaining-requests": "99",
            "remaining-tokens": "380",
            "reset-requests": "45s",
            "reset-tokens": "45s",
        }
        sent = {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in found.headers()}
        assert sent == expected
        assert found.headers() == world.first.headers(chosen)
        only_days = await world.first.reserve(limits(tokens_per_day=10), 1, 0)
        assert only_days.headers() == []
        assert only_days.counts_tokens
        assert not (await world.first.reserve(limits(concurrent_requests=10), 1, 0)).counts_tokens

    run(work)


def test_adjusting() -> None:
    chosen = limits(tokens_per_minute=1000, cost_per_day=1000)

    async def work(world: World) -> None:
        found = await world.first.reserve(chosen, 300, 300)
        await found.adjust(100, 100)
        assert (found.tokens, found.cost) == (100, 100)
        await found.adjust(900, 150)
        with pytest.raises(InsufficientQuota, match="never"):
            await found.adjust(1001, 150)
        await world.passes(0.3)
        other = await world.second.reserve(chosen, 100, 850)
        with pytest.raises(RateLimitExceeded):
            await found.adjust(901, 150)
        with pytest.raises(InsufficientQuota):
            await found.adjust(900, 151)
        assert (found.tokens, found.cost) == (900, 150)
        found.settle(10, 10)
        await found.adjust(5000, 5000)  # too late to matter
        other.cancel()
        await world.passes(0.3)
        assert world.total() == 10
        assert world.total(Metric.COST_PER_DAY) == 10

    run(work)


def test_callers_share_one_call_in_their_order() -> None:
    chosen = limits(tokens_per_minute=1000)

    async def work(world: World) -> None:
        order: list[int] = []

        async def one(number: int, tokens: int) -> None:
            await world.first.reserve(chosen, tokens, 0)
            order.append(number)

        sizes = [400, 300, 500, 200, 90, 50]
        results = await asyncio.gather(
            *(one(number, tokens) for number, tokens in enumerate(sizes)), return_exceptions=True
        )
        assert order == [0, 1, 3, 4]
        assert [type(each) for each in results if each is not None] == [RateLimitExceeded] * 2
        assert world.first.calls == 1
        assert world.total() == 1000

    run(work)


def test_a_refusal_is_remembered_for_a_moment() -> None:
    chosen = limits(tokens_per_minute=100)

    async def work(world: World) -> None:
        held = await world.second.reserve(chosen, 100, 0)
        for _ in range(50):
            with pytest.raises(RateLimitExceeded):
                await world.first.reserve(chosen, 10, 0)
        assert world.first.calls == 1
        held.cancel()
        await passes(world.clock, 0.1, world.second)
        await world.first.reserve(chosen, 10, 0)

    run(work)


def test_a_request_is_charged_to_its_window() -> None:
    chosen = limits(tokens_per_minute=100, tokens_per_month=1000)

    async def work(world: World) -> None:
        old = await world.first.reserve(chosen, 100, 0)
        await world.passes(60)
        new = await world.first.reserve(chosen, 100, 0)
        old.settle(30, 0)
        with pytest.raises(RateLimitExceeded):
            await world.first.reserve(chosen, 1, 0)  # what comes back is the old minute's
        await old.adjust(70, 0)
        new.settle(50, 0)
        await world.first.reserve(chosen, 50, 0)
        await world.passes(0.3)
        assert world.total(Metric.TOKENS_PER_MONTH) == 130

    run(work)


def test_a_request_that_grows_after_its_minute() -> None:
    chosen = limits(tokens_per_minute=100, tokens_per_day=200)

    async def work(world: World) -> None:
        old = await world.first.reserve(chosen, 100, 0)
        await world.passes(60)
        with pytest.raises(InsufficientQuota):
            await old.adjust(201, 0)
        await old.adjust(150, 0)  # its minute is over, its day is not
        assert world.total(Metric.TOKENS_PER_DAY) == 150
        old.settle(150, 0)

    run(work)


def test_a_request_that_waits_into_the_next_minute() -> None:
    chosen = limits(tokens_per_minute=100)

    async def work(world: World) -> None:
        full = await world.second.reserve(chosen, 100, 0)

        async def slow(call: Call) -> Granted:
            world.clock.now = START + 60
            return await world.store.lease(call)

        waiting = limiter(2, slow, world.clock)
        found = await waiting.reserve(chosen, 100, 0)
        assert waiting.calls == 2
        full.cancel()
        found.cancel()

    run(work)


def test_limits_that_change() -> None:
    async def work(world: World) -> None:
        before = limits(tokens_per_minute=128_000)
        held = await world.first.reserve(before, 100, 0)
        assert world.first.try_reserve(before, 900, 0)
        lower = limits(tokens_per_minute=1000)
        with pytest.raises(RateLimitExceeded):
            await world.first.reserve(lower, 1, 0)  # the rest of the hand is no way around the new limit
        held.settle(50, 0)
        await world.passes(0.1)
        await world.first.reserve(lower, 50, 0)
        await world.first.reserve(limits(tokens_per_minute=2000), 1000, 0)
        open_now = await world.first.reserve(limits(requests_per_minute=5), 10**9, 0)  # the other limit is gone
        open_now.settle(10**9, 0)
        with pytest.raises(InsufficientQuota, match="never"):
            await world.first.reserve(limits(tokens_per_minute=0), 1, 0)

    run(work)


def test_big_limits() -> None:
    limit = 10**15
    chosen = limits(tokens_per_minute=limit, cost_per_month=limit)

    async def work(world: World) -> None:
        found = await world.first.reserve(chosen, limit - 1, limit)
        assert await world.first.reserve(chosen, 1, 0)
        with pytest.raises(RateLimitExceeded):
            await world.first.reserve(chosen, 1, 0)
        found.settle(limit - 2, limit - 5)
        await world.passes(0.1)
        await world.first.reserve(chosen, 1, 5)

    run(work)


def test_idle_hands_are_emptied_and_busy_ones_kept_small() -> None:
    chosen = limits(tokens_per_minute=128_000)

    async def work(world: World) -> None:
        found = await world.first.reserve(chosen, 50_000, 0)
        found.settle(100, 0)
        await world.passes(0.1)
        assert world.total() == 1100
        await world.passes(0.3)
        assert world.total() == 100
        calls = world.first.calls
        await world.passes(2.5)
        assert world.first.calls <= calls + 1  # quiet but for the sign of life

    run(work)


def test_the_hand_is_filled_ahead() -> None:
    chosen = limits(tokens_per_minute=128_000)

    async def work(world: World) -> None:
        await world.first.reserve(chosen, 100, 0)
        for _ in range(20):
            for _ in range(4):
                assert world.first.try_reserve(chosen, 100, 0)
            await world.passes(0.05)

    run(work)


def test_holds_are_told_again_and_again() -> None:
    async def work(world: World) -> None:
        found = await world.first.reserve(limits(concurrent_requests=1), 1, 0)
        for _ in range(4):
            await world.passes(10)
            with pytest.raises(RateLimitExceeded):
                await world.second.reserve(limits(concurrent_requests=1), 1, 0)
        found.settle(0, 0)
        await world.passes(0.1)
        await world.second.reserve(limits(concurrent_requests=1), 1, 0)

    run(work)


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
