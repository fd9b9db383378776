"""What of a request's body has no effect, so that the answer can name it.

A name is the path of the key with its places in arrays left out: `messages[].id`.
"""

import re
from typing import Any

import orjson
from msgspec import Struct

HEADER = b"x-helixflow-ignored"
MAX_NAMES = 16
"""Names in the header; the rest is counted."""
MAX_NAME_CHARS = 64
_ODD = re.compile(r"[^A-Za-z0-9_.\[\]-]")


class Shape:
    """The keys that an object may have, and the shapes of the objects (or arrays of them) below some of them."""

    __slots__ = ("_below", "_known")

    def __init__(self, kind: type[Struct], **below: "Shape") -> None:
        self._known = frozenset(kind.__struct_fields__)
        self._below = tuple(below.items())

    def unknown(self, document: dict[str, Any]) -> list[str]:
        """The keys that it does not have. `null` means absent."""
        if document.keys() <= self._known:
            return []
        return [key for key, value in document.items() if value is not None and key not in self._known]

    def below(self, document: dict[str, Any], path: str, names: dict[str, None]) -> None:
        """Adds the unknown keys of the objects below."""
        for key, shape in self._below:
            value = document.get(key)
            if isinstance(value, dict):
                shape.add(value, f"{path}{key}.", names)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, dict):
                        shape.add(item, f"{path}{key}[].", names)

    def add(self, document: dict[str, Any], path: str, names: dict[str, None]) -> None:
        """Adds the unknown keys of an object and of those below it."""
        for key in self.unknown(document):
            names[path + key] = None
        if self._below:
            self.below(document, path, names)


def unknown(body: bytes, shape: Shape) -> tuple[list[str], list[str]]:
    """Names of the keys of a checked body that its shape does not have: at the top level, and below it."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return [], []  # orjson is stricter than what has checked the body
    names: dict[str, None] = {}
    shape.below(document, "", names)
    return shape.unknown(document), list(names)


def header(names: list[str]) -> bytes:
    """The value of the header: bounded, and nothing in it that a header or a terminal would take for more."""
    shown = [_ODD.sub("?", name[:MAX_NAME_CHARS]) for name in names[:MAX_NAMES]]
    more = len(names) - len(shown)
    return ", ".join([*shown, f"+{more}"] if more else shown).encode("ascii")
