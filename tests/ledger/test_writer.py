"""Writing rows: once each, whoever sends them, however often, into whatever month."""

import asyncio
import random
from datetime import date, datetime, timedelta
from typing import Any

import msgspec
import pytest

from helixflow.core_rs import InvalidRequest, Unavailable
from helixflow.ledger.content import content
from helixflow.ledger.record import COUNT_MAX, UNKNOWN, UNKNOWN_ERROR, Row, decode, encode, new_id
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer

from .support import DAY_US, GATEWAY, KEY, NOON_US, ORGANISATION, PEPPER_KEY, USER, Databases, begin, opened, row

NOUGHT = {"prompt_tokens": 0, "completion_tokens": 0, "cost": 0}


def encoded(rows: list[Row]) -> list[bytes]:
    return [encode(each) for each in rows]


async def faults(connection: Any) -> list[object]:
    return list((await verify(connection, PEPPER_KEY)).faults)


def test_rows_are_written_once(databases: Databases) -> None:
    target = databases.new()

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            data = encoded([row(NOON_US + n * DAY_US * 9) for n in range(20)])
            assert await writer.append("s", data[:12]) == (12, 0)
            assert await writer.append("s", data[:12]) == (0, 12)
            assert await writer.append("s", [*data[5:], *data[5:]]) == (8, 7)
            assert await Writer(pool, PEPPER_KEY).append("t", data) == (0, 20)
            assert await writer.append("s", []) == (0, 0)
            async with pool.acquire() as connection:
                report = await verify(connection, PEPPER_KEY)
                assert (report.days, report.rows, report.faults) == (20, 20, [])
                for table in ("usage_daily", "usage_keys", "usage_models", "usage_monthly"):
                    assert await connection.fetchval(f"SELECT sum(requests) FROM {table}") == 20

    asyncio.run(scenario())


def test_every_column(databases: Databases) -> None:
    target = databases.new()
    one = row(
        NOON_US + 123_456,
        {"model": "größe'; DROP TABLE requests; --", "client": "2001:db8::1", "request_id": 'tab\t"quote"\n'},
        finish="length", error="engine_failed", status=500, prompt_tokens=1, cached_tokens=2, completion_tokens=3,
        queue_us=4, first_token_us=5, total_us=6, cost=COUNT_MAX,
    )  # fmt: skip
    anonymous = row(NOON_US, {"organisation": None, "user": None, "key": None, "model": ""})

    async def scenario() -> None:
        async with opened(target) as pool:
            assert await Writer(pool, PEPPER_KEY).append("s", encoded([one, anonymous])) == (2, 0)
            async with pool.acquire() as connection:
                first, second = await connection.fetch("SELECT * FROM requests ORDER BY sequence")
                assert await faults(connection) == []
        found = {name: getattr(value, "bytes", value) for name, value in first.items()}
        del found["hash"]
        assert found == {
            "id": one.id, "at": datetime.fromisoformat("2026-03-01T12:00:00.123456+00:00"), "sequence": 1,
            "status": 500,
            "organisation_id": ORGANISATION.bytes, "user_id": USER.bytes, "key_id": KEY.bytes, "gateway": GATEWAY.bytes,
            "prompt_tokens": 1, "cached_tokens": 2, "completion_tokens": 3, "queue_us": 4, "first_token_us": 5,
            "total_us": 6, "cost": COUNT_MAX, "model": one.model, "endpoint": "/v1/chat/completions",
            "finish": "length", "error": "engine_failed", "client": "2001:db8::1", "request_id": one.request_id,
        }  # fmt: skip
        assert (second["organisation_id"], second["user_id"], second["key_id"]) == (None, None, None)

    asyncio.run(scenario())


