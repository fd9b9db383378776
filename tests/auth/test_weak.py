"""Which passwords are guessed first."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.auth import weak
from helixflow.auth.passwords import SHORTEST, acceptable, one_time
from helixflow.core_rs import InvalidRequest

ADA = weak.expected("ada.lovelace@example.com", "Analytical Engines Ltd")


@pytest.mark.parametrize(
    "password",
    [
        "Password123456!!",
        "p@ssw0rdp@ssw0rd",
        "P@$$w0rd P@$$w0rd P@$$w0rd",
        "iloveyou1234567",
        "adminadmin12345",
        "Welcome2026!!!!!",
        "qwertyuiopasdfgh",
        "yxcvbnmasdfghjkl",
        "123456789012345",
        "abcdefghijklmnopqrs",
        "zyxwvutsrqponmlk",
        "aaaaaaaaaaaaaaaaaaaa",
        "!!!!!!!!!!!!!!!!!!!!",
        "x" * 1024,
        "internationalization",
        "helixflowhelixflow",
        "HelixFlow-2026-!",
    ],
)
def test_what_is_guessed_first_is_weak(password: str) -> None:
    assert len(password) >= SHORTEST
    assert weak.weak(password)


@pytest.mark.parametrize(
    "password",
    [
        "ada.lovelace@example.com",
        "Ada.Lovelace2026!",
        "lovelace-lovelace-1",
        "example.com 2026 ada",
        "Analytical Engines Ltd",
        "analyticalengines1",
        "4da.l0velace@ex4mple",
    ],
)
def test_what_belongs_to_the_account_is_weak_for_it_alone(password: str) -> None:
    assert weak.weak(password, ADA)
    assert not weak.weak(password.replace("ada", "xqj").replace("ove", "wkz").replace("nal", "vbx") + " kjh", ())


@pytest.mark.parametrize(
    "password",
    [
        "correct horse battery",
        "correct horse battery staple",
        "another horse battery",
        "the new password one",
        "batteries of horses",
        "пароль из трёх слов",
        "Tr0ub4dor&3xkcd936",
        "qwerty and some more",
    ],
)
def test_other_passwords_are_their_owners_choice(password: str) -> None:
    assert not weak.weak(password, ADA)


@given(st.text(min_size=0, max_size=1024), st.emails())
def test_every_text_gets_an_answer(text: str, email: str) -> None:
    assert weak.weak(text, weak.expected(email, text[:50])) in (True, False)


@given(st.integers(1, 8), st.integers(2, 20))
def test_repetition_adds_nothing(length: int, times: int) -> None:
    """A pattern of up to two pieces stays one, however long it gets."""
    assert weak.weak(("monkey" + "1" * length) * times)


def test_random_ones_pass() -> None:
    for _ in range(200):
        assert not weak.weak(one_time(), ADA)
        # Not in hexadecimal digits: of 16, one in a thousand is hardly more than a number.
        assert not weak.weak(secrets.token_urlsafe(12), ADA)


def test_length_is_counted_in_characters() -> None:
    assert SHORTEST == 15
    assert acceptable("ü" * 15) == "ü" * 15
    for wrong in ("ü" * 14, "x" * 1025):
        with pytest.raises(InvalidRequest, match="15 to 1024"):
            acceptable(wrong)


def test_the_lists_are_of_a_decent_size() -> None:
    passwords, words = weak._common()
    assert len(passwords) > 20_000
    assert len(words) > 60_000
