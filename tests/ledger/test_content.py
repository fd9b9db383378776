"""Texts: redacted, bounded, gone after their time, and never a danger to others."""

import asyncio
import re
import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.core_rs import InvalidRequest
from helixflow.ledger import content
from helixflow.ledger.content import REDACTED, Redactor, check
from helixflow.ledger.record import CONTENT_MAX, Content, decode, encode

from .support import NOON_US, Databases, begin, opened

MAIL = r"[\w.+-]{1,64}@[\w.-]{1,64}"


def test_patterns_are_replaced() -> None:
    redact = Redactor([MAIL, r"\b\d{13,19}\b", r"(?i)secret-[a-z]{3}"])
    text = "Write to joe+x@example.org or SECRET-abc; 4111111111111111, not 123."
    assert redact(text) == f"Write to {REDACTED} or {REDACTED}; {REDACTED}, not 123."
    assert Redactor([])("as it is") == "as it is"


@settings(deadline=None, max_examples=60)
@given(st.text("ab1 ", max_size=1500), st.integers(1, 300))
def test_windows_change_nothing(text: str, shift: int) -> None:
    text = "x" * shift + text
    for pattern in (r"ab{1,3}", r"\b1{1,200}\b", r"a|1{2}", r"(?:a1 ){2}$"):
        assert Redactor([pattern])(text) == re.sub(pattern, REDACTED, text)


@pytest.mark.parametrize("start", range(400, 1100, 50))
def test_a_match_over_the_edge_of_a_window(start: int) -> None:
    text = "x" * start + "1" * 150 + "x" * 300
    assert Redactor([r"1{1,200}"])(text) == "x" * start + REDACTED + "x" * 300


def test_a_match_at_the_end_of_what_is_kept() -> None:
    text = "." * (CONTENT_MAX - 8) + " 4111111111111111 and more"
    kept = Redactor([r"\b\d{16}\b"])(text)
    assert kept is not None
    assert len(kept) <= CONTENT_MAX
    assert "411" not in kept


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a+", "more than 256"),
        ("a*", "empty"),
        ("(a{0,9}){0,9}", "empty"),
        ("a{1,300}", "more than 256"),
        ("(a{1,9}){1,9}", "too many ways"),
        ("(ab|cd){1,100}", "too many ways"),
        ("[a-z]{1,80}[a-z]{1,80}", "too many ways"),
        (r"(a)\1", "back reference"),
        ("(?=a)a", "look-around"),
        ("(?<!a)b", "look-around"),
        ("(", "no regular expression"),
        ("[[a]", "no regular expression"),
        ("a" * 513, "longer than 512"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        check(["fine", pattern])
    assert refused.value.param == "content.redact[1]"


def test_too_many_patterns() -> None:
    with pytest.raises(InvalidRequest, match="at most 32"):
        check(["a"] * 33)


def test_a_slow_pattern_is_given_up() -> None:
    patterns = (r"[a-z]{1,64}[a-z]{1,64}!",)
    begun = begin()
    began = time.thread_time()
    assert content.content(begun, "a" * CONTENT_MAX, "", patterns, 1) is None
    assert time.thread_time() - began < 0.5
    began = time.thread_time()
    assert content.content(begun, "a" * CONTENT_MAX, "short", patterns, 1) is None
    assert time.thread_time() - began < 0.01
    assert content.content(begun, "a" * CONTENT_MAX, "short", ("short",), 1) is not None


def test_texts_are_bounded() -> None:
    kept = content.content(begin(NOON_US), "\U0001f600" * 70_000, "\0", (), 0)
    assert kept is not None
    assert (len(kept.prompt), kept.answer) == (CONTENT_MAX, "\ufffd")
    assert kept.expires_us == NOON_US + 86_400_000_000
    assert decode(encode(kept)) == kept
    assert isinstance(kept, Content)
    assert content.content(begin(), "text", "text", ("(",), 1) is None


def test_purge(on_wheel: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PURGE_ROWS", 3)
    target = on_wheel.new()
    now = datetime(2026, 3, 1, tzinfo=UTC)

    async def scenario() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            for number in range(10):
                await connection.execute(
                    "INSERT INTO contents VALUES ($1, $2, NULL, '', '', $3)",
                    uuid.UUID(int=number),
                    now,
                    now + timedelta(days=number),
                )
            assert await content.purge(connection, now + timedelta(days=6)) == 7
            assert await content.purge(connection, now + timedelta(days=6)) == 0
            assert await connection.fetchval("SELECT count(*) FROM contents") == 3

    asyncio.run(scenario())
