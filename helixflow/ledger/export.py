"""Rows for other programs: CSV and JSON lines, a piece at a time. Works on anything with the fields of the rows."""

import csv
import dataclasses
import io
from collections.abc import AsyncIterator, Iterable
from operator import attrgetter
from typing import Any, Final

import orjson

from helixflow.core_rs import InvalidRequest
from helixflow.ledger.neutral import cell, json_text
from helixflow.ledger.query import LedgerRow, UsageRow
from helixflow.refusals import refusal

FORMATS: Final = ("csv", "jsonl")
LEDGER_FIELDS: Final = tuple(field.name for field in dataclasses.fields(LedgerRow))
USAGE_FIELDS: Final = tuple(field.name for field in dataclasses.fields(UsageRow))


async def export(
    pages: AsyncIterator[Iterable[Any]], form: str, fields: tuple[str, ...] = LEDGER_FIELDS
) -> AsyncIterator[bytes]:
    """The rows of all pages as UTF-8 text, a piece for each page; CSV begins with a line of names (RFC 4180).

    No text in it steers a spreadsheet or a terminal (`neutral`); JSON lines say exactly what the rows say.
    The rows may be those of `query`, or messages of admin.proto. Raises InvalidRequest for an unknown format.
    """
    if form not in FORMATS:
        raise refusal(InvalidRequest, f"The format must be one of {', '.join(FORMATS)}, not {form!r}.", "format")
    if form == "csv":
        yield _csv([fields])
    values = attrgetter(*fields)
    async for page in pages:
        rows = [values(row) for row in page]
        if form == "csv":
            yield _csv(rows)
        else:
            yield json_text("".join(_line(fields, row) for row in rows)).encode()


def _csv(rows: Iterable[tuple[Any, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _line(fields: tuple[str, ...], row: tuple[Any, ...]) -> str:
    return orjson.dumps(dict(zip(fields, row, strict=True))).decode() + "\n"
