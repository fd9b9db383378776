"""Typed access to a parsed config.json: a wrong value is refused with the file, the key and the reason."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixflow.engine.base import DamagedFileError, UnsupportedModelError
from helixflow.engine.folder import read_bounded

LARGEST = 1 << 31
LARGEST_JSON = 1 << 20
"""Bytes: the largest config.json in use has a tenth of it, and parsing takes up to fifty times the size."""


@dataclass(frozen=True, slots=True)
class Reader:
    """One JSON object of a file; `prefix` says where in the file it stands (for messages)."""

    path: Path
    config: Mapping[str, Any]
    prefix: str = ""

    def damaged(self, key: str, reason: str) -> DamagedFileError:
        """The error of a key whose value makes no sense."""
        return DamagedFileError(self.path, self.prefix + key, reason)

    def unsupported(self, key: str, reason: str) -> UnsupportedModelError:
        """The error of a key whose value is not supported."""
        return UnsupportedModelError(self.path, self.prefix + key, reason)

    def whole(self, key: str, default: int | None = None, most: int = LARGEST - 1) -> int:
        """A whole number in 0 .. `most`; a missing (or null) key takes the default."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
            raise self.damaged(key, f"is {value!r}, expected a whole number")
        if value > most:
            raise self.unsupported(key, f"is {value}; at most {most} is supported")
        return value

    def count(self, key: str, default: int | None = None, most: int = LARGEST - 1) -> int:
        """A whole number in 1 .. `most`."""
        value = self.whole(key, default, most)
        if value == 0:
            raise self.damaged(key, "is 0, expected at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise self.damaged(key, f"is {value!r}, expected a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.damaged(key, f"is {value!r}, expected true or false")
        return value

    def _value(self, key: str, default: object) -> object:
        value = self.config.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.damaged(key, "is missing")
        return default


def read_json(path: Path, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes, inside its folder. Raises DamagedFileError."""
    try:
        value = json.loads(read_bounded(path, limit))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, "", f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedFileError(path, "", "is not a JSON object")
    return value
