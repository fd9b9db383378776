"""Partitions that come and go, and what verification says of it."""

import asyncio
from datetime import date
from typing import Any

import pytest

from helixflow.core_rs import InvalidRequest
from helixflow.ledger import maintenance
from helixflow.ledger.record import encode
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer

from .support import DAY_US, NOON_US, PEPPER_KEY, Databases, ledger_options, opened, row

NOW = date(2026, 3, 17)


async def partitions(connection: Any) -> list[str]:
    return [each[0].removeprefix("requests_") for each in await connection.fetch(maintenance._PARTITIONS)]


async def turns(connection: Any, count: int) -> None:
    async with asyncio.timeout(10):
        while len(await partitions(connection)) != count:
            pass


def test_partitions_ahead_by_several_at_once(databases: Databases) -> None:
    target = databases.new()

    async def scenario() -> None:
        async with opened(target, pool_max=5) as pool:
            options = ledger_options()
            done = await asyncio.gather(
                *(maintenance.once(pool, options, PEPPER_KEY, now=date(2026, 11, 30)) for _ in range(5))
            )
            assert True in done
            async with pool.acquire() as connection:
                assert await partitions(connection) == ["2026_11", "2026_12", "2027_01"]
            assert await maintenance.once(pool, options, PEPPER_KEY, now=date(2026, 11, 30))

    asyncio.run(scenario())


def test_partitions_are_complete(on_wheel: Databases) -> None:
    # A partition that is attached must have the indexes and the key of the others.
    target = on_wheel.new()

    async def scenario() -> None:
        async with opened(target) as pool:
            await maintenance.once(pool, ledger_options(), PEPPER_KEY, now=NOW)
            async with pool.acquire() as connection:
                count = "SELECT count(*) FROM pg_indexes WHERE tablename = $1"
                assert await connection.fetchval(count, "requests_2026_03") == 4
                invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid AND indrelid = 'requests'::regclass"
                assert await connection.fetchval(invalid) == 0

    asyncio.run(scenario())


def test_old_months_go_and_the_rest_can_be_verified(databases: Databases) -> None:
    target = databases.new()
    rows = [row(NOON_US + n * DAY_US * 10 - DAY_US * 100) for n in range(12)]  # 2025-11-21 to 2026-03-11

    async def scenario() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            writer = Writer(pool, PEPPER_KEY)
            await writer.append("s", [encode(each) for each in rows])
            assert await maintenance.once(pool, ledger_options(), PEPPER_KEY, now=NOW)
            assert len(await partitions(connection)) == 7
            assert await maintenance.once(pool, ledger_options(keep_months=2), PEPPER_KEY, now=NOW)
            assert await partitions(connection) == ["2026_01", "2026_02", "2026_03", "2026_04", "2026_05"]
            left = await connection.fetchval("SELECT count(*) FROM requests")
            assert left == 7
            assert await connection.fetchval("SELECT sum(requests) FROM usage_daily") == 12
            found = await verify(connection, PEPPER_KEY)
            assert (found.days, found.rows, found.faults, len(found.dropped)) == (12, left, [], 5)

            # One that comes late, or again, is set aside by its gateway: nobody knows any more whether it was there.
            for late in (row(rows[0].at_us + 1), rows[0]):
                with pytest.raises(InvalidRequest, match="were dropped"):
                    await writer.append("s", [encode(late), encode(row(NOON_US))])
            assert await connection.fetchval("SELECT count(*) FROM requests") == left
            assert await connection.fetchval("SELECT sum(requests) FROM usage_daily") == 12
            found = await verify(connection, PEPPER_KEY)
            assert (found.days, found.rows, found.faults, len(found.dropped)) == (12, left, [], 5)

            # Nobody else may call rows dropped.
            forged = "UPDATE ledger_days SET dropped_sequence = sequence, dropped_hash = hash WHERE day = '2026-03-01'"
            await connection.execute(forged)
            await connection.execute("DELETE FROM requests WHERE at >= '2026-03-01' AND at < '2026-03-02'")
            report = await verify(connection, PEPPER_KEY)
            assert [(each.day, each.problem) for each in report.faults] == [
                ("2026-03-01", "the head of the chain was altered")
            ]

    asyncio.run(scenario())


def test_a_busy_month_is_dropped_later(on_wheel: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "DROP_WAIT_MS", 20)
    monkeypatch.setattr(maintenance, "RETRY_S", 0.01)
    monkeypatch.setattr(maintenance, "today", lambda: NOW)
    target = on_wheel.new()

    async def scenario() -> None:
        async with opened(target) as pool, pool.acquire() as reader, pool.acquire() as connection:
            await Writer(pool, PEPPER_KEY).append("s", [encode(row(NOON_US - 100 * DAY_US))])
            running = asyncio.create_task(maintenance.run(pool, ledger_options(keep_months=1), PEPPER_KEY))
            async with reader.transaction():
                await reader.fetch("SELECT * FROM requests")
                await turns(connection, 4)
                async with asyncio.timeout(10):
                    while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                        pass
                assert len(await partitions(connection)) == 4
                found = await connection.fetchrow("SELECT * FROM ledger_days")
                assert found["dropped_sequence"] == 0
            await turns(connection, 3)
            running.cancel()
            await asyncio.wait({running})
            found = await verify(connection, PEPPER_KEY)
            assert (found.days, found.rows, found.faults, len(found.dropped)) == (1, 0, [], 1)

    asyncio.run(scenario())
