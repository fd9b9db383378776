"""Writes what gateways ship into the ledger, each request once, in one transaction per batch."""

import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any, Final

import asyncpg
import msgspec

from helixflow import log, traces
from helixflow.core_rs import InvalidRequest, Unavailable
from helixflow.db.errors import DatabaseError
from helixflow.db.pool import Pool
from helixflow.ledger.audit_chain import ChainError
from helixflow.ledger.chain import EPOCH, Head, link, start
from helixflow.ledger.record import CANCELLED, INTERRUPTED, UNKNOWN, UNKNOWN_ERROR, Content, Row, day_of, decode, fits
from helixflow.ledger.sealer import seal_days
from helixflow.ledger.seals import SealKeys
from helixflow.refusals import refusal

COLUMNS: Final = (
    "id",
    "at",
    "sequence",
    "status",
    "hash",
    "organisation_id",
    "user_id",
    "key_id",
    "gateway",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "queue_us",
    "first_token_us",
    "total_us",
    "cost",
    "model",
    "endpoint",
    "finish",
    "error",
    "client",
    "request_id",
)
Note = Callable[[Iterable[tuple[bytes | None, int]]], Awaitable[None]]

ATTEMPTS: Final = 3
"""A partition may be dropped between two statements."""

_HEADS: Final = """
SELECT day, sequence, hash, dropped_sequence, dropped_hash, lost_sequence FROM helixflow.ledger_days
WHERE day = ANY($1::date[]) ORDER BY day FOR UPDATE
"""
_NEW_HEADS: Final = """
INSERT INTO helixflow.ledger_days (day, sequence, hash, seal)
SELECT * FROM unnest($1::date[], $2::bigint[], $3::bytea[], $4::bytea[]) ON CONFLICT DO NOTHING
"""
_SET_HEADS: Final = """
UPDATE helixflow.ledger_days d SET sequence = n.sequence, hash = n.hash, seal = n.seal
FROM unnest($1::date[], $2::bigint[], $3::bytea[], $4::bytea[]) n (day, sequence, hash, seal) WHERE d.day = n.day
"""
_KNOWN: Final = """
SELECT uuid_send(r.id) FROM helixflow.requests r
JOIN unnest($1::uuid[], $2::timestamptz[]) n (id, at) ON r.id = n.id AND r.at = n.at
WHERE r.at BETWEEN $3 AND $4
"""
_ADD: Final = """
ON CONFLICT (day, organisation_id, user_id, key_id, model, endpoint) DO UPDATE SET
    requests = u.requests + excluded.requests, errors = u.errors + excluded.errors,
    interrupted = u.interrupted + excluded.interrupted, prompt_tokens = u.prompt_tokens + excluded.prompt_tokens,
    cached_tokens = u.cached_tokens + excluded.cached_tokens,
    completion_tokens = u.completion_tokens + excluded.completion_tokens, cost = u.cost + excluded.cost
"""
_SUMS: Final = (
    "sum(requests), sum(errors), sum(interrupted), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), "
    "sum(cost)"
)
# Sorted, so that two writers who meet at a month's row have not met in the other order before.
_USAGE: Final = f"""
WITH n AS (
    SELECT * FROM unnest($1::date[], $2::uuid[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::bigint[],
        $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[])
    AS n (day, organisation_id, user_id, key_id, model, endpoint, requests, errors, interrupted, prompt_tokens,
        cached_tokens, completion_tokens, cost)
), daily AS (
    INSERT INTO helixflow.usage_daily AS u SELECT * FROM n ORDER BY 1, 2, 3, 4, 5, 6 {_ADD}
), keys AS (
    INSERT INTO helixflow.usage_keys AS u SELECT day, organisation_id, user_id, key_id, '', '', {_SUMS} FROM n
    GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4 {_ADD}
), models AS (
    INSERT INTO helixflow.usage_models AS u
    SELECT day, organisation_id, NULL::uuid, NULL::uuid, model, endpoint, {_SUMS} FROM n
    GROUP BY 1, 2, 5, 6 ORDER BY 1, 2, 5, 6 {_ADD}
)
INSERT INTO helixflow.usage_monthly AS u
SELECT date_trunc('month', day)::date, organisation_id, user_id, key_id, model, endpoint, {_SUMS} FROM n
GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6 {_ADD}
"""  # noqa: S608 - constants
_CONTENTS: Final = """
INSERT INTO helixflow.contents (id, at, organisation_id, prompt, answer, expires_at)
SELECT * FROM unnest($1::uuid[], $2::timestamptz[], $3::uuid[], $4::text[], $5::text[], $6::timestamptz[])
ON CONFLICT DO NOTHING
"""

