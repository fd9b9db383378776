"""Tables for people: columns side by side, cut to the width of the terminal."""

import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from helixflow.terminal import safe

WIDTH = 100
"""Columns of a line where no terminal says how wide it is."""
GAP = "  "
NARROWEST = 8
"""A column that may be cut keeps at least so much."""


@dataclass(frozen=True, slots=True)
class Column:
    """Head of a column. `right`: numbers. `cut`: may lose its end when the line is too long."""

    title: str
    right: bool = False
    cut: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], empty: str) -> str:
    """The rows under their titles; `empty` when there are none. Texts of others cannot steer the terminal."""
    if not rows:
        return empty
    lines = [[column.title for column in columns], *([safe(cell) for cell in row] for row in rows)]
    widths = [max(_width(line[index]) for line in lines) for index in range(len(columns))]
    _shrink(widths, columns)
    return "\n".join(_line(columns, widths, line) for line in lines)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """One fact a line, the values under each other. Values are whole, however long."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {safe(value)}" for name, value in pairs)


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    parts = []
    for column, width, cell in zip(columns, widths, cells, strict=True):
        shown = _fit(cell, width)
        space = " " * (width - _width(shown))
        parts.append(space + shown if column.right else shown + space)
    return GAP.join(parts).rstrip()


def _shrink(widths: list[int], columns: Sequence[Column]) -> None:
    """Takes from the widest of the columns that may be cut until the line fits, or none can give any more."""
    total = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
    over = sum(widths) + len(GAP) * (len(widths) - 1) - total
    cut = [index for index, column in enumerate(columns) if column.cut]
    while over > 0 and cut:
        widest = max(cut, key=lambda index: widths[index])
        if widths[widest] <= NARROWEST:
            return
        widths[widest] -= 1
        over -= 1


def _fit(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _width(text: str) -> int:
    """Terminal columns of a text: East Asian characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )
