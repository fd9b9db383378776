"""`helixflow usage export`."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from helixflow.core_rs import Unavailable
from helixflow.rpc import messages
from tests.admin.conftest import Shell
from tests.admin.scripted import Scripted, error

KEY = "7b7e6f3e-0000-4000-8000-000000000001"


def ledger(rows: int, fail_at: int | None = None) -> Any:
    """Answers pages of so many rows in all."""

    def page(asked: Any) -> Any:
        first = int(asked.after or 0)
        if fail_at is not None and first >= fail_at:
            return error(Unavailable, "the database is away")
        last = min(first + asked.limit, rows)
        data = [
            messages.LedgerRow(
                id=f"id-{n}",
                at_us=1_770_000_000_000_000 + n,
                key_id=KEY,
                model='m,"odd"',
                prompt_tokens=n,
                finish="stop",
                status=200,
                cost=1_250_000_000,
                request_id=f"req-{n}",
            )
            for n in range(first, last)
        ]
        return messages.LedgerRows(data=data, next=str(last) if last < rows else "")

    return page


def test_csv_in_pages(service: Scripted, shell: Shell, tmp_path: Path) -> None:
    service.answers["AdminService/ListRequests"] = ledger(2500)
    path = tmp_path / "ledger.csv"
    done = shell("usage", "export", "--from", "2026-01-01", "--to", "2026-02-01", "--out", str(path))
    assert (done.status, done.out) == (0, f"{path}: 2,500 rows\n")
    assert [call.message["after"] for call in service.calls] == ["", "1000", "2000"]
    assert service.calls[0].message["from"] == "2026-01-01"
    assert service.calls[0].message["to"] == "2026-02-01"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"id-{n}" for n in range(2500)]
    assert rows[7]["at"] == "2026-02-02T02:40:00.000007Z"
    assert rows[7]["cost"] == "1.25"
    assert rows[7]["model"] == 'm,"odd"'
    assert "at_us" not in rows[7]
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_to_standard_output(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/ListRequests"] = ledger(3)
    done = shell("usage", "export", "--format", "jsonl")
    assert done.status == 0
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["request_id"] for row in rows] == ["req-0", "req-1", "req-2"]
    assert rows[1]["prompt_tokens"] == 1
    assert rows[1]["cost"] == "1.25"


def test_csv_to_standard_output_is_nothing_but_csv(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/ListRequests"] = ledger(0)
    done = shell("usage", "export", "--json")
    rows = list(csv.reader(io.StringIO(done.out)))
    assert len(rows) == 1
    assert rows[0][:2] == ["id", "at"]


def test_summary_as_json(service: Scripted, shell: Shell, tmp_path: Path) -> None:
    service.answers["AdminService/ListRequests"] = ledger(5)
    path = tmp_path / "x.jsonl"
    done = shell("usage", "export", "--format", "jsonl", "--out", str(path), "--json")
    assert done.json == {"file": str(path), "rows": 5}
    assert len(path.read_text("utf-8").splitlines()) == 5


def test_a_failure_midway_leaves_the_old_file(service: Scripted, shell: Shell, tmp_path: Path) -> None:
    service.answers["AdminService/ListRequests"] = ledger(5000, fail_at=2000)
    path = tmp_path / "ledger.csv"
    path.write_text("old", "ascii")
    done = shell("usage", "export", "--out", str(path))
    assert done.status == 69
    assert "the database is away" in done.err
    assert path.read_text("ascii") == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing half-written stays"


def test_the_file_appears_when_it_is_complete(service: Scripted, shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    seen: list[tuple[bool, bool]] = []
    pages = ledger(1500)

    def page(asked: Any) -> Any:
        seen.append((path.exists(), path.with_name("ledger.csv.partial").exists()))
        return pages(asked)

    service.answers["AdminService/ListRequests"] = page
    assert shell("usage", "export", "--out", str(path)).status == 0
    assert seen == [(False, True), (False, True)]
    assert path.exists()


@pytest.mark.parametrize("name", ["missing/ledger.csv", "."])
def test_a_place_that_cannot_be_written(service: Scripted, shell: Shell, tmp_path: Path, name: str) -> None:
    done = shell("usage", "export", "--out", str(tmp_path / name))
    assert done.status == 1
    assert "cannot write" in done.err
    assert "Traceback" not in done.err


def peak_kib() -> int:
    """Most memory of this process since `clear_refs`."""
    (line,) = [line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def test_memory_holds_one_page(service: Scripted, shell: Shell, tmp_path: Path) -> None:
    """60,000 rows at once would be some 100 MB of objects."""
    service.answers["AdminService/ListRequests"] = ledger(5000)
    path = tmp_path / "ledger.csv"
    shell("usage", "export", "--out", str(path))
    service.answers["AdminService/ListRequests"] = ledger(60_000)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts anew
    before = peak_kib()
    assert shell("usage", "export", "--out", str(path)).status == 0
    assert peak_kib() - before < 12_000
