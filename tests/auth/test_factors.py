"""Second factors: enrolled, confirmed, asked for, lost."""

import base64
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP
from hypothesis import given
from hypothesis import strategies as st

from helixflow.auth import factors, organisations, session_desk
from helixflow.auth.actors import Actor
from helixflow.auth.factors import STEP_S, Factors
from helixflow.auth.pepper import Pepper
from helixflow.core_rs import (
    AccountLocked,
    InvalidCredentials,
    InvalidRequest,
    InvalidToken,
    NotFound,
    PasswordChangeRequired,
    PermissionDenied,
    SecondFactorMissing,
    SecondFactorRequired,
)
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .support import OPERATOR, OWNER, PASSWORD, SECRET, World, run, world

ANN, HOME = "ann@example.com", "192.0.2.1"
RFC_SECRET = b"12345678901234567890"


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def code_of(secret: str | bytes, clock: Clock) -> str:
    raw = base64.b32decode(secret) if isinstance(secret, str) else secret
    return TOTP(raw, 6, SHA1(), STEP_S).generate(int(clock.now)).decode()


async def enrolled(w: World) -> tuple[str, list[str], Clock]:
    """A user with a second factor: its secret, the recovery codes, the clock."""
    clock = w.factors._clock = Clock()
    await w.user(ANN)
    made = await w.factor.enrol(ANN, PASSWORD, "", HOME)
    codes = await w.factor.confirm(ANN, PASSWORD, code_of(made.secret, clock), HOME)
    clock.now += STEP_S
    return made.secret, codes, clock


async def login(w: World, code: str = "", **more: Any) -> Any:
    return await w.login.login(ANN, PASSWORD, "", HOME, code=code, **more)


@pytest.mark.parametrize(
    ("at", "code"),
    # RFC 6238, appendix B: the last six of the eight digits for SHA-1.
    [
        (59, "287082"),
        (1_111_111_109, "081804"),
        (1_111_111_111, "050471"),
        (1_234_567_890, "005924"),
        (2_000_000_000, "279037"),
        (20_000_000_000, "353130"),
    ],
)
def test_the_vectors_of_the_standard(at: int, code: str) -> None:
    made = Factors(SECRET, "x", lambda: float(at))
    assert made._step(RFC_SECRET, code, 0) == at // 30


