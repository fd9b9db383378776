"""Structured logs that nobody can block: JSON in production, readable on a terminal.

A line goes into the extension's queue, from where a thread of its own writes it to standard error or to a file.
"""

import atexit
import io
import json
import logging
import os
import sys
import threading
from pathlib import PurePath
from types import TracebackType
from typing import Any

import orjson
import structlog
from structlog.typing import EventDict, Processor

from helixflow import core_rs, terminal, traces
from helixflow.config import UNSET
from helixflow.errors import StartError
from helixflow.options import Address
from helixflow.secret import MASK, Secret
from helixflow.sections.log import LogConfig

FLUSH_MS = 500
"""At its end a process waits this long for whoever reads its log (milliseconds)."""

SECRETS = frozenset(
    {"password", "token", "secret", "authorization", "api_key", "credential", "pepper", "prompt", "messages"}
)
"""Fields that are never written, whatever they hold."""

TELLING = (
    "address", "status", "method", "route", "name", "pool", "backend", "spool", "task", "call", "kind", "why",
    "reason", "error",
)  # fmt: skip
"""Fields that tell the kinds of one event apart when repetitions are summed up."""

_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_RESET = "\x1b[0m"


def is_console(config: LogConfig) -> bool:
    """Whether lines are written for people."""
    return config.format == "console" or (config.format == "auto" and config.file == UNSET and os.isatty(2))


def setup(config: LogConfig, service: str, *, command: bool = False) -> None:
    """Configures structlog, the standard library's logging and the extension's for one process.

    Every line carries `timestamp` (RFC 3339, UTC), `level`, `service` and `event`. From then on nothing that this
    process writes to standard output or standard error waits for a reader: what is not read in time is dropped, and
    counted. `command`: a command whose output somebody waits for, so that only the log takes that way. Raises
    StartError for a file that cannot be opened.
    """
    level = logging.getLevelNamesMapping()[config.level.upper()]
    console = is_console(config)
    file = None if command or config.file == UNSET else str(config.file).replace("{service}", service)
    try:
        core_rs.init_logging(
            service,
            config.level,
            json=not console,
            unblock=not command,
            window_s=config.repeats_s,
            file=file,
            max_bytes=config.file_max_bytes,
            max_age_s=config.file_max_hours * 3600,
            keep=config.file_keep,
        )
    except OSError as error:
        raise StartError(f"the log file {file} (log.file) cannot be opened: {error.strerror or error}") from None
    _take_over(command)
    shared = _processors(service)
    structlog.configure(
        processors=[*shared, _console(colours=file is None and os.isatty(2)) if console else _json],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _LINES,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Foreign()], level=max(level, logging.WARNING), force=True)


def get(name: str) -> Any:
    """A logger; `name` tells the component."""
    return structlog.get_logger(component=name)


def flush() -> None:
    """Writes what is queued, and the sums of repetitions; gives up after FLUSH_MS. For ends that nothing follows."""
    core_rs.flush_logs(FLUSH_MS)


class _Lines:
    """What structlog calls a logger: each level's method takes a finished line."""

    msg = debug = info = warning = error = critical = staticmethod(core_rs.log_line)


_LINES = _Lines()


# --- processors --------------------------------------------------------------------


