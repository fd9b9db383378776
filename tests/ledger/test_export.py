"""Rows as CSV and JSON lines."""

import asyncio
import csv
import io
import json
import unicodedata
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core_rs import InvalidRequest
from helixflow.ledger.export import LEDGER_FIELDS, USAGE_FIELDS, export
from helixflow.ledger.query import LedgerRow, UsageRow

ROWS = [
    LedgerRow("id-1", 1, "o", "u", "k", 'mo"del,\n', "/v1", 1, 2, 3, 4, 5, 6, "stop", "", 200, "::1", 7, "größe"),
    LedgerRow("id-2", 2, "", "", "", "demo", "/v1", 0, 0, 0, 0, 0, 0, "", "internal", 500, "", 0, "r"),
]


async def pages(*found: Any) -> AsyncIterator[Any]:
    for each in found:
        yield each


def collect(form: str, *found: Any, fields: tuple[str, ...] = LEDGER_FIELDS) -> list[bytes]:
    async def work() -> list[bytes]:
        return [piece async for piece in export(pages(*found), form, fields)]

    return asyncio.run(work())


def test_csv() -> None:
    pieces = collect("csv", ROWS[:1], ROWS[1:])
    assert len(pieces) == 3
    found = list(csv.DictReader(io.StringIO(b"".join(pieces).decode(), newline="")))
    assert found == [{name: str(value).replace("\n", "\\n") for name, value in asdict(each).items()} for each in ROWS]
    assert b"".join(collect("csv")).decode() == ",".join(LEDGER_FIELDS) + "\r\n"


def test_json_lines() -> None:
    pieces = collect("jsonl", ROWS[:1], ROWS[1:])
    assert [json.loads(line) for line in b"".join(pieces).splitlines()] == [asdict(each) for each in ROWS]
    assert collect("jsonl") == []


HOSTILE = ["=cmd|'/c calc'!A1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "=\x1b]0;x\x07", "-", "+49 30"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_spreadsheet_computes_nothing(text: str) -> None:
    found = list(csv.reader(io.StringIO(b"".join(collect("csv", [replace(ROWS[1], model=text)])).decode(), newline="")))
    cell = found[1][LEDGER_FIELDS.index("model")]
    assert cell.startswith("'")
    assert cell.isprintable()


def test_numbers_stay_numbers() -> None:
    rows = [replace(ROWS[1], model="-1.25", cost=-7, client="12")]
    found = next(csv.reader(io.StringIO(collect("csv", rows)[1].decode(), newline="")))
    values = [found[LEDGER_FIELDS.index(name)] for name in ("model", "cost", "client")]
    assert values == ["-1.25", "-7", "12"]


@given(st.text(max_size=30))
def test_no_text_steers_a_terminal_or_a_spreadsheet(text: str) -> None:
    """Whatever a client calls its model."""
    row = replace(ROWS[1], model=text)
    lines, table = (b"".join(collect(form, [row])).decode() for form in ("jsonl", "csv"))
    for line in (*lines.splitlines(), *table.splitlines()):
        assert not [c for c in line if unicodedata.category(c) == "Cc"]
    assert json.loads(lines)["model"] == text
    cell = list(csv.reader(io.StringIO(table, newline="")))[1][LEDGER_FIELDS.index("model")]
    assert cell.isprintable()
    assert cell[:1] not in ("=", "+", "@")


def test_anything_with_the_fields() -> None:
    usage = UsageRow(day="2026-01-01", requests=3)
    message = SimpleNamespace(**asdict(usage), unknown=1)
    assert collect("jsonl", [message], fields=USAGE_FIELDS) == collect("jsonl", [usage], fields=USAGE_FIELDS)


def test_other_formats() -> None:
    with pytest.raises(InvalidRequest) as refused:
        collect("xlsx")
    assert refused.value.param == "format"
