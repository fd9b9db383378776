"""Exceptions for the log: what happened and where, never with which data.

Values of variables and messages of unexpected errors hold what clients and databases sent: passwords, tokens, prompts.
So a frame is its file, line and function, and the message is shown only for errors whose messages are known to be ours.
"""

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from helixflow.core_rs import CoreError
from helixflow.errors import HelixError

OURS = (
    HelixError, CoreError, OSError, TimeoutError, ImportError, NameError, AttributeError, NotImplementedError,
    MemoryError, RecursionError,
)  # fmt: skip
"""Errors whose messages hold names of files, hosts and code."""
STATES = ("08", "25", "28", "3D", "40", "53", "55", "57", "58")
"""Classes of SQLSTATE that are about the server and the connection: their messages hold no row."""
NOT_SHOWN = "(not shown: it may hold data)"

MOST_LINKS = 8
MOST_FRAMES = 24
"""Of a traceback; what is left out is in the middle."""

_ROOT = str(Path(__file__).resolve().parents[1]) + "/"


def of(error: BaseException) -> list[dict[str, Any]]:
    """The error and what it came from, the newest first: `type`, `message`, `frames` (the innermost last)."""
    links: list[dict[str, Any]] = []
    seen: set[int] = set()
    todo: list[BaseException] = [error]
    while todo and len(links) < MOST_LINKS:
        link = todo.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        links.append(
            {"type": type(link).__qualname__, "message": message_of(link), "frames": _frames(link.__traceback__)}
        )
        origin = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
        if origin is not None:
            todo.append(origin)
        if isinstance(link, BaseExceptionGroup):
            todo += link.exceptions
    return links


def message_of(error: BaseException) -> str:
    """What may be said of an error: its message when that cannot hold anybody's data, else why it is missing."""
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        parts = [f"SQLSTATE {state}"]
        names = {name: getattr(error, f"{name}_name", None) for name in ("table", "constraint", "column")}
        parts += [f"{name} {value}" for name, value in names.items() if value]
        if state[:2] in STATES and error.args:
            parts.append(str(error.args[0]))
        return ", ".join(parts)
    if type(error).__module__.startswith("asyncpg."):
        # Those of the client itself: about its connection, or about an argument, with its value.
        return str(error) if type(error).__name__ in ("InterfaceError", "InternalClientError") else NOT_SHOWN
    return str(error) if isinstance(error, OURS) or not error.args else NOT_SHOWN


def text(links: list[dict[str, Any]]) -> str:
    """The same for people, one indented line a frame."""
    lines = []
    for number, link in enumerate(links):
        lines.append(f"{'  from ' if number else '  '}{link['type']}: {link['message']}")
        lines += [f"    {frame}" for frame in link["frames"]]
    return "\n".join(lines)


def _frames(trace: TracebackType | None) -> list[str]:
    found = [(frame.f_code, line) for frame, line in traceback.walk_tb(trace)]
    shown = [f"{_short(code.co_filename)}:{line} {code.co_qualname}" for code, line in found]
    if len(shown) > MOST_FRAMES:
        half = MOST_FRAMES // 2
        shown[half:-half] = [f"({len(shown) - 2 * half} more)"]
    return shown


def _short(file: str) -> str:
    return file.removeprefix(_ROOT).rpartition("site-packages/")[2]