def _processors(service: str) -> list[Processor]:
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)

    def add_service(_logger: object, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    return [_sum_up, structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, stamp, add_service, _hide]


def _sum_up(_logger: object, method: str, event: EventDict) -> EventDict:
    """Lets the first lines of a kind through: of what goes wrong, and of what an address from outside causes."""
    if method not in ("warning", "error", "critical") and "address" not in event:
        return event
    what = " ".join(f"{name}={_host(event[name])}" for name in TELLING if name in event)
    level = "error" if method == "critical" else method
    component, said = (terminal.safe(str(event.get(name, ""))) for name in ("component", "event"))
    if not core_rs.log_first(level, component, said, terminal.safe(what)):
        raise structlog.DropEvent
    return event


def _host(value: object) -> str:
    """A value without the port, when it is the address of a connection: each has another."""
    text = str(value)[:200]
    host, colon, port = text.rpartition(":")
    return host if colon and port.isdecimal() and (host.count(":") == 0 or host.startswith("[")) else text


def _hide(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Masks what must not be written; turns an exception into what may be said of it."""
    if not SECRETS.isdisjoint(event):
        for name in SECRETS.intersection(event):
            event[name] = MASK
    found = event.pop("exc_info", None)
    if found:
        error = found if isinstance(found, BaseException) else found[1] if isinstance(found, tuple) else sys.exception()
        if error is not None:
            event["exception"] = traces.of(error)
    return event


def _plain(value: object) -> Any:
    """What JSON does not know. Never the contents of something that may hold anybody's data."""
    if isinstance(value, (PurePath, Address, Secret)):
        return str(value)
    if isinstance(value, BaseException):
        return f"{type(value).__qualname__}: {traces.message_of(value)}"
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return f"<{type(value).__qualname__}>"


def _dump(value: object) -> str:
    try:
        text = orjson.dumps(value, default=_plain, option=orjson.OPT_PASSTHROUGH_DATACLASS).decode()
    except (TypeError, ValueError):
        # Half a surrogate pair, a number of more than 64 bits, a key that is no string.
        text = json.dumps(value, default=_plain, skipkeys=True)
    return text if text.isascii() else terminal.safe(text)


def _json(_logger: object, _method: str, event: EventDict) -> str:
    return _dump(event)


def _console(*, colours: bool) -> Processor:
    def render(_logger: object, _method: str, event: EventDict) -> str:
        exception = event.pop("exception", None)
        stamp, level = event.pop("timestamp", ""), str(event.pop("level", ""))
        colour, reset = (_COLOURS.get(level, ""), _RESET) if colours else ("", "")
        said = terminal.safe(str(event.pop("event", "")))
        line = f"{stamp} [{colour}{level:<8}{reset}] {said:<30}"
        line += "".join(f" {name}={_shown(value)}" for name, value in event.items())
        return f"{line}\n{terminal.safe(traces.text(exception), lines=True)}" if exception else line

    return render


def _shown(value: object) -> str:
    if isinstance(value, str) and value and value.isprintable() and not any(c in ' "=' for c in value):
        return value
    return _dump(value)


# --- everybody else ------------------------------------------------------------------


class _Foreign(logging.Handler):
    """Lines of the standard library's logging: of asyncio, Granian and other libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line. Behind the first line of a message asyncio prints the objects concerned, with their contents."""
        try:
            said = record.getMessage().partition("\n")[0]
            logger = structlog.get_logger(component=record.name)
            level = "error" if record.levelno >= logging.ERROR else "warning"
            getattr(logger, level)(said, exc_info=record.exc_info)
        except Exception:  # noqa: BLE001 - a log line is no reason to fail
            core_rs.log_line(f"a log line of {record.name} could not be written")


class _Stream(io.TextIOBase):
    """Standard output or standard error of a service: the same queue, so that no print waits for a reader."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        core_rs.log_text(self._descriptor, text.encode("utf-8", "backslashreplace").decode())
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


_taken = False


def _take_over(command: bool) -> None:
    """Once a process: standard streams, last words, forks."""
    global _taken  # noqa: PLW0603 - hooks of the interpreter are global too
    if not command:
        sys.stdout, sys.stderr = _Stream(1), _Stream(2)
        sys.excepthook = _on_exception
        threading.excepthook = _on_thread_exception
        sys.unraisablehook = _on_unraisable
    if not _taken:
        _taken = True
        os.register_at_fork(after_in_child=core_rs.log_forked)
        atexit.register(flush)


def _on_exception(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    get("process").error("ended by an unexpected error", exc_info=error)
    flush()


def _on_thread_exception(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        name = ended.thread.name if ended.thread else ""
        get("process").error("a thread ended by an unexpected error", name=name, exc_info=ended.exc_value)


def _on_unraisable(failed: "sys.UnraisableHookArgs") -> None:
    get("process").error("an error that nobody could handle", exc_info=failed.exc_value)
