"""Stands for `perf.gpu.worker` in tests: a process that behaves as the name of its step says.

python fake_worker.py STEP BACKEND   (with what the runner passes on standard input)
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from perf.gpu.rows import CutError, RefusedError, Report, SkippedError
from perf.gpu.worker import perform


def good(report: Report) -> None:
    report.row("what", "1", value=1.0)
    report.check("check", "2", good=True)
    report.fact("seen", [*report.facts.get("seen", []), sys.argv[1]])


def wrong(report: Report) -> None:
    report.check("a | b", "3", good=False, note="it differs")


def refused(report: Report) -> None:
    report.row("library", "9.9")
    raise RefusedError("UNSUPPORTED_CC: this device is\nnot supported")


def skipped(report: Report) -> None:
    raise SkippedError("the package x is not installed")


def cut(report: Report) -> None:
    report.row("half", "4")
    raise CutError("too late")


def broken(report: Report) -> None:
    report.row("before", "5")
    raise KeyError("no such thing")


def crashed(report: Report) -> None:
    report.row("before", "6")
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def silent(report: Report) -> None:
    os._exit(7)


def hanging(report: Report) -> None:
    report.row("before", "8")
    signal.pause()


def stubborn(report: Report) -> None:
    """Neither it nor its child ends when asked to; the child keeps the pipe open."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], close_fds=False)
    report.row("child", str(child.pid))
    signal.pause()


def leaving(report: Report) -> None:
    """Ends well, but leaves a child behind."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], close_fds=False)
    report.row("child", str(child.pid))


def noisy(report: Report) -> None:
    """More output and more rows than a pipe holds."""
    sys.stdout.write("x" * 1_000_000 + "\n")
    sys.stdout.flush()
    for i in range(3000):
        report.row(f"row {i}", "y" * 100)


def main() -> None:
    given = json.loads(sys.stdin.read())
    work: Callable[[Report], None] = globals()[sys.argv[1].partition(".")[0].replace("-", "_")]
    with os.fdopen(given["fd"], "w", encoding="utf-8") as stream:
        perform(work, Report(stream, given["facts"], given["seconds"]))


if __name__ == "__main__":
    main()