logger = log.get("ledger")


class _GoneError(Exception):
    """Somebody removed what the writer relies on."""


class Writer:
    """The ledger's only writer in this process. Any number of them may work at once, on one or many machines."""

    def __init__(self, pool: Pool, chain_key: bytes, note: Note | None = None) -> None:
        """`note` hears of the keys of every batch that has been written: (16 bytes or None, microseconds) each."""
        self._note = note
        self._pool = pool
        self._key = chain_key
        self._keys = SealKeys.of(chain_key)
        self._days: set[date] = set()  # whose partition and head exist

    async def append(self, spool: str, records: Sequence[bytes]) -> tuple[int, int]:
        """Writes encoded rows and contents of one spool, all or nothing; returns how many rows were new, and known.

        Raises InvalidRequest, which names the record, when one can never be written, and Unavailable when the batch
        should come again.
        """
        rows, contents = _decoded(records)
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    counts = await self._append(rows, contents)
                except (asyncpg.CheckViolationError, _GoneError):
                    # What was there is there no more.
                    self._days.clear()
                    if attempt == ATTEMPTS:
                        raise
                else:
                    break
        except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
            raise refusal(
                InvalidRequest, f"The database refuses a record of the batch: {traces.message_of(error)}.", "records"
            ) from None
        except (DatabaseError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, _GoneError) as error:
            logger.warning(
                "rows could not be written; the gateway keeps them", spool=spool, error=traces.message_of(error)
            )
            raise refusal(Unavailable, "The ledger's database is not available now. Try again later.") from None
        if self._note is not None:
            await self._note((row.key, row.at_us) for row in rows.values())
        return counts

    async def _append(self, rows: dict[bytes, Row], contents: Sequence[Content]) -> tuple[int, int]:
        async with self._pool.acquire() as connection:
            days = sorted({day_of(row.at_us) for row in rows.values()})
            await self._prepare(connection, [day for day in days if day not in self._days])
            async with connection.transaction():
                new = list(rows.values())
                if new:
                    heads = {row["day"]: Head(*row) for row in await connection.fetch(_HEADS, days)}
                    if len(heads) < len(days):
                        raise _GoneError("the head of a day's chain was removed")
                    _refuse_late(rows, heads)
                    new = await self._write(connection, new, heads)
                    if new:
                        await connection.execute(_SET_HEADS, *self._columns(heads.values()))
                        await connection.execute(_USAGE, *_usage(new))
                if contents:
                    await connection.execute(_CONTENTS, *_texts(contents))
        return len(new), len(rows) - len(new)

    async def _prepare(self, connection: Any, days: Sequence[date]) -> None:
        """Makes partitions and heads, outside of the transaction: inside, two that make each other's would block."""
        if not days:
            return
        for month in sorted({day.replace(day=1) for day in days}):
            await connection.execute("SELECT helixflow.requests_partition($1)", month)
        fresh = [Head(day, 0, start(self._key, day)) for day in days]
        await connection.execute(_NEW_HEADS, *self._columns(fresh))
        await self._seal(connection)
        self._days.update(days)

    async def _seal(self, connection: Any) -> None:
        """A day is under a checkpoint before it has a row: from then on it cannot vanish."""
        try:
            await seal_days(connection, self._keys)
        except ChainError as error:
            # What is wrong is `audit verify`'s to say; rows must not wait for it.
            logger.error("the ledger was tampered with: nothing is sealed before that is settled", error=str(error))

    def _columns(self, heads: Iterable[Head]) -> tuple[list[Any], ...]:
        listed = list(heads)
        return (
            [head.day for head in listed],
            [head.sequence for head in listed],
            [head.hash for head in listed],
            [head.seal(self._key) for head in listed],
        )

    async def _write(self, connection: Any, rows: list[Row], heads: dict[date, Head]) -> list[Row]:
        """Writes the rows that are new; returns them, with the heads moved on."""
        ends = {day: (head.sequence, head.hash) for day, head in heads.items()}
        try:
            async with connection.transaction():
                await self._copy(connection, rows, heads)
        except asyncpg.UniqueViolationError:
            known = await _known(connection, rows)
            rows = [row for row in rows if row.id not in known]
            for day, (sequence, digest) in ends.items():
                heads[day].sequence, heads[day].hash = sequence, digest
            if rows:
                await self._copy(connection, rows, heads)
        return rows

    async def _copy(self, connection: Any, rows: Sequence[Row], heads: dict[date, Head]) -> None:
        uuids = _Uuids()
        records = []
        for row in rows:
            head = heads[day_of(row.at_us)]
            head.sequence += 1
            head.hash = link(self._key, head.hash, head.sequence, row)
            records.append(
                (
                    uuid.UUID(bytes=row.id), _time(row.at_us), head.sequence, row.status, head.hash,
                    uuids[row.organisation], uuids[row.user], uuids[row.key], uuids[row.gateway], row.prompt_tokens,
                    row.cached_tokens, row.completion_tokens, row.queue_us, row.first_token_us, row.total_us, row.cost,
                    row.model, row.endpoint, row.finish, row.error, row.client, row.request_id,
                )
            )  # fmt: skip
        await connection.copy_records_to_table("requests", schema_name="helixflow", columns=COLUMNS, records=records)


