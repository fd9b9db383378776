"""Changes on their way to gateways: what fires, what does not, and what happens when the connection is lost."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from helixflow.auth import api_keys, organisations, sessions, users
from helixflow.auth.api_keys import Changes
from helixflow.auth.events import Events, Watcher
from helixflow.auth.records import Content
from helixflow.auth.touch import touch
from helixflow.config import DatabaseConfig
from helixflow.db.target import Target
from helixflow.limits import settings
from helixflow.limits.model import Limits, Price
from helixflow.pki.layout import Layout

from .support import OPERATOR, SECRET, World, run, world


@contextlib.asynccontextmanager
async def listening(target: Target, **options: Any) -> AsyncIterator[Events]:
    events = Events(target, DatabaseConfig(), **options)
    task = asyncio.create_task(events.run())
    await events.listening.wait()
    try:
        yield events
    finally:
        task.cancel()
        await asyncio.wait({task})


async def heard(events: Events, w: World, act: Any) -> list[str]:
    """What a stream hears of an act, up to a mark behind it."""
    stream = events.watch()
    assert await anext(stream) == "resync"
    await act
    mark = f"session:{uuid4()}"
    await w.value("SELECT pg_notify('helixflow_events', $1)", mark)
    found = []
    while (event := await anext(stream)) != mark:
        found.append(event)
    await stream.aclose()
    return found


def test_what_gateways_hear_and_what_not(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w, listening(each) as events:
            user = await w.user("ann@example.com")
            key, _ = await w.key(user, expires_at=4_000_000_000)
            session = await w.do(w.sessions.begin, user, "password", "")
            session_id = await w.value("SELECT id FROM sessions")
            home = await w.value("SELECT id FROM organisations")
            now = "UPDATE sessions SET last_used_at = now()"

            silent = (
                w.user("bob@example.com"),
                w.do(organisations.create, OPERATOR, "other"),
                w.do(touch, {key: (await w.rows("SELECT now() AS now"))[0]["now"]}),
                w.login.login("ann@example.com", "correct horse battery", "", ""),
                w.value(now),
                w.value("UPDATE users SET last_login_at = now(), password = 'x', must_change_password = true"),
                w.value("UPDATE api_keys SET name = name, models = models"),
                w.do(users.update, OPERATOR, "ann@example.com", "member", False),
                w.do(organisations.update, OPERATOR, "default", "default", False, None),
            )
            for act in silent:
                assert await heard(events, w, act) == [], act
            async with w.pool.acquire() as connection:
                refreshing = w.sessions.refresh(connection, session.refresh_token, "")
                assert await heard(events, w, refreshing) == []

            loud: tuple[tuple[Any, list[str]], ...] = (
                (w.do(api_keys.update, OPERATOR, SECRET, str(key), Changes(name="new")), [f"key:{key}"]),
                (w.do(api_keys.revoke, OPERATOR, str(key)), [f"key:{key}"]),
                (w.do(users.update, OPERATOR, "ann@example.com", "viewer", None), [f"user:{user}"]),
                (w.do(sessions.end, session_id), [f"session:{session_id}"]),
                (w.do(organisations.update, OPERATOR, "default", "main", None, None), [f"organisation:{home}"]),
                (
                    w.do(organisations.update, OPERATOR, "main", None, None, Content(True, 1, [])),
                    [f"organisation:{home}"],
                ),
                (w.do(settings.set_limits, f"user:{user}", Limits(tokens_per_day=1)), [f"user:{user}"]),
                (w.do(settings.set_limits, f"user:{user}", Limits()), [f"user:{user}"]),
                (w.do(settings.set_limits, f"organisation:{home}", Limits(tokens_per_day=1)), [f"organisation:{home}"]),
                (w.do(settings.set_price, Price("m", 1, 1, 1)), ["prices"]),
                (w.do(settings.delete_price, "m"), ["prices"]),
            )
            for act, expected in loud:
                assert await heard(events, w, act) == expected
            # A new key may have been refused before there was one.
            made = await heard(events, w, w.key(user))
            rotated = await heard(events, w, w.do(api_keys.rotate, OPERATOR, SECRET, made[0].removeprefix("key:"), 60))
            newest = await w.value("SELECT id FROM api_keys ORDER BY created_at DESC LIMIT 1")
            assert sorted(rotated) == sorted([made[0], f"key:{newest}"])
            kinds = sorted(
                event.partition(":")[0] for event in await heard(events, w, w.do(users.delete, OPERATOR, str(user)))
            )
            assert kinds == ["key", "key", "session", "user"], "of the keys those that were alive"

    run(test())


def test_a_rolled_back_change_is_not_heard(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w, listening(target) as events:
            user = await w.user("ann@example.com")

            async def undone() -> None:
                with contextlib.suppress(RuntimeError):
                    async with w.begin() as connection:
                        await users.update(connection, OPERATOR, str(user), "viewer", None)
                        raise RuntimeError

            assert await heard(events, w, undone()) == []

    run(test())


def test_every_stream_hears_within_a_second(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w, listening(target) as events:
            key, _ = await w.key(await w.user("ann@example.com"))
            streams = [events.watch() for _ in range(20)]
            assert [await anext(stream) for stream in streams] == ["resync"] * 20
            began = time.monotonic()
            await w.do(api_keys.revoke, OPERATOR, str(key))
            assert [await anext(stream) for stream in streams] == [f"key:{key}"] * 20
            assert time.monotonic() - began < 1
            await streams[0].aclose()
            assert len(events._watchers) == 19
            events.close()
            with pytest.raises(StopAsyncIteration):
                await anext(streams[1])
            # One that begins afterwards says resync and ends.
            assert [event async for event in events.watch()] == ["resync"]
            for stream in streams:
                await stream.aclose()

    run(test())


def test_a_lost_connection_is_made_anew_and_resyncs(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w, listening(target) as events:
            stream = events.watch()
            assert await anext(stream) == "resync"
            await w.value(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'auth-service events'"
            )
            assert await anext(stream) == "resync"
            key, _ = await w.key(await w.user("ann@example.com"))
            await w.do(api_keys.revoke, OPERATOR, str(key))
            assert await anext(stream) == f"key:{key}"
            await stream.aclose()

    run(test())


def test_a_connection_that_answers_no_more_is_given_up(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki), listening(target, ping_s=0.1) as events:
            stream = events.watch()
            assert await anext(stream) == "resync"
            # A server that has vanished without a word: the ping waits for an answer that does not come.
            answered = asyncio.Event()

            class Silent:
                async def execute(self, _query: str) -> None:
                    answered.set()
                    await asyncio.Event().wait()

            with pytest.raises(TimeoutError):
                await events._until(asyncio.Event(), Silent())
            assert answered.is_set()
            await stream.aclose()

    run(test())


def test_no_database_is_waited_for(tmp_path: Any) -> None:
    async def test() -> None:
        events = Events(Target(str(tmp_path), 5432, "u", "d"), DatabaseConfig())
        task = asyncio.create_task(events.run())
        done, _ = await asyncio.wait({task}, timeout=0.3)
        assert not done
        assert not events.listening.is_set()
        task.cancel()
        await asyncio.wait({task})

    run(test())


def test_an_unknown_message_is_a_resync(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w, listening(target) as events:
            stream = events.watch()
            assert await anext(stream) == "resync"
            for payload in ("", "key", "key:", "robot:1", "nonsense"):
                await w.value("SELECT pg_notify('helixflow_events', $1)", payload)
                assert await anext(stream) == "resync"
            await stream.aclose()

    run(test())


def test_a_full_queue_becomes_one_resync() -> None:
    async def test() -> None:
        watcher = Watcher(3)
        assert await watcher.next() == "resync"
        for number in range(3):
            watcher.put(f"key:{number}")
        assert len(watcher._events) == 3
        watcher.put("key:3")
        watcher.put("key:4")
        assert list(watcher._events) == ["resync"]
        assert await watcher.next() == "resync"
        watcher.put("key:5")
        assert await watcher.next() == "key:5"
        watcher.put("key:6")
        watcher.put("resync")
        watcher.close()
        assert [await watcher.next(), await watcher.next()] == ["resync", None]

    run(test())
