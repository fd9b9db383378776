"""The stores: one rule, on PostgreSQL 18 and 15 and on Redis."""

import asyncio
import uuid
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.core_rs import Conflict, InvalidRequest
from helixflow.limits.model import MAX_LIMIT, Metric, window_start
from helixflow.limits.postgres import PostgresStore
from helixflow.limits.redis import RedisStore
from helixflow.limits.returned import give_back
from helixflow.limits.store import HOLD_S, KEEP_S, MAX_ITEMS, SKEW_S, Call, Item, LimitStore
from tests.ledger.support import begin

from .support import GATEWAYS, KEY, ORGANISATION, START, USER, Caller, Clock, Databases, ModelStore, Redis, item

Backend = Databases | Redis
MINUTE = Metric.TOKENS_PER_MINUTE


RULE: list[tuple[dict[str, int], int, int]] = [
    ({"need": 100}, 100, 900),
    ({"need": 1000}, 1000, 0),
    ({"need": 10, "want": 40}, 40, 960),
    ({"need": 10, "want": 500}, 62, 938),  # a sixteenth of the room is all that is given ahead
    ({"want": 500}, 62, 938),
    ({"need": 1001, "floor": 700}, 1000, 0),
    ({"need": 1001, "floor": 1000}, 1000, 0),
    ({"need": 1500, "floor": 1001}, 0, 1000),
    ({"need": 1001}, 0, 1000),
    ({"need": 10, "limit": 0, "floor": 10}, 0, 0),
    ({"held": 990, "need": 10}, 10, 0),
    ({"held": 2000, "need": 1, "floor": 1}, 0, 0),
    ({"held": 300, "spent": 600, "need": 100}, 100, 0),
    ({}, 0, 1000),
]


def test_the_rule(backend: Backend) -> None:
    async def work() -> None:
        async with backend.store(Clock()) as store:
            gateway = Caller(store, GATEWAYS[0])
            for number, (asked, granted, room) in enumerate(RULE):
                subject = f"{USER[:-4]}{number:04}"
                answer = await gateway(item(subject, MINUTE, **asked), item(subject, Metric.COST_PER_DAY, **asked))
                assert [(grant.granted, grant.room) for grant in answer.grants] == [(granted, room)] * 2, asked
            assert answer.now_ms == START * 1000

    asyncio.run(work())


def test_what_others_hold_and_used_counts(backend: Backend) -> None:
    async def work() -> None:
        async with backend.store(Clock()) as store:
            first, second = Caller(store, GATEWAYS[0]), Caller(store, GATEWAYS[1])
            assert (await first(item(need=600))).grants[0].granted == 600
            answer = await second(item(need=500, floor=100))
            assert answer.grants[0].granted == 400
            assert answer.gateways == 2
            await first(item(held=100, spent=300))
            assert (await second(item(held=400, need=200))).grants[0].granted == 200
            await first(item(held=0))
            assert (await second(item(held=0, spent=0))).grants[0].room == 700
            for other in (item(USER), item(metric=Metric.TOKENS_PER_DAY), item(window=int(START) - 60)):
                assert (await second(other)).grants[0].room == 1000

    asyncio.run(work())