def _refuse_late(rows: Mapping[bytes, Row], heads: Mapping[date, Head]) -> None:
    """A row of a day whose rows retention has dropped could not be told from one that was there.

    Raises InvalidRequest, so that its gateway sets it aside.
    """
    dropped = {day for day, head in heads.items() if head.dropped_sequence}
    if not dropped:
        return
    for row in rows.values():
        day = day_of(row.at_us)
        if day in dropped:
            message = (
                f"The rows of {day} were dropped (ledger.keep_months): whether this one was among them is unknown."
            )
            raise refusal(InvalidRequest, message, "records")


class _Uuids(dict[bytes | None, uuid.UUID | None]):
    """Bytes to UUIDs: most rows of a batch name the same few."""

    def __missing__(self, key: bytes | None) -> uuid.UUID | None:
        value = self[key] = None if key is None else uuid.UUID(bytes=key)
        return value


def _time(at_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=at_us)


def _decoded(records: Sequence[bytes]) -> tuple[dict[bytes, Row], list[Content]]:
    rows: dict[bytes, Row] = {}
    contents: list[Content] = []
    for number, data in enumerate(records):
        try:
            record = decode(data)
        except msgspec.MsgspecError as error:
            raise refusal(InvalidRequest, f"It is no record of the ledger: {error}.", f"records[{number}]") from None
        if _has_nul(record):
            raise refusal(InvalidRequest, "A text of the record holds a NUL character.", f"records[{number}]")
        if isinstance(record, Content):
            contents.append(record)
            continue
        if not fits(record):
            raise refusal(InvalidRequest, "The id was not made of the time of the request.", f"records[{number}]")
        rows.setdefault(record.id, record)
    return rows, contents


def _has_nul(record: Row | Content) -> bool:
    """PostgreSQL's text cannot hold the character."""
    if isinstance(record, Content):
        return "\0" in record.prompt or "\0" in record.answer
    texts = (record.model, record.endpoint, record.finish, record.error, record.client, record.request_id)
    return "\0" in "".join(texts)


async def _known(connection: Any, rows: Sequence[Row]) -> set[bytes]:
    times = [_time(row.at_us) for row in rows]
    found = await connection.fetch(_KNOWN, [uuid.UUID(bytes=row.id) for row in rows], times, min(times), max(times))
    return {row[0] for row in found}


def _usage(rows: Iterable[Row]) -> list[list[Any]]:
    """The rows summed up, as columns."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        model = UNKNOWN if row.error == UNKNOWN_ERROR else row.model
        key = (day_of(row.at_us), row.organisation, row.user, row.key, model, row.endpoint)
        total = sums.get(key)
        if total is None:
            total = sums[key] = [0] * 7
        total[0] += 1
        total[1] += _failed(row)
        total[2] += row.finish == INTERRUPTED
        total[3] += row.prompt_tokens
        total[4] += row.cached_tokens
        total[5] += row.completion_tokens
        total[6] += row.cost
    uuids = _Uuids()
    lines = [
        (day, uuids[organisation], uuids[user], uuids[key], model, endpoint, *total)
        for (day, organisation, user, key, model, endpoint), total in sums.items()
    ]
    return [list(column) for column in zip(*lines, strict=True)]


def _failed(row: Row) -> bool:
    """Whether the request ended in an error, as `verify` counts it: going away is none."""
    return row.error != "" or (row.status >= 400 and row.finish != CANCELLED)


def _texts(contents: Sequence[Content]) -> list[list[Any]]:
    uuids = _Uuids()
    lines = [
        (uuids[each.id], _time(each.at_us), uuids[each.organisation], each.prompt, each.answer, _time(each.expires_us))
        for each in contents
    ]
    return [list(column) for column in zip(*lines, strict=True)]
