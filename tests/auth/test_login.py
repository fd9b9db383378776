"""Passwords and the first start."""

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from argon2 import PasswordHasher

from helixflow.auth import organisations, users
from helixflow.auth.first_start import development_key, first_start
from helixflow.auth.passwords import Passwords
from helixflow.core_rs import (
    InvalidCredentials,
    InvalidRequest,
    PasswordChangeRequired,
    PermissionDenied,
)
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .support import CHEAP, OPERATOR, OWNER, PASSWORD, SECRET, run, world

NEW = "another horse battery"
ADDRESS = "10.0.0.1"


def test_first_start_makes_an_owner_with_a_one_time_password(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            assert w.first_password is not None
            assert len(w.first_password) == 24
            assert await w.rows("SELECT name, first FROM organisations") == [("default", True)]
            assert await w.rows("SELECT email, role, must_change_password FROM users") == [(OWNER, "owner", True)]
            with pytest.raises(PasswordChangeRequired, match="first login only"):
                await w.login.login(OWNER, w.first_password, "", ADDRESS)
            issued = await w.login.login(OWNER, w.first_password, NEW, ADDRESS)
            assert issued.expires_in == 900
            with pytest.raises(InvalidCredentials):
                await w.login.login(OWNER, w.first_password, "", ADDRESS)
            await w.login.login(OWNER, NEW, "", ADDRESS)
            assert [row["action"] for row in await w.rows("SELECT action FROM audit_log ORDER BY id")] == [
                "organisation.create",
                "user.create",
                "user.password",
                "login.succeeded",
                "login.failed",
                "login.succeeded",
            ]

    run(test())


def test_of_first_starts_at_once_one_makes_the_owner(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            pass
        async with world(each, pki) as w:
            assert w.first_password is None
            await w.value("TRUNCATE organisations CASCADE")
            made = await asyncio.gather(
                *(w.do(first_start, w.passwords, "Me@Example.com", w.first_file, 60) for _ in range(6))
            )
            assert sum(password is not None for password in made) == 1
            assert await w.rows("SELECT email FROM users") == [("me@example.com",)]

    run(test())


def test_the_development_key_is_made_once_and_mended(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            made = await asyncio.gather(*(w.do(development_key, SECRET) for _ in range(4)))
            assert sorted(made) == [False, False, False, True]
            assert await w.rows("SELECT name, prefix, development, revoked_at FROM api_keys") == [
                ("demo-key", "demo-key", True, None)
            ]
            await w.value("UPDATE api_keys SET revoked_at = now()")
            assert await w.do(development_key, SECRET)
            assert await w.value("SELECT count(*) FROM api_keys WHERE revoked_at IS NULL") == 1
            # Its owner leaves: it becomes another owner's.
            other = await w.user("second@example.com", "owner")
            await w.do(users.delete, OPERATOR, OWNER)
            assert await w.do(development_key, SECRET)
            assert await w.rows("SELECT user_id, revoked_at FROM api_keys") == [(other, None)]
            await w.value("TRUNCATE organisations CASCADE")
            assert not await w.do(development_key, SECRET)

    run(test())


def test_wrong_passwords_and_unknown_names_are_refused_alike(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user("ann@example.com")
            await w.service("robot")
            messages = set()
            for email in ("ann@example.com", "nobody@example.com"):
                with pytest.raises(InvalidCredentials) as caught:
                    await w.login.login(email, "wrong password", "", ADDRESS)
                messages.add((str(caught.value), caught.value.http_status))
            assert len(messages) == 1
            failed = await w.audited("login.failed")
            assert [(row["target"], row["organisation_id"] is None, row["address"]) for row in failed] == [
                ("ann@example.com", False, ADDRESS),
                ("nobody@example.com", True, ADDRESS),
            ]
            with pytest.raises(InvalidRequest, match="must be an e-mail address"):
                await w.login.login("robot", PASSWORD, "", ADDRESS)
            issued = await w.login.login(" ANN@example.com ", PASSWORD, "", ADDRESS)
            assert issued.refresh_token.startswith("hr-")
            assert await w.value("SELECT last_login_at IS NOT NULL FROM users WHERE email = 'ann@example.com'")

    run(test())


def test_every_refused_name_costs_a_hash(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user("ann@example.com")
            provider_only = (
                "INSERT INTO users (organisation_id, email, role) SELECT id, $1, 'member' FROM organisations"
            )
            await w.value(provider_only, "oidc@example.com")
            seen: list[str] = []
            verify = w.passwords._verify

            def counted(stored: str, password: str) -> bool:
                seen.append(stored)
                return verify(stored, password)

            w.passwords._verify = counted  # type: ignore[method-assign]
            for email in ("ann@example.com", "oidc@example.com", "nobody@example.com"):
                with pytest.raises(InvalidCredentials):
                    await w.login.login(email, "wrong password", "", ADDRESS)
            assert len(seen) == 3
            assert seen[1] == seen[2] == w.passwords._nobody

    run(test())


def test_timing_does_not_tell_who_exists() -> None:
    async def test() -> None:
        hashes = Passwords(1, PasswordHasher(time_cost=2, memory_cost=4096, parallelism=1))
        stored = await hashes.hash(PASSWORD)

        async def seconds(which: str | None) -> float:
            began = time.perf_counter()
            assert not await hashes.matches(which, "wrong password")
            return time.perf_counter() - began

        known, unknown = [], []
        for _ in range(15):
            known.append(await seconds(stored))
            unknown.append(await seconds(None))
        ratio = statistics.median(known) / statistics.median(unknown)
        hashes.close()
        # A name without a hash would answer some hundred times as fast.
        assert 0.5 < ratio < 2

    run(test())


@pytest.mark.parametrize(
    "hinder",
    [
        lambda w: w.do(users.update, OPERATOR, "ann@example.com", None, True),
        lambda w: w.do(organisations.update, OPERATOR, "default", None, True, None),
    ],
)
def test_a_disabled_account_is_told_only_to_who_knows_the_password(
    target: Target, pki: Layout, hinder: Callable[[Any], Any]
) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user("ann@example.com")
            await hinder(w)
            with pytest.raises(InvalidCredentials):
                await w.login.login("ann@example.com", "wrong password", "", ADDRESS)
            with pytest.raises(PermissionDenied, match="disabled"):
                await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)
            assert len(await w.audited("login.refused")) == 1
            assert await w.value("SELECT count(*) FROM sessions") == 0

    run(test())


def test_removed_users_are_unknown(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user("ann@example.com")
            await w.do(users.delete, OPERATOR, "ann@example.com")
            with pytest.raises(InvalidCredentials):
                await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)
            await w.user("ann@example.com")
            await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)

    run(test())


@pytest.mark.parametrize(
    ("password", "problem"),
    [("short", "15 to 1024"), ("x" * 14, "15 to 1024"), ("x" * 1025, "15 to 1024"), (PASSWORD, "differ")],
)
def test_new_passwords_have_rules(target: Target, pki: Layout, password: str, problem: str) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user("ann@example.com")
            with pytest.raises(InvalidRequest, match=problem) as caught:
                await w.login.login("ann@example.com", PASSWORD, password, ADDRESS)
            assert caught.value.param == "new_password"
            await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)

    run(test())


def test_a_new_password_ends_the_sessions_of_the_old_one(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user("ann@example.com")
            await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)
            await w.login.login("ann@example.com", PASSWORD, NEW, ADDRESS)
            assert await w.value("SELECT count(*) FROM sessions WHERE revoked_at IS NOT NULL") == 1
            assert await w.value("SELECT count(*) FROM sessions WHERE revoked_at IS NULL") == 1
            (row,) = await w.audited("user.password")
            assert row["detail"] == '{"keys_kept": 0, "keys_revoked": 0, "sessions_ended": 1}'

    run(test())


def test_hashes_are_renewed_when_the_parameters_change(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            user = await w.user("ann@example.com")
            old = await w.value("SELECT password FROM users WHERE id = $1", user)
            await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)
            assert await w.value("SELECT password FROM users WHERE id = $1", user) == old
            w.passwords._hasher = PasswordHasher(time_cost=2, memory_cost=16, parallelism=1)
            await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)
            new = await w.value("SELECT password FROM users WHERE id = $1", user)
            assert new.startswith("$argon2id$v=19$m=16,t=2,p=1$")
            await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)

    run(test())


