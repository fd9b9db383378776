"""What a step of the GPU check reports: rows of the table, facts for later steps, and why there are none."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from perf.gpu.bench import Tools

Verdict = Literal["PASS", "FAIL", "REFUSED", "SKIPPED", "measured"]
VERDICTS: tuple[Verdict, ...] = ("PASS", "FAIL", "REFUSED", "SKIPPED", "measured")
"""PASS and FAIL: compared with a reference. measured: a figure without one."""


class SkippedError(Exception):
    """The step cannot be done here; the text says what is missing."""


class RefusedError(Exception):
    """Library or device refused; the text is the refusal, word for word."""


class CutError(Exception):
    """There is too little time for the rest of the step; it is run again."""


@dataclass(frozen=True, slots=True)
class Row:
    """`what` was looked at, the `figure`, the `verdict` and the reason for it (`note`); `value`: the figure as a number
    where another step needs it."""

    what: str
    figure: str = ""
    verdict: Verdict = "measured"
    note: str = ""
    value: float | None = None

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> "Row":
        """From JSON. Raises TypeError or ValueError."""
        row = cls(**data)
        if row.verdict not in VERDICTS:
            raise ValueError(f"verdict {row.verdict!r}")
        return row


class Report:
    """Passes on what a step finds as it finds it, one JSON object per line: what a crash leaves behind is kept.

    `facts`: what earlier steps found (and this one). `seconds`: until the step is cut.
    """

    def __init__(self, stream: IO[str], facts: Mapping[str, Any], seconds: float) -> None:
        self._stream = stream
        self.facts: dict[str, Any] = dict(facts)
        self.rows: list[Row] = []
        self._until = time.monotonic() + seconds

    def row(
        self, what: str, figure: str = "", verdict: Verdict = "measured", note: str = "", value: float | None = None
    ) -> None:
        """Adds a row, see `Row`."""
        row = Row(what, figure, verdict, note, value)
        self.rows.append(row)
        self._send({"row": asdict(row)})

    def check(self, what: str, figure: str, good: bool, note: str = "") -> None:
        """A row whose verdict is PASS or FAIL; the note is for a failure."""
        self.row(what, figure, "PASS" if good else "FAIL", "" if good else note)

    def fact(self, name: str, value: Any) -> None:
        """Something later steps build on."""
        self.facts[name] = value
        self._send({"fact": [name, value]})

    def end(self, how: str, reason: str = "") -> None:
        """The last line. `how`: "done", "cut" (too little time) or "failed" (an error of the check itself)."""
        self._send({"end": how, "reason": reason})

    @property
    def left(self) -> float:
        """Seconds until the step is cut."""
        return self._until - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raises CutError unless that much time is left."""
        if self.left < seconds:
            raise CutError(f"{seconds:.0f} s are needed for the rest, {max(self.left, 0):.0f} s are left")

    def _send(self, message: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()


@dataclass(frozen=True, slots=True)
class Task:
    """What a step is called with: where it reports, its back end and option, and what it works with (None: a GPU)."""

    report: Report
    backend: str
    option: str = ""
    tools: "Tools | None" = None
