"""What people read on a terminal: text of others must not steer it."""

import sys
from typing import TextIO


def safe(text: str, *, lines: bool = False) -> str:
    r"""The text with everything that is not printable written as `\u001b`, which JSON reads back.

    Control characters and marks of direction move cursors, change titles and hide what a name really is. `lines`: line
    feeds and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c in "\n\t") else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    number = ord(c)
    if c.isspace() and number > 0xA0 and number not in (0x2028, 0x2029):
        return c  # spaces of other widths
    if number < 0x10000:
        return f"\\u{number:04x}"
    high, low = divmod(number - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


def say(text: object = "", *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Prints for people (default: standard output), every command's one way to do so."""
    print(safe(str(text), lines=True), file=file or sys.stdout, end=end, flush=flush)
