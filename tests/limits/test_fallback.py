"""Backends that go away, slowly or at once, and come back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from helixflow.core_rs import CoreError, RateLimitExceeded, Unavailable
from helixflow.db.pool import Pool
from helixflow.errors import ConfigError
from helixflow.limits import fallback
from helixflow.limits.fallback import Counters
from helixflow.limits.limiter import Limiter
from helixflow.limits.model import Metric
from helixflow.limits.redis import RedisStore
from helixflow.pki import issue
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout, Role

from .support import GATEWAYS, OPTIONS, Caller, Clock, Databases, Redis, free_port, item, limiter, limits, passes, until

MINUTE, DAY = Metric.TOKENS_PER_MINUTE, Metric.TOKENS_PER_DAY


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "PROBE_S", 0.02)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log says: backend, then away or back."""
    lines: list[str] = []

    class Log:
        def warning(self, event: str, **facts: Any) -> None:
            lines.append(f"{facts['backend']} away")

        def info(self, event: str, **facts: Any) -> None:
            lines.append(f"{facts['backend']} back")

    monkeypatch.setattr(fallback, "logger", Log())
    return lines


@asynccontextmanager
async def _both(
    databases: Databases, redis: Redis, clock: Callable[[], float], **values: Any
) -> AsyncIterator[Counters]:
    await redis.ready()
    async with databases.pool() as pool:
        counters = Counters(redis.options(**values), pool, clock)
        try:
            yield counters
        finally:
            await counters.close()


def _room(granted: Any) -> list[int | None]:
    return [None if grant.uncounted else grant.room for grant in granted.grants]


def test_redis_stops_and_comes_back(on_wheel: Databases, redis: Redis, told: list[str]) -> None:
    async def work() -> None:
        async with _both(on_wheel, redis, Clock()) as counters:
            assert counters.redis is not None
            gateway = Caller(counters, GATEWAYS[0])
            assert _room(await gateway(item(spent=100), item(metric=DAY, spent=100))) == [900, 900]
            redis.stop()
            for turn in range(1, 4):
                # The minute starts anew, but for what is held; the day does not.
                answer = await gateway(item(spent=10, held=50), item(metric=DAY, spent=10))
                assert _room(answer) == [950 - 10 * turn, 900 - 10 * turn]
            assert counters.redis.away
            redis.start()
            await until(lambda: counters.redis is not None and not counters.redis.away)
            assert _room(await gateway(item(held=0), item(metric=DAY))) == [1000, 870]
            redis.stop()
            assert _room(await gateway(item(held=0), item(metric=DAY, spent=1))) == [970, 869]
            assert counters.redis.failures == 2

    asyncio.run(work())
    assert told == ["Redis away", "Redis back", "Redis away"]


def test_a_redis_that_hangs_costs_one_wait(on_wheel: Databases, redis: Redis, told: list[str]) -> None:
    async def work() -> None:
        async with _both(on_wheel, redis, Clock(), redis_timeout_ms=100) as counters:
            assert counters.redis is not None
            gateway = Caller(counters, GATEWAYS[0])
            await gateway(item(spent=1))
            with redis.paused():
                began = asyncio.get_running_loop().time()
                for _ in range(20):
                    assert len(_room(await gateway(item(spent=1)))) == 1
                assert asyncio.get_running_loop().time() - began < 2.0  # twenty waits are 2 s, and PostgreSQL's time
                assert counters.redis.failures == 1
            await until(lambda: counters.redis is not None and not counters.redis.away)
            assert _room(await gateway(item()))[0] in (998, 999)  # the call that hung may have come through

    asyncio.run(work())
    assert told == ["Redis away", "Redis back"]


def test_slow_postgres_leaves_minutes_counted(on_wheel: Databases, redis: Redis, told: list[str]) -> None:
    async def work() -> None:
        async with _both(on_wheel, redis, Clock(), lease_timeout_ms=125, redis_timeout_ms=5000) as counters:
            gateway = Caller(counters, GATEWAYS[0])
            async with on_wheel.other() as connection, connection.transaction():
                await connection.execute("LOCK TABLE helixflow.limit_budgets")
                assert _room(await gateway(item(metric=DAY, spent=5), item(spent=5))) == [None, 995]
                await until(lambda: not counters.postgres.away)  # it answers the probe, which needs no lock
            answer = await gateway(item(metric=DAY, spent=5), item(), batch=gateway.batch)
            assert _room(answer) == [995, 995]

    asyncio.run(work())
    assert told == ["PostgreSQL away", "PostgreSQL back"]