def test_usage_is_the_sum_of_new_rows(on_wheel: Databases) -> None:
    target = on_wheel.new()
    rows = [
        row(NOON_US, prompt_tokens=100, cached_tokens=40, completion_tokens=7, cost=5),
        row(NOON_US + 1, status=500, error="internal", cost=1),
        row(NOON_US + 2, error="engine_failed"),
        begin(NOON_US + 3).interrupted(),
        row(NOON_US + 4, {"organisation": None, "user": None, "key": None}),
        row(NOON_US + 5, {"organisation": None, "user": None, "key": None}),
        row(NOON_US + DAY_US),
    ]

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            await writer.append("s", encoded(rows[:3]))
            await writer.append("s", encoded(rows[1:]))
            async with pool.acquire() as connection:
                daily = await connection.fetch(
                    "SELECT day, user_id, requests, errors, interrupted, prompt_tokens, cached_tokens, "
                    "completion_tokens, cost FROM usage_daily ORDER BY day, user_id NULLS LAST"
                )
                monthly, models, keys = [
                    await connection.fetch(
                        f"SELECT day, user_id, model, requests FROM {table} ORDER BY day, organisation_id NULLS LAST"
                    )
                    for table in ("usage_monthly", "usage_models", "usage_keys")
                ]
        first, second = date(2026, 3, 1), date(2026, 3, 2)
        assert [*map(tuple, daily)] == [
            (first, USER, 4, 2, 1, 120, 40, 17, 1006),
            (first, None, 2, 0, 0, 20, 0, 10, 2000),
            (second, USER, 1, 0, 0, 10, 0, 5, 1000),
        ]
        assert [*map(tuple, monthly)] == [(first, USER, "demo", 5), (first, None, "demo", 2)]
        assert [*map(tuple, models)] == [
            (first, None, "demo", 4),
            (first, None, "demo", 2),
            (second, None, "demo", 1),
        ]
        assert [*map(tuple, keys)] == [(first, USER, "", 4), (first, None, "", 2), (second, USER, "", 1)]

    asyncio.run(scenario())


def test_names_that_no_model_has_are_counted_as_one(databases: Databases) -> None:
    target = databases.new()
    invented = [
        row(NOON_US + n, {"model": f"gpt-{n}"}, finish="", error=UNKNOWN_ERROR, status=404, **NOUGHT) for n in range(30)
    ]
    known = [row(NOON_US + 100 + n) for n in range(3)]

    async def scenario() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            await Writer(pool, PEPPER_KEY).append("s", encoded([*invented, *known]))
            for table in ("usage_daily", "usage_models", "usage_monthly"):
                found = await connection.fetch(f"SELECT model, requests, errors FROM {table} ORDER BY 1")
                assert [tuple(each) for each in found] == [(UNKNOWN, 30, 30), ("demo", 3, 0)], table
            assert await connection.fetchval("SELECT count(DISTINCT model) FROM requests") == 31
            assert await faults(connection) == []
            # A release before this one counted each name, perhaps on the same day.
            for table in ("usage_daily", "usage_models", "usage_monthly"):
                names = [
                    name for name in await columns(connection, table) if name not in ("model", "requests", "errors")
                ]
                listed = ", ".join(names)
                await connection.execute(f"UPDATE {table} SET requests = 29, errors = 29 WHERE model = '{UNKNOWN}'")
                await connection.execute(
                    f"INSERT INTO {table} (model, requests, errors, {listed}) "
                    f"SELECT 'gpt-7', 1, 1, {listed} FROM {table} WHERE model = '{UNKNOWN}'"
                )
            assert await faults(connection) == [], "the tokens are nought"
            await connection.execute(f"UPDATE usage_daily SET cost = cost + 1 WHERE model = '{UNKNOWN}'")
            assert len(await faults(connection)) == 1

    asyncio.run(scenario())


async def columns(connection: Any, table: str) -> list[str]:
    query = "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 ORDER BY attnum"
    return [each[0] for each in await connection.fetch(query, f"helixflow.{table}")]


