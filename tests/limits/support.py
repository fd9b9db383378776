"""Real stores, a simple one to compare them with, and clocks that obey."""

import asyncio
import contextlib
import heapq
import itertools
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from helixflow.config import LimitsConfig
from helixflow.db import migrate
from helixflow.db.pool import Pool
from helixflow.db.target import connect
from helixflow.limits.limiter import Limiter
from helixflow.limits.model import Limits, Metric, SubjectLimits, window_start
from helixflow.limits.postgres import PostgresStore
from helixflow.limits.redis import RedisStore
from helixflow.limits.store import HOLD_S, Call, Grant, Granted, Item, LimitStore, check, open_at, overtaken
from helixflow.process import die_with_parent
from helixflow.secret import Secret
from tests.db.support import Server, options

START = 1_800_000_000.0
"""2027-01-15 08:00:00 UTC, the beginning of a minute."""

KEY = "key:00000000-0000-0000-0000-000000000001"
USER = "user:00000000-0000-0000-0000-000000000002"
ORGANISATION = "organisation:00000000-0000-0000-0000-000000000003"
GATEWAYS = [f"10000000-0000-0000-0000-{number:012}" for number in range(16)]
OPTIONS = LimitsConfig()
TABLES = ("limits", "prices", "organisations", "limit_counters", "limit_budgets", "limit_holds", "limit_gateways")


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self, now: float = START) -> None:
        self.now = now
        self._sleeping: list[tuple[float, int, asyncio.Event]] = []
        self._sleeps = itertools.count()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Waits until somebody moves the clock so far."""
        event = asyncio.Event()
        heapq.heappush(self._sleeping, (self.now + seconds, next(self._sleeps), event))
        await event.wait()

    async def move(self, seconds: float) -> None:
        """Time goes by; who wakes up has its turn before this returns."""
        self.now = round(self.now + seconds, 3)
        while self._sleeping and self._sleeping[0][0] <= self.now:
            heapq.heappop(self._sleeping)[-1].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def limits(subject: str = KEY, **values: int) -> tuple[SubjectLimits, ...]:
    return (SubjectLimits(subject, Limits(**values)),)


def item(subject: str = KEY, metric: Metric = Metric.TOKENS_PER_MINUTE, **values: int) -> Item:
    """An item of the window at `START`; `want` is at least `need`."""
    chosen = {"limit": 1000, "floor": 0, "need": 0, "held": 0, "spent": 0, "window": window_start(metric, START)}
    chosen |= values
    chosen["want"] = max(chosen.get("want", 0), chosen["need"])
    return Item(subject, metric, **chosen)


class Caller:
    """A gateway that counts its calls and batches."""

    def __init__(self, store: LimitStore, gateway: str) -> None:
        self._store = store
        self._gateway = gateway
        self.sequence = 0
        self.batch = 0

    async def __call__(self, *items: Item, batch: int | None = None) -> Granted:
        self.sequence += 1
        self.batch = self.batch + 1 if batch is None else batch
        return await self._store.lease(Call(self._gateway, self.sequence, self.batch, items))


@dataclass
class _Account:
    used: int = 0
    holds: dict[str, tuple[int, float]] = field(default_factory=dict)


class ModelStore:
    """The rules of `LimitStore`, written down a second time, as plainly as possible."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.accounts: dict[tuple[str, Metric, int], _Account] = {}
        self._gateways: dict[str, tuple[int, int, float]] = {}

    async def lease(self, call: Call) -> Granted:
        check(call)
        now = self._clock()
        sequence, batch, _ = self._gateways.get(call.gateway, (-1, -1, 0.0))
        if call.sequence <= sequence:
            raise overtaken(call)
        self._gateways[call.gateway] = (call.sequence, call.batch, now)
        grants = []
        for each in call.items:
            account = self.accounts.setdefault((each.subject, each.metric, each.window), _Account())
            if call.batch > batch:
                account.used += each.spent
            account.holds[call.gateway] = (each.held, now + HOLD_S)
            room = max(0, (each.limit if open_at(each, now) else 0) - self.total(each))
            if room >= each.need:
                granted = max(each.need, min(each.want, room // 16))
            else:
                granted = room if room >= each.floor > 0 else 0
            account.holds[call.gateway] = (each.held + granted, now + HOLD_S)
            grants.append(Grant(granted, room - granted))
        alive = sum(now - seen < HOLD_S for _, _, seen in self._gateways.values())
        return Granted(tuple(grants), alive, int(now * 1000))

    def total(self, each: Item) -> int:
        account = self.accounts[each.subject, each.metric, each.window]
        now = self._clock()
        return account.used + sum(held for held, lapses in account.holds.values() if lapses > now)

    async def ping(self) -> None:
        """Always there."""

    async def close(self) -> None:
        """Nothing to end."""


class Databases:
    """A database with the schema."""

    def __init__(self, server: Server) -> None:
        self.target = server.database()
        asyncio.run(self._migrate())

    async def _migrate(self) -> None:
        connection = await connect(self.target)
        try:
            await migrate.migrate(connection)
        finally:
            await connection.close()

    @asynccontextmanager
    async def pool(self, **values: Any) -> AsyncIterator[Pool]:
        """Of one database for all such calls, emptied first: that is faster than a copy."""
        pool = await Pool.open(options(**values), self.target, name="test")
        try:
            async with pool.acquire() as connection:
                await connection.execute(f"TRUNCATE {', '.join(TABLES)} CASCADE")
            yield pool
        finally:
            await pool.close()

    @asynccontextmanager
    async def other(self) -> AsyncIterator[Any]:
        """A connection beside the pool's."""
        connection = await connect(self.target)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def store(self, clock: Callable[[], float]) -> AsyncIterator[LimitStore]:
        async with self.pool() as pool:
            yield PostgresStore(pool, clock)


class Redis:
    """A Redis on a Unix socket, or with TLS on a loopback port."""

    def __init__(self, place: Path, *arguments: str, url: str = "") -> None:
        self.url = url or f"unix://{place}/redis.sock"
        self.command = [
            "redis-server",
            *("--save", "", "--appendonly", "no", "--dir", str(place), "--loglevel", "warning"),
            *(arguments or ("--port", "0", "--unixsocket", f"{place}/redis.sock")),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        parent = os.getpid()
        # A run that is cut off by its time limit cleans nothing up.
        self._process = subprocess.Popen(
            self.command,
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - nothing in it takes a lock of another thread
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A server that is there and does not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def options(self, **values: Any) -> LimitsConfig:
        return replace(LimitsConfig(), redis_url=Secret(self.url), **{"redis_timeout_ms": 5000, **values})

    async def ready(self, **values: Any) -> None:
        store = RedisStore(self.options(**values))
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(Exception):
                    await store.ping()
                    break
                await asyncio.sleep(0.01)
        await store._redis.flushall()
        await store.close()

    @asynccontextmanager
    async def store(self, clock: Callable[[], float]) -> AsyncIterator[LimitStore]:
        await self.ready()
        store = RedisStore(self.options(), clock)
        try:
            yield store
        finally:
            await store.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Lossy:
    """A way to a store on which answers, or calls, get lost."""

    def __init__(self, store: LimitStore) -> None:
        self._store = store
        self.lose_call = False
        self.lose_answer = False

    async def __call__(self, call: Call) -> Granted:
        if self.lose_call:
            raise TimeoutError
        granted = await self._store.lease(call)
        if self.lose_answer:
            raise TimeoutError
        return granted


def limiter(number: int, lease: Any, clock: Callable[[], float], **values: Any) -> Limiter:
    return Limiter(GATEWAYS[number], lease, replace(OPTIONS, **values), clock)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what another process or task brings about, without telling."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.005)


async def passes(clock: Clock, seconds: float, *limiters: Limiter) -> None:
    """Time goes by, with a tick each 50 ms and the calls that follow from it."""
    for _ in range(round(seconds / 0.05)):
        await clock.move(0.05)
        for limiter in limiters:
            limiter.tick()
            await limiter.settled()


class World:
    """Gateways around one store, and a clock moved by hand."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = ModelStore(self.clock)
        self.way = Lossy(self.store)
        self.first = limiter(0, self.way, self.clock)
        self.second = limiter(1, self.store.lease, self.clock)

    def total(self, metric: Metric = Metric.TOKENS_PER_MINUTE, subject: str = KEY) -> int:
        """Used and held of the window at `START`, as the store sees it."""
        return self.store.total(item(subject, metric))

    async def passes(self, seconds: float) -> None:
        await passes(self.clock, seconds, self.first, self.second)


def run(work: Callable[[World], Any]) -> None:
    asyncio.run(work(World()))
