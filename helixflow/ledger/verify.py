"""Verification: recomputes every chain, and compares it with what checkpoints and anchors say of it."""

import hmac
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any, Final

from helixflow.ledger import audit_chain, sealer
from helixflow.ledger.chain import EPOCH, Head, link, midnight, start
from helixflow.ledger.faults import CHECKPOINT, LEDGER, LedgerFault, Report
from helixflow.ledger.record import UNKNOWN, UNKNOWN_ERROR, Row, today
from helixflow.ledger.seals import SealKeys, Witness, of_day

CHUNK: Final = 1000
"""Rows that are hashed at a time: they hold up the event loop by a few milliseconds."""

DAY_S: Final = 3600.0
"""Time for sorting the rows of one day (seconds): 10 million take a minute."""
_US: Final = timedelta(microseconds=1)
_DAY: Final = timedelta(days=1)

_DAYS: Final = """
SELECT day, sequence, hash, dropped_sequence, dropped_hash, lost_sequence, seal FROM helixflow.ledger_days
WHERE day BETWEEN $1 AND $2 ORDER BY day
"""
# In the order of Row's fields, so that a record of the database is one.
_ROWS: Final = """
SELECT sequence, hash, uuid_send(id), at, uuid_send(organisation_id), uuid_send(user_id), uuid_send(key_id), model,
    endpoint, prompt_tokens, cached_tokens, completion_tokens, queue_us, first_token_us, total_us, finish, error,
    status, client, cost, request_id, uuid_send(gateway)
FROM helixflow.requests WHERE at >= $1 AND at < $2 ORDER BY sequence, id
"""
# Days whose rows have no head at all.
_STRAYS: Final = """
SELECT s.since::date AS day FROM generate_series($1::date, $2::date, interval '1 day') s (since)
WHERE NOT EXISTS (SELECT FROM helixflow.ledger_days d WHERE d.day = s.since::date)
AND EXISTS (
    SELECT FROM helixflow.requests r WHERE r.at >= s.since::timestamp AT TIME ZONE 'UTC'
    AND r.at < (s.since::timestamp + interval '1 day') AT TIME ZONE 'UTC'
)
"""
_BOUNDS: Final = "SELECT min(day), max(day) FROM helixflow.ledger_days"
_OUTSIDE: Final = """
SELECT (at AT TIME ZONE 'UTC')::date FROM helixflow.requests WHERE at < $1 OR at >= $2 LIMIT 1
"""
_SUMS: Final = ", ".join(
    f"sum({name})::bigint AS {name}"
    for name in ("requests", "errors", "interrupted", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")
)
# The sums of a day, as its rows say and as they are kept.
# A name that no model had is counted under one label; releases before counted each, and a day may have both.
_LABEL: Final = f"CASE WHEN model IN (SELECT model FROM strange) THEN '{UNKNOWN}' ELSE model END AS model"  # noqa: S608
_USAGE: Final = f"""
WITH strange AS (
    SELECT DISTINCT model FROM helixflow.requests WHERE at >= $2 AND at < $3 AND error = '{UNKNOWN_ERROR}'
), counted AS (
    SELECT $1::date AS day, organisation_id, user_id, key_id, {_LABEL}, endpoint, count(*) AS requests,
        count(*) FILTER (WHERE error <> '' OR status >= 400 AND finish <> 'cancelled') AS errors,
        count(*) FILTER (WHERE finish = 'interrupted') AS interrupted, sum(prompt_tokens)::bigint AS prompt_tokens,
        sum(cached_tokens)::bigint AS cached_tokens, sum(completion_tokens)::bigint AS completion_tokens,
        sum(cost)::bigint AS cost
    FROM helixflow.requests WHERE at >= $2 AND at < $3 GROUP BY 1, 2, 3, 4, 5, 6
), due AS (
    SELECT 1 AS kind, * FROM counted
    UNION ALL SELECT 2, day, organisation_id, user_id, key_id, '', '', {_SUMS} FROM counted GROUP BY 2, 3, 4, 5
    UNION ALL SELECT 3, day, organisation_id, NULL, NULL, model, endpoint, {_SUMS} FROM counted GROUP BY 2, 3, 6, 7
), kept AS (
    SELECT 1 AS kind, day, organisation_id, user_id, key_id, {_LABEL}, endpoint, {_SUMS} FROM helixflow.usage_daily
        WHERE day = $1 GROUP BY 2, 3, 4, 5, 6, 7
    UNION ALL SELECT 2, * FROM helixflow.usage_keys WHERE day = $1
    UNION ALL SELECT 3, day, organisation_id, user_id, key_id, {_LABEL}, endpoint, {_SUMS} FROM helixflow.usage_models
        WHERE day = $1 GROUP BY 2, 3, 4, 5, 6, 7
)
SELECT EXISTS ((TABLE due EXCEPT TABLE kept) UNION ALL (TABLE kept EXCEPT TABLE due))
"""  # noqa: S608 - constants
# Months whose sums are not those of their days.
_MONTHS: Final = f"""
WITH due AS (
    SELECT date_trunc('month', day)::date AS day, organisation_id, user_id, key_id, model, endpoint, {_SUMS}
    FROM helixflow.usage_daily WHERE day >= $1 AND day < $2 GROUP BY 1, 2, 3, 4, 5, 6
), kept AS (SELECT * FROM helixflow.usage_monthly WHERE day >= $1 AND day < $2)
SELECT DISTINCT day FROM ((TABLE due EXCEPT TABLE kept) UNION ALL (TABLE kept EXCEPT TABLE due)) wrong ORDER BY day
"""  # noqa: S608 - constants


async def verify(
    connection: Any, key: bytes, first: date | None = None, last: date | None = None, anchors: Sequence[Witness] = ()
) -> Report:
    """Recomputes the chains of the days from `first` to `last` and that of the audit log, and compares them with the
    last checkpoint and with `anchors`. None: from the first, to the last there is.

    `connection`: in no transaction; a role that may only read is enough. Each day is seen as at one moment; writers go
    on meanwhile.
    """
    report = Report()
    keys = SealKeys.of(key)
    low, high = await connection.fetchrow(_BOUNDS)
    witnesses = [*(await _checkpoint(connection, keys, report, anchors, empty=high is None)), *anchors]
    low, high = low or today(), high or today()
    strays = {row["day"] for row in await connection.fetch(_STRAYS, first or low, last or high)}
    if first is None or last is None:
        since = midnight(low) if first is None else midnight(date(1, 1, 2))
        until = midnight(high + _DAY) if last is None else midnight(date(9999, 12, 31))
        strays |= {row[0] for row in await connection.fetch(_OUTSIDE, since, until)}
    for day in strays:
        report.days += 1
        report.faults.append(LedgerFault(day.isoformat(), 0, "", "the day has rows but no head of its chain"))
    rows = await connection.fetch(_DAYS, first or low, last or high)
    known = strays | {row["day"] for row in rows}
    _removed_days(witnesses, known, first or date.min, last or date.max, report)
    for row in rows:
        await _verify_day(connection, key, row["day"], report, witnesses)
    await _verify_months(connection, first or low, last or high, report)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute("SET LOCAL statement_timeout = 0")
        await audit_chain.verify(connection, keys.audit, report, witnesses)
    report.faults.sort(key=lambda fault: (fault.chain != LEDGER, fault.day))
    return report


async def _checkpoint(
    connection: Any, keys: SealKeys, report: Report, anchors: Sequence[Witness], *, empty: bool
) -> list[Witness]:
    """The last checkpoint, when it can be trusted; whether it is as new as the anchors."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        last = await sealer.load(connection)
    moment = last.at.date().isoformat() if last.number else ""

    def wrong(day: str, number: int, problem: str) -> None:
        report.faults.append(LedgerFault(day, number, "", problem, CHECKPOINT))

    for anchor in anchors:
        known = anchor.checkpoint
        if known.number > last.number:
            problem = f"the database is older than {anchor}: it has checkpoint {last.number}, not {known.number}"
            wrong(known.at.date().isoformat(), known.number, problem)
        elif known.number == last.number and known.signature != last.signature:
            wrong(moment, known.number, f"history was rewritten: {anchor} is another checkpoint of the same number")
    if not sealer.sound(last, keys):
        wrong(moment, last.number, "the checkpoint was altered")
    elif not last.number and not empty:
        wrong(moment, 0, "there is no checkpoint: it was removed, or this release has not sealed the ledger yet")
    else:
        return [Witness("the checkpoint", last)] if last.number else []
    return []


def _removed_days(witnesses: Sequence[Witness], known: set[date], first: date, last: date, report: Report) -> None:
    """Days of which nothing is left."""
    gone: dict[date, Witness] = {}
    for witness in witnesses:
        for day in witness.checkpoint.days.keys() - known:
            if first <= day <= last:
                gone.setdefault(day, witness)
    for day, witness in gone.items():
        rows = witness.checkpoint.days[day].sequence
        problem = f"the day was removed: {witness} has {rows} rows of it"
        report.days += 1
        report.faults.append(LedgerFault(day.isoformat(), 0, "", problem))


async def _verify_months(connection: Any, first: date, last: date, report: Report) -> None:
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute("SET LOCAL statement_timeout = 0")
        until = (last.replace(day=1) + timedelta(days=32)).replace(day=1)
        wrong = await connection.fetch(_MONTHS, first.replace(day=1), until, timeout=DAY_S)
    known = {fault.day[:7] for fault in report.faults}  # what is wrong with a day is wrong with its month
    for month in (row["day"].isoformat() for row in wrong):
        if month[:7] not in known:
            report.faults.append(LedgerFault(month, 0, "", "the month's usage is not the sum of its days"))


async def _verify_day(connection: Any, key: bytes, day: date, report: Report, witnesses: Sequence[Witness]) -> None:
    since, until = midnight(day), midnight(day + _DAY)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute("SET LOCAL statement_timeout = 0")
        found = await connection.fetchrow(_DAYS, day, day)
        *fields, seal = found
        head = Head(*fields)
        report.days += 1
        check = _Check(key, head, witnesses)
        cursor = await connection.cursor(_ROWS, since, until, timeout=DAY_S)
        while rows := await cursor.fetch(CHUNK, timeout=DAY_S):
            if not check.rows(rows):
                break
        report.rows += check.seen
        fault = check.fault or check.end()
        if not hmac.compare_digest(seal, head.seal(key)):
            fault = fault or check.wrong(0, "", "the head of the chain was altered")
        if head.dropped_sequence:
            report.dropped.append(f"{day}: rows 1 to {head.dropped_sequence}")
        if head.lost_sequence > head.dropped_sequence:
            report.lost.append(f"{day}: rows {head.dropped_sequence + 1} to {head.lost_sequence}")
        whole = fault is None and not head.dropped_sequence
        if whole and await connection.fetchval(_USAGE, day, since, until, timeout=DAY_S):
            fault = check.wrong(0, "", "the day's usage is not the sum of its rows")
        if fault is not None:
            report.faults.append(fault)


class _Check:
    """One day's rows in order."""

    def __init__(self, key: bytes, head: Head, witnesses: Sequence[Witness]) -> None:
        self._key = key
        self._head = head
        self._next = head.dropped_sequence + 1
        self._previous = head.dropped_hash if head.dropped_sequence else start(key, head.day)
        self._witnesses = of_day(witnesses, head.day)
        """What is still to be compared."""
        self.seen = 0
        self.fault: LedgerFault | None = None
        self._compare(head.dropped_sequence, self._previous)

    def wrong(self, sequence: int, request: str, problem: str) -> LedgerFault:
        """Notes a fault."""
        self.fault = LedgerFault(self._head.day.isoformat(), sequence, request, problem)
        return self.fault

    def rows(self, rows: Sequence[Any]) -> bool:
        """Checks the next rows; False at the first that is wrong."""
        for found in rows:
            sequence, stored, identity, at, *rest = found
            if sequence != self._next:
                self._out_of_order(sequence, identity)
                return False
            row = Row(identity, (at - EPOCH) // _US, *rest)
            lost = sequence <= self._head.lost_sequence
            if not lost and link(self._key, self._previous, sequence, row) != stored:
                self.wrong(sequence, _text(identity), "the row was altered, or another one stood here")
                return False
            self.seen += 1
            self._previous = stored
            self._next += 1
            if self._witnesses and sequence >= self._witnesses[0][0].sequence:
                self._compare(sequence, stored)
                if self.fault:
                    return False
        return True

    def _compare(self, sequence: int, stored: bytes) -> None:
        """Whether this row is what checkpoints and anchors say of its place."""
        while self._witnesses and self._witnesses[0][0].sequence <= sequence:
            end, witness = self._witnesses.pop(0)
            if end.sequence == sequence and end.hash != stored:
                self.wrong(sequence, "", f"history was rewritten: {witness} says otherwise")

    def _out_of_order(self, sequence: int, identity: bytes) -> None:
        if sequence < self._next:
            self.wrong(sequence, _text(identity), "the row was added: its number is taken or out of range")
        elif self._next <= self._head.sequence:
            self.wrong(self._next, "", "the row was removed")
        else:
            self.wrong(sequence, _text(identity), "the row was added behind the end of the chain")

    def end(self) -> LedgerFault | None:
        """After the last row."""
        if self._next <= self._head.sequence:
            return self.wrong(self._next, "", "the row was removed")
        if self._next > self._head.sequence + 1:
            return self.wrong(self._head.sequence + 1, "", "a row was added behind the end of the chain")
        if self._head.sequence and self._previous != self._head.hash:
            return self.wrong(self._head.sequence, "", "the head of the chain was altered")
        if self._witnesses:
            end, witness = self._witnesses[-1]
            return self.wrong(self._next, "", f"rows were removed from the end: {witness} has {end.sequence}")
        return None


def _text(identity: bytes) -> str:
    text = identity.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