def test_what_a_dead_gateway_held_at_a_time_goes_back(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixflow.limits.returned.MAX_ITEMS", 2)
    at_a_time = Metric.CONCURRENT_REQUESTS
    subjects = (KEY, USER, ORGANISATION)
    organisation, user, key = (uuid.UUID(subject.partition(":")[2]).bytes for subject in reversed(subjects))

    async def work() -> None:
        async with backend.store(Clock()) as store:
            dead, alive = Caller(store, GATEWAYS[0]), Caller(store, GATEWAYS[1])
            wanted = [item(subject, at_a_time, limit=10, need=10) for subject in subjects]
            assert [grant.granted for grant in (await dead(*wanted)).grants] == [10] * 3
            assert [grant.granted for grant in (await alive(*wanted)).grants] == [0] * 3
            gateway = uuid.UUID(GATEWAYS[0]).bytes
            begun = [begin(organisation=organisation, user=user, key=key, gateway=gateway) for _ in range(2)]
            await give_back(store.lease, [*begun, begin(organisation=None, user=None, key=None)])
            assert [grant.granted for grant in (await alive(*wanted)).grants] == [10] * 3

    asyncio.run(work())


def test_a_batch_counts_once(backend: Backend) -> None:
    async def work() -> None:
        async with backend.store(Clock()) as store:
            gateway = Caller(store, GATEWAYS[0])
            for metric in (MINUTE, Metric.TOKENS_PER_MONTH):
                batch = gateway.batch + 1
                for _ in range(3):
                    answer = await gateway(item(metric=metric, spent=100), batch=batch)
                    assert answer.grants[0].room == 900
                answer = await gateway(item(metric=metric, spent=100), batch=batch + 1)
                assert answer.grants[0].room == 800

    asyncio.run(work())


def test_a_grant_whose_answer_was_lost_comes_back(backend: Backend) -> None:
    async def work() -> None:
        async with backend.store(Clock()) as store:
            for metric in (MINUTE, Metric.CONCURRENT_REQUESTS, Metric.TOKENS_PER_DAY, Metric.COST_PER_MONTH):
                gateway = Caller(store, GATEWAYS[0])
                gateway.sequence = metric * 100
                await gateway(item(metric=metric, need=900))
                answer = await gateway(item(metric=metric, held=0, need=1000))
                assert answer.grants[0].granted == 1000

    asyncio.run(work())


def test_an_overtaken_call_changes_nothing(backend: Backend) -> None:
    async def work() -> None:
        async with backend.store(Clock()) as store:
            gateway = Caller(store, GATEWAYS[0])
            gateway.sequence = 7
            await gateway(item(held=100))
            for late in (7, 8):
                with pytest.raises(Conflict, match="after a later one"):
                    await store.lease(Call(GATEWAYS[0], late, 99, (item(held=0, spent=50),)))
            assert (await Caller(store, GATEWAYS[1])(item())).grants[0].room == 900

    asyncio.run(work())


def test_what_a_dead_gateway_held_lapses(backend: Backend) -> None:
    clock = Clock()
    metrics = (MINUTE, Metric.CONCURRENT_REQUESTS, Metric.TOKENS_PER_MONTH)

    async def work() -> None:
        async with backend.store(clock) as store:
            dead, other = Caller(store, GATEWAYS[0]), Caller(store, GATEWAYS[1])
            items = [item(metric=metric, held=800, spent=0 if metric == 3 else 100) for metric in metrics]
            await dead(*items)
            clock.now += HOLD_S - 0.001
            answer = await other(*(item(metric=metric) for metric in metrics))
            assert [grant.room for grant in answer.grants] == [100, 200, 100]
            assert answer.gateways == 2
            clock.now += 0.002
            answer = await other(*(item(metric=metric) for metric in metrics))
            assert [grant.room for grant in answer.grants] == [900, 1000, 900]
            assert answer.gateways == 1
            # It was only paused: what it really holds counts again.
            answer = await dead(*items, batch=dead.batch)
            answer = await other(*(item(metric=metric) for metric in metrics))
            assert [grant.room for grant in answer.grants] == [100, 200, 100]

    asyncio.run(work())


@pytest.mark.parametrize("metric", [MINUTE, Metric.TOKENS_PER_DAY, Metric.COST_PER_MONTH])
def test_windows_beyond_the_skew_grant_nothing(backend: Backend, metric: Metric) -> None:
    async def room(store: LimitStore, window: int) -> int:
        answer = await Caller(store, str(uuid.uuid4()))(item(metric=metric, window=window, need=1))
        return answer.grants[0].granted

    async def work() -> None:
        clock = Clock(START)
        async with backend.store(clock) as store:
            now = window_start(metric, START)
            after = window_start(metric, now + 32 * 86400) if metric.budget else now + 60
            if metric is Metric.TOKENS_PER_DAY:
                after = now + 86400
            clock.now = after - SKEW_S - 0.5
            assert await room(store, after) == 0
            clock.now = after - SKEW_S
            assert await room(store, after) == 1
            clock.now = after + SKEW_S - 0.5
            assert await room(store, now) == 1
            clock.now = after + SKEW_S
            assert await room(store, now) == 0

    asyncio.run(work())


def test_big_numbers_are_exact(backend: Backend) -> None:
    async def work() -> None:
        async with backend.store(Clock()) as store:
            first, second = Caller(store, GATEWAYS[0]), Caller(store, GATEWAYS[1])
            for metric, limit in ((MINUTE, 10**15 + 1), (Metric.COST_PER_MONTH, MAX_LIMIT)):
                answer = await first(item(metric=metric, limit=limit, need=limit - 3, spent=1))
                assert (answer.grants[0].granted, answer.grants[0].room) == (limit - 3, 2)
                answer = await second(item(metric=metric, limit=limit, need=3, floor=1))
                assert answer.grants[0].granted == 2

    asyncio.run(work())


def test_a_call_of_many_items(backend: Backend) -> None:
    async def work() -> None:
        async with backend.store(Clock()) as store:
            gateway = Caller(store, GATEWAYS[0])
            many = [item(f"{USER[:-6]}{number:06}", need=number) for number in range(MAX_ITEMS)]
            answer = await gateway(*many)
            assert [grant.granted for grant in answer.grants] == list(range(MAX_ITEMS))
            assert (await gateway()).gateways == 1

    asyncio.run(work())


@pytest.mark.parametrize(
    "wrong",
    [
        [item(), item()],
        [item(limit=MAX_LIMIT + 1)],
        [item(window=int(START) + 1)],
        [item(metric=Metric.CONCURRENT_REQUESTS, window=60)],
        [item(metric=Metric.COST_PER_MONTH, window=1 << 50)],
        [item(f"{USER[:-6]}{number:06}") for number in range(MAX_ITEMS + 1)],
    ],
)
def test_calls_that_no_gateway_makes(on_wheel: Databases, shared_redis: Redis, wrong: list[Item]) -> None:
    async def work() -> None:
        for backend in (on_wheel, shared_redis):
            async with backend.store(Clock()) as store:
                with pytest.raises(InvalidRequest):
                    await Caller(store, GATEWAYS[0])(*wrong)

    asyncio.run(work())


def test_gateways_at_once_never_pass_the_limit(backend: Backend) -> None:
    subjects = [f"{ORGANISATION[:-2]}{number:02}" for number in range(4)]

    async def gateway(store: LimitStore, number: int, held: dict[str, int]) -> None:
        caller = Caller(store, GATEWAYS[number])
        for turn in range(12):
            order = subjects if (turn + number) % 2 else subjects[::-1]
            items = [item(each, limit=500, need=13, floor=1, held=held[each]) for each in order]
            items += [item(each, Metric.TOKENS_PER_DAY, limit=500, held=1) for each in order]
            answer = await caller(*items)
            for each, grant in zip(order, answer.grants, strict=False):
                held[each] += grant.granted

    async def work() -> None:
        async with backend.store(Clock()) as store:
            held: list[dict[str, int]] = [dict.fromkeys(subjects, 0) for _ in range(8)]
            await asyncio.gather(*(gateway(store, number, held[number]) for number in range(8)))
            for each in subjects:
                assert sum(one[each] for one in held) == 500

    asyncio.run(work())


_ITEMS = st.lists(
    st.builds(
        item,
        st.sampled_from([USER, ORGANISATION]),
        st.sampled_from([MINUTE, Metric.CONCURRENT_REQUESTS, Metric.COST_PER_DAY]),
        limit=st.sampled_from([0, 1, 100, 10**15]),
        floor=st.integers(0, 20),
        need=st.integers(0, 120),
        want=st.integers(0, 300),
        held=st.integers(0, 120),
        spent=st.integers(0, 30),
    ),
    max_size=4,
    unique_by=lambda each: (each.subject, each.metric),
)
_CALLS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(-1, 2), st.integers(0, 1), st.sampled_from([0.0, 0.4, 9.0]), _ITEMS),
    max_size=15,
)


