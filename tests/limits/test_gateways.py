"""Several gateways around one store: nothing is granted twice, nothing is lost, limits are used up."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.core_rs import InsufficientQuota, RateLimitExceeded
from helixflow.limits.limiter import Limiter, Reservation
from helixflow.limits.model import MAX_LIMIT, Metric, window_start
from helixflow.limits.store import LimitStore

from .support import (
    GATEWAYS,
    KEY,
    ORGANISATION,
    START,
    Caller,
    Clock,
    Databases,
    Lossy,
    ModelStore,
    Redis,
    item,
    limiter,
    limits,
    passes,
)

LIMITS = (
    *limits(KEY, requests_per_minute=25, tokens_per_minute=1000, concurrent_requests=6, tokens_per_day=2600),
    *limits(ORGANISATION, tokens_per_minute=1500, cost_per_month=9000),
)
CAPS = {(each.subject, metric): limit for each in LIMITS for metric, limit in each.limits}
REFUSED = (RateLimitExceeded, InsufficientQuota)
WEIGHTS = {
    Metric.REQUESTS_PER_MINUTE: (1, 0, 0),
    Metric.CONCURRENT_REQUESTS: (0, 0, 0),
    Metric.TOKENS_PER_MINUTE: (0, 1, 0),
    Metric.TOKENS_PER_DAY: (0, 1, 0),
    Metric.COST_PER_MONTH: (0, 0, 1),
}


@dataclass
class Running:
    reservation: Reservation
    began: float


class Truth:
    """What the requests themselves know: counted in the test, by nobody else."""

    def __init__(self) -> None:
        self.running: list[Running] = []
        self.ended: list[tuple[float, int, int]] = []
        self.overrun = 0

    def used(self, metric: Metric, now: float, *, open_too: bool) -> int:
        """Of the window that `now` lies in."""
        if metric is Metric.CONCURRENT_REQUESTS:
            return len(self.running) if open_too else 0
        window = window_start(metric, now)
        weight = WEIGHTS[metric]
        known = [(began, tokens, cost) for began, tokens, cost in self.ended]
        if open_too:
            known += [(each.began, each.reservation.tokens, each.reservation.cost) for each in self.running]
        return sum(
            weight[0] + weight[1] * tokens + weight[2] * cost
            for began, tokens, cost in known
            if window_start(metric, began) == window
        )


async def _step(
    name: str, number: int, sizes: tuple[int, int], gateways: list[Limiter], truth: Truth, now: float
) -> None:
    tokens, extra = sizes
    gateway = gateways[number % len(gateways)]
    if name == "reserve":
        found = gateway.try_reserve(LIMITS, tokens, tokens * 3)
        if found is None:
            try:
                found = await gateway.reserve(LIMITS, tokens, tokens * 3)
            except REFUSED:
                return
        truth.running.append(Running(found, now))
        return
    if not truth.running:
        return
    each = truth.running[number % len(truth.running)]
    if name == "adjust":
        with contextlib.suppress(*REFUSED):
            await each.reservation.adjust(extra, extra * 3)
        return
    truth.running.remove(each)
    if name == "cancel":
        each.reservation.cancel()
        return
    truth.overrun += 3 * max(0, extra - each.reservation.tokens)
    each.reservation.settle(extra, extra * 3)
    truth.ended.append((each.began, extra, extra * 3))


async def _check(store: LimitStore, truth: Truth, now: float) -> None:
    """What the store counts is what was used, to the token."""
    probe = Caller(store, GATEWAYS[15])
    asked = [item(subject, metric, limit=MAX_LIMIT, window=window_start(metric, now)) for subject, metric in CAPS]
    answer = await probe(*asked)
    for (subject, metric), grant in zip(CAPS, answer.grants, strict=True):
        assert MAX_LIMIT - grant.room == truth.used(metric, now, open_too=False), (subject, metric.name)


_SIZES = st.tuples(st.integers(1, 400), st.integers(0, 450))
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["reserve", "reserve", "settle", "adjust", "cancel"]), st.integers(0, 11), _SIZES),
        st.tuples(st.just("pass"), st.sampled_from([1, 1, 6, 1300]), _SIZES),
    ),
    min_size=5,
    max_size=40,
)
_LOSSES = st.lists(st.sampled_from(["call", "answer", "", ""]), min_size=3, max_size=12)
Steps = list[tuple[str, int, tuple[int, int]]]


async def _play(steps: Steps, losses: list[str], open_store: Callable[..., Any]) -> None:
    clock = Clock(START + 30)
    truth = Truth()
    async with open_store(clock) as store:
        ways = [Lossy(store) for _ in range(3)]
        gateways = [limiter(number, way, clock) for number, way in enumerate(ways)]
        for turn, (name, number, sizes) in enumerate(steps):
            for way in ways:
                loss = losses[turn % len(losses)] if losses else ""
                way.lose_call, way.lose_answer = loss == "call", loss == "answer"
            if name == "pass":
                await passes(clock, number * 0.05, *gateways)
            else:
                await _step(name, number, sizes, gateways, truth, clock.now)
            if not losses:
                for (_, metric), limit in CAPS.items():
                    assert truth.used(metric, clock.now, open_too=True) <= limit + truth.overrun, metric.name
        for way in ways:
            way.lose_call = way.lose_answer = False
        for each in truth.running:
            each.reservation.settle(7, 21)
            truth.ended.append((each.began, 7, 21))
        await passes(clock, 2.0, *gateways)
        await _check(store, truth, clock.now)


@asynccontextmanager
async def _model(clock: Clock) -> Any:
    yield ModelStore(clock)


def _property(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@_property(100)
@given(_STEPS)
def test_limits_hold_and_everything_comes_back(steps: Steps) -> None:
    asyncio.run(_play(steps, [], _model))


@_property(100)
@given(_STEPS, _LOSSES)
def test_whatever_gets_lost_everything_comes_back(steps: Steps, losses: list[str]) -> None:
    asyncio.run(_play(steps, losses, _model))


@_property(10)
@given(_STEPS, st.one_of(st.just([]), _LOSSES))
def test_the_same_on_postgres(on_wheel: Databases, steps: Steps, losses: list[str]) -> None:
    asyncio.run(_play(steps, losses, on_wheel.store))


@_property(15)
@given(_STEPS, st.one_of(st.just([]), _LOSSES))
def test_the_same_on_redis(shared_redis: Redis, steps: Steps, losses: list[str]) -> None:
    asyncio.run(_play(steps, losses, shared_redis.store))


async def _stream(gateway: Limiter, dice: random.Random, clock: Clock, used: Counter[int]) -> None:
    """A client that always has something to ask: up to 100 tokens each time, and fewer in the end."""
    chosen = limits(KEY, tokens_per_minute=10_000)
    while True:
        try:
            found = gateway.try_reserve(chosen, 100, 0) or await gateway.reserve(chosen, 100, 0)
        except RateLimitExceeded:
            await clock.sleep(dice.uniform(0.5, 3))
            continue
        await clock.sleep(dice.uniform(0.2, 4))
        tokens = dice.randint(10, 100)
        found.settle(tokens, 0)
        used[int(found.since)] += tokens


@pytest.mark.parametrize("kind", ["on_wheel", "shared_redis"])
def test_200_streams_over_4_gateways_use_the_limit_up(kind: str, request: pytest.FixtureRequest) -> None:
    backend = request.getfixturevalue(kind)

    async def work() -> Counter[int]:
        clock = Clock()
        used: Counter[int] = Counter()
        async with backend.store(clock) as store:
            gateways = [limiter(number, store.lease, clock) for number in range(4)]
            async with asyncio.TaskGroup() as group:
                streams = [_stream(gateways[n % 4], random.Random(n), clock, used) for n in range(200)]
                running = [group.create_task(stream) for stream in streams]
                await passes(clock, 120, *gateways)
                for task in running:
                    task.cancel()
            for each in gateways:
                await each.close()
                assert each.fallbacks == 0
        return used

    used = asyncio.run(work())
    windows = [used[int(START) + minute * 60] for minute in range(2)]
    assert all(0.95 * 10_000 <= tokens <= 1.02 * 10_000 for tokens in windows), windows
