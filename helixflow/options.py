"""The machinery of the configuration: options declared once, read from TOML and environment, all errors together."""

import dataclasses
import difflib
import ipaddress
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from helixflow.secret import Secret

T = TypeVar("T")


_PORT = re.compile(r"[0-9]{1,5}")
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_host(text: str) -> bool:
    """An IP address, or a name that can be looked up (RFC 1123, and `_` as container networks use it)."""
    return _ip(text) is not None or (len(text) <= 253 and all(_LABEL.fullmatch(label) for label in text.split(".")))


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address. `port` 0 asks the system for a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Reads `host:port` or `[v6]:port`. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if not colon or not _is_host(host) or not _PORT.fullmatch(port) or int(port) > 65535:
            raise ValueError(f"{text!r} is not an address: write host:port, for example 127.0.0.1:8443")
        return cls(host, int(port))

    @property
    def loopback(self) -> bool:
        """True when no other machine can reach the address."""
        # A name that only looks like an address (127.example.org) is somebody's name.
        ip = _ip(self.host)
        return ip.is_loopback if ip else self.host == "localhost"

    @property
    def everywhere(self) -> bool:
        """True for all addresses of the machine."""
        ip = _ip(self.host)
        return ip is not None and ip.is_unspecified

    @property
    def from_here(self) -> "Address":
        """Where a process of the same machine reaches what listens on this address."""
        return Address("::1" if ":" in self.host else "127.0.0.1", self.port) if self.everywhere else self

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Check = Callable[[Any], str | None]
"""Looks at a parsed value; returns what is wrong with it, or None."""


def option(default: Any, doc: str, *, check: Check | None = None, env: str | None = None) -> Any:
    """Declares one option of a frozen dataclass: default, documentation, check, extra environment name."""
    metadata = {"doc": doc, "check": check, "env": env}
    return dataclasses.field(default=default, metadata=metadata)


def between(low: float, high: float) -> Check:
    """A check that the value lies in [low, high]."""
    return lambda value: None if low <= value <= high else f"must be between {low:g} and {high:g}, not {value:g}"


def one_of(*choices: str) -> Check:
    """A check that the value is one of the words given."""
    return lambda value: None if value in choices else f"must be one of {', '.join(choices)}, not {value!r}"


def https_origin(value: str) -> str | None:
    """A check that the value is empty, or `https://NAME` with or without a port, and nothing more."""
    scheme, _, rest = value.partition("://")
    try:
        address = Address.parse(rest if rest.rpartition("]")[2].count(":") else f"{rest}:443")
    except ValueError:
        address = None
    if not value or (scheme == "https" and address is not None and address.port > 0):
        return None
    return f"must read https://NAME or https://NAME:PORT, not {value!r}"


def _boolean(value: object) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{value!r} is not a boolean: write true or false")


def _number(kind: type[int] | type[float], value: object) -> int | float:
    name = "a whole number" if kind is int else "a number"
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, str))
        or (kind is int and isinstance(value, float))
    ):
        raise ValueError(f"{value!r} is not {name}")
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{value!r} is not {name}") from None


def _convert(kind: Any, value: object) -> Any:
    """Turns a TOML or environment value into the declared type. Raises ValueError."""
    if kind is bool:
        return _boolean(value)
    if kind in (int, float):
        return _number(kind, value)
    if kind is Path:
        return Path(str(value)).expanduser()
    if kind is Address:
        return Address.parse(str(value))
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is not a list")
        return tuple(_convert(typing.get_args(kind)[0], item) for item in value)
    if not isinstance(value, str):
        shown = "the value" if kind is Secret else repr(value)
        raise ValueError(f"{shown} is not a string")
    return Secret(value) if kind is Secret else value


class Reader:
    """Reads options from parsed TOML and an environment, and collects every problem."""

    def __init__(self, document: Mapping[str, Any], environ: Mapping[str, str], source: str) -> None:
        self._document = document
        self._environ = environ
        self._source = source
        self._known_env: set[str] = set()
        self.problems: list[str] = []

    def section(self, cls: type[T], name: str) -> T:
        """Reads one dataclass: TOML table `name` (top level when empty), environment `HELIX_<NAME>_<OPTION>`."""
        table = self._document.get(name, {}) if name else self._document
        if not isinstance(table, Mapping):
            self.problems.append(f"{self._source}: [{name}] must be a table")
            table = {}
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if "doc" not in field.metadata:
                continue
            options[field.name] = field
            where, raw = self._lookup(field, name, table)
            if where is None:
                continue
            try:
                value = _convert(hints[field.name], raw)
                wrong = field.metadata["check"](value) if field.metadata["check"] else None
            except ValueError as error:
                wrong = str(error)
            if wrong:
                self.problems.append(f"{where}: {wrong}")
            else:
                values[field.name] = value
        self._unknown_keys(name, table, options)
        return cls(**values)

    def _lookup(self, field: Any, section: str, table: Mapping[str, Any]) -> tuple[str | None, object]:
        full = "_".join(["HELIX", section.upper(), field.name.upper()] if section else ["HELIX", field.name.upper()])
        names = [full, field.metadata["env"]] if field.metadata["env"] else [full]
        self._known_env.update(names)
        for name in names:
            if name in self._environ:
                return name, self._environ[name]
        if field.name in table:
            return f"{self._source}: {section + '.' if section else ''}{field.name}", table[field.name]
        return None, None

    def _unknown_keys(self, section: str, table: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        for key, value in table.items():
            if key in options or (not section and isinstance(value, Mapping)):
                continue
            self.problems.append(
                f"{self._source}: {section + '.' if section else ''}{key} is not an option" + _suggest(key, options)
            )

    def unknown(self, sections: set[str]) -> None:
        """Reports tables and HELIX_ variables that no option declares. Call it after the last section."""
        for key, value in self._document.items():
            if isinstance(value, Mapping) and key not in sections:
                self.problems.append(f"{self._source}: [{key}] is not a section" + _suggest(key, sections))
        for name in sorted(self._environ):
            if name.startswith("HELIX_") and name not in self._known_env:
                self.problems.append(f"{name} is not an option" + _suggest(name, self._known_env))


def _suggest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
