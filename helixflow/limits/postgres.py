"""Counters in PostgreSQL: one function call for each call of a gateway."""

import contextlib
import time
from collections.abc import Callable, Iterator

import asyncpg

from helixflow.core_rs import Unavailable
from helixflow.db.errors import DatabaseError
from helixflow.db.pool import Pool
from helixflow.limits.store import HOLD_S, Call, Grant, Granted, check, lapses_ms, open_at, overtaken
from helixflow.refusals import refusal

FORGET_GATEWAY_MS = 3_600_000
"""A gateway that was silent this long (milliseconds) sends no batch again."""

_LEASE = "SELECT * FROM helixflow.lease_limits($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"

_PURGE = tuple(
    f"DELETE FROM helixflow.{table} WHERE ctid = ANY (ARRAY("  # noqa: S608 - names of our own
    f"SELECT ctid FROM helixflow.{table} WHERE {condition} FOR UPDATE SKIP LOCKED))"
    for table, condition in (
        ("limit_counters", "lapses_ms < $1::bigint"),
        ("limit_budgets", "lapses_ms < $1::bigint"),
        ("limit_holds", "lapses_ms < $1::bigint"),
        ("limit_gateways", f"seen_ms < $1::bigint - {FORGET_GATEWAY_MS}"),
    )
)
"""Locked rows are in use: they are left for the next time, so that a purge never waits, nor deadlocks."""


class PostgresStore:
    """The default backend. See `helixflow.limits.store.LimitStore`."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since the epoch. The pool stays its owner's."""
        self._pool = pool
        self._clock = clock

    async def lease(self, call: Call) -> Granted:
        """Raises Conflict, InvalidRequest or Unavailable."""
        check(call)
        now = self._clock()
        now_ms = int(now * 1000)
        items = call.items
        opened = [open_at(item, now) for item in items]
        with _away():
            async with self._pool.acquire() as connection:
                row = await connection.fetchrow(
                    _LEASE,
                    call.gateway,
                    call.sequence,
                    call.batch,
                    now_ms,
                    HOLD_S * 1000,
                    [item.subject for item in items],
                    [int(item.metric) for item in items],
                    [item.window for item in items],
                    [lapses_ms(item, now_ms) for item in items],
                    [item.limit if good else 0 for item, good in zip(items, opened, strict=True)],
                    [item.floor for item in items],
                    [item.need for item in items],
                    [item.want for item in items],
                    [item.held for item in items],
                    [item.spent for item in items],
                )
        if row["granted"] is None:
            raise overtaken(call)
        grants = tuple(map(Grant, row["granted"], row["rooms"]))
        return Granted(grants, row["gateways"], now_ms)

    async def purge(self) -> None:
        """Removes what belongs to windows and gateways of the past. Raises Unavailable."""
        now_ms = int(self._clock() * 1000)
        with _away():
            async with self._pool.acquire() as connection:
                for statement in _PURGE:
                    await connection.execute(statement, now_ms)

    async def ping(self) -> None:
        """Raises Unavailable when the server does not answer."""
        with _away():
            async with self._pool.acquire() as connection:
                await connection.execute("SELECT")

    async def close(self) -> None:
        """Nothing to do: the pool is not this object's."""


@contextlib.contextmanager
def _away() -> Iterator[None]:
    try:
        yield
    except (DatabaseError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise away(error) from None


def away(error: BaseException) -> Unavailable:
    """What a backend's own error is to a gateway."""
    return refusal(Unavailable, f"the counters of limits cannot be reached: {error or type(error).__name__}")
