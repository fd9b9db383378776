"""Counters in Redis: one Lua script for each call of a gateway. No cluster: a call's counters lie on one server."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from helixflow.config import UNSET, LimitsConfig
from helixflow.errors import ConfigError
from helixflow.limits.postgres import FORGET_GATEWAY_MS, away
from helixflow.limits.store import HOLD_S, Call, Grant, Granted, check, lapses_ms, open_at, overtaken

_PREFIX = "helixflow:"
_SCRIPT = (Path(__file__).parent / "lease.lua").read_text("utf-8")


class RedisStore:
    """The backend for many gateways. See `helixflow.limits.store.LimitStore`."""

    def __init__(self, options: LimitsConfig, clock: Callable[[], float] = time.time) -> None:
        """Connects when it is first used. `clock`: seconds since the epoch. Raises ConfigError for a wrong URL."""
        self._timeout_s = options.redis_timeout_ms / 1000
        self._clock = clock
        arguments: dict[str, Any] = {}
        url = options.redis_url.reveal()
        if url.startswith("rediss://"):
            arguments = {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
            if options.redis_ca != UNSET:
                arguments["ssl_ca_certs"] = str(options.redis_ca)
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=self._timeout_s,
                socket_connect_timeout=self._timeout_s,
                retry=Retry(NoBackoff(), 0),  # the other backend is the second try
                **arguments,
            )
        except (ValueError, RedisError):
            raise ConfigError(
                ["limits.redis_url: write redis://host:port, rediss://user:password@host:port or unix:///path"]
            ) from None
        self._script = self._redis.register_script(_SCRIPT)

    async def lease(self, call: Call) -> Granted:
        """Raises Conflict, InvalidRequest or Unavailable."""
        check(call)
        now = self._clock()
        now_ms = int(now * 1000)
        keys = [f"{_PREFIX}gateways", f"{_PREFIX}gateway:{call.gateway}"]
        values: list[int | str] = [
            now_ms,
            call.gateway,
            call.sequence,
            call.batch,
            HOLD_S * 1000,
            FORGET_GATEWAY_MS,
        ]
        for item in call.items:
            keys.append(f"{_PREFIX}limit:{item.subject}:{item.metric.value}:{item.window}")
            values += (
                item.limit if open_at(item, now) else 0,
                item.floor,
                item.need,
                item.want,
                item.held,
                item.spent,
                lapses_ms(item, now_ms) - now_ms,
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._script(keys, values)
        except (RedisError, OSError, TimeoutError) as error:
            raise away(error) from None
        if answer[0] < 0:
            raise overtaken(call)
        grants = tuple(map(Grant, answer[1::2], answer[2::2]))
        return Granted(grants, answer[0], now_ms)

    async def ping(self) -> None:
        """Raises Unavailable when the server does not answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._redis.ping()
        except (RedisError, OSError, TimeoutError) as error:
            raise away(error) from None

    async def close(self) -> None:
        """Disconnects."""
        await self._redis.aclose()