@given(st.integers(-90, 90), st.integers(0, 59))
def test_a_code_is_good_for_its_step_and_those_beside_it(off: int, second: int) -> None:
    clock = Clock()
    clock.now += second
    made = Factors(SECRET, "x", clock)
    other = Clock()
    other.now = clock.now + off
    step = int(other.now) // STEP_S
    found = made._step(RFC_SECRET, code_of(RFC_SECRET, other), 0)
    assert (found == step) == (abs(step - int(clock.now) // STEP_S) <= 1)
    assert made._step(RFC_SECRET, code_of(RFC_SECRET, other), step) in (None, *range(step + 1, step + 3))


def test_a_secret_is_sealed_for_one_user_under_one_pepper(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            secret, codes, _ = await enrolled(w)
            raw = base64.b32decode(secret)
            sealed = await w.value("SELECT secret FROM second_factors")
            assert raw not in sealed
            user = await w.value("SELECT user_id FROM second_factors")
            assert w.factors._open(user, sealed) == raw
            bob = await w.user("bob@example.com")
            for whose, what in ((bob, sealed), (user, sealed[:-1] + b"x")):
                with pytest.raises(InvalidRequest, match="cannot be read"):
                    w.factors._open(whose, what)
            with pytest.raises(InvalidRequest, match="another pepper"):
                Factors(Pepper(b"x" * 32), "x")._open(user, sealed)
            # Nothing of it in the clear anywhere.
            everything = str(
                await w.rows("SELECT second_factors::text, recovery_codes::text FROM second_factors, recovery_codes")
            )
            everything += str(await w.rows("SELECT detail FROM audit_log"))
            assert not [code for code in (*codes, secret, raw.hex()) if code.replace("-", "") in everything]

    run(test())


def test_enrolment_confirmation_and_login(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            clock = w.factors._clock = Clock()
            await w.user(ANN)
            before = await login(w)
            made = await w.factor.enrol(ANN, PASSWORD, "", HOME)
            parts = urlsplit(made.uri)
            assert (parts.scheme, parts.netloc, parts.path) == ("otpauth", "totp", "/HelixFlow:ann%40example.com")
            asked = parse_qs(parts.query)
            assert {name: asked[name] for name in ("secret", "digits", "period", "algorithm", "issuer")} == {
                "secret": [made.secret],
                "digits": ["6"],
                "period": ["30"],
                "algorithm": ["SHA1"],
                "issuer": ["HelixFlow"],
            }
            # It does not count before it is confirmed.
            await login(w)
            with pytest.raises(InvalidCredentials, match="clock"):
                await w.factor.confirm(ANN, PASSWORD, "000000", HOME)
            codes = await w.factor.confirm(ANN, PASSWORD, code_of(made.secret, clock), HOME)
            assert len(codes) == len(set(codes)) == 10
            assert all(len(code) == 19 for code in codes)
            # What was begun without it is over.
            async with w.pool.acquire() as connection:
                with pytest.raises(InvalidToken):
                    await w.sessions.refresh(connection, before.refresh_token, HOME)
            with pytest.raises(SecondFactorRequired) as caught:
                await login(w)
            assert (caught.value.http_status, caught.value.param) == (403, "code")
            with pytest.raises(InvalidCredentials):
                await w.login.login(ANN, "this is the wrong password", "", HOME, code=code_of(made.secret, clock))
            # The code of the confirmation was used up.
            with pytest.raises(InvalidCredentials, match="used before"):
                await login(w, code_of(made.secret, clock))
            clock.now += STEP_S
            code = code_of(made.secret, clock)
            issued = await login(w, f" {code[:3]} {code[3:]} ")
            assert issued.recovery_codes_left is None
            with pytest.raises(InvalidCredentials, match="used before"):
                await login(w, code)
            (row,) = await w.audited("user.factor_confirm")
            assert json.loads(row["detail"]) == {"sessions_ended": 2}
            assert json.loads((await w.audited("login.succeeded"))[-1]["detail"])["second_factor"] == "totp"

    run(test())


def test_recovery_codes_work_once_each(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            secret, codes, clock = await enrolled(w)
            assert (await login(w, codes[0])).recovery_codes_left == 9
            assert (await login(w, codes[1].upper().replace("-", " "))).recovery_codes_left == 8
            with pytest.raises(InvalidCredentials):
                await login(w, codes[0])
            # Somebody else's are worth nothing.
            await w.value("UPDATE recovery_codes SET user_id = (SELECT id FROM users WHERE email = $1)", OWNER)
            with pytest.raises(InvalidCredentials):
                await login(w, codes[2])
            assert json.loads((await w.audited("login.succeeded"))[-1]["detail"])["second_factor"] == "recovery code"
            # A new enrolment, with the factor there is, replaces them.
            again = await w.factor.enrol(ANN, PASSWORD, code_of(secret, clock), HOME)
            clock.now += STEP_S
            await login(w, code_of(secret, clock))
            fresh = await w.factor.confirm(ANN, PASSWORD, code_of(again.secret, clock), HOME)
            clock.now += STEP_S
            with pytest.raises(InvalidCredentials):
                await login(w, code_of(secret, clock))
            await login(w, fresh[0])
            await login(w, code_of(again.secret, clock))

    run(test())


def test_codes_are_guessed_as_slowly_as_passwords_from_wherever(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki, login_free_attempts=3) as w:
            secret, _, clock = await enrolled(w)
            for number in range(4):
                with pytest.raises(InvalidCredentials):
                    await w.login.login(ANN, PASSWORD, "", f"198.51.100.{number}", code="000000")
            with pytest.raises(AccountLocked):
                await w.login.login(ANN, PASSWORD, "", "198.51.100.99", code=code_of(secret, clock))
            with pytest.raises(AccountLocked):
                await w.factor.confirm(ANN, PASSWORD, "000000", "198.51.100.77")
            # Who knows only the password does not become known by that, nor are wrong ones forgotten.
            assert await w.value("SELECT count(*) FROM known_addresses WHERE address LIKE '198%'") == 0
            await w.value("UPDATE login_attempts SET free_at = now()")
            await w.login.login(ANN, PASSWORD, "", "198.51.100.99", code=code_of(secret, clock))
            assert await w.value("SELECT count(*) FROM login_attempts WHERE address = '(code)'") == 0

    run(test())


def test_enrolment_needs_what_a_login_needs(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            secret, codes, clock = await enrolled(w)
            with pytest.raises(InvalidCredentials):
                await w.factor.enrol(ANN, "this is the wrong password", codes[0], HOME)
            with pytest.raises(SecondFactorRequired):
                await w.factor.enrol(ANN, PASSWORD, "", HOME)
            with pytest.raises(InvalidRequest, match="no second factor to confirm"):
                await w.factor.confirm(ANN, PASSWORD, code_of(secret, clock), HOME)
            assert w.first_password is not None
            with pytest.raises(PasswordChangeRequired):
                await w.factor.enrol(OWNER, w.first_password, "", HOME)
            await w.user("bob@example.com")
            with pytest.raises(InvalidRequest, match="no second factor"):
                await w.factor.remove("bob@example.com", PASSWORD, "000000", HOME)
            with pytest.raises(InvalidCredentials):
                await w.factor.remove(ANN, PASSWORD, "000000", HOME)
            await w.factor.remove(ANN, PASSWORD, code_of(secret, clock), HOME)
            await login(w)
            assert await w.value("SELECT count(*) FROM recovery_codes") == 0

    run(test())


def test_an_organisation_may_ask_for_one(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            clock = w.factors._clock = Clock()
            await w.user(ANN, "admin")
            await w.user("bob@example.com", "member")
            before = await login(w)
            await w.do(organisations.require_factor, OPERATOR, "default", "admin")
            # Sessions without one end with their access token.
            async with w.pool.acquire() as connection:
                with pytest.raises(InvalidToken):
                    await w.sessions.refresh(connection, before.refresh_token, HOME)
            await w.login.login("bob@example.com", PASSWORD, "", HOME)
            with pytest.raises(SecondFactorMissing, match="enrol one first") as caught:
                await login(w)
            assert caught.value.http_status == 403
            # A new password is taken, but lets nobody in.
            with pytest.raises(SecondFactorMissing):
                await w.login.login(ANN, PASSWORD, "another horse battery", HOME)
            made = await w.factor.enrol(ANN, "another horse battery", "", HOME)
            await w.factor.confirm(ANN, "another horse battery", code_of(made.secret, clock), HOME)
            clock.now += STEP_S
            code = code_of(made.secret, clock)
            issued = await w.login.login(ANN, "another horse battery", "", HOME, code=code)
            async with w.pool.acquire() as connection:
                await w.sessions.refresh(connection, issued.refresh_token, HOME)
            with pytest.raises(PermissionDenied, match="asks for a second factor"):
                await w.factor.remove(ANN, "another horse battery", code, HOME)
            (row,) = await w.audited("organisation.update")
            assert json.loads(row["detail"]) == {"factor_from": {"from": "", "to": "admin"}}
            await w.do(organisations.require_factor, OPERATOR, "default", "")
            clock.now += STEP_S
            await w.factor.remove(ANN, "another horse battery", code_of(made.secret, clock), HOME)

    run(test())


def test_only_an_owner_of_it_asks_an_organisation(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.do(organisations.create, OPERATOR, "other")
            theirs = await w.acting(await w.user("boss@example.com", "owner", "other"))
            changed = await w.do(organisations.require_factor, theirs, "other", "viewer")
            assert changed.factor_from == "viewer"
            with pytest.raises(NotFound):
                await w.do(organisations.require_factor, theirs, "default", "viewer")
            with pytest.raises(InvalidRequest):
                await w.do(organisations.require_factor, theirs, "other", "king")

    run(test())


def test_a_lost_factor_is_reset_by_who_may(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            _, codes, _ = await enrolled(w)
            issued = await login(w, codes[0])
            member = await w.acting(await w.user("bob@example.com", "viewer"))
            with pytest.raises(PermissionDenied):
                await w.do(session_desk.reset_factor, member, ANN)
            admin: Actor = await w.acting(await w.user("admin@example.com", "admin"))
            user = await w.do(session_desk.reset_factor, admin, ANN)
            assert not user.second_factor
            async with w.pool.acquire() as connection:
                with pytest.raises(InvalidToken):
                    await w.sessions.refresh(connection, issued.refresh_token, HOME)
            await login(w)
            await w.do(session_desk.reset_factor, admin, ANN)
            (row,) = await w.audited("user.reset_factor")
            assert (row["actor"], row["target"]) == ("admin@example.com", ANN)

    run(test())


def test_a_removed_user_leaves_no_factor(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await enrolled(w)
            from helixflow.auth import users

            assert (await w.do(users.find, OPERATOR, ANN))["second_factor"]
            await w.do(users.delete, OPERATOR, ANN)
            assert await w.value("SELECT count(*) FROM second_factors") == 0
            assert not await w.do(factors.remove, await w.user(ANN))

    run(test())
