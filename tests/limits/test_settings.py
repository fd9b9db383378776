"""Limits and prices in the database, and that gateways hear of them."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from helixflow.core_rs import InvalidRequest
from helixflow.limits import settings
from helixflow.limits.model import MAX_LIMIT, Limits, Metric, Price, SubjectLimits
from helixflow.limits.remote import prices_handler

from .support import KEY, ORGANISATION, USER, Databases

ALL = Limits(1, 2, 3, 4, 5, 6, MAX_LIMIT)


def run(databases: Databases, work: Callable[[Any], Awaitable[None]]) -> None:
    async def within() -> None:
        async with databases.pool() as pool, pool.acquire() as connection:
            await work(connection)

    asyncio.run(within())


@pytest.fixture(params=["on_wheel", "on_debian"])
def databases(request: pytest.FixtureRequest) -> Databases:
    found: Databases = request.getfixturevalue(request.param)
    return found


def test_setting_replacing_removing(databases: Databases) -> None:
    async def work(connection: Any) -> None:
        for limits in (ALL, Limits(tokens_per_day=0), Limits()):
            assert await settings.set_limits(connection, KEY, limits) == SubjectLimits(KEY, limits)
            expected = (SubjectLimits(KEY, limits),) if limits else ()
            assert await settings.limits_for(connection, [USER, KEY]) == expected
        assert await connection.fetchval("SELECT count(*) FROM limits") == 0

    run(databases, work)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "key:1",
        "team:00000000-0000-0000-0000-000000000001",
        KEY.upper(),
        KEY + " ",
        KEY + "\n",
        "key:'; DROP TABLE limits",
    ],
)
def test_subjects_that_are_none(on_wheel: Databases, subject: str) -> None:
    async def refused() -> None:
        with pytest.raises(InvalidRequest, match="subject must be") as caught:
            await settings.set_limits(None, subject, ALL)
        assert caught.value.param == "subject"

    asyncio.run(refused())


def test_the_database_refuses_what_python_would(databases: Databases) -> None:
    async def work(connection: Any) -> None:
        for metric in Metric:
            for value in (-1, MAX_LIMIT + 1):
                with pytest.raises(asyncpg.CheckViolationError):
                    await connection.execute(
                        f"INSERT INTO limits (subject, {metric.name.lower()}) VALUES ($1, $2)", KEY, value
                    )
        with pytest.raises(InvalidRequest):
            await settings.set_limits(connection, KEY, Limits(tokens_per_day=MAX_LIMIT + 1))

    run(databases, work)


def test_pages_of_an_organisation(databases: Databases) -> None:
    async def work(connection: Any) -> None:
        expected: dict[str, list[str]] = {}
        for name in ("one", "two"):
            organisation = await connection.fetchval("INSERT INTO organisations (name) VALUES ($1) RETURNING id", name)
            user = await connection.fetchval(
                "INSERT INTO users (organisation_id, email, role) VALUES ($1, $2, 'member') RETURNING id",
                organisation,
                f"{name}@localhost",
            )
            key = await connection.fetchval(
                "INSERT INTO api_keys (user_id, digest, prefix, name) VALUES ($1, $2, 'hf-', 'k') RETURNING id",
                user,
                uuid.uuid4().bytes * 2,
            )
            expected[organisation] = sorted([f"key:{key}", f"user:{user}", f"organisation:{organisation}"])
            for subject in expected[organisation]:
                await settings.set_limits(connection, subject, ALL)
        await settings.set_limits(connection, ORGANISATION, ALL)
        for organisation, subjects in expected.items():
            first, after = await settings.limits_of(connection, organisation, "", 2)
            second, end = await settings.limits_of(connection, organisation, after, 2)
            assert [each.subject for each in first + second] == subjects
            assert (after, end) == (subjects[1], "")
        everything, end = await settings.limits_of(connection, None, "", 7)
        assert (len(everything), end) == (7, "")
        assert all(each.limits == ALL for each in everything)

    run(databases, work)


def test_gateways_hear_of_changes(databases: Databases) -> None:
    async def work(connection: Any) -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()

        def hear(*arguments: Any) -> None:
            heard.put_nowait(arguments[3])

        await connection.add_listener("helixflow_events", hear)
        async with asyncio.timeout(10):
            for limits in (ALL, replace(ALL, tokens_per_day=None), Limits()):
                await settings.set_limits(connection, USER, limits)
                assert await heard.get() == USER
            for price in (Price("m", 1, 1, 1), Price("m", 2, 1, 1)):
                await settings.set_price(connection, price)
                assert await heard.get() == "prices"
            assert await settings.delete_price(connection, "m")
            assert await heard.get() == "prices"
        assert not await settings.delete_price(connection, "m")
        await connection.remove_listener("helixflow_events", hear)

    run(databases, work)


def test_prices(databases: Databases) -> None:
    async def work(connection: Any) -> None:
        made = [Price(model, number, number + 1, settings.MAX_PRICE) for number, model in enumerate("abc")]
        for price in reversed(made):
            assert await settings.set_price(connection, price) == price
        changed = replace(made[1], prompt=77)
        await settings.set_price(connection, changed)
        assert await settings.prices(connection) == ([made[0], changed, made[2]], "")
        assert await settings.prices(connection, limit=2) == ([made[0], changed], "b")
        assert await settings.prices(connection, "b", 2) == ([made[2]], "")

    run(databases, work)


@pytest.mark.parametrize(
    ("price", "param"),
    [
        (Price("", 1, 1, 1), "price.model"),
        (Price("x" * 201, 1, 1, 1), "price.model"),
        (Price("a\nb", 1, 1, 1), "price.model"),
        (Price("a", -1, 1, 1), "price.prompt"),
        (Price("a", 1, settings.MAX_PRICE + 1, 1), "price.cached"),
        (Price("a", 1, 1, 1 << 63), "price.completion"),
    ],
)
def test_wrong_prices(price: Price, param: str) -> None:
    async def refused() -> None:
        with pytest.raises(InvalidRequest) as caught:
            await settings.set_price(None, price)
        assert caught.value.param == param

    asyncio.run(refused())


def test_the_price_list_of_gateways(on_wheel: Databases) -> None:
    async def work() -> None:
        async with on_wheel.pool() as pool:
            async with pool.acquire() as connection:
                await settings.set_price(connection, Price("m", 1, 2, 3))
            answer = await prices_handler(pool, "EUR")(None, None)
            assert answer.currency == "EUR"
            assert [Price.of(price) for price in answer.prices] == [Price("m", 1, 2, 3)]

    asyncio.run(work())
