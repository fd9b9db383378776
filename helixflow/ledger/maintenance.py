"""What the ledger needs from time to time: partitions ahead, old ones dropped, texts purged."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import asyncpg

from helixflow import log, traces
from helixflow.config import LedgerConfig
from helixflow.db.errors import DatabaseError
from helixflow.db.pool import Pool
from helixflow.ledger import sealer
from helixflow.ledger.audit_chain import ChainError
from helixflow.ledger.chain import Head
from helixflow.ledger.content import purge
from helixflow.ledger.record import today
from helixflow.ledger.seals import SealKeys

EVERY_S: Final = 3600.0
RETRY_S: Final = 30.0
"""Between two rounds, and after one that failed (seconds)."""
AHEAD: Final = 2
"""Months that have their partition before they begin."""
DROP_WAIT_MS: Final = 1000
"""A partition is dropped when its table is free within this time (milliseconds): whoever comes later waits as well."""
LOCK: Final = 0x48656C6978_03
"""Key of the advisory lock: "Helix", then 03 for the ledger's maintenance."""

_PARTITIONS: Final = """
SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'helixflow.requests'::regclass ORDER BY 1
"""

_DAYS: Final = """
SELECT day, sequence, hash FROM helixflow.ledger_days WHERE day >= $1 AND day < $2 ORDER BY day FOR UPDATE
"""

logger = log.get("ledger")


async def run(pool: Pool, options: LedgerConfig, chain_key: bytes, audit_keep_days: int = 0) -> None:
    """Does what is due, now and every hour, until it is cancelled. Any number of processes may run it."""
    while True:
        try:
            await once(pool, options, chain_key)
            if audit_keep_days:
                await prune_audit(pool, chain_key, audit_keep_days)
        except ChainError as error:
            logger.error("nothing of the audit log is removed: it was tampered with", error=str(error))
            await asyncio.sleep(EVERY_S)
        except (DatabaseError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            logger.warning("the ledger's maintenance failed and will be tried again", error=traces.message_of(error))
            await asyncio.sleep(RETRY_S)
        else:
            await asyncio.sleep(EVERY_S)


async def once(pool: Pool, options: LedgerConfig, chain_key: bytes, *, now: date | None = None) -> bool:
    """Does what is due; False when another process is at it. Raises what the database raises."""
    now = now or today()
    async with pool.acquire() as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
            return False
        try:
            for ahead in range(AHEAD + 1):
                await connection.execute("SELECT helixflow.requests_partition($1)", _month(now, ahead))
            if removed := await purge(connection):
                logger.info("texts were purged", requests=removed)
            if options.keep_months:
                await _drop_before(connection, _month(now, -options.keep_months), chain_key)
        finally:
            if not connection.is_closed():
                await connection.execute("SELECT pg_advisory_unlock($1)", LOCK)
    return True


async def prune_audit(pool: Pool, chain_key: bytes, keep_days: int, *, now: datetime | None = None) -> int:
    """Removes entries of the audit log that are older than `keep_days` days; returns how many went.

    Where the chain was cut stands in its head, under a seal. Raises ChainError, and what the database raises.
    """
    before = (now or datetime.now(UTC)) - timedelta(days=keep_days)
    async with pool.acquire() as connection:
        removed = await sealer.prune_audit(connection, SealKeys.of(chain_key), before)
    if removed:
        logger.info("entries of the audit log were removed (auth.audit_keep_days)", entries=removed)
    return removed


def _month(day: date, offset: int) -> date:
    """The first of the month so many months later."""
    months = day.year * 12 + day.month - 1 + offset
    return date(months // 12, months % 12 + 1, 1)


async def _drop_before(connection: Any, limit: date, chain_key: bytes) -> None:
    for row in await connection.fetch(_PARTITIONS):
        name = row[0]
        month = date(int(name[-7:-3]), int(name[-2:]), 1)
        if month < limit:
            await _drop(connection, month, chain_key)


async def _drop(connection: Any, month: date, chain_key: bytes) -> None:
    """Drops one month; the heads of its days keep where their chains were, so that late rows go on from there."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = {DROP_WAIT_MS}")
        days = await connection.fetch(
            _DAYS,
            month,
            _month(month, 1),
        )
        for day, sequence, digest in days:
            head = Head(day, sequence, digest, sequence, digest)
            await connection.execute(
                "UPDATE helixflow.ledger_days SET dropped_sequence = $2, dropped_hash = $3, lost_sequence = 0, "
                "seal = $4 WHERE day = $1",
                day,
                sequence,
                digest,
                head.seal(chain_key),
            )
        await connection.execute("SELECT helixflow.requests_drop($1)", month)
    logger.info("a month of the ledger was dropped (ledger.keep_months)", month=month.isoformat()[:7])
