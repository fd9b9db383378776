"""Everything that only a GPU can say about the GPU engines, in one table: is it right, and how fast is it?

    python3 perf/gpu_check.py [--backend tensorrt-rtx|tensorrt|onnx ...] [--only STEP ...] [--budget SECONDS]
                              [--state DIR] [--out FILE] [--again] [--keep] [--list]

Resumable: what was found is kept in the state folder by device and versions, so that a second call goes on where the
first one's time was up. A step is run again when it was cut or crashed, when the sources have changed since (unless
`--keep`), when `--only` names it, and with `--again`. The table goes to the terminal and to
`perf/results/gpu-<device>.md`, anew after every step.

Exit status: 0 nothing failed (refusals and skipped steps included), 1 something failed, 2 usage, 69 no GPU is here,
130 it was interrupted.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# As a script, its own folder is on the path, but not the folder of the packages.
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

from perf.gpu import runner, state  # noqa: E402
from perf.gpu.plan import BACKENDS, BEST, STEPS, Step  # noqa: E402
from perf.gpu.report import Entry, line, render, slug  # noqa: E402
from perf.gpu.rows import Row  # noqa: E402
from perf.gpu.worker import PROBE  # noqa: E402

INTERRUPTED = 130
NO_DEVICE = 69
"""EX_UNAVAILABLE of sysexits.h."""
SOURCES = (ROOT / "helixflow" / "engine", ROOT / "perf" / "gpu")
PROBE_S = 40.0
# A step that gets less than this (seconds), or this part of its limit, would be cut before it says much.
LEAST_S, LEAST_SHARE = 15.0, 0.25
# Kept back for killing the last step and writing the table.
RESERVE_S = 15.0


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    backends: tuple[str, ...]
    only: tuple[str, ...]
    budget: float
    state: Path
    out: Path | None
    again: bool
    keep: bool


class Check:
    """One call of the command on one device. `probed`: what the worker said of it; `worker`, `steps`: for tests."""

    def __init__(
        self,
        options: Options,
        probed: state.Record,
        worker: Sequence[str] = runner.WORKER,
        steps: Sequence[Step] = STEPS,
    ) -> None:
        self.options, self.worker, self.steps = options, worker, steps
        self.device = {name: value for name, value in probed.facts.items() if name != "versions"}
        self.versions: dict[str, str] = probed.facts["versions"]
        self.key = state.key_of(self.device, self.versions)
        self.sources = state.digest_of(SOURCES)
        self.state = state.State(options.state)
        self._out = options.out or ROOT / "perf" / "results" / f"gpu-{slug(self.device['device'])}.md"
        self._until = time.monotonic() + options.budget - RESERVE_S
        self._ran: set[tuple[str, str]] = set()
        self._reasons: dict[tuple[str, str], str] = {}

    def run(self) -> int:
        """Runs what is left to run, first what was never tried. Returns the exit status."""
        wanted = [pair for pair in self._pairs() if self._wanted(*pair)]
        try:
            for step, backend in sorted(wanted, key=lambda pair: self._tried(*pair)):
                self._obtain(step, backend)
        finally:
            text = self.write()
        print(f"\n{text}\ntable: {self._out}\nstate: {self.options.state}", flush=True)
        failed = any(row.verdict == "FAIL" for entry in self.entries() for row in entry.rows)
        return 1 if failed else 0

    def entries(self) -> list[Entry]:
        """Every step that was asked for, or was run on this device before, with what is known of it."""
        found = []
        for step, backend in self._pairs():
            record = self.state.latest(self.key, step.name, backend)
            if record is not None or self._wanted(step, backend) or (step.name, backend) in self._reasons:
                found.append(Entry(step, backend, record, self._reasons.get((step.name, backend), "not run")))
        return found

    def write(self) -> str:
        """Writes the table; returns it."""
        text = render(self.entries(), self.device, self.versions, self.sources)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(text, encoding="utf-8")
        return text

    def _pairs(self) -> list[tuple[Step, str]]:
        return [(step, backend) for step in self.steps for backend in step.backends]

    def _wanted(self, step: Step, backend: str) -> bool:
        """Whether this call is about a step."""
        return step.chosen(self.options.only) and (backend == "" or backend in self.options.backends)

    def _tried(self, step: Step, backend: str) -> bool:
        """Whether an earlier call had a try at it and got nowhere."""
        record = self.state.latest(self.key, step.name, backend)
        return record is not None and record.end != "done"

    def _current(self, step: Step, backend: str) -> bool:
        """Whether what is known of a step need not be found again."""
        if (step.name, backend) in self._ran:
            return True
        record = self.state.latest(self.key, step.name, backend)
        if record is None or record.end != "done":
            return False
        if not self._wanted(step, backend):
            # Something that was asked for builds on it: that costs no more time than it has to.
            return True
        if self.options.again or self.options.only:
            return False
        return self.options.keep or record.sources == self.sources

    def _obtain(self, step: Step, backend: str) -> state.Record | None:
        """Runs a step unless it is known, after those it builds on; None when it cannot be run."""
        if self._current(step, backend):
            return self.state.latest(self.key, step.name, backend)
        for other in self._named(step.needs):
            record = self._obtain(other, backend)
            if record is None or not record.good:
                self._without(step, backend, f"`{other.name}` did not pass")
                return None
        for other in self._named(step.uses):
            self._obtain(other, backend if backend in other.backends else "")
        left = self._until - time.monotonic()
        if left < max(LEAST_S, LEAST_SHARE * step.limit_s):
            self._without(step, backend, "time is up: run the command again")
            return None
        return self._execute(step, backend, left)

    def _named(self, names: Sequence[str]) -> list[Step]:
        return [step for step in self.steps if step.name in names]

    def _execute(self, step: Step, backend: str, left: float) -> state.Record:
        facts = self._facts()
        if step.name == BEST:
            facts["ranking"] = self._ranking()
        job = runner.Job((step.name, backend), min(left, step.limit_s), facts, whole=left >= step.limit_s)
        print(f"{step.name} {backend}".rstrip(), flush=True)
        record = runner.run(job, self.key, self.sources, lambda row: print("  " + line(row), flush=True), self.worker)
        print(f"  {record.seconds:.1f} s", flush=True)
        self._ran.add((step.name, backend))
        self.state.append(record)
        self.write()
        return record

    def _without(self, step: Step, backend: str, reason: str) -> None:
        if (step.name, backend) not in self._reasons:
            print(f"{step.name} {backend}\n  {line(Row('', '', 'SKIPPED', reason))}", flush=True)
        self._reasons[step.name, backend] = reason

    def _facts(self) -> dict[str, Any]:
        """What the device is, and what all steps found on it so far."""
        facts = dict(self.device)
        for record in self.state.records:
            if record.key == self.key:
                facts |= record.facts
        return facts

    def _ranking(self) -> list[str]:
        """The back ends whose golden checkpoints passed, best first: by tokens per second of the 8B shape."""
        facts = self._facts()
        passed = []
        for backend in self.options.backends:
            golden = "golden-cuda.fp16" if backend == "onnx" else "golden.fp16"
            record = self.state.latest(self.key, golden, backend)
            if record is not None and record.good:
                passed.append(backend)
        return sorted(passed, key=lambda backend: -float(facts.get(f"speed.{backend}", 0.0)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = _parse(arguments)
    if options is None:
        return 0
    signal.signal(signal.SIGTERM, _stop)
    probed = runner.run(runner.Job((PROBE, ""), PROBE_S), "", "")
    if "device" not in probed.facts:
        reason = probed.rows[-1].note if probed.rows else probed.reason
        print(f"no GPU is here, so nothing was checked: {reason}", flush=True)
        return NO_DEVICE
    return guarded(Check(options, probed))


def guarded(check: Check) -> int:
    """Runs it; an interrupt leaves the table of what was found so far. Returns the exit status."""
    try:
        return check.run()
    except KeyboardInterrupt:
        print("interrupted: run the command again to go on", file=sys.stderr, flush=True)
        return INTERRUPTED


def _stop(_number: int, _frame: FrameType | None) -> None:
    # As Ctrl-C does: the step that runs is ended with its children.
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> Options | None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="perf/gpu_check.py"
    )
    parser.add_argument("--backend", action="append", nargs="+", choices=BACKENDS, help="default: all three")
    parser.add_argument(
        "--only", action="append", nargs="+", metavar="STEP", help="run these again (`golden`: all of it)"
    )
    parser.add_argument("--budget", type=float, default=570.0, metavar="SECONDS", help="for everything (default: 570)")
    parser.add_argument("--state", type=Path, default=ROOT / ".build" / "gpu_check", help="folder of what was found")
    parser.add_argument("--out", type=Path, help="the table (default: perf/results/gpu-<device>.md)")
    parser.add_argument("--again", action="store_true", help="run every step again")
    parser.add_argument("--keep", action="store_true", help="take what earlier sources found")
    parser.add_argument("--list", action="store_true", help="list the steps and end")
    given = parser.parse_args(arguments)
    if given.list:
        for step in STEPS:
            print(f"{step.name:24}{', '.join(filter(None, step.backends)) or 'once':26}{step.title}")
        return None
    only = tuple(name for names in given.only or () for name in names)
    for name in only:
        if not any(step.chosen([name]) for step in STEPS):
            parser.error(f"there is no step {name!r}: see --list")
    backends = dict.fromkeys(name for names in given.backend or () for name in names) or dict.fromkeys(BACKENDS)
    return Options(
        tuple(backend for backend in BACKENDS if backend in backends),
        only,
        given.budget,
        given.state.resolve(),
        given.out.resolve() if given.out else None,
        given.again,
        given.keep,
    )


if __name__ == "__main__":
    sys.exit(main())
