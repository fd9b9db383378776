"""A pepper that is lost: the chains go on with the next one, and of what was before nothing can vanish."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from helixflow.auth import actors, audit
from helixflow.db.pool import Pool
from helixflow.ledger import lost, maintenance, seals
from helixflow.ledger.faults import AUDIT, LEDGER, Report
from helixflow.ledger.record import encode
from helixflow.ledger.sealer import Sealer, load, seal
from helixflow.ledger.seals import AnotherKeyError, SealKeys
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer

from .support import DAY_US, NOON_US, PEPPER_KEY, Databases, ledger_options, opened, row

NEXT_KEY = bytes(range(32))
ADA = actors.operator("ada", "10.0.0.1", "r-1")
ROWS, ENTRIES, UNCHAINED = 3, 4, 2

Work = Callable[[Pool, Any], Awaitable[None]]


async def write(pool: Pool, connection: Any, key: bytes, first: int, entries: int) -> None:
    """Rows of two days and entries of the audit log, none of them sealed."""
    audit.seal_with(SealKeys.of(key).audit)
    rows = [row(NOON_US + day * DAY_US + first + n) for day in range(2) for n in range(ROWS)]
    await Writer(pool, key).append("s", [encode(each) for each in rows])
    for number in range(entries):
        await audit.record(connection, ADA, "key.create", f"target {number}", None, {})


async def forget(connection: Any) -> None:
    async with connection.transaction():
        await lost.forget(connection)


async def begin(connection: Any, key: bytes) -> None:
    async with connection.transaction():
        await lost.begin(connection, key)


async def check(connection: Any, key: bytes = NEXT_KEY) -> Report:
    return await verify(connection, key)


def scenario(databases: Databases, work: Work) -> None:
    """A ledger that has lost its pepper and gone on with the next."""
    target = databases.new()

    async def test() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            await write(pool, connection, PEPPER_KEY, 0, ENTRIES)
            await seal(connection, SealKeys.of(PEPPER_KEY))
            await write(pool, connection, PEPPER_KEY, 1000, UNCHAINED)
            await forget(connection)
            await begin(connection, NEXT_KEY)
            await write(pool, connection, NEXT_KEY, 2000, ENTRIES)
            await seal(connection, SealKeys.of(NEXT_KEY))
            await work(pool, connection)

    asyncio.run(test())


def test_chains_go_on(databases: Databases) -> None:
    async def work(pool: Pool, connection: Any) -> None:
        report = await check(connection)
        assert not report.faults
        assert (report.rows, report.entries) == (6 * ROWS, 2 * ENTRIES + UNCHAINED)
        assert report.lost == ["2026-03-01: rows 1 to 6", "2026-03-02: rows 1 to 6", "audit log: entries 1 to 6"]
        # A second time, and a start that finds nothing to do.
        await forget(connection)
        await begin(connection, PEPPER_KEY)
        await begin(connection, PEPPER_KEY)
        await write(pool, connection, PEPPER_KEY, 3000, 1)
        await seal(connection, SealKeys.of(PEPPER_KEY))
        report = await check(connection, PEPPER_KEY)
        assert not report.faults
        assert report.lost[0] == "2026-03-01: rows 1 to 9"
        assert report.lost[2] == f"audit log: entries 1 to {2 * ENTRIES + UNCHAINED}"

    scenario(databases, work)


def test_nothing_was_written_before(on_wheel: Databases) -> None:
    target = on_wheel.new()

    async def test() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            await forget(connection)
            await begin(connection, NEXT_KEY)
            await write(pool, connection, NEXT_KEY, 0, 1)
            await seal(connection, SealKeys.of(NEXT_KEY))
            report = await check(connection)
            assert (report.faults, report.lost, report.rows, report.entries) == ([], [], 2 * ROWS, 1)

    asyncio.run(test())


SECOND = "(at AT TIME ZONE 'UTC')::date = '2026-03-02'"


@pytest.mark.parametrize(
    ("statement", "chain"),
    [
        (f"DELETE FROM helixflow.requests WHERE {SECOND} AND sequence = 2", LEDGER),
        (f"DELETE FROM helixflow.requests WHERE {SECOND} AND sequence <= 6", LEDGER),
        (f"UPDATE helixflow.requests SET cost = 7 WHERE {SECOND} AND sequence = 8", LEDGER),
        ("UPDATE helixflow.ledger_days SET lost_sequence = 9 WHERE day = '2026-03-02'", LEDGER),
        ("DELETE FROM helixflow.ledger_days WHERE day = '2026-03-02'", LEDGER),
        ("DELETE FROM helixflow.audit_log WHERE id = (SELECT min(id) FROM helixflow.audit_log)", AUDIT),
        ("DELETE FROM helixflow.audit_chain WHERE sequence = 2", AUDIT),
        ("UPDATE helixflow.audit_log SET actor = 'eve' WHERE id = (SELECT max(id) FROM helixflow.audit_log)", AUDIT),
        ("UPDATE helixflow.audit_head SET lost_sequence = sequence", AUDIT),
    ],
)
def test_what_vanishes_or_is_altered_afterwards_is_found(on_wheel: Databases, statement: str, chain: str) -> None:
    async def work(_pool: Pool, connection: Any) -> None:
        await connection.execute("ALTER TABLE helixflow.requests DISABLE TRIGGER USER")
        await connection.execute("ALTER TABLE helixflow.audit_log DISABLE TRIGGER USER")
        assert await connection.execute(statement) not in ("DELETE 0", "UPDATE 0")
        assert chain in {fault.chain for fault in (await check(connection)).faults}

    scenario(on_wheel, work)


def test_a_service_cannot_pretend_that_its_pepper_was_lost(on_wheel: Databases) -> None:
    """What it may write looks like it; the checkpoint, which it cannot remove, says otherwise."""

    async def work(_pool: Pool, connection: Any) -> None:
        await connection.execute("ALTER TABLE helixflow.requests DISABLE TRIGGER USER")
        await connection.execute("UPDATE helixflow.requests SET cost = 7 WHERE sequence = 8")
        await connection.execute("UPDATE helixflow.ledger_days SET lost_sequence = sequence, seal = ''")
        await begin(connection, NEXT_KEY)
        assert (await check(connection)).faults

    scenario(on_wheel, work)


def set_aside(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.glob("anchor-*.*.json")]


def test_anchors_of_the_lost_pepper(on_wheel: Databases, tmp_path: Path) -> None:
    async def work(pool: Pool, connection: Any) -> None:
        sealer = Sealer(pool, NEXT_KEY, tmp_path)
        installation = (await load(connection)).installation
        path = sealer.path(installation)
        assert path is not None
        before = SealKeys.of(PEPPER_KEY)
        anchor = seals.dump((await load(connection)).signed(before), before)
        path.write_bytes(anchor)
        last = await sealer.round()
        assert set_aside(tmp_path) == [anchor]
        assert sealer.own(installation) == last
        with pytest.raises(AnotherKeyError, match="given up since"):
            seals.parse(anchor, sealer.keys, installation)

    scenario(on_wheel, work)


def test_retention_goes_over_it(on_wheel: Databases) -> None:
    async def work(pool: Pool, connection: Any) -> None:
        assert await maintenance.once(pool, ledger_options(keep_months=1), NEXT_KEY)
        report = await check(connection)
        assert not report.faults
        assert report.dropped == ["2026-03-01: rows 1 to 9", "2026-03-02: rows 1 to 9"]
        assert report.lost == ["audit log: entries 1 to 6"]

    scenario(on_wheel, work)
