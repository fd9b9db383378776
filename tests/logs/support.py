"""Starts processes that log, with standard error in the hands of the test."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parents[2]


def environ(**options: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HELIX_")}
    return {**own, "HELIX_LOG_FORMAT": "json", **options}


def command(what: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.logs.writer", what, *map(str, arguments)]


def run(what: str, **options: str) -> subprocess.CompletedProcess[bytes]:
    """Runs to the end, everything read."""
    return subprocess.run(command(what), cwd=ROOT, env=environ(**options), capture_output=True, check=False, timeout=60)


def lines(data: bytes) -> list[dict[str, Any]]:
    """The lines of a log, without one that broke off."""
    return [orjson.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


class Unread:
    """A process whose standard output and standard error are one pipe that nobody reads until `rest`."""

    def __init__(self, *arguments: str, **options: str) -> None:
        self._reader, writer = os.pipe()
        told, tell = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3>&{tell}', "-", *arguments],
            cwd=ROOT,
            env=environ(**options),
            stdin=subprocess.PIPE,
            stdout=writer,
            stderr=writer,
            pass_fds=(tell,),
            start_new_session=True,
        )
        os.close(writer)
        os.close(tell)
        self.told = os.fdopen(told, "rb")

    def rest(self) -> bytes:
        """Everything that was written, up to its end."""
        with os.fdopen(self._reader, "rb") as pipe:
            return pipe.read()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.told.close()
        if self.process.stdin:
            self.process.stdin.close()
