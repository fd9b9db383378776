"""Guessing passwords: what slows it down, and whom it does not."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.auth import throttle, users
from helixflow.auth.throttle import Count
from helixflow.core_rs import AccountLocked, CoreError, InvalidCredentials
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .support import OPERATOR, PASSWORD, World, run, world

ANN = "ann@example.com"
HOME, STRANGER = "192.0.2.1", "198.51.100.7"
WRONG = "this is the wrong password"


async def attempt(w: World, address: str, password: str = WRONG, email: str = ANN) -> str:
    """`in`, or the code of the refusal."""
    try:
        await w.login.login(email, password, "", address)
    except CoreError as error:
        return error.code
    return "in"


async def later(w: World, seconds: float) -> None:
    """As if that time had passed."""
    await w.value(
        "UPDATE login_attempts SET free_at = free_at - make_interval(secs => $1), "
        "last_at = last_at - make_interval(secs => $1)",
        float(seconds),
    )


def test_wrong_passwords_make_the_next_attempt_wait_longer_each_time(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki, login_free_attempts=3, login_delay_max_s=800.0) as w:
            await w.user(ANN)
            for email in (ANN, "nobody@example.com"):
                assert [await attempt(w, STRANGER, email=email) for _ in range(4)] == ["invalid_credentials"] * 4
                for pause in (100, 200, 400, 800, 800, 800):
                    with pytest.raises(AccountLocked, match=r"try again in \d+ s") as caught:
                        await w.login.login(email, PASSWORD, "", STRANGER)
                    assert caught.value.retry_after_s is not None
                    assert pause - 50 < caught.value.retry_after_s <= pause
                    assert caught.value.http_status == 429
                    await later(w, pause)
                    assert await attempt(w, STRANGER, email=email) == "invalid_credentials"
            # Whoever knows the password gets in when the pause is over, and starts anew.
            await later(w, 800)
            assert await attempt(w, STRANGER, PASSWORD) == "in"
            assert [await attempt(w, STRANGER) for _ in range(4)] == ["invalid_credentials"] * 4

    run(test())


def test_no_stranger_keeps_a_user_out(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki, login_free_attempts=3) as w:
            await w.user(ANN)
            # From where they never were, too: it is the stranger's address that waits.
            for number in range(10):
                for _ in range(4):
                    assert await attempt(w, f"198.51.100.{number}") == "invalid_credentials"
            assert await attempt(w, STRANGER) == "account_locked"
            assert await attempt(w, HOME, PASSWORD) == "in"
            # A botnet: the account has to wait wherever it is not known.
            for number in range(60):
                await attempt(w, f"203.0.113.{number}")
            assert await attempt(w, "203.0.113.99", PASSWORD) == "account_locked"
            assert (await w.do(users.find, OPERATOR, ANN))["locked"]
            for _ in range(3):
                assert await attempt(w, HOME, PASSWORD) == "in"
            # An IPv6 network is one address.
            assert await attempt(w, "2001:db8::1", PASSWORD) == "account_locked"
            await later(w, throttle.ACCOUNT_DELAY_S)
            assert await attempt(w, "2001:db8::1", PASSWORD) == "in"
            for number in range(60):
                await attempt(w, f"203.0.113.{number + 100}")
            assert await attempt(w, "2001:db8::ffff:2", PASSWORD) == "in"
            assert await attempt(w, "2001:db8:1::1", PASSWORD) == "account_locked"

    run(test())


def test_a_stranger_beside_a_user_makes_them_wait_a_minute_at_most(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user(ANN)
            assert await attempt(w, HOME, PASSWORD) == "in"
            for _ in range(20):
                await attempt(w, HOME)
                await later(w, 900)
            await attempt(w, HOME)
            with pytest.raises(AccountLocked) as caught:
                await w.login.login(ANN, PASSWORD, "", HOME)
            assert caught.value.retry_after_s is not None
            assert throttle.KNOWN_DELAY_S - 30 < caught.value.retry_after_s <= throttle.KNOWN_DELAY_S
            # What became of the address for others does not matter to who is known there.
            for number in range(40):
                await attempt(w, HOME, email=f"nobody{number}@example.com")
            assert await attempt(w, HOME, email="somebody@example.com") == "account_locked"
            await w.do(throttle.clear, ANN)
            assert await attempt(w, HOME, PASSWORD) == "in"

    run(test())


def test_guesses_at_once_are_no_more_than_one_after_another(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki, login_free_attempts=3, password_checks=8) as w:
            await w.user(ANN)
            found = await asyncio.gather(*(attempt(w, STRANGER) for _ in range(8)))
            assert sorted(found) == ["account_locked"] * 4 + ["invalid_credentials"] * 4
            # From many addresses at once: what may be guessed of one account is bounded as well.
            many = await asyncio.gather(*(attempt(w, f"203.0.113.{number}") for number in range(100)))
            assert many.count("invalid_credentials") == throttle.ACCOUNT_FREE + 1 - 4
            # Attempts whose process died before they were judged count as well.
            await w.value("UPDATE login_attempts SET free_at = now() + interval '60 s' WHERE address = $1", STRANGER)
            assert await attempt(w, STRANGER, PASSWORD) == "account_locked"

    run(test())


def test_a_flood_from_one_address_delays_others_by_a_turn(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki, password_checks=1) as w:
            await w.user(ANN)
            hashed: list[str] = []
            verify, begun = w.passwords._verify, asyncio.Event()
            loop = asyncio.get_running_loop()

            def noted(stored: str, password: str) -> bool:
                hashed.append(password)
                loop.call_soon_threadsafe(begun.set)
                return verify(stored, password)

            w.passwords._verify = noted  # type: ignore[method-assign]
            flood = [
                asyncio.create_task(attempt(w, STRANGER, f"{WRONG} {number}", f"invented{number}@example.com"))
                for number in range(160)
            ]
            await begun.wait()
            before = len(hashed)
            assert await attempt(w, HOME, PASSWORD) == "in"
            assert hashed.index(PASSWORD) <= before + 1
            outcomes = await asyncio.gather(*flood)
            assert outcomes.count("queue_full") >= 160 - 30 - 10, "they are not even looked at"

    run(test())


def test_failures_that_are_not_in_a_row_are_forgotten(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki, login_free_attempts=1) as w:
            await w.user(ANN)
            for _ in range(3):
                assert [await attempt(w, HOME), await attempt(w, HOME, PASSWORD)] == ["invalid_credentials", "in"]
            for _ in range(3):
                assert [await attempt(w, HOME), await attempt(w, HOME)] == ["invalid_credentials"] * 2
                await later(w, throttle.FORGET_S + 1)

    run(test())


def test_right_passwords_cost_an_address_nothing(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            for number in range(w.options.login_free_per_address + 5):
                await w.user(f"user{number}@example.com")
                assert await attempt(w, HOME, PASSWORD, f"user{number}@example.com") == "in"
            assert await w.value("SELECT sum(failures) FROM login_attempts") == 0
            assert await w.value("SELECT count(*) FROM known_addresses") == w.options.login_free_per_address + 5

    run(test())


def test_only_so_many_addresses_are_known_of_a_user(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            user = await w.user(ANN)
            for number in range(throttle.KNOWN_MOST + 5):
                assert await attempt(w, f"192.0.2.{number}", PASSWORD) == "in"
            known = [row["address"] for row in await w.rows("SELECT address FROM known_addresses ORDER BY last_at")]
            assert known == [f"192.0.2.{number}" for number in range(5, throttle.KNOWN_MOST + 5)]
            assert await w.do(throttle.known, user, "192.0.2.9")
            await w.value("UPDATE known_addresses SET last_at = last_at - interval '91 days'")
            assert not await w.do(throttle.known, user, "192.0.2.9")

    run(test())


def test_an_administrator_unlocks(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki, login_free_attempts=1) as w:
            await w.user(ANN)
            for address in (HOME, STRANGER):
                assert [await attempt(w, address) for _ in range(3)][2] == "account_locked"
            unlocked = await w.do(users.unlock, OPERATOR, ANN)
            assert not unlocked.locked
            for address in (HOME, STRANGER):
                assert await attempt(w, address, PASSWORD) == "in"
            await w.do(users.unlock, OPERATOR, ANN)
            assert len(await w.audited("user.unlock")) == 1

    run(test())


def test_a_count_that_is_removed_meanwhile_is_made_again(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user(ANN)
            assert await attempt(w, HOME) == "invalid_credentials"
            async with w.begin() as connection:
                await throttle.clear(connection, ANN)
                waiting = asyncio.create_task(attempt(w, HOME, PASSWORD))
                await w.blocked()
            assert await waiting == "in"

    run(test())


def test_a_client_without_an_address_is_one_like_others(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki, login_free_attempts=1) as w:
            await w.user(ANN)
            assert [await attempt(w, "") for _ in range(3)] == ["invalid_credentials"] * 2 + ["account_locked"]
            assert await attempt(w, HOME, PASSWORD) == "in"

    run(test())


def test_the_table_holds_no_names(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await attempt(w, HOME, email="my secret typed @ wrong field")
            with pytest.raises(InvalidCredentials):
                await w.login.login(ANN, WRONG, "", HOME)
            found: list[Any] = await w.rows("SELECT account FROM login_attempts")
            assert {len(row["account"]) for row in found} == {0, 32}
            assert ANN.encode() not in b"".join(row["account"] for row in found)

    run(test())


@given(st.integers(1, 100), st.floats(1, 86_400), st.integers(0, 10_000))
def test_pauses_grow_up_to_the_longest(free: int, longest_s: float, failures: int) -> None:
    count = Count(b"", "", free, 1.0, longest_s)
    pause, following = count.pause_s(failures), count.pause_s(failures + 1)
    assert 0 <= pause <= following <= longest_s
    assert (pause == 0) == (failures <= free)
    assert following <= max(1.0, 2 * pause)
