"""Whoever touches a row is found out."""

import asyncio
from datetime import date
from typing import Any

import pytest

from helixflow.ledger.chain import chain_key
from helixflow.ledger.faults import LedgerFault, Report
from helixflow.ledger.record import Row, encode
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer

from .support import DAY_US, NOON_US, PEPPER_KEY, Databases, opened, row

COLUMNS = [
    "status = status + 1", "organisation_id = NULL", "user_id = gen_random_uuid()", "key_id = NULL",
    "gateway = gen_random_uuid()", "prompt_tokens = prompt_tokens - 1", "cached_tokens = 1", "completion_tokens = 0",
    "queue_us = 1", "first_token_us = 1", "total_us = 1", "cost = cost + 1", "model = 'other'", "endpoint = ''",
    "finish = 'length'", "error = 'x'", "client = '::1'", "request_id = ''", "hash = sha256('x')",
    "at = at + interval '1 microsecond'",
]  # fmt: skip
SECOND = "WHERE (at AT TIME ZONE 'UTC')::date = '2026-03-02' AND sequence"


def change(databases: Databases, *statements: str, first: date | None = None, last: date | None = None) -> Report:
    """What verification says of three days with five rows each once somebody has been at them."""
    target = databases.new()
    ends: list[dict[str, Any]] = [
        {"finish": "stop"},
        {"finish": "error", "error": "unavailable"},
        {"finish": "cancelled", "status": 499},
    ]
    rows = [row(NOON_US + n * DAY_US // 5 - DAY_US // 2, **ends[n % 3]) for n in range(15)]

    async def scenario() -> Report:
        async with opened(target) as pool:
            await Writer(pool, PEPPER_KEY).append("s", [encode(each) for each in rows])
            async with pool.acquire() as connection:
                for statement in statements:
                    await connection.execute(statement)
                return await verify(connection, PEPPER_KEY, first, last)

    return asyncio.run(scenario())


def fault(databases: Databases, *statements: str) -> LedgerFault:
    report = change(databases, *statements)
    assert len(report.faults) == 1
    assert report.faults[0].day == "2026-03-02"
    return report.faults[0]


def test_nothing_happened(databases: Databases) -> None:
    assert change(databases) == Report(3, 15, [])


def test_one_day(on_wheel: Databases) -> None:
    day = date(2026, 3, 2)
    assert change(on_wheel, first=day, last=day) == Report(1, 5, [])
    assert change(on_wheel, f"DELETE FROM requests {SECOND} = 1", first=date(2026, 3, 3)) == Report(1, 5, [])
    assert change(on_wheel, first=date(2030, 1, 1), last=date(2030, 2, 1)) == Report(0, 0, [])


def test_an_empty_ledger(on_wheel: Databases) -> None:
    target = on_wheel.new()

    async def scenario() -> Report:
        async with opened(target) as pool, pool.acquire() as connection:
            return await verify(connection, PEPPER_KEY)

    assert asyncio.run(scenario()) == Report(0, 0, [])


@pytest.mark.parametrize("assignment", COLUMNS)
def test_a_row_was_altered(on_wheel: Databases, assignment: str) -> None:
    found = fault(on_wheel, f"UPDATE requests SET {assignment} {SECOND} = 3")
    assert found.sequence == 3
    assert "altered" in found.problem


@pytest.mark.parametrize("sequence", [1, 3, 5])
def test_a_row_was_removed(on_wheel: Databases, sequence: int) -> None:
    found = fault(on_wheel, f"DELETE FROM requests {SECOND} = {sequence}")
    assert (found.sequence, found.id) == (sequence, "")
    assert "removed" in found.problem


def test_the_last_row_was_removed_and_the_head_put_back(on_wheel: Databases) -> None:
    found = fault(
        on_wheel,
        f"UPDATE ledger_days SET sequence = 4, hash = (SELECT hash FROM requests {SECOND} = 4) "
        "WHERE day = '2026-03-02'",
        f"DELETE FROM requests {SECOND} = 5",
    )
    assert "head" in found.problem


@pytest.mark.parametrize("sequence", [0, 3, 6])
def test_a_row_was_added(on_wheel: Databases, sequence: int) -> None:
    found = fault(
        on_wheel,
        f"CREATE TEMPORARY TABLE added AS SELECT * FROM requests {SECOND} = 3",
        f"UPDATE added SET id = gen_random_uuid(), sequence = {sequence}",
        "INSERT INTO requests TABLE added",
    )
    assert "added" in found.problem or "another one stood here" in found.problem


def test_rows_were_moved(on_wheel: Databases) -> None:
    found = fault(on_wheel, f"UPDATE requests SET sequence = 7 - sequence {SECOND} IN (3, 4)")
    assert found.sequence == 3


def test_a_row_was_moved_to_another_day(on_wheel: Databases) -> None:
    report = change(on_wheel, f"UPDATE requests SET at = at + interval '1 day' {SECOND} = 2")
    assert [each.day for each in report.faults] == ["2026-03-02", "2026-03-03"]


def test_a_day_without_a_head(on_wheel: Databases) -> None:
    assert "no head" in fault(on_wheel, "DELETE FROM ledger_days WHERE day = '2026-03-02'").problem
    for at in ("2025-12-31", "2026-03-05"):
        month = at[:7] + "-01"
        report = change(
            on_wheel,
            f"SELECT requests_partition('{month}')",
            f"CREATE TEMPORARY TABLE added AS SELECT * FROM requests LIMIT 1; UPDATE added SET at = '{at}'; "
            "INSERT INTO requests TABLE added",
        )
        assert [each.day for each in report.faults] == [at]


@pytest.mark.parametrize("table", ["usage_daily", "usage_keys", "usage_models"])
def test_usage_was_altered(on_wheel: Databases, table: str) -> None:
    columns = "day, gen_random_uuid(), NULL, NULL, model, endpoint, 1, 0, 0, 0, 0, 0, 0"
    for statement in (
        f"UPDATE {table} SET cost = cost - 1 WHERE day = '2026-03-02'",
        f"DELETE FROM {table} WHERE day = '2026-03-02'",
        f"INSERT INTO {table} SELECT {columns} FROM {table} WHERE day = '2026-03-02'",
    ):
        assert "day's usage" in fault(on_wheel, statement).problem


def test_usage_of_a_month_was_altered(on_wheel: Databases) -> None:
    for statement in ("UPDATE usage_monthly SET requests = 14", "DELETE FROM usage_monthly"):
        report = change(on_wheel, statement)
        assert [each.day for each in report.faults] == ["2026-03-01"]
        assert "month's usage" in report.faults[0].problem


def test_every_day_tells_its_own(on_wheel: Databases) -> None:
    report = change(on_wheel, "UPDATE requests SET cost = 0 WHERE sequence IN (2, 4)")
    assert [(each.day, each.sequence) for each in report.faults] == [
        ("2026-03-01", 2),
        ("2026-03-02", 2),
        ("2026-03-03", 2),
    ]


def test_another_key_verifies_nothing(on_wheel: Databases) -> None:
    target = on_wheel.new()
    one: Row = row(NOON_US)

    async def scenario() -> Report:
        async with opened(target) as pool:
            await Writer(pool, chain_key(b"a" * 32)).append("s", [encode(one)])
            async with pool.acquire() as connection:
                return await verify(connection, chain_key(b"b" * 32))

    assert [each.chain for each in asyncio.run(scenario()).faults] == ["ledger", "checkpoint"]
