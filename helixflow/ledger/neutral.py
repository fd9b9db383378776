"""Texts of others in files that spreadsheets and terminals open: they must stay texts."""

import re
from typing import Any, Final

_FORMULA: Final = re.compile(r"[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
"""What a cell begins with that spreadsheets compute (OWASP, CSV injection)."""
_NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_STEERING: Final = re.compile(r"[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
"""Beyond ASCII's own, which JSON escapes already: control characters, and those that turn or hide text."""


def cell(value: Any) -> Any:
    """A value for a cell of a CSV file: control characters escaped, formulas kept from being computed by a quote."""
    if not isinstance(value, str) or not value:
        return value
    text = value
    if not value.isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in value)
    if _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return "'" + text
    return text


def json_text(text: str) -> str:
    """JSON with every character escaped that could steer a terminal; it says the same."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
