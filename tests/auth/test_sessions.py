"""Refresh tokens: exchanged once, replayed never."""

import asyncio
from typing import Any
from uuid import UUID

import pytest

from helixflow.auth import organisations, principals, sessions, users
from helixflow.core_rs import InvalidToken
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .support import INJECTIONS, OPERATOR, SECRET, World, run, world

ADDRESS = "10.0.0.1"


async def begin(w: World, email: str = "ann@example.com") -> Any:
    user = await w.user(email)
    return await w.do(w.sessions.begin, user, "password", ADDRESS)


async def refresh(w: World, token: str) -> Any:
    async with w.pool.acquire() as connection:
        return await w.sessions.refresh(connection, token, ADDRESS)


async def verify(w: World, token: str) -> Any:
    async with w.pool.acquire() as connection:
        return await principals.by_token(connection, w.signer, token)


def test_the_life_of_a_session(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki, access_ttl_s=300, refresh_ttl_s=3600) as w:
            first = await begin(w)
            assert (first.expires_in, first.refresh_expires_in) == (300, 3600)
            assert len(first.refresh_token) == 46
            seen = await verify(w, first.access_token)
            assert (seen.user, seen.role, seen.organisation) == ("ann@example.com", "member", "default")
            second = await refresh(w, first.refresh_token)
            assert second.refresh_token != first.refresh_token
            again = await verify(w, second.access_token)
            assert again.session_id == seen.session_id
            # The old access token is good until it ends: it belongs to the same session.
            await verify(w, first.access_token)
            stored = await w.rows("SELECT digest FROM refresh_tokens")
            assert {row["digest"] for row in stored} == {
                SECRET.refresh_digest(first.refresh_token),
                SECRET.refresh_digest(second.refresh_token),
            }
            async with w.pool.acquire() as connection:
                await w.sessions.end_by_refresh(connection, second.refresh_token)
            for token in (first.access_token, second.access_token):
                with pytest.raises(InvalidToken, match="is over"):
                    await verify(w, token)
            with pytest.raises(InvalidToken):
                await refresh(w, second.refresh_token)

    run(test())


def test_a_token_that_is_used_twice_ends_its_session_and_no_other(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            first, other = await begin(w), await begin(w, "bob@example.com")
            second = await refresh(w, first.refresh_token)
            with pytest.raises(InvalidToken, match="used before"):
                await refresh(w, first.refresh_token)
            with pytest.raises(InvalidToken):
                await refresh(w, second.refresh_token)
            with pytest.raises(InvalidToken):
                await verify(w, second.access_token)
            # Once more changes nothing, and is not written down again.
            with pytest.raises(InvalidToken):
                await refresh(w, first.refresh_token)
            (row,) = await w.audited("session.reuse")
            assert (row["target"], row["address"]) == ("ann@example.com", ADDRESS)
            assert first.refresh_token not in row["detail"]
            await refresh(w, other.refresh_token)

    run(test())


def test_of_refreshes_at_once_one_gets_tokens_and_the_session_ends(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            first = await begin(w)
            found = await asyncio.gather(*(refresh(w, first.refresh_token) for _ in range(8)), return_exceptions=True)
            won = [item for item in found if isinstance(item, sessions.Issued)]
            assert len(won) == 1
            assert all(isinstance(item, InvalidToken) for item in found if item not in won)
            with pytest.raises(InvalidToken):
                await refresh(w, won[0].refresh_token)
            assert len(await w.audited("session.reuse")) == 1
            assert await w.value("SELECT count(*) FROM refresh_tokens") == 2

    run(test())


def test_an_unused_session_ends_by_itself(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            first = await begin(w)
            await w.value("UPDATE refresh_tokens SET expires_at = now() - interval '1 s'")
            with pytest.raises(InvalidToken):
                await refresh(w, first.refresh_token)
            await w.value("UPDATE refresh_tokens SET expires_at = now() + interval '1 h'")
            await w.value("UPDATE sessions SET expires_at = now() - interval '1 s'")
            with pytest.raises(InvalidToken):
                await refresh(w, first.refresh_token)
            with pytest.raises(InvalidToken):
                await verify(w, first.access_token)
            # Use moves the end.
            await w.value("UPDATE sessions SET expires_at = now() + interval '1 s'")
            await refresh(w, first.refresh_token)
            assert await w.value("SELECT expires_at > now() + interval '20 days' FROM sessions")

    run(test())


@pytest.mark.parametrize("what", ["disable", "delete", "suspend", "reset"])
def test_what_ends_every_session_of_a_user(target: Target, pki: Layout, what: str) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            first, other = await begin(w), await begin(w, "bob@example.com")
            if what == "disable":
                await w.do(users.update, OPERATOR, "ann@example.com", None, True)
            elif what == "delete":
                await w.do(users.delete, OPERATOR, "ann@example.com")
            elif what == "suspend":
                await w.do(organisations.update, OPERATOR, "default", None, True, None)
            else:
                await w.do(users.reset_password, OPERATOR, "ann@example.com", "hash")
            with pytest.raises(InvalidToken):
                await refresh(w, first.refresh_token)
            with pytest.raises(InvalidToken):
                await verify(w, first.access_token)
            if what != "suspend":
                await refresh(w, other.refresh_token)

    run(test())


@pytest.mark.parametrize(
    "token", ["", "hr-", "hr-unknown", "hf-x", "x" * 5000, "hr-" + "x" * 200, "hr-é", *("hr-" + i for i in INJECTIONS)]
)
def test_tokens_that_are_none(shared: Target, pki: Layout, token: str) -> None:
    async def test() -> None:
        async with world(shared, pki) as w:
            with pytest.raises(InvalidToken):
                await refresh(w, token)
            async with w.pool.acquire() as connection:
                await w.sessions.end_by_refresh(connection, token)

    run(test())


def test_a_rotated_pepper_ends_all(target: Target, pki: Layout) -> None:
    async def test() -> None:
        from helixflow.auth.pepper import Pepper

        async with world(target, pki) as w:
            first = await begin(w)
            other = sessions.Sessions(w.options, Pepper(b"\7" * 32), w.signer)
            async with w.pool.acquire() as connection:
                with pytest.raises(InvalidToken):
                    await other.refresh(connection, first.refresh_token, ADDRESS)

    run(test())


def test_sessions_end_once(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await begin(w)
            (row,) = await w.rows("SELECT id, user_id FROM sessions")
            found = [await w.do(sessions.end, row["id"]) for _ in range(2)]
            assert found == [True, False]
            assert await w.do(sessions.end_all, row["user_id"]) == 0
            assert not await w.do(sessions.end, UUID(int=1))

    run(test())
