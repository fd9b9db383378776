"""`helixflow usage` and `helixflow audit`."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from helixflow.admin import export
from helixflow.admin.errors import AdminError
from helixflow.admin.operator import Operator, Outcome
from helixflow.admin.table import Column, table
from helixflow.admin.values import count_text, moment_text, money_text

VERIFY_TIMEOUT_S = 3600.0
"""Every row of the ledger is read."""
PAGE = 1000

COUNTS = ("requests", "errors", "interrupted", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")
TITLES = ("REQUESTS", "ERRORS", "CUT OFF", "PROMPT", "CACHED", "COMPLETION", "COST")


def _days(options: Namespace) -> dict[str, str | None]:
    if options.first and options.last and options.first > options.last:
        raise AdminError(f"--from {options.first} is after --to {options.last}")
    return {"from": options.first, "to": options.last}


async def usage_show(operator: Operator, options: Namespace) -> Outcome:
    """What was used, added up by day, model, endpoint, key, user or organisation."""
    groups = options.by or ["day"]
    fields: dict[str, Any] = {
        **_days(options),
        "organisation": options.organisation,
        "group_by": groups,
        "key": options.key,
        "user": options.user,
        "model": options.model,
    }
    report = await operator.call("QueryUsage", "UsageRequest", fields)
    rows = report["data"]
    cells = [(*(_group(row, group) for group in groups), *_counts(row)) for row in rows]
    if len(rows) > 1:
        total = {name: sum(row[name] for row in rows) for name in COUNTS}
        cells.append(("total", *[""] * (len(groups) - 1), *_counts(total)))
    titles = [*TITLES[:-1], f"{TITLES[-1]} {report['currency']}".strip()]
    columns = [
        *(Column(group.upper(), cut=group != "day") for group in groups),
        *(Column(title, right=True) for title in titles),
    ]
    return Outcome(report, table(columns, cells, "nothing was used"))


def _group(row: dict[str, Any], group: str) -> str:
    """The name; the id of what has none any more."""
    value: str = row[group] or row.get(f"{group}_id", "")
    return value or "-"


def _counts(row: dict[str, Any]) -> list[str]:
    return [*(count_text(row[name]) for name in COUNTS[:-1]), money_text(row["cost"])]


async def usage_export(operator: Operator, options: Namespace) -> Outcome:
    """Every row of the ledger, into a file or to standard output."""
    for name in ("by", "key", "user", "model"):
        if getattr(options, name) is not None:
            raise AdminError(f"--{name} belongs to `usage show`; an export has every request of the days named")
    fields = {**_days(options), "organisation": options.organisation}
    pages = operator.pages("ListRequests", "RequestsRequest", fields)
    rows = await export.write(pages, options.format, options.out)
    if options.out is None:
        return Outcome(None, "")
    return Outcome({"file": str(options.out), "rows": rows}, f"{options.out}: {count_text(rows)} rows")


async def usage_texts(operator: Operator, options: Namespace) -> Outcome:
    """Prompt and answer of one request."""
    found = await operator.call("GetTexts", "TextsRequest", {"request": options.request})
    kept = f"kept until {moment_text(found['expires_at'])} UTC"
    return Outcome(found, f"PROMPT\n\n{found['prompt']}\n\nANSWER\n\n{found['answer']}\n\n{kept}")


async def audit_list(operator: Operator, options: Namespace) -> Outcome:
    """Who did what, as many rows as asked for."""
    fields = {**_days(options), "organisation": options.organisation}
    rows: list[dict[str, Any]] = []
    more = False
    async for page in operator.pages("ListAudit", "AuditRequest", fields, page=min(options.limit + 1, PAGE)):
        rows += page
        if len(rows) > options.limit:
            more = True
            break
    del rows[options.limit :]
    columns = [
        Column("AT (UTC)"),
        Column("ACTOR", cut=True),
        Column("ACTION"),
        Column("TARGET", cut=True),
        Column("DETAIL", cut=True),
    ]
    cells = [(moment_text(row["at"]), row["actor"], row["action"], row["target"], row["detail"]) for row in rows]
    text = table(columns, cells, "no administrative act")
    if more:
        text += "\n\nthere are more: name other days with --from and --to, or raise --limit"
    return Outcome({"data": rows, "more": more}, text)


async def audit_verify(operator: Operator, options: Namespace) -> Outcome:
    """Recomputes the chains of ledger and audit log. Status 1 when something is wrong."""
    fields: dict[str, Any] = {**_days(options), "anchor": _read_anchor(options.anchor)}
    report = await operator.call("VerifyLedger", "VerifyLedgerRequest", fields, timeout_s=VERIFY_TIMEOUT_S)
    faults = report["faults"]
    entries = count_text(report["entries"])
    read = f"{count_text(report['rows'])} rows of {count_text(report['days'])} days, {entries} entries of the audit log"
    gaps = [f"removed by retention: {line}" for line in report["dropped"]]
    gaps += [f"chained with a pepper that is lost, so present but not checked: {line}" for line in report["lost"]]
    unread = "".join(f"\n{line}" for line in gaps)
    if not faults:
        said = ", and the anchor" if options.anchor else ""
        return Outcome({**report, "ok": True}, f"{read}: every chain holds{said}{unread}")
    columns = [
        Column("CHAIN"),
        Column("DAY"),
        Column("ROW", right=True),
        Column("ID"),
        Column("PROBLEM", cut=True),
    ]
    cells = [
        (fault["chain"] or "ledger", fault["day"], count_text(fault["sequence"]), fault["id"], fault["problem"])
        for fault in faults
    ]
    text = f"{read}: the chain is broken in {len(faults)} places\n\n{table(columns, cells, '')}{unread}"
    return Outcome({**report, "ok": False}, text, status=1)


def _read_anchor(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise AdminError(f"the anchor {path} cannot be read: {reason}") from None


async def audit_anchor(operator: Operator, options: Namespace) -> Outcome:
    """Writes a signed statement of where all chains end, into a new file."""
    answer = await operator.call("AnchorLedger", "AnchorLedgerRequest", timeout_s=VERIFY_TIMEOUT_S)
    try:
        with options.out.open("x") as file:
            file.write(answer["anchor"])
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise AdminError(f"{options.out} exists already; anchors are never overwritten") from None
    except OSError as error:
        raise AdminError(f"{options.out} cannot be written: {error.strerror}") from None
    text = f"{options.out}: keep it where nobody can reach it who can reach the database"
    return Outcome({"file": str(options.out)}, text)
