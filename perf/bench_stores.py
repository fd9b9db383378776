"""Throughput of limiter and ledger by themselves: leases of both backends, admission, spool, writer, verification."""

import asyncio
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop

from helixflow.config import DatabaseConfig, LedgerConfig, LimitsConfig
from helixflow.core_rs import Unavailable
from helixflow.db import migrate
from helixflow.db.embedded import Embedded
from helixflow.db.pool import Pool
from helixflow.db.target import connect
from helixflow.ledger.record import Begin, encode, new_id
from helixflow.ledger.sealer import Sealer
from helixflow.ledger.shipper import Shipper
from helixflow.ledger.spool import Spool
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer
from helixflow.limits.limiter import Limiter
from helixflow.limits.model import Limits, Metric, SubjectLimits, window_start
from helixflow.limits.postgres import PostgresStore
from helixflow.limits.redis import RedisStore
from helixflow.limits.store import Call, Item, LimitStore
from helixflow.secret import Secret
from perf import lab

SECONDS = 3.0
METRICS = (Metric.REQUESTS_PER_MINUTE, Metric.TOKENS_PER_MINUTE, Metric.TOKENS_PER_DAY)
SHAPES = ((1, 3), (8, 3), (8, 20))
"""Gateways that call at once, items of a call."""
SUBJECTS = 1000
REQUESTS = 50_000
BATCHES = 50
BATCH_ROWS = 1000
CHAIN_KEY = b"k" * 32


@dataclass(frozen=True, slots=True)
class Leases:
    """One measurement of a backend."""

    calls_s: float
    leases_s: float
    p50_ms: float
    p99_ms: float


