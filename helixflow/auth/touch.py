"""When keys were last used, from the rows of the ledger."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from helixflow import log
from helixflow.auth.errors import database_errors
from helixflow.core_rs import CoreError
from helixflow.db.pool import Pool

GRAIN = timedelta(minutes=1)
"""A key in steady use is written this seldom."""

MOST_REMEMBERED = 100_000
"""Keys whose last write is remembered; beyond that all of it is forgotten, which costs one write per key."""

_TOUCH = """
WITH used AS (SELECT * FROM unnest($1::uuid[], $2::timestamptz[]) AS u (id, at)),
due AS (
    -- In order, so that two of these cannot wait for each other.
    SELECT k.id, used.at FROM api_keys k JOIN used ON used.id = k.id
    WHERE k.last_used_at IS NULL OR k.last_used_at <= used.at - $3::interval
    ORDER BY k.id FOR NO KEY UPDATE OF k
)
UPDATE api_keys SET last_used_at = due.at FROM due WHERE api_keys.id = due.id
"""

logger = log.get("auth")


async def touch(connection: Any, used: Mapping[UUID, datetime]) -> None:
    """Notes the last use of keys; only forwards in time, accurate to a minute. Unknown keys are ignored."""
    if used:
        await connection.execute(_TOUCH, list(used), list(used.values()), GRAIN)


class LastUses:
    """Notes the uses of one process; most of them need no database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._written: dict[UUID, datetime] = {}

    async def note(self, uses: Iterable[tuple[bytes | None, int]]) -> None:
        """Uses as (the 16 bytes of a key or None, microseconds since the epoch). A failure is logged: it is no loss."""
        latest: dict[bytes, int] = {}
        for key, at_us in uses:
            if key is not None and at_us > latest.get(key, 0):
                latest[key] = at_us
        due = {}
        for key, at_us in latest.items():
            name, at = UUID(bytes=key), datetime.fromtimestamp(at_us // 1_000_000, UTC)
            if name not in self._written or at - self._written[name] >= GRAIN:
                due[name] = at
        if not due:
            return
        try:
            with database_errors():
                async with self._pool.acquire() as connection:
                    await touch(connection, due)
        except CoreError:
            logger.warning("the last use of keys was not noted", keys=len(due))
            return
        if len(self._written) + len(due) > MOST_REMEMBERED:
            self._written.clear()
        self._written.update(due)
