"""Which backend counts what, and what happens while one is away.

Without Redis, PostgreSQL counts everything. With Redis, minutes and concurrent requests are Redis's, and PostgreSQL
steps in while it is away: the counters of that minute start anew there, save for what gateways hold, which they tell
again. Budgets are always PostgreSQL's, because a restart of Redis must not forget a month; while PostgreSQL is away the
gateways count budgets by themselves.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from helixflow import log
from helixflow.config import LimitsConfig
from helixflow.core_rs import Unavailable
from helixflow.db.pool import Pool
from helixflow.limits.postgres import PostgresStore
from helixflow.limits.redis import RedisStore
from helixflow.limits.store import Call, Grant, Granted, LimitStore
from helixflow.refusals import message_of, refusal

PROBE_S = 1.0
"""A backend that failed is asked this often (seconds) whether it answers again; until then nobody waits for it."""

PURGE_S = 60.0

ANSWER_SHARE = 0.8
"""The part of a gateway's patience within which PostgreSQL must answer: the gateway shall hear of a failure."""

_UNCOUNTED = Grant(0, 0, uncounted=True)

logger = log.get("limits")


class Backend:
    """A store that is left alone while it is away. The log has one line for each change."""

    def __init__(self, name: str, store: LimitStore, timeout_s: float) -> None:
        self.failures = 0
        """How often it went away since the start."""
        self._name = name
        self._store = store
        self._timeout_s = timeout_s
        self._probing: asyncio.Task[None] | None = None

    @property
    def away(self) -> bool:
        """Whether it has failed and has not answered since."""
        return self._probing is not None

    async def lease(self, call: Call) -> Granted:
        """Raises Conflict, InvalidRequest or Unavailable."""
        if self.away:
            raise refusal(Unavailable, f"{self._name}, which counts limits, is away")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._store.lease(call)
        except (Unavailable, TimeoutError) as error:
            reason = message_of(error) if isinstance(error, Unavailable) else f"no answer within {self._timeout_s:g} s"
            if not self.away:
                self.failures += 1
                self._probing = asyncio.get_running_loop().create_task(self._until_back())
                logger.warning("a backend of limits is away", backend=self._name, error=reason)
            raise refusal(Unavailable, reason) from None

    async def _until_back(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await self._store.ping()
                break
        self._probing = None
        logger.info("a backend of limits answers again", backend=self._name)

    async def close(self) -> None:
        """Disconnects."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        await self._store.close()


class Counters:
    """The backends behind one interface. See `helixflow.limits.store.LimitStore`."""

    def __init__(self, options: LimitsConfig, pool: Pool, clock: Callable[[], float] = time.time) -> None:
        """Connects to Redis when it is first used. Raises ConfigError for a wrong URL."""
        self._purged = PostgresStore(pool, clock)
        self.postgres = Backend("PostgreSQL", self._purged, options.lease_timeout_ms / 1000 * ANSWER_SHARE)
        self.redis: Backend | None = None
        if options.redis_url:
            self.redis = Backend("Redis", RedisStore(options, clock), options.redis_timeout_ms / 1000)

    async def lease(self, call: Call) -> Granted:
        """Raises Conflict, InvalidRequest, or Unavailable when nothing can be counted."""
        if self.redis is None or self.redis.away:
            return await self.postgres.lease(call)
        budgets = [item.metric.budget for item in call.items]
        try:
            granted = await self.redis.lease(_part(call, budgets, wanted=False))
        except Unavailable:
            return await self.postgres.lease(call)
        if not any(budgets):
            return granted
        others: Sequence[Grant]
        try:
            others = (await self.postgres.lease(_part(call, budgets, wanted=True))).grants
        except Unavailable:
            others = [_UNCOUNTED] * sum(budgets)
        minutes, days = iter(granted.grants), iter(others)
        return replace(granted, grants=tuple(next(days) if budget else next(minutes) for budget in budgets))

    async def run(self) -> None:
        """Removes counters of the past, for ever."""
        while True:
            with contextlib.suppress(Unavailable):
                await self._purged.purge()
            await asyncio.sleep(PURGE_S)

    async def ping(self) -> None:
        """Raises Unavailable when PostgreSQL does not answer."""
        await self._purged.ping()

    async def close(self) -> None:
        """Disconnects from Redis; the pool stays its owner's."""
        await self.postgres.close()
        if self.redis is not None:
            await self.redis.close()


def _part(call: Call, budgets: Sequence[bool], *, wanted: bool) -> Call:
    """The call with those items alone that are, or are not, of budgets."""
    items = tuple(item for item, budget in zip(call.items, budgets, strict=True) if budget is wanted)
    return replace(call, items=items)