def items_of(draw: random.Random, count: int) -> tuple[Item, ...]:
    """Different counters of random subjects, far from their limits."""
    names = draw.sample(range(SUBJECTS), -(-count // len(METRICS)))
    now = time.time()
    found = [
        Item(f"key:{uuid.UUID(int=name)}", metric, window_start(metric, now), 10**12, 100, 100, 200, 50, 50)
        for name in names
        for metric in METRICS
    ]
    return tuple(found[:count])


async def leases(store: LimitStore, gateways: int, count: int) -> Leases:
    """As many calls as `gateways` callers get done, one after the other each, of `count` items."""
    times: list[float] = []
    stop = time.perf_counter() + SECONDS

    async def call(number: int) -> None:
        gateway, draw, sequence = str(uuid.uuid4()), random.Random(number), 0
        while (began := time.perf_counter()) < stop:
            sequence += 1
            await store.lease(Call(gateway, sequence, sequence, items_of(draw, count)))
            times.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(call(number) for number in range(gateways)))
    spent = time.perf_counter() - began
    ordered = sorted(times)
    return Leases(
        len(times) / spent,
        len(times) * count / spent,
        statistics.median(ordered) * 1000,
        ordered[len(ordered) * 99 // 100] * 1000,
    )


@contextlib.asynccontextmanager
async def database(folder: Path) -> AsyncIterator[Pool]:
    """A migrated embedded PostgreSQL."""
    server = Embedded(folder / "postgres")
    await server.start()
    try:
        connection = await connect(server.target)
        await migrate.migrate(connection)
        await connection.close()
        pool = await Pool.open(DatabaseConfig(), server.target, name="bench")
        try:
            yield pool
        finally:
            await pool.close()
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def redis(folder: Path) -> AsyncIterator[RedisStore]:
    """A Redis on a Unix socket."""
    path = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--loglevel", "warning"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, cwd=folder)
    store = RedisStore(replace(LimitsConfig(), redis_url=Secret(f"unix://{path}")))
    try:
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(Unavailable):
                    await store.ping()
                    break
                await asyncio.sleep(0.05)
        yield store
    finally:
        await store.close()
        process.terminate()
        await process.wait()


async def admission(store: LimitStore) -> str:
    """Reserving, headers and settling of a request whose limits are far away (microseconds of processor time)."""
    limiter = Limiter(str(uuid.uuid4()), store.lease, LimitsConfig())
    running = asyncio.create_task(limiter.run())
    rows = []
    far = Limits(requests_per_minute=10**9, tokens_per_minute=10**12, tokens_per_month=10**13)
    for subjects in (1, 3):
        limits = tuple(SubjectLimits(f"key:{uuid.uuid4()}", far) for _ in range(subjects))
        (await limiter.reserve(limits, 200, 0)).settle(100, 0)
        began, waited = time.thread_time(), 0
        for number in range(REQUESTS):
            reservation = limiter.try_reserve(limits, 200, 0)
            if reservation is None:
                waited += 1
                reservation = await limiter.reserve(limits, 200, 0)
            reservation.headers()
            reservation.settle(100, 0)
            if number % 64 == 0:
                await asyncio.sleep(0)
        each = (time.thread_time() - began) / REQUESTS * 1e6
        rows.append(f"| {subjects * 3} | {each:.1f} | {waited} |")
    running.cancel()
    await asyncio.wait({running})
    await limiter.close()
    return "\n".join(rows)


async def spooling(folder: Path) -> str:
    """Begin and end of requests, and shipping them to nowhere (microseconds per request)."""
    options = LedgerConfig()
    spool = Spool(folder / "spool", options)
    shipped = 0

    async def append(_spool: str, records: list[bytes]) -> None:
        nonlocal shipped
        shipped += len(records)

    shipper = Shipper(spool, append, options)
    times = []
    one = uuid.uuid4().bytes
    for _ in range(REQUESTS):
        at_us = time.time_ns() // 1000
        began = time.perf_counter()
        begin = Begin(
            new_id(at_us), at_us, one, one, one, "demo", "/v1/completions", "127.0.0.1", "req-0123456789", one
        )
        spool.begin(begin)
        spool.end(begin.row(finish="stop", status=200, prompt_tokens=100, completion_tokens=200, total_us=400_000))
        times.append(time.perf_counter() - began)
    size = spool.held / REQUESTS
    began = time.thread_time()
    running = asyncio.create_task(shipper.run())
    await shipper.drain(60)
    await running
    cost = (time.thread_time() - began) / REQUESTS * 1e6
    if shipped != REQUESTS:
        raise RuntimeError(f"{shipped} of {REQUESTS} rows were shipped")
    p99 = sorted(times)[REQUESTS * 99 // 100] * 1e6
    mean = statistics.fmean(times) * 1e6
    return f"begin and end {mean:.1f} us (p99 {p99:.0f}), shipping {cost:.1f} us, {size:.0f} bytes on the disk"


def batch(draw: random.Random, holders: Sequence[bytes], start_us: int) -> list[bytes]:
    """Encoded rows a millisecond apart."""
    rows = []
    for number in range(BATCH_ROWS):
        at_us, holder = start_us + number * 1000, draw.choice(holders)
        begin = Begin(new_id(at_us), at_us, holder, holder, holder, "demo", "/v1/completions", "127.0.0.1", "r", holder)
        rows.append(encode(begin.row(finish="stop", status=200, prompt_tokens=100, completion_tokens=200, cost=1234)))
    return rows


async def writing(pool: Pool) -> str:
    """Rows/s of one writer and of four, rows that are known already, and verification; a sealer runs beside them."""
    draw, now = random.Random(1), time.time_ns() // 1000
    holders = [os.urandom(16) for _ in range(200)]
    made = [batch(draw, holders, now + number * BATCH_ROWS * 1000) for number in range(2 * BATCHES)]
    first = Writer(pool, CHAIN_KEY)
    rows = []
    sealing = asyncio.create_task(Sealer(pool, CHAIN_KEY).run())

    async def timed(what: str, work: Callable[[], Awaitable[object]], count: int) -> None:
        began = time.perf_counter()
        await work()
        rows.append(f"| {what} | {count / (time.perf_counter() - began):,.0f} |")

    async def write(writer: Writer, batches: Sequence[list[bytes]]) -> None:
        for records in batches:
            await writer.append("bench", records)

    count = BATCHES * BATCH_ROWS
    await timed("one writer", lambda: write(first, made[:BATCHES]), count)
    writers = [Writer(pool, CHAIN_KEY) for _ in range(4)]
    await timed(
        "four writers at once",
        lambda: asyncio.gather(*(write(one, made[BATCHES + n :: 4]) for n, one in enumerate(writers))),
        count,
    )
    await timed("rows sent again", lambda: write(first, made[:10]), 10 * BATCH_ROWS)
    sealing.cancel()
    await asyncio.wait({sealing})
    async with pool.acquire() as connection:
        began = time.perf_counter()
        report = await verify(connection, CHAIN_KEY)
        if report.faults or report.rows != 2 * count:
            raise RuntimeError(f"the ledger does not verify: {report}")
        rows.append(f"| `audit verify` | {report.rows / (time.perf_counter() - began):,.0f} |")
    return "\n".join(rows)


async def measure(folder: Path) -> str:
    """All of it, as Markdown."""
    lines = []
    async with database(folder) as pool, redis(folder) as other:
        for name, store in (("PostgreSQL", PostgresStore(pool)), ("Redis", other)):
            for gateways, count in SHAPES:
                found = await leases(store, gateways, count)
                lines.append(
                    f"| {name} | {gateways} | {count} | {found.calls_s:,.0f} | {found.leases_s:,.0f} | "
                    f"{found.p50_ms:.2f} | {found.p99_ms:.2f} |"
                )
        admitted = await admission(PostgresStore(pool))
        spooled = await spooling(folder)
        written = await writing(pool)
    table = "\n".join(lines)
    return f"""# Limiter and ledger by themselves

{lab.machine()}
- method: `perf/bench_stores.py`, embedded PostgreSQL and Redis on Unix sockets, everything on the same cores; leases:
  calls one after the other per gateway for {SECONDS:g} s, {SUBJECTS} subjects; ledger: {BATCHES} batches of
  {BATCH_ROWS} rows.

## Leases: what gateways ask the store

| backend | gateways | items of a call | calls/s | leases/s | p50 (ms) | p99 (ms) |
| --- | --- | --- | --- | --- | --- | --- |
{table}

## Admission in a gateway: reserve, headers, settle

| counters | processor time (us) | of {REQUESTS:,} requests had to ask |
| --- | --- | --- |
{admitted}

## Ledger

In a gateway, per request: {spooled}.

| in the auth-service | rows/s |
| --- | --- |
{written}
"""


def main() -> None:
    """Measures and writes `perf/results/stores.md`."""
    folder = Path(tempfile.mkdtemp(prefix="helix-bench-"))
    folder.chmod(0o711)
    try:
        lab.write("stores.md", uvloop.run(measure(folder)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
