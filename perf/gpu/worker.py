"""One step in a process of its own: a crash, a sticky CUDA error or leaked device memory ends with it.

    python -m perf.gpu.worker STEP BACKEND   (started by `perf.gpu.runner`, which passes the rest on standard input)

Findings go, as JSON lines, to the file descriptor that the input names; standard output and error are free for
whatever the libraries print.
"""

import faulthandler
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from perf.gpu.plan import Step, find
from perf.gpu.rows import CutError, RefusedError, Report, SkippedError, Task

PROBE = "probe"
"""The step that says which device is here."""
# The stack of a step that hangs is printed this long before its time is up (seconds).
LAST_WORDS_S = 1.0


def perform(work: Callable[[Report], None], report: Report) -> bool:
    """Runs a step to its end or to what kept it from it; whether the check itself is sound."""
    try:
        work(report)
    except SkippedError as reason:
        report.row("", "", "SKIPPED", str(reason))
    except RefusedError as reason:
        report.row("", "", "REFUSED", str(reason))
    except CutError as reason:
        report.row("", "", "SKIPPED", f"time is up: {reason}")
        report.end("cut", str(reason))
        return True
    except Exception as error:  # noqa: BLE001 - whatever it is, the table has to say so
        traceback.print_exc()
        report.row("", "", "FAIL", describe(error))
        report.end("failed", describe(error))
        return False
    report.end("done")
    return True


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _work(step: Step, backend: str) -> Callable[[Report], None]:
    """The function of a step, with everything it imports."""
    module, _, function = step.call.partition(":")

    def work(report: Report) -> None:
        try:
            found = getattr(importlib.import_module(f"perf.gpu.{module}"), function)
            found(Task(report, backend, step.option))
        except ImportError as error:
            missing = _missing(error)
            if missing is None:
                raise
            raise missing from error

    return work


def _missing(error: ImportError) -> SkippedError | None:
    """What is not installed here; None when the error is one of ours."""
    name = error.name or ""
    if "core_rs" in f"{name} {error}":
        return SkippedError(f"the extension helixflow.core_rs cannot be loaded ({error}): build it, or carry it here")
    if name.partition(".")[0] in ("perf", "helixflow", ""):
        return None
    return SkippedError(f"the package {name} cannot be imported: {error}")


def _probe(report: Report) -> None:
    from perf.gpu.probe import NoDeviceError, probe, versions  # noqa: PLC0415 - nothing else needs it

    try:
        found = probe()
    except NoDeviceError as error:
        raise SkippedError(str(error)) from error
    for name, value in (*found.items(), ("versions", versions())):
        report.fact(name, value)


def main() -> int:
    """Runs the step named on the command line; the exit status says whether the check itself is sound."""
    name, backend = sys.argv[1:3]
    given: dict[str, Any] = json.loads(sys.stdin.read())
    # What this process starts must not keep the pipe open.
    os.set_inheritable(given["fd"], False)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(given["seconds"] - LAST_WORDS_S, LAST_WORDS_S))
    with os.fdopen(given["fd"], "w", encoding="utf-8") as stream:
        report = Report(stream, given["facts"], given["seconds"] - 2 * LAST_WORDS_S)
        sound = perform(_probe if name == PROBE else _work(find(name), backend), report)
    sys.stdout.flush()
    sys.stderr.flush()
    # Destructors of a library in a bad state have been seen to hang or crash; all that matters is on the pipe.
    os._exit(0 if sound else 1)


if __name__ == "__main__":
    main()
