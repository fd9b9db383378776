"""Runs a step in a subprocess, with a time limit, and records what came of it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perf.gpu.rows import Row
from perf.gpu.state import End, Record

ROOT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "perf.gpu.worker")
# How long a process may take to end after SIGTERM: what it started (a gateway, say) is ended by it.
GRACE_S = 8.0
# A process in the hands of a stuck driver cannot be killed; it is left behind.
ABANDON_S = 5.0
POLL_S = 0.25
LAST_LINES = 25


@dataclass
class _Heard:
    """What a step has reported so far."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    end: End | None = None
    reason: str = ""

    def line(self, line: bytes, seen: Callable[[Row], None]) -> None:
        """Takes a line of the pipe."""
        message = json.loads(line)
        if "row" in message:
            self.rows.append(Row.parse(message["row"]))
            seen(self.rows[-1])
        elif "fact" in message:
            name, value = message["fact"]
            self.facts[name] = value
        else:
            self.end, self.reason = message["end"], message["reason"]


@dataclass(frozen=True, slots=True)
class Job:
    """What to run: `arguments` of the worker, `seconds` it may take, `facts` it is told; `whole`: these are all the
    seconds it ever gets, so that running out of them is a failure."""

    arguments: tuple[str, str]
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = True


def _unseen(row: Row) -> None:
    """Shows nothing."""


def run(
    job: Job, key: str, sources: str, seen: Callable[[Row], None] = _unseen, worker: Sequence[str] = WORKER
) -> Record:
    """Runs a step; `seen` is called with each row as it comes. Never raises for what the step does."""
    at, started, heard = f"{datetime.now(UTC):%Y-%m-%d %H:%M}", time.monotonic(), _Heard()
    with tempfile.TemporaryFile() as log:
        timed_out, status = _supervise(job, worker, log, lambda line: heard.line(line, seen))
        end, reason = heard.end, heard.reason
        if end is None:
            end, reason = _unfinished(job, timed_out, status)
            heard.rows.append(Row("", "", "SKIPPED" if end == "cut" else "FAIL", reason))
            seen(heard.rows[-1])
        if end != "done":
            _print_end(log, job)
    seconds = round(time.monotonic() - started, 1)
    return Record(key, *job.arguments, sources, end, at, seconds, reason, tuple(heard.rows), heard.facts)


def _unfinished(job: Job, timed_out: bool, status: int | None) -> tuple[End, str]:
    """What became of a process that did not report its end."""
    if timed_out and not job.whole:
        return "cut", f"time is up after {job.seconds:.0f} s: run the command again"
    if timed_out:
        return "crashed", f"did not end within {job.seconds:.0f} s" + (
            "" if status is not None else ", nor when killed"
        )
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return "crashed", f"the process died of {signal.Signals(-status).name}"
    return "crashed", f"the process ended with status {status}"


def _supervise(job: Job, worker: Sequence[str], log: Any, line: Callable[[bytes], None]) -> tuple[bool, int | None]:
    """Starts the process and reads its pipe. Returns whether its time ran out, and its exit status if it has one."""
    reader, writer = os.pipe()
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with os.fdopen(reader, "rb", buffering=0):
        try:
            process = subprocess.Popen(
                [*worker, *job.arguments], stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, env=environ,
                pass_fds=(writer,), start_new_session=True,
            )  # fmt: skip
        finally:
            # Only the child writes now: its end is the end of the pipe.
            os.close(writer)
        try:
            assert process.stdin is not None
            given = {"fd": writer, "seconds": job.seconds, "facts": dict(job.facts)}
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(given).encode())
            timed_out = _read(reader, process, job.seconds, line)
            return timed_out, _end(process, timed_out)
        except BaseException:
            _end(process, timed_out=True)
            raise


def _read(reader: int, process: "subprocess.Popen[bytes]", seconds: float, line: Callable[[bytes], None]) -> bool:
    """Passes on the lines of the pipe until it ends; True when the time ran out first."""
    until, rest = time.monotonic() + seconds, b""
    while (left := until - time.monotonic()) > 0:
        if not select.select([reader], [], [], min(left, POLL_S))[0]:
            # A process that something else keeps the pipe of has ended all the same.
            if process.poll() is not None:
                return False
            continue
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), POLL_S))
                return False
            return True
        *lines, rest = (rest + chunk).split(b"\n")
        for whole in lines:
            line(whole)
    return True


def _end(process: "subprocess.Popen[bytes]", timed_out: bool) -> int | None:
    """Ends a process and all it started; its exit status, None when it cannot be killed."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, ABANDON_S)):
        if timed_out or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    return process.returncode


def _print_end(log: Any, job: Job) -> None:
    """The end of what a step printed, for the one who reads the terminal."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    for text in lines:
        print(f"    {job.arguments[0]} | {text}", flush=True)