def test_without_any_backend_gateways_count_by_themselves(on_wheel: Databases, redis: Redis) -> None:
    chosen = limits(tokens_per_minute=1000, tokens_per_day=1000)

    async def work() -> None:
        clock = Clock()
        async with _both(on_wheel, redis, clock) as counters:
            await Caller(counters, GATEWAYS[1])()
            alone = limiter(0, counters.lease, clock)
            (await alone.reserve(chosen, 100, 0)).cancel()
            await passes(clock, 0.5, alone)
            redis.stop()
            await counters._purged._pool.close()
            clock.now += 60
            with pytest.raises(Unavailable):
                await Caller(counters, GATEWAYS[2])()
            await alone.reserve(chosen, 500, 0)
            with pytest.raises(CoreError) as caught:
                await alone.reserve(chosen, 1, 0)
            assert caught.value.http_status == 429
            assert (alone.away, alone.gateways) == (True, 2)

    asyncio.run(work())


def test_postgres_alone(on_debian: Databases, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with on_debian.pool() as pool:
            counters = Counters(OPTIONS, pool, Clock())
            purging = asyncio.create_task(counters.run())
            gateway = Caller(counters, GATEWAYS[0])
            assert _room(await gateway(item(spent=1), item(metric=DAY, spent=2))) == [999, 998]
            await counters.ping()
            await Pool.close(pool)
            asked = AsyncMock(side_effect=counters._purged.lease)
            monkeypatch.setattr(counters._purged, "lease", asked)
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await gateway(item())
            assert (counters.postgres.failures, asked.await_count) == (1, 1)
            purging.cancel()
            await asyncio.gather(purging, return_exceptions=True)
            await counters.close()

    asyncio.run(work())
    assert told == ["PostgreSQL away"]


def test_redis_is_killed_under_load(on_wheel: Databases, redis: Redis) -> None:
    """Never open beyond one window: each backend by itself holds the limit."""
    chosen = limits(tokens_per_minute=1000, tokens_per_day=1500)

    async def client(gateway: Limiter, admitted: list[int]) -> None:
        for _ in range(30):
            try:
                found = gateway.try_reserve(chosen, 20, 0) or await gateway.reserve(chosen, 20, 0)
            except CoreError:
                await asyncio.sleep(0.001)
                continue
            admitted.append(20)
            await asyncio.sleep(0.001)
            found.settle(20, 0)

    async def work() -> None:
        clock = Clock()
        async with _both(on_wheel, redis, clock) as counters:
            gateways = [limiter(number, counters.lease, clock) for number in range(3)]
            admitted: list[int] = []
            load = asyncio.gather(*(client(gateways[number % 3], admitted) for number in range(12)))
            await until(lambda: sum(admitted) >= 400)
            redis.stop()
            await load
            # What was used before is forgotten for this minute; the day is not.
            assert 1000 <= sum(admitted) <= 1500
            assert all(gateway.fallbacks == 0 for gateway in gateways)
            with pytest.raises(RateLimitExceeded):
                await gateways[0].reserve(limits(tokens_per_minute=1000), 1000, 0)

    asyncio.run(work())


@pytest.mark.parametrize("url", ["http://localhost", "redis://localhost:port", "localhost:6379"])
def test_wrong_urls(url: str) -> None:
    with pytest.raises(ConfigError, match=r"limits\.redis_url: write redis://"):
        RedisStore(Redis(Path(), url=url).options())


def test_redis_with_tls(pki: Layout, tmp_path: Path) -> None:
    if not pki.pair("redis", Role.SERVER).cert.exists():
        issue.issue(pki, "redis")
    pair, port = pki.pair("redis", Role.SERVER), free_port()
    files = ("--tls-cert-file", str(pair.cert), "--tls-key-file", str(pair.key), "--tls-ca-cert-file", str(pki.ca_cert))
    server = Redis(
        tmp_path,
        *("--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--tls-auth-clients", "no", *files),
        url=f"rediss://default:s3cret@localhost:{port}",
    )
    server.command += ["--requirepass", "s3cret"]
    other = Layout(tmp_path / "certs")
    other.directory.mkdir()
    issue.init(other, key_type=KeyType.ECDSA_P256)

    async def work() -> None:
        await server.ready(redis_ca=pki.ca_cert)
        store = RedisStore(server.options(redis_ca=pki.ca_cert), Clock())
        assert _room(await Caller(store, GATEWAYS[0])(item(need=10))) == [990]
        await store.close()
        stranger = RedisStore(server.options(redis_ca=other.ca_cert), Clock())
        with pytest.raises(Unavailable, match="certificate verify failed") as caught:
            await stranger.ping()
        assert "s3cret" not in str(caught.value)
        await stranger.close()

    server.start()
    try:
        asyncio.run(work())
    finally:
        server.stop()
