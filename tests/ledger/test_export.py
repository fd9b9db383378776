"""Rows as CSV and JSON lines."""

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

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
    assert found == [{name: str(value) for name, value in asdict(each).items()} for each in ROWS]
    assert b"".join(collect("csv")).decode() == ",".join(LEDGER_FIELDS) + "\r\n"


def test_json_lines() -> None:
    pieces = collect("jsonl", ROWS[:1], ROWS[1:])
    assert [json.loads(line) for line in b"".join(pieces).splitlines()] == [asdict(each) for each in ROWS]
    assert collect("jsonl") == []


def test_anything_with_the_fields() -> None:
    usage = UsageRow(day="2026-01-01", requests=3)
    message = SimpleNamespace(**asdict(usage), unknown=1)
    assert collect("jsonl", [message], fields=USAGE_FIELDS) == collect("jsonl", [usage], fields=USAGE_FIELDS)


def test_other_formats() -> None:
    with pytest.raises(InvalidRequest) as refused:
        collect("xlsx")
    assert refused.value.param == "format"
