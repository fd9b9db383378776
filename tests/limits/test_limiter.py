"""The limiter of a gateway: what is admitted, what comes back, what clients are told."""

import asyncio

import pytest

from helixflow.core_rs import CoreError, InsufficientQuota, RateLimitExceeded
from helixflow.limits.limiter import UNLIMITED, Reservation
from helixflow.limits.model import Metric
from helixflow.limits.store import Call, Granted

from .support import (
    KEY,
    ORGANISATION,
    START,
    USER,
    World,
    limiter,
    limits,
    passes,
    run,
)


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


def test_a_guess_is_corrected_where_the_limit_is_near() -> None:
    async def work(world: World) -> None:
        found = await world.first.reserve(limits(tokens_per_minute=1000), 100, 0)
        assert not found.tight, "900 are left"
        more = await world.first.reserve(limits(tokens_per_minute=1000), 150, 0)
        assert not more.tight, "750 are left, and five such requests"
        large = await world.first.reserve(limits(tokens_per_minute=1000), 300, 0)
        assert large.tight, "450 are left, less than four such requests"
        small = await world.first.reserve(limits(tokens_per_minute=1000), 10, 0)
        assert not small.tight
        last = await world.first.reserve(limits(tokens_per_minute=1000), 330, 0)
        assert last.tight, "110 are left, less than an eighth"
        assert not (await world.first.reserve(limits(requests_per_minute=1), 100, 0)).tight, "tokens do not count"
        costly = await world.first.reserve(limits(cost_per_day=1000), 0, 900)
        assert costly.tight

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
