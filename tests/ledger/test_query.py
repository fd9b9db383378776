"""Usage and pages of requests, against a sum by hand."""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from datetime import date, timedelta
from typing import Any

import msgspec
import pytest

from helixflow.core_rs import InvalidRequest
from helixflow.db.target import Target
from helixflow.ledger import query
from helixflow.ledger.query import LedgerRow, UsageRow
from helixflow.ledger.record import Row, day_of, encode
from helixflow.ledger.writer import Writer

from .support import DAY_US, NOON_US, PEPPER_KEY, Databases, opened, row

ORGANISATIONS = [uuid.UUID(int=n) for n in (1, 2)]
USERS = [uuid.UUID(int=n) for n in (11, 12, 13)]
KEYS = [uuid.UUID(int=n) for n in range(21, 26)]
MODELS = ["demo", "other", "'; DROP TABLE usage_daily; --"]
SETUP = [
    *(f"INSERT INTO organisations (id, name) VALUES ('{each}', 'organisation {each.int}')" for each in ORGANISATIONS),
    *(
        f"INSERT INTO users (id, organisation_id, email, role) VALUES ('{each}', '{ORGANISATIONS[0]}', "
        f"'user{each.int}@example.org', 'member')"
        for each in USERS[:2]  # the third is unknown: its row is gone, its usage is not
    ),
    *(
        f"INSERT INTO api_keys (id, user_id, digest, prefix, name) VALUES ('{each}', '{USERS[0]}', "
        f"sha256('{each}'), 'hf-', 'key {each.int}')"
        for each in KEYS[:4]
    ),
]
FIRST, LAST = date(2026, 1, 10), date(2026, 4, 20)


@dataclass
class Filled:
    target: Target
    rows: list[Row]


def made(chance: random.Random) -> Row:
    key = chance.randrange(6)
    who: dict[str, Any] = {"organisation": None, "user": None, "key": None}
    if key < 5:
        user = USERS[key % 3]
        who = {"organisation": ORGANISATIONS[key % 2].bytes, "user": user.bytes, "key": KEYS[key].bytes}
    days = (LAST - FIRST).days
    at_us = NOON_US + ((FIRST - date(2026, 3, 1)).days + chance.randint(0, days)) * DAY_US + chance.randrange(10**9)
    return row(
        at_us,
        {"model": chance.choice(MODELS), "endpoint": chance.choice(["/a", "/b"]), **who},
        status=chance.choice([200, 200, 400, 499, 500]),
        finish=chance.choice(["stop", "interrupted", "cancelled"]),
        prompt_tokens=chance.randrange(1000),
        cached_tokens=chance.randrange(100),
        completion_tokens=chance.randrange(1000),
        cost=chance.randrange(10**6),
    )


@pytest.fixture(scope="module")
def filled(on_wheel: Databases) -> Filled:
    chance = random.Random(11)
    rows = [made(chance) for _ in range(3000)]
    target = on_wheel.own()

    async def fill() -> None:
        async with opened(target) as pool:
            await Writer(pool, PEPPER_KEY).append("s", [encode(each) for each in rows])
            async with pool.acquire() as connection:
                for statement in SETUP:
                    await connection.execute(statement)

    asyncio.run(fill())
    return Filled(target, rows)


def ask(filled: Filled, work: Callable[[Any], Awaitable[Any]]) -> Any:
    async def scenario() -> Any:
        async with opened(filled.target) as pool, pool.acquire() as connection:
            return await work(connection)

    return asyncio.run(scenario())


def text(value: bytes | None) -> str:
    return str(uuid.UUID(bytes=value)) if value else ""


def group_of(each: Row) -> dict[str, str]:
    return {
        "day": day_of(each.at_us).isoformat(),
        "model": each.model,
        "endpoint": each.endpoint,
        "key": text(each.key),
        "user": text(each.user),
        "organisation": text(each.organisation),
    }


def by_hand(rows: list[Row], groups: list[str]) -> dict[tuple[str, ...], Counter[str]]:
    sums: dict[tuple[str, ...], Counter[str]] = {}
    for each in rows:
        counter = sums.setdefault(tuple(group_of(each)[name] for name in query.GROUPS if name in groups), Counter())
        counter["requests"] += 1
        counter["errors"] += each.status >= 400 and each.finish != "cancelled"
        counter["interrupted"] += each.finish == "interrupted"
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "cost"):
            counter[name] += getattr(each, name)
    return sums


def as_sums(found: list[UsageRow], groups: list[str]) -> dict[tuple[str, ...], Counter[str]]:
    columns = {"key": "key_id", "user": "user_id", "organisation": "organisation_id"}
    names = [columns.get(name, name) for name in query.GROUPS if name in groups]
    counts = [field.name for field in fields(UsageRow) if field.type is int]
    sums = {
        tuple(getattr(each, name) for name in names): Counter({name: getattr(each, name) for name in counts})
        for each in found
    }
    assert len(sums) == len(found)
    return sums


PERIODS = [
    (FIRST, LAST),
    (date(2026, 2, 1), date(2026, 2, 28)),
    (date(2026, 1, 1), date(2026, 4, 30)),
    (date(2026, 2, 1), date(2026, 4, 20)),
    (date(2026, 1, 15), date(2026, 3, 31)),
    (date(2026, 2, 10), date(2026, 3, 9)),
    (date(2026, 3, 5), date(2026, 3, 5)),
    (date(2026, 2, 1), date(2026, 4, 19)),
    (date(2027, 1, 1), date(2027, 1, 2)),
]
QUESTIONS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["model"], {}),
    (["key"], {}),
    (["user"], {}),
    (["organisation"], {}),
    (["endpoint", "model"], {}),
    (["day", "key"], {}),
    (["key", "model"], {}),
    (list(query.GROUPS), {}),
    (["key"], {"organisation_id": ORGANISATIONS[0]}),
    (["user"], {"model": MODELS[2]}),
    (["day"], {"key_id": KEYS[1]}),
    (["model"], {"user_id": USERS[2]}),
    (
        ["organisation"],
        {"user_id": USERS[0], "key_id": KEYS[0], "model": MODELS[0], "organisation_id": ORGANISATIONS[0]},
    ),
    (["user"], {"key_id": uuid.UUID(int=99)}),
]


