"""How people write and read values."""

import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.admin import values
from helixflow.admin.table import Column, facts, table


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("250", 250), ("10k", 10_000), ("1.5M", 1_500_000), ("2G", 2 * 10**9), ("0.001k", 1)],
)
def test_counts(text: str, number: int) -> None:
    assert values.count(text) == number


@pytest.mark.parametrize(
    ("text", "nano"),
    [("1.25", 1_250_000_000), ("0.000000001", 1), ("0", 0), ("12.5", 12_500_000_000), ("1.2500000000", 1_250_000_000)],
)
def test_money(text: str, nano: int) -> None:
    assert values.money(text) == nano


@pytest.mark.parametrize(("text", "nano"), [("1.25", 1250), ("0.001", 1), ("15", 15_000), ("0", 0)])
def test_prices_are_per_million_tokens(text: str, nano: int) -> None:
    assert values.token_price(text) == nano


@pytest.mark.parametrize(
    ("read", "texts"),
    [
        (values.count, ["", "-1", "1.5", "10x", "k", "1e3", "ten", "1.0001k", "9" * 19 + "G", "\u0661", "1 k", "+1"]),
        (values.money, ["", "-1", "1,25", "1.2.3", "1e3", "$1", "nan", "inf", "0.0000000001", "9" * 19]),
        (values.token_price, ["0.0001", "x", "", "9" * 19]),
        (values.day, ["", "2026-02-30", "2026-13-01", "20260101", "2026-1-1", "today", "2026-W01-1", "0000-01-01"]),
        (values.duration, ["", "1", "d", "1y", "-1d", "1.5h", "9999999999s", "999999w"]),
        (values.expiry, ["", "soon", "2020-01-01", "2026-02-30", "0", "1"]),
    ],
)
def test_what_is_not_a_value_is_refused_with_the_text(read: Callable[[str], Any], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(ArgumentTypeError, match="`"):
            read(text)


def test_durations_and_expiry() -> None:
    assert [values.duration(text) for text in ("0s", "45s", "30m", "12h", "90d", "2w")] == [
        0,
        45,
        1800,
        43_200,
        7_776_000,
        1_209_600,
    ]
    assert values.expiry("never") == 0
    before = int(time.time())
    assert before + 86_400 <= values.expiry("1d") <= time.time() + 86_400
    tomorrow = datetime.now(UTC) + timedelta(days=2)
    ends = datetime.fromtimestamp(values.expiry(tomorrow.strftime("%Y-%m-%d")), UTC)
    assert (ends.date(), ends.hour, ends.minute) == (tomorrow.date(), 0, 0)


@given(st.integers(min_value=0, max_value=values.MOST))
def test_money_survives_being_written_and_read(nano: int) -> None:
    text = values.money_text(nano)
    assert values.money(text) == nano
    assert len(text.partition(".")[2]) >= 2


@given(st.integers(min_value=0, max_value=values.MOST // 1000))
def test_prices_survive_being_written_and_read(nano: int) -> None:
    assert values.token_price(values.token_price_text(nano)) == nano


def test_texts() -> None:
    assert values.money_text(1_250_000_000) == "1.25"
    assert values.money_text(5 * 10**9) == "5.00"
    assert values.token_price_text(1250) == "1.25"
    assert values.token_price_text(1) == "0.001"
    assert values.count_text(1_234_567) == "1,234,567"
    assert values.moment_text(0) == values.day_text(0) == "never"
    assert values.moment_text(1_770_000_000) == "2026-02-02 02:40"
    assert values.day_text(1_770_000_000) == "2026-02-02"
    assert values.precise_text(1_770_000_000_000_007) == "2026-02-02T02:40:00.000007Z"


def test_a_table_fits_into_100_columns() -> None:
    columns = [Column("ID"), Column("NAME", cut=True), Column("N", right=True), Column("NOTE", cut=True)]
    rows = [("x" * 36, "n" * 80, "12", "short"), ("y" * 36, "long " * 20, "3", "日本語" * 20)]
    lines = table(columns, rows, "nothing").split("\n")
    assert len(lines) == 3
    assert "x" * 36 in lines[1], "what a command needs is whole"
    assert "…" in lines[1]
    assert all(len(line) <= 100 for line in lines)
    assert lines[1].index("12") == lines[2].index("3") - 1
    assert lines[2].count("日") < 20, "wide characters take two columns"


def test_an_empty_table_says_so() -> None:
    assert table([Column("A")], [], "no users") == "no users"


def test_texts_of_others_cannot_steer_the_terminal() -> None:
    evil = "a\x1b]0;owned\x07\nb\u202ec"
    assert table([Column("A")], [[evil]], "") == "A\na\\u001b]0;owned\\u0007\\u000ab\\u202ec"
    assert "\x1b" not in table([Column("A")], [[evil]], "")
    assert "\x1b" not in facts([("name", evil)])
