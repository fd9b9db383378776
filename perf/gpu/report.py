"""The table of the GPU check, as Markdown."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from perf.gpu.plan import Step
from perf.gpu.rows import VERDICTS, Row
from perf.gpu.state import Record

METHOD = """\
- method: `perf/gpu_check.py`; each step is a process of its own, with which a crash or a sticky error ends. Device time
  by events around the work, warmed up, median of repeats over fresh random inputs; outputs are poisoned before they are
  compared; errors are ‖out - reference‖ / ‖reference‖ unless said otherwise."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A step with what is known of it: a record of this or an earlier run, or the reason why there is none."""

    step: Step
    backend: str
    record: Record | None = None
    reason: str = ""

    @property
    def rows(self) -> Sequence[Row]:
        """At least one row."""
        if self.record is None or not self.record.rows:
            return (Row("", "", "SKIPPED", self.reason or "it reported nothing"),)
        return self.record.rows


def slug(device: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


def render(entries: Sequence[Entry], facts: Mapping[str, Any], versions: Mapping[str, str], sources: str) -> str:
    """The whole report. `sources`: digest of the code as it is now; steps that others ran say so."""
    lines = [
        f"# GPU check: {facts['device']}",
        "",
        f"- device: {_device(facts)}",
        f"- driver: {facts['driver']}, CUDA {facts['cuda']}; Linux {platform.release()}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- written: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, sources {sources}",
        METHOD,
        f"- verdicts: {summary(entries)}",
        "",
        "| step | back end | what | figure | verdict |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for entry in entries:
        if entry.record is not None:
            lines += _lines(entry)
    lines += _unknown(entries)
    earlier = sorted({entry.step.name for entry in entries if entry.record and entry.record.sources != sources})
    if earlier:
        lines += ["", f"Measured with earlier sources: {', '.join(earlier)}."]
    return "\n".join(lines) + "\n"


def _lines(entry: Entry) -> list[str]:
    """A line per row; step and back end in the first one only."""
    lines = []
    for i, row in enumerate(entry.rows):
        names = (entry.step.name, entry.backend) if i == 0 else ("", "")
        lines.append(_line(*names, row.what or entry.step.title, row.figure, _verdict(row)))
    return lines


def _unknown(entries: Sequence[Entry]) -> list[str]:
    """What was not run: a line for all steps that have the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if entry.record is None:
            groups.setdefault((entry.backend, entry.reason), []).append(entry.step.name)
    return [_line(", ".join(names), backend, "", "", f"SKIPPED: {why}") for (backend, why), names in groups.items()]


def _line(*cells: str) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _device(facts: Mapping[str, Any]) -> str:
    memory, cache = facts["memory"] / 2**30, facts["cache"] / 2**20
    words = f"{facts['device']}, SM {facts['sm']}, {facts['processors']} multiprocessors"
    return f"{words}, {memory:.1f} GiB, {cache:.0f} MiB of second-level cache"


def summary(entries: Sequence[Entry]) -> str:
    """How many rows have each verdict."""
    verdicts = [row.verdict for entry in entries for row in entry.rows]
    return ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS if name in verdicts)


def line(row: Row) -> str:
    """A row for the terminal."""
    return "  ".join(part for part in (row.what, row.figure, _verdict(row)) if part)


def _verdict(row: Row) -> str:
    return f"{row.verdict}: {row.note}" if row.note else row.verdict


def _cell(text: str) -> str:
    """Text that cannot break the table."""
    return " ".join(text.split()).replace("|", "\\|")
