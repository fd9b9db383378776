"""What `usage` and `audit` print, against a scripted auth-service."""

from pathlib import Path
from typing import Any

from helixflow.rpc import messages
from tests.admin.conftest import Shell
from tests.admin.scripted import Scripted, sent

ID = "7b7e6f3e-0000-4000-8000-000000000001"


def test_usage(service: Scripted, shell: Shell) -> None:
    rows = [
        messages.UsageRow(day="2026-01-01", model="m" * 80, requests=1200, prompt_tokens=10**9, cost=1_500_000_000),
        messages.UsageRow(day="2026-01-02", model="", key_id=ID, requests=1, errors=1, cost=1),
    ]
    service.answers["AdminService/QueryUsage"] = messages.UsageReport(currency="EUR", data=rows)
    done = shell("usage", "--by", "day,model", "--from", "2026-01-01", "show", "--to", "2026-01-31", "--user", "a")
    assert sent(service, "QueryUsage") == {
        "from": "2026-01-01",
        "to": "2026-01-31",
        "group_by": ["day", "model"],
        "user": "a",
    }
    lines = done.out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[0].endswith("COST EUR")
    assert lines[1].split()[-1] == "1.50"
    assert lines[2].split()[1] == "-", "a name that is not known"
    assert lines[3].split()[0] == "total"
    assert lines[3].split()[-1] == "1.500000001"
    assert "1,201" in lines[3]
    assert "1,000,000,000" in lines[1]
    service.calls.clear()
    assert shell("usage", "--json").json["data"][0]["cost"] == 1_500_000_000
    assert sent(service, "QueryUsage") == {"group_by": ["day"]}
    assert ID[:20] in shell("usage", "--by", "key").out, "a key without a name is shown by its id"


def test_audit_list(service: Scripted, shell: Shell) -> None:
    def page(asked: Any) -> Any:
        first = int(asked.after or 0)
        rows = [
            messages.AuditRow(id=str(n), at=1_770_000_000, actor="root", action="key.create", detail=f"d{n}\x1b[31m")
            for n in range(first, first + asked.limit)
        ]
        return messages.AuditRows(data=rows, next=str(first + asked.limit))

    service.answers["AdminService/ListAudit"] = page
    done = shell("audit", "list", "--limit", "3", "--from", "2026-01-01")
    lines = done.out.splitlines()
    assert len(lines) == 1 + 3 + 2
    assert "raise --limit" in lines[-1]
    assert "\x1b" not in done.out
    assert [call.message["limit"] for call in service.calls] == [4]
    asked = shell("audit", "list", "--limit", "1500", "--json").json
    assert len(asked["data"]) == 1500
    assert asked["more"] is True


def test_audit_verify(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/VerifyLedger"] = messages.VerifyLedgerReply(days=3, rows=4000, entries=12)
    done = shell("audit", "verify", "--from", "2026-01-01")
    held = "4,000 rows of 3 days, 12 entries of the audit log: every chain holds\n"
    assert (done.status, done.out) == (0, held)
    assert sent(service, "VerifyLedger") == {"from": "2026-01-01"}
    fault = messages.LedgerFault(day="2026-01-02", sequence=17, id=ID, problem="the row was altered")
    service.answers["AdminService/VerifyLedger"] = messages.VerifyLedgerReply(days=3, rows=4000, faults=[fault])
    done = shell("audit", "verify")
    assert done.status == 1
    assert "2026-01-02" in done.out
    assert "the row was altered" in done.out
    done = shell("audit", "verify", "--json")
    assert done.status == 1
    assert done.json["ok"] is False
    assert done.json["faults"][0]["sequence"] == 17


def test_audit_anchor(service: Scripted, shell: Shell, tmp_path: Path) -> None:
    service.answers["AdminService/AnchorLedger"] = messages.Anchor(anchor='{"number": 7}')
    path = tmp_path / "anchor.json"
    done = shell("audit", "anchor", "--out", str(path))
    assert (done.status, path.read_text()) == (0, '{"number": 7}')
    assert shell("audit", "anchor", "--out", str(path)).status == 1
    assert path.read_text() == '{"number": 7}', "an anchor is never overwritten"
    dropped, lost = ["2026-01-01: rows 1 to 5"], ["2026-01-02: rows 1 to 7"]
    service.answers["AdminService/VerifyLedger"] = messages.VerifyLedgerReply(days=1, dropped=dropped, lost=lost)
    done = shell("audit", "verify", "--anchor", str(path))
    assert sent(service, "VerifyLedger") == {"anchor": '{"number": 7}'}
    assert "and the anchor" in done.out
    assert "removed by retention: 2026-01-01: rows 1 to 5" in done.out
    assert "a pepper that is lost, so present but not checked: 2026-01-02: rows 1 to 7" in done.out
    done = shell("audit", "verify", "--anchor", str(tmp_path / "none"))
    assert done.status == 1
    assert "cannot be read" in done.err