def test_late_rows_of_earlier_days_and_months(on_wheel: Databases) -> None:
    target = on_wheel.new()
    clock = random.Random(3)
    rows = [row(NOON_US + clock.randrange(-90, 90) * DAY_US // 2) for _ in range(300)]

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            for start in range(0, 300, 25):
                assert await writer.append("s", encoded(rows[start : start + 25])) == (25, 0)
            async with pool.acquire() as connection:
                assert await faults(connection) == []
                partitions = await connection.fetch("SELECT DISTINCT tableoid::regclass::text FROM requests ORDER BY 1")
                assert [each[0] for each in partitions] == [
                    "requests_2026_01", "requests_2026_02", "requests_2026_03", "requests_2026_04",
                ]  # fmt: skip

    asyncio.run(scenario())


def test_writers_at_once(databases: Databases) -> None:
    # The same batches from everywhere, over two months that nobody has made a partition for.
    target = databases.new()
    rows = [row(NOON_US + 25 * DAY_US + n * DAY_US // 10) for n in range(120)]
    batches = [encoded(rows[start : start + 20]) for start in range(0, 120, 10)]

    async def scenario() -> None:
        async with opened(target, pool_max=6) as pool:
            chance = random.Random(5)

            async def work() -> int:
                writer = Writer(pool, PEPPER_KEY)
                written = 0
                for batch in chance.sample(batches, len(batches)):
                    written += (await writer.append("s", batch))[0]
                return written

            assert sum(await asyncio.gather(*(work() for _ in range(6)))) == 120
            async with pool.acquire() as connection:
                assert await connection.fetchval("SELECT count(*) FROM requests") == 120
                assert await connection.fetchval("SELECT sum(requests) FROM usage_monthly") == 120
                assert await faults(connection) == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no record"),
        (b"\xc1garbage", "no record"),
        (encode(begin()), "no record"),
        (encode(msgspec.structs.replace(row(), id=new_id(NOON_US))), "time of the request"),
        (encode(row(begun={"model": "nul\0"})), "NUL"),
        (encode(row(cost=-1)), "no record"),
    ],
)
def test_what_can_never_be_written_is_named(on_wheel: Databases, data: bytes, message: str) -> None:
    target = on_wheel.new()

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            with pytest.raises(InvalidRequest, match=message) as refused:
                await writer.append("s", [encode(row()), data, encode(row())])
            assert refused.value.param == "records[1]"
            async with pool.acquire() as connection:
                assert await connection.fetchval("SELECT count(*) FROM requests") == 0

    asyncio.run(scenario())


def test_a_partition_that_goes_is_made_again(on_wheel: Databases) -> None:
    target = on_wheel.new()

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            await writer.append("s", [encode(row(NOON_US))])
            async with pool.acquire() as connection:
                await connection.execute("DROP TABLE requests_2026_03")
            assert await writer.append("s", [encode(row(NOON_US + 1))]) == (1, 0)

    asyncio.run(scenario())


def test_a_batch_is_all_or_nothing(on_wheel: Databases) -> None:
    # The roll-up fails after the rows were written: nothing of them may stay, and the batch must come again.
    target = on_wheel.new()

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            one = encode(row(NOON_US))
            async with pool.acquire() as connection:
                await connection.execute("ALTER TABLE usage_monthly RENAME TO elsewhere")
                with pytest.raises(Unavailable):
                    await writer.append("s", [one])
                assert await connection.fetchval("SELECT count(*) FROM requests") == 0
                assert await connection.fetchval("SELECT sum(sequence) FROM ledger_days") == 0
                assert await connection.fetchval("SELECT count(*) FROM usage_daily") == 0
                await connection.execute("ALTER TABLE elsewhere RENAME TO usage_monthly")
            assert await writer.append("s", [one]) == (1, 0)

    asyncio.run(scenario())


def test_a_database_that_is_away(on_wheel: Databases) -> None:
    target = on_wheel.new()

    async def scenario() -> None:
        async with opened(target, pool_min=0) as pool:
            writer = Writer(pool, PEPPER_KEY)
            one = encode(row(NOON_US))
            assert await writer.append("s", [one]) == (1, 0)
            async with pool.acquire() as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND datname = current_database() AND usename = current_user"
                )
            results = []
            for _ in range(20):
                try:
                    results.append(await writer.append("s", [one]))
                except Unavailable:
                    continue
            assert set(results) == {(0, 1)}

    asyncio.run(scenario())


def test_texts_are_stored_once(on_wheel: Databases) -> None:
    target = on_wheel.new()
    begun = begin(NOON_US)
    kept = content(begun, "my number is 4111111111111111", "thanks\0", (r"\d{16}",), 30)
    assert kept is not None
    ended = begun.row(finish="stop")

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            for expected in ((1, 0), (0, 1)):
                assert await writer.append("s", [encode(ended), encode(kept)]) == expected
            async with pool.acquire() as connection:
                found = await connection.fetchrow("SELECT * FROM contents")
        assert (found["id"].bytes, found["organisation_id"]) == (begun.id, ORGANISATION)
        assert (found["prompt"], found["answer"]) == ("my number is [redacted]", "thanks\ufffd")
        assert found["expires_at"] - found["at"] == timedelta(days=30)

    asyncio.run(scenario())


def test_what_arrives_is_what_was_sent() -> None:
    one = row()
    assert decode(encode(one)) == one
