"""Writing rows: once each, whoever sends them, however often."""

import asyncio

from helixflow.ledger.chain import verify
from helixflow.ledger.record import encode
from helixflow.ledger.writer import Writer

from .support import DAY_US, NOON_US, PEPPER_KEY, Databases, opened, row


def test_rows_are_written_once(databases: Databases) -> None:
    target = databases.new()

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            rows = [row(NOON_US + n * DAY_US * 9) for n in range(20)]
            data = [encode(each) for each in rows]
            assert await writer.append("s", data[:12]) == (12, 0)
            assert await writer.append("s", data[:12]) == (0, 12)
            assert await writer.append("s", data[5:]) == (8, 7)
            async with pool.acquire() as connection:
                report = await verify(connection, PEPPER_KEY)
            assert (report.days, report.rows, report.faults) == (20, 20, [])

    asyncio.run(scenario())