def test_usage(filled: Filled) -> None:
    async def work(connection: Any) -> None:
        for first, last in PERIODS:
            for groups, filters in QUESTIONS:
                rows = [each for each in filled.rows if first <= day_of(each.at_us) <= last]
                for name, value in filters.items():
                    wanted = getattr(value, "bytes", value)
                    rows = [each for each in rows if getattr(each, name.removesuffix("_id")) == wanted]
                found = await query.usage(connection, first=first, last=last, group_by=groups, **filters)
                due = by_hand(rows, groups or ["day"])
                assert as_sums(found, groups or ["day"]) == due, (first, last, groups, filters)

    ask(filled, work)


def test_names_are_those_of_now(filled: Filled) -> None:
    found = ask(filled, lambda c: query.usage(c, first=FIRST, last=LAST, group_by=["key", "user", "organisation"]))
    names = {(each.key_id, each.key, each.user, each.organisation) for each in found}
    assert names == {
        (str(KEYS[0]), "key 21", "user11@example.org", "organisation 1"),
        (str(KEYS[1]), "key 22", "user12@example.org", "organisation 2"),
        (str(KEYS[2]), "key 23", "", "organisation 1"),
        (str(KEYS[3]), "key 24", "user11@example.org", "organisation 2"),
        (str(KEYS[4]), "", "user12@example.org", "organisation 1"),
        ("", "", "", ""),
    }
    days = ask(filled, lambda c: query.usage(c, first=FIRST, last=LAST))
    assert [each.day for each in days] == sorted(each.day for each in days)
    assert {(each.model, each.key_id) for each in days} == {("", "")}


def test_what_cannot_be_asked(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(connection: Any) -> None:
        with pytest.raises(InvalidRequest, match="grouped by client, week") as refused:
            await query.usage(connection, first=FIRST, last=LAST, group_by=["week", "day", "client"])
        assert refused.value.param == "group_by"

    async def long(connection: Any) -> None:
        assert len(await query.usage(connection, first=FIRST, last=FIRST + timedelta(days=49))) == 50
        with pytest.raises(InvalidRequest, match="more than 50 rows"):
            await query.usage(connection, first=FIRST, last=FIRST + timedelta(days=50))

    ask(filled, unknown)
    monkeypatch.setattr(query, "USAGE_ROWS", 50)
    ask(filled, long)


def due(each: Row) -> LedgerRow:
    values = msgspec.structs.asdict(each)
    for name in ("organisation", "user", "key"):
        values[f"{name}_id"] = text(values.pop(name))
    values["id"] = text(values["id"])
    del values["gateway"]
    return LedgerRow(**values)


@pytest.mark.parametrize(
    ("limit", "filters"),
    [
        (0, {}),
        (7, {"organisation_id": ORGANISATIONS[1]}),
        (1, {"organisation_id": ORGANISATIONS[0], "user_id": USERS[0]}),
        (999_999, {}),
    ],
)
def test_pages(filled: Filled, limit: int, filters: dict[str, uuid.UUID]) -> None:
    first, last = date(2026, 2, 20), date(2026, 3, 10)

    async def work(connection: Any) -> list[LedgerRow]:
        found: list[LedgerRow] = []
        after = ""
        while True:
            page, after = await query.requests(connection, first=first, last=last, after=after, limit=limit, **filters)
            assert len(page) <= (limit or query.PAGE)
            found += page
            if not after:
                return found

    rows = [each for each in filled.rows if first <= day_of(each.at_us) <= last]
    for name, value in filters.items():
        rows = [each for each in rows if getattr(each, name.removesuffix("_id")) == value.bytes]
    assert rows
    assert ask(filled, work) == [due(each) for each in sorted(rows, key=lambda each: each.id)]


def test_a_page_begins_after_a_real_place(filled: Filled) -> None:
    async def work(connection: Any) -> None:
        with pytest.raises(InvalidRequest) as refused:
            await query.requests(connection, first=FIRST, last=LAST, after="' OR 1=1")
        assert refused.value.param == "after"
        for place, there in ((uuid.UUID(int=0), True), (uuid.UUID(int=(1 << 128) - 1), False)):
            page, _ = await query.requests(connection, first=FIRST, last=LAST, after=str(place))
            assert bool(page) == there

    ask(filled, work)


def test_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "today", lambda: date(2026, 3, 17))
    assert query.period("", "") == (date(2026, 3, 1), date(2026, 3, 17))
    assert query.period("2025-12-31", "") == (date(2025, 12, 31), date(2026, 3, 17))
    assert query.period("", "2026-02-03") == (date(2026, 2, 1), date(2026, 2, 3))
    assert query.period("2026-02-03", "2026-02-03") == (date(2026, 2, 3), date(2026, 2, 3))
    for first, last, param in (
        ("2026-02-30", "", "from"),
        ("", "20260201", "to"),
        ("0001-01-01", "", "from"),
        ("", "9999-12-31", "to"),
        ("2026-W05-1", "", "from"),
        ("2026-02-04", "2026-02-03", "from"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            query.period(first, last)
        assert refused.value.param == param
