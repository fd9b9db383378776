"""Refused logins in the audit log: all of them, in few rows."""

import asyncio
import json
from typing import Any

import pytest

from helixflow.auth import refusals
from helixflow.core_rs import CoreError, PermissionDenied
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .office import office
from .support import World, run, world

HOME = "192.0.2.1"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def wrong(w: World, email: str, address: str) -> None:
    try:
        await w.login.login(email, "this is the wrong password", "", address)
    except CoreError:
        return
    pytest.fail("that was the right one")


async def failed(w: World) -> list[tuple[Any, ...]]:
    return [
        (row["action"], row["target"], row["address"], json.loads(row["detail"]))
        for row in await w.rows("SELECT * FROM audit_log WHERE action LIKE 'login.%' ORDER BY id")
    ]


def test_the_first_refusal_is_a_row_and_the_rest_of_the_minute_another(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            clock = w.refusals.clock = Clock()
            user = await w.user("ann@example.com")
            for _ in range(50):
                await wrong(w, "ann@example.com", HOME)
            assert await failed(w) == [
                ("login.failed", "ann@example.com", HOME, {}),
                ("login.throttled", "ann@example.com", HOME, {}),
            ]
            clock.now += 61
            await wrong(w, "nobody@example.com", HOME)
            assert (await failed(w))[2:] == [
                ("login.failed", "ann@example.com", HOME, {"further": 5}),
                ("login.throttled", "ann@example.com", HOME, {"further": 43}),
                ("login.failed", "nobody@example.com", HOME, {}),
            ]
            home = await w.value("SELECT organisation_id FROM users WHERE id = $1", user)
            rows = await w.rows("SELECT organisation_id FROM audit_log WHERE action LIKE 'login.%' ORDER BY id")
            assert [row["organisation_id"] for row in rows] == [home] * 4 + [None]

    run(test())


def test_a_flood_of_names_and_addresses_fills_few_rows(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            w.refusals.clock = Clock()
            for number in range(300):
                await w.refusals.note("login.failed", f"name{number}@example.com", HOME, None)
            names = {row[1] for row in await failed(w)}
            assert len(names) == refusals.EACH + 1
            assert refusals.SEVERAL in names
            for number in range(2000):
                address = f"10.0.{number // 256}.{number % 256}"
                await w.refusals.note("login.failed", f"name{number}@example.com", address, None)
            await w.refusals.flush()
            rows = await failed(w)
            assert len(rows) <= refusals.ALL + 3
            assert sum(row[3].get("further", 1) for row in rows) == 2300
            assert (refusals.SEVERAL, refusals.SEVERAL) in {row[1:3] for row in rows}

    run(test())


def test_what_could_not_be_written_is_kept(target: Target, pki: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def acquire(self) -> Any:
            raise OSError("the database is away")

    async def test() -> None:
        async with world(target, pki) as w:
            clock = w.refusals.clock = Clock()
            await w.refusals.note("login.failed", "ann@example.com", HOME, None)
            there, w.refusals.pool = w.refusals.pool, Away()  # type: ignore[assignment]
            await w.refusals.note("login.failed", "ann@example.com", HOME, None)
            with pytest.raises(OSError, match="away"):
                await w.refusals.note("login.failed", "bob@example.com", HOME, None)
            clock.now += 61
            monkeypatch.setattr(refusals, "EVERY_S", 0.001)
            summing = asyncio.create_task(w.refusals.run())
            await asyncio.sleep(0.01)
            w.refusals.pool = there
            # What is left is written when the service ends.
            summing.cancel()
            await asyncio.wait({summing})
            assert sorted((row[1], row[3].get("further", 0)) for row in await failed(w)) == [
                ("ann@example.com", 0),
                ("ann@example.com", 1),
                ("bob@example.com", 1),
            ]

    run(test())


def test_acts_that_are_refused_are_written_down_too(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            for _ in range(5):
                with pytest.raises(PermissionDenied):
                    await o.call("member", "CreateUser", email="x@example.com", role="member")
            with pytest.raises(PermissionDenied):
                await o.call("admin", "ResetPassword", user="owner@example.com")
            rows = await o.w.rows("SELECT * FROM audit_log WHERE action LIKE '%.refused' ORDER BY id")
            assert [(row["action"], row["actor"], row["address"]) for row in rows] == [
                ("CreateUser.refused", "member@example.com", "10.0.0.1"),
                ("ResetPassword.refused", "admin@example.com", "10.0.0.1"),
            ]
            home = await o.w.value("SELECT id FROM organisations WHERE first")
            assert {row["organisation_id"] for row in rows} == {home}

    run(test())