def test_a_password_that_was_reset_meanwhile_is_wrong(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user("ann@example.com")
            matches = w.passwords.matches

            async def slow(stored: str | None, password: str) -> bool:
                right = await matches(stored, password)
                await w.do(users.reset_password, OPERATOR, "ann@example.com", await w.passwords.hash(NEW))
                return right

            w.passwords.matches = slow  # type: ignore[method-assign]
            with pytest.raises(InvalidCredentials):
                await w.login.login("ann@example.com", PASSWORD, "", ADDRESS)
            assert await w.value("SELECT count(*) FROM sessions") == 0

    run(test())


def test_unicode_passwords_match_in_any_form() -> None:
    async def test() -> None:
        hashes = Passwords(1, CHEAP)
        stored = await hashes.hash("pässwörd ünlimited")
        assert await hashes.matches(stored, "pa\u0308sswo\u0308rd u\u0308nlimited")
        assert not await hashes.matches(stored, "password unlimited")
        assert not await hashes.matches("no hash at all", "x")
        # Whoever has no password has not the one that only takes the time.
        hashes._nobody = stored
        assert not await hashes.matches(None, "pässwörd ünlimited")
        hashes.close()

    run(test())


def test_the_real_parameters_are_those_of_rfc_9106() -> None:
    stored = PasswordHasher().hash("x")
    assert stored.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
