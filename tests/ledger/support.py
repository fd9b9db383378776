"""Rows, databases and stand-ins that the tests of the ledger share."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from helixflow.config import LedgerConfig
from helixflow.db import migrate
from helixflow.db.pool import Pool
from helixflow.db.target import Target, connect
from helixflow.ledger.record import Begin, Row, decode, new_id
from tests.db.support import Server, options

ORGANISATION, USER, KEY = (uuid.UUID(int=0xA0 + n) for n in range(3))
GATEWAY = uuid.UUID(int=0xB0)
PEPPER_KEY = b"k" * 32
NOON_US = 1_772_366_400_000_000
"""2026-03-01 12:00 UTC."""
DAY_US = 86_400_000_000
_numbers = itertools.count(1)


def ledger_options(**values: Any) -> LedgerConfig:
    return replace(LedgerConfig(), **{"fsync_ms": 1, "ship_ms": 1, **values})


def begin(at_us: int | None = None, **values: Any) -> Begin:
    at_us = time.time_ns() // 1000 if at_us is None else at_us
    fields = {
        "id": new_id(at_us),
        "at_us": at_us,
        "organisation": ORGANISATION.bytes,
        "user": USER.bytes,
        "key": KEY.bytes,
        "model": "demo",
        "endpoint": "/v1/chat/completions",
        "client": "127.0.0.1",
        "request_id": f"req-{next(_numbers)}",
        "gateway": GATEWAY.bytes,
    }
    return Begin(**{**fields, **values})


def row(at_us: int | None = None, begun: dict[str, Any] | None = None, **values: Any) -> Row:
    ended = {"finish": "stop", "status": 200, "prompt_tokens": 10, "completion_tokens": 5, "cost": 1000, **values}
    return begin(at_us, **(begun or {})).row(**ended)


async def until(true: Callable[[], bool]) -> None:
    """Waits for something that tells nobody."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Store:
    """Stands in for the ledger: keeps each id once, and can fail before or after it has written."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.written = 0
        self.calls: list[tuple[str, int]] = []
        self.before: list[BaseException] = []
        """Raised, one a call, before anything is written."""
        self.after: list[BaseException] = []
        """Raised, one a call, once everything has been written: the reply was lost."""

    async def append(self, spool: str, records: list[bytes]) -> None:
        self.calls.append((spool, len(records)))
        await asyncio.sleep(0)
        if self.before:
            raise self.before.pop()
        for data in records:
            record = decode(data)
            if isinstance(record, Row) and record.id not in self.rows:
                self.rows[record.id] = record
                self.written += 1
        if self.after:
            raise self.after.pop()


EMPTY = """
DO $$
DECLARE partition regclass;
BEGIN
    FOR partition IN SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'helixflow.requests'::regclass LOOP
        EXECUTE 'DROP TABLE ' || partition;
    END LOOP;
    TRUNCATE helixflow.ledger_days, helixflow.usage_daily, helixflow.usage_keys, helixflow.usage_models,
        helixflow.usage_monthly, helixflow.contents, helixflow.ledger_sealed, helixflow.ledger_checkpoint,
        helixflow.audit_log, helixflow.audit_chain, helixflow.audit_head;
END
$$
"""


class Databases:
    """Databases with the schema of this release on one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._shared: Target | None = None

    def new(self) -> Target:
        """The one that the tests share, empty: a database for each would take longer."""
        if self._shared is None:
            self._shared = self.own()
        asyncio.run(self.server.execute(EMPTY, database=self._shared.database))
        return self._shared

    def own(self) -> Target:
        """One that nobody empties."""
        target = self.server.database()
        asyncio.run(_migrate(target))
        return target


async def _migrate(target: Target) -> None:
    connection = await connect(target)
    try:
        await migrate.migrate(connection)
    finally:
        await connection.close()


@asynccontextmanager
async def opened(target: Target, **values: Any) -> AsyncIterator[Pool]:
    pool = await Pool.open(options(**values), target, name="ledger-test")
    try:
        yield pool
    finally:
        await pool.close()