def _agree(calls: list[tuple[int, int, int, float, list[Item]]], open_store: Callable[..., object]) -> None:
    async def outcome(store: LimitStore, call: Call) -> object:
        try:
            return await store.lease(call)
        except Conflict:
            return "overtaken"

    async def work() -> None:
        clock = Clock()
        model = ModelStore(clock)
        async with open_store(clock) as store:  # type: ignore[attr-defined]
            sequences, batches = [5, 5, 5], [5, 5, 5]
            for gateway, step, fresh, pause, items in calls:
                clock.now += pause
                sequences[gateway] += step
                batches[gateway] += fresh
                call = Call(GATEWAYS[gateway], sequences[gateway], batches[gateway], tuple(items))
                assert await outcome(store, call) == await outcome(model, call)

    asyncio.run(work())


_PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_PROPERTY
@given(_CALLS)
def test_redis_agrees_with_the_model(shared_redis: Redis, calls: list[tuple[int, int, int, float, list[Item]]]) -> None:
    _agree(calls, shared_redis.store)


@_PROPERTY
@given(_CALLS)
def test_postgres_agrees_with_the_model(
    on_wheel: Databases, calls: list[tuple[int, int, int, float, list[Item]]]
) -> None:
    _agree(calls, on_wheel.store)


def test_the_past_is_removed(on_wheel: Databases, on_debian: Databases) -> None:
    async def count(store: PostgresStore) -> list[int]:
        async with store._pool.acquire() as connection:
            tables = ("limit_counters", "limit_budgets", "limit_holds", "limit_gateways")
            return [await connection.fetchval(f"SELECT count(*) FROM {table}") for table in tables]

    async def work(databases: Databases) -> None:
        clock = Clock()
        async with databases.store(clock) as store:
            assert isinstance(store, PostgresStore)
            await Caller(store, GATEWAYS[0])(*(item(metric=metric, held=1) for metric in Metric))
            clock.now += 60 + KEEP_S - 0.1
            await store.purge()
            assert await count(store) == [2, 4, 0, 1]  # requests and tokens of the minute; nobody runs any more
            clock.now += 0.2
            await store.purge()
            assert await count(store) == [0, 4, 0, 1]
            clock.now += 86_400
            await store.purge()
            assert await count(store) == [0, 2, 0, 0]
            clock.now += 31 * 86_400
            await store.purge()
            assert await count(store) == [0, 0, 0, 0]

    for databases in (on_wheel, on_debian):
        asyncio.run(work(databases))


