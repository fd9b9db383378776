"""A backup of the ledger can be verified where it was restored."""

import asyncio
from pathlib import Path

from helixflow.db import backup, migrate
from helixflow.db.target import connect
from helixflow.ledger.faults import Report
from helixflow.ledger.record import encode
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer
from tests.db.support import Server

from .support import DAY_US, NOON_US, PEPPER_KEY, Databases, opened, row


def test_the_chain_survives(on_wheel: Databases, debian: Server, tmp_path: Path) -> None:
    source, sink = on_wheel.new(), debian.database()
    rows = [row(NOON_US + n * DAY_US * 15) for n in range(8)]

    async def save() -> None:
        async with opened(source) as pool:
            await Writer(pool, PEPPER_KEY).append("s", [encode(each) for each in rows])
        connection = await connect(source)
        await backup.backup(connection, tmp_path / "backup.tar")
        await connection.close()

    async def restore() -> None:
        connection = await connect(sink)
        await backup.restore(connection, tmp_path / "backup.tar", migrate.read())
        await connection.close()
        async with opened(sink) as pool:
            async with pool.acquire() as connection:
                assert await verify(connection, PEPPER_KEY) == Report(8, 8, [])
            more = [*rows[4:], row(NOON_US + 200 * DAY_US), row(NOON_US + 1)]
            assert await Writer(pool, PEPPER_KEY).append("s", [encode(each) for each in more]) == (2, 4)
            async with pool.acquire() as connection:
                assert await verify(connection, PEPPER_KEY) == Report(9, 10, [])

    asyncio.run(save())
    asyncio.run(restore())
