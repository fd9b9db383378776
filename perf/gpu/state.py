"""The state folder: what was found, by device and versions, one JSON object per line and never rewritten."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from perf.gpu.rows import Row

FILE = "gpu_check.jsonl"
End = Literal["done", "cut", "failed", "crashed"]
"""done: it ran to its end, whatever it found. cut: its time was up. failed: an error of the check. crashed: the process
died."""


@dataclass(frozen=True, slots=True)
class Record:
    """One run of a step. `key`: device and versions; `sources`: digest of the code that ran; `at`: UTC; `seconds`: it
    took; `reason`: why it did not get to its end."""

    key: str
    step: str
    backend: str
    sources: str
    end: End
    at: str
    seconds: float
    reason: str = ""
    rows: tuple[Row, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether it ran to its end, was neither skipped nor refused as a whole, and nothing in it failed."""
        parted = any(row.verdict in ("SKIPPED", "REFUSED") and not row.what for row in self.rows)
        return self.end == "done" and not parted and all(row.verdict != "FAIL" for row in self.rows)


class State:
    """Reads all records at once, and appends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.records: list[Record] = []
        if self._path.is_file():
            self.records = list(_parsed(self._path.read_text(encoding="utf-8").splitlines()))

    def latest(self, key: str, step: str, backend: str) -> Record | None:
        """The last run of a step."""
        for record in reversed(self.records):
            if (record.key, record.step, record.backend) == (key, step, backend):
                return record
        return None

    def append(self, record: Record) -> None:
        """Keeps a record; it is on disk when this returns."""
        self.records.append(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def _parsed(lines: Iterable[str]) -> Iterable[Record]:
    """Records of well-formed lines: the last one may have been cut."""
    for line in lines:
        try:
            data = json.loads(line)
            rows = tuple(Row.parse(row) for row in data.pop("rows"))
            yield Record(**data, rows=rows)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue


def key_of(facts: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Name of a device with its driver and the versions of the software."""
    content = {"device": facts["device"], "driver": facts["driver"], "versions": dict(versions)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(folders: Iterable[Path]) -> str:
    """Digest over the sources that results come from."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cu")):
            total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]
