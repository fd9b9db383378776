"""Rows of the ledger as CSV or JSON lines, page by page: memory holds one page, however many there are."""

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from helixflow.admin.errors import AdminError
from helixflow.admin.values import money_text, precise_text
from helixflow.ledger.export import export

COLUMNS = (
    "id",
    "at",
    "organisation_id",
    "user_id",
    "key_id",
    "model",
    "endpoint",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "queue_us",
    "first_token_us",
    "total_us",
    "finish",
    "error",
    "status",
    "client",
    "cost",
    "request_id",
)
"""In this order, in both formats. `at` is RFC 3339 (UTC), `cost` a decimal number, times are microseconds."""


async def write(pages: AsyncIterator[list[dict[str, Any]]], form: str, path: Path | None) -> int:
    """Writes every row and returns their number. `path` None: standard output.

    A file appears, or is replaced, only once it is complete; until then it is called PATH.partial. Raises AdminError
    when it cannot be written.
    """
    written = 0

    async def shown() -> AsyncIterator[list[SimpleNamespace]]:
        nonlocal written
        async for page in pages:
            written += len(page)
            yield [_shown(row) for row in page]

    try:
        with _destination(path) as file:
            async for piece in export(shown(), form, COLUMNS):
                file.write(piece.decode())
    except OSError as error:
        raise AdminError(f"cannot write {path or 'to standard output'}: {error.strerror}") from None
    return written


def _shown(row: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{**row, "at": precise_text(row["at_us"]), "cost": money_text(row["cost"])})


@contextlib.contextmanager
def _destination(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