def test_keys_of_redis_expire(shared_redis: Redis) -> None:
    async def work() -> None:
        async with shared_redis.store(Clock()) as store:
            assert isinstance(store, RedisStore)
            await Caller(store, GATEWAYS[0])(*(item(metric=metric, held=1) for metric in Metric))
            keys = [str(key).encode() if isinstance(key, str) else key for key in await store._redis.keys("*")]
            left = {key.decode(): await store._redis.ttl(key) for key in keys}
            assert len(left) == 9
            assert all(0 < seconds <= 32 * 86_400 for seconds in left.values())
            assert left[f"helixflow:limit:key:{'0' * 8}-0000-0000-0000-{1:012}:2:{int(START)}"] <= 60 + KEEP_S

    asyncio.run(work())


def test_a_crash_forgets_minutes_but_no_budget(on_debian: Databases) -> None:
    async def work() -> None:
        async with on_debian.pool() as pool, pool.acquire() as connection:
            query = r"SELECT relname, relpersistence FROM pg_class WHERE relname LIKE 'limit\__%s'"
            rows = await connection.fetch(query)
            kept = {row["relname"] for row in rows if row["relpersistence"] == b"p"}
            assert kept == {"limit_budgets", "limit_gateways"}
            assert {row["relname"] for row in rows} - kept == {"limit_counters", "limit_holds"}

    asyncio.run(work())
