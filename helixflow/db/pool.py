"""The connection pool of a service."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from helixflow.config import UNSET, DatabaseConfig
from helixflow.db.errors import DatabaseUnavailableError, PoolExhaustedError
from helixflow.db.target import Target, arguments, check_version, explained, tls_context

IDLE_IN_TRANSACTION_MS = 60_000
"""The server ends a transaction in which nothing happened this long (milliseconds): it holds back VACUUM."""

CLIENT_MARGIN_S = 2.0
"""The client gives up this long (seconds) after the server should have: only a dead server gets there."""


def tls_of(options: DatabaseConfig, target: Target) -> ssl.SSLContext | bool:
    """TLS as configured. Raises DatabaseRefusedError."""
    return tls_context(target, options.tls, options.tls_ca if options.tls_ca != UNSET else None)


class Pool:
    """asyncpg's pool with time limits everywhere and typed errors."""

    def __init__(self, pool: Any, target: Target, options: DatabaseConfig) -> None:
        """Use `Pool.open`."""
        self.target = target
        self._pool = pool
        self._options = options

    @classmethod
    async def open(cls, options: DatabaseConfig, target: Target, *, name: str) -> "Pool":
        """Connects `pool_min` times. `name` shows up in pg_stat_activity.

        Raises DatabaseUnavailableError, DatabaseRefusedError or DatabaseVersionError.
        """
        with explained(target):
            pool = await asyncpg.create_pool(
                **arguments(target, tls_of(options, target)),
                min_size=options.pool_min,
                max_size=options.pool_max,
                timeout=options.connect_timeout_ms / 1000,
                command_timeout=options.statement_timeout_ms / 1000 + CLIENT_MARGIN_S,
                init=check_version,
                server_settings={
                    "application_name": name,
                    "search_path": "helixflow",
                    "statement_timeout": str(options.statement_timeout_ms),
                    "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
                    "timezone": "UTC",
                },
            )
        return cls(pool, target, options)

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        """A connection. Raises PoolExhaustedError when none is free in time, or what `open` raises.

        Errors inside the block are asyncpg's; asyncpg.QueryCanceledError is the statement timeout.
        """
        full = self._pool.get_size() - self._pool.get_idle_size() >= self._options.pool_max
        try:
            with explained(self.target):
                async with asyncio.timeout(self._options.acquire_timeout_ms / 1000):
                    connection = await self._pool.acquire()
        except DatabaseUnavailableError as error:
            if full and isinstance(error.__context__, TimeoutError):
                raise PoolExhaustedError(
                    f"{self.target}: all {self._options.pool_max} connections were busy for "
                    f"{self._options.acquire_timeout_ms} ms (database.pool_max, database.acquire_timeout_ms)"
                ) from None
            raise
        try:
            yield connection
        finally:
            await self._pool.release(connection)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Waits for connections in use, then closes; cuts them after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()
