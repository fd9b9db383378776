"""Checkpoints, anchors, and the chain of the audit log: whatever the owner of the tables does is found."""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.auth import actors, audit
from helixflow.core_rs import InvalidRequest
from helixflow.db.pool import Pool
from helixflow.ledger import maintenance, seals
from helixflow.ledger.audit_chain import LATE, ChainError
from helixflow.ledger.faults import AUDIT, CHECKPOINT, LEDGER, Report
from helixflow.ledger.proof import Proof
from helixflow.ledger.record import encode
from helixflow.ledger.sealer import Sealer, load, seal
from helixflow.ledger.seals import AnchorError, SealKeys
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer

from .support import DAY_US, NOON_US, PEPPER_KEY, Databases, opened, row

KEYS = SealKeys.of(PEPPER_KEY)
ADA = actors.operator("ada", "10.0.0.1", "r-1")
DAYS, ROWS, ENTRIES = 3, 4, 6
# Rows of the second day that a table's tampering is about.
SECOND = "day = '2026-03-02'"
ON_SECOND = "(at AT TIME ZONE 'UTC')::date = '2026-03-02'"
STATE = ("requests", "ledger_days", "ledger_sealed", "ledger_checkpoint", "usage_daily", "usage_keys", "usage_models",
         "usage_monthly", "audit_log", "audit_chain", "audit_head")  # fmt: skip

Work = Callable[[Pool, Any], Awaitable[None]]


@pytest.fixture(autouse=True)
def _sealed() -> None:
    audit.seal_with(KEYS.audit)


async def act(connection: Any, count: int = 1) -> None:
    for number in range(count):
        await audit.record(connection, ADA, "key.create", f"target {number}", None, {"b": number, "a": ["ä", None]})


async def fill(pool: Pool, connection: Any) -> None:
    """Three days with rows, an audit log, all of it sealed."""
    rows = [row(NOON_US + day * DAY_US + n) for day in range(DAYS) for n in range(ROWS)]
    await Writer(pool, PEPPER_KEY).append("s", [encode(each) for each in rows])
    await act(connection, ENTRIES)
    await seal(connection, KEYS)


def scenario(databases: Databases, work: Work, *, filled: bool = True) -> None:
    target = databases.new()

    async def test() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            if filled:
                await fill(pool, connection)
            await work(pool, connection)

    asyncio.run(test())


async def check(connection: Any, *anchors: seals.Witness) -> Report:
    return await verify(connection, PEPPER_KEY, anchors=anchors)


def test_nothing_happened(databases: Databases) -> None:
    async def work(_pool: Pool, connection: Any) -> None:
        found = await check(connection)
        assert found == Report(DAYS, DAYS * ROWS, [], ENTRIES, [])
        before = await load(connection)
        assert (await seal(connection, KEYS))[0] == before, "nothing new, no new checkpoint"
        await act(connection)
        again, _ = await seal(connection, KEYS)
        assert (again.number, again.audit.sequence) == (before.number + 1, ENTRIES + 1)
        assert (await check(connection)).faults == []

    scenario(databases, work)


def test_entries_of_transactions_that_end_in_another_order(databases: Databases) -> None:
    async def work(pool: Pool, connection: Any) -> None:
        async with pool.acquire() as slow:
            transaction = slow.transaction()
            await transaction.start()
            await act(slow)
            rolled_back = connection.transaction()
            await rolled_back.start()
            await act(connection, 2)
            await rolled_back.rollback()
            await act(connection)
            _, last = await seal(connection, KEYS)
            assert (await check(connection)) == Report(DAYS, DAYS * ROWS, [], ENTRIES + 1, [])
            await transaction.commit()
        assert last == ENTRIES + 4
        await seal(connection, KEYS)
        assert (await check(connection)) == Report(DAYS, DAYS * ROWS, [], ENTRIES + 2, [])

    async def reset(pool: Pool, connection: Any) -> None:
        await connection.execute("ALTER TABLE audit_log ALTER COLUMN id RESTART")
        await fill(pool, connection)
        await work(pool, connection)

    scenario(databases, reset, filled=False)


def test_many_seal_at_once(databases: Databases) -> None:
    async def work(pool: Pool, connection: Any) -> None:
        async def one(number: int) -> None:
            async with pool.acquire() as own:
                await act(own, number)
                await seal(own, KEYS)

        await asyncio.gather(*(one(number) for number in range(1, 9)))
        found = await check(connection)
        assert (found.entries, found.faults) == (ENTRIES + 36, [])

    scenario(databases, work)


UNCHAIN = "ALTER TABLE audit_log DISABLE TRIGGER USER"
TAMPERINGS = {
    "row altered": (LEDGER, f"UPDATE requests SET cost = cost + 1 WHERE {ON_SECOND} AND sequence = 2"),
    "row removed": (LEDGER, f"DELETE FROM requests WHERE {ON_SECOND} AND sequence = 2"),
    "rows swapped": (LEDGER, f"UPDATE requests SET sequence = 5 - sequence WHERE {ON_SECOND} AND sequence IN (2, 3)"),
    "row inserted": (
        LEDGER,
        (
            f"CREATE TEMP TABLE t AS SELECT * FROM requests WHERE {ON_SECOND} AND sequence = 2; "
            "UPDATE t SET id = gen_random_uuid(), sequence = 5; INSERT INTO requests TABLE t; DROP TABLE t"
        ),
    ),
    "day removed": (
        LEDGER,
        (
            f"DELETE FROM requests WHERE {ON_SECOND}; DELETE FROM ledger_days WHERE {SECOND}; "
            f"DELETE FROM usage_daily WHERE {SECOND}; DELETE FROM usage_keys WHERE {SECOND}; "
            f"DELETE FROM usage_models WHERE {SECOND}; UPDATE usage_monthly m SET requests = m.requests - 4, "
            "prompt_tokens = m.prompt_tokens - 40, completion_tokens = m.completion_tokens - 20, cost = m.cost - 4000"
        ),
    ),
    "last day removed": (
        LEDGER,
        "DELETE FROM requests WHERE at >= '2026-03-03'; DELETE FROM ledger_days WHERE day = '2026-03-03'",
    ),
    "tail removed": (LEDGER, f"DELETE FROM requests WHERE {ON_SECOND} AND sequence = 4"),
    "all days removed": (LEDGER, "DELETE FROM requests; DELETE FROM ledger_days"),
    "head altered": (LEDGER, f"UPDATE ledger_days SET sequence = 3 WHERE {SECOND}"),
    "head called dropped": (
        LEDGER,
        (
            f"DELETE FROM requests WHERE {ON_SECOND}; "
            f"UPDATE ledger_days SET dropped_sequence = sequence, dropped_hash = hash WHERE {SECOND}"
        ),
    ),
    "usage altered": (LEDGER, f"UPDATE usage_daily SET cost = 0 WHERE {SECOND}"),
    "checkpoint altered": (CHECKPOINT, "UPDATE ledger_checkpoint SET number = number + 1"),
    "checkpoint's day altered": (CHECKPOINT, f"UPDATE ledger_sealed SET sequence = 3 WHERE {SECOND}"),
    "checkpoint's day removed": (CHECKPOINT, f"DELETE FROM ledger_sealed WHERE {SECOND}"),
    "checkpoint removed": (CHECKPOINT, "DELETE FROM ledger_checkpoint; DELETE FROM ledger_sealed"),
    "entry altered": (AUDIT, f"{UNCHAIN}; UPDATE audit_log SET target = 'x' WHERE target = 'target 2'"),
    "entry's detail altered": (AUDIT, f"{UNCHAIN}; UPDATE audit_log SET detail = '{{}}' WHERE target = 'target 2'"),
    "entry's time altered": (
        AUDIT,
        f"{UNCHAIN}; UPDATE audit_log SET at = at + interval '1 us' WHERE target = 'target 2'",
    ),
    "entry removed": (AUDIT, f"{UNCHAIN}; DELETE FROM audit_log WHERE target = 'target 2'"),
    "entry and link removed": (
        AUDIT,
        f"{UNCHAIN}; DELETE FROM audit_chain WHERE sequence = 3; DELETE FROM audit_log WHERE target = 'target 2'",
    ),
    "last entry removed": (
        AUDIT,
        f"{UNCHAIN}; DELETE FROM audit_chain WHERE sequence = 6; DELETE FROM audit_log WHERE target = 'target 5'",
    ),
    "last entry removed, head put back": (
        AUDIT,
        (
            f"{UNCHAIN}; DELETE FROM audit_chain WHERE sequence = 6; DELETE FROM audit_log WHERE target = 'target 5'; "
            "UPDATE audit_head SET sequence = 5, hash = (SELECT hash FROM audit_chain WHERE sequence = 5)"
        ),
    ),
    "links swapped": (
        AUDIT,
        (
            "UPDATE audit_chain SET sequence = -sequence WHERE sequence IN (2, 3); "
            "UPDATE audit_chain SET sequence = 5 + sequence WHERE sequence < 0"
        ),
    ),
    "entry inserted": (
        AUDIT,
        (
            "INSERT INTO audit_log (actor, action, target, address, request_id, detail) "
            "VALUES ('ada', 'key.create', 'x', '', '', '{}')"
        ),
    ),
    "entry copied": (
        AUDIT,
        (
            "INSERT INTO audit_log (at, actor, action, target, address, request_id, detail, mac) "
            "SELECT at, actor, action, target, address, request_id, detail, mac FROM audit_log "
            "WHERE target = 'target 2'"
        ),
    ),
    "all entries removed": (
        AUDIT,
        f"{UNCHAIN}; DELETE FROM audit_log; DELETE FROM audit_chain; DELETE FROM audit_head",
    ),
    "audit head called dropped": (
        AUDIT,
        (
            f"{UNCHAIN}; DELETE FROM audit_log WHERE target <> 'target 5'; DELETE FROM audit_chain WHERE sequence < 6; "
            "UPDATE audit_head SET dropped_sequence = 5, dropped_hash = hash"
        ),
    ),
    "legacy raised": (
        AUDIT,
        f"{UNCHAIN}; UPDATE meta SET audit_legacy = 10000000; UPDATE audit_log SET mac = NULL",
    ),
}
UNDO = "ALTER TABLE audit_log ENABLE TRIGGER USER; UPDATE meta SET audit_legacy = 0"


@pytest.mark.parametrize("name", TAMPERINGS)
def test_each_kind_of_tampering_is_found(on_wheel: Databases, name: str) -> None:
    chain, statements = TAMPERINGS[name]

    async def work(pool: Pool, connection: Any) -> None:
        await connection.execute(statements)
        found = await check(connection)
        assert chain in {fault.chain for fault in found.faults}, found.faults
        # Nor does sealing it make it right, as the service does before it verifies.
        again = await Proof(pool, Sealer(pool, PEPPER_KEY)).verify(None, None, "")
        await connection.execute(UNDO)
        assert chain in {fault.chain for fault in again.faults} or name == "checkpoint removed", again.faults

    scenario(on_wheel, work)


def test_the_other_server_finds_it_too(on_debian: Databases) -> None:
    async def work(_pool: Pool, connection: Any) -> None:
        for name in ("day removed", "tail removed", "entry and link removed", "checkpoint altered"):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(TAMPERINGS[name][1])
            await transaction.rollback()
            assert (await check(connection)).faults == []
        for name in ("day removed", "entry and link removed"):
            await connection.execute(TAMPERINGS[name][1])
        assert {fault.chain for fault in (await check(connection)).faults} == {LEDGER, AUDIT}
        await connection.execute(UNDO)

    scenario(on_debian, work)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(sorted(TAMPERINGS)), min_size=1, max_size=4, unique=True))
def test_tamperings_do_not_hide_each_other(on_wheel: Databases, names: list[str]) -> None:
    """Whatever is done after whatever else: something is found."""

    async def work(_pool: Pool, connection: Any) -> None:
        for name in names:
            # One that another has made impossible changes nothing: it is one statement to the server.
            with contextlib.suppress(asyncpg.PostgresError):
                await connection.execute(TAMPERINGS[name][1])
        found = await check(connection)
        await connection.execute(UNDO)
        assert found.faults

    scenario(on_wheel, work)


async def snapshot(connection: Any) -> None:
    for table in STATE:
        await connection.execute(f"CREATE TEMP TABLE saved_{table} AS TABLE helixflow.{table}")


async def put_back(connection: Any) -> None:
    """As somebody does who owns the tables: everything as it was, with seals that were right then."""
    await connection.execute(UNCHAIN)
    for table in STATE:
        await connection.execute(f"DELETE FROM helixflow.{table}; INSERT INTO helixflow.{table} TABLE saved_{table}")
    await connection.execute(UNDO)


def anchor_of(checkpoint: seals.Checkpoint) -> seals.Witness:
    text = seals.dump(checkpoint, KEYS)
    return seals.Witness("the anchor", seals.parse(text, KEYS, checkpoint.installation))


@pytest.mark.parametrize("when", ["before anything", "before the last rows"])
def test_an_older_state_contradicts_an_anchor(on_wheel: Databases, tmp_path: Path, when: str) -> None:
    async def work(pool: Pool, connection: Any) -> None:
        sealer = Sealer(pool, PEPPER_KEY, tmp_path)
        if when == "before anything":
            await snapshot(connection)
            await fill(pool, connection)
        else:
            await fill(pool, connection)
            await sealer.round()
            await snapshot(connection)
            await Writer(pool, PEPPER_KEY).append("s", [encode(row(NOON_US + 50)), encode(row(NOON_US + 5 * DAY_US))])
            await act(connection)
        anchor = anchor_of(await sealer.round(whole=True))
        assert (await check(connection, anchor)).faults == []
        await put_back(connection)
        assert (await check(connection)).faults == [], "in itself it is right"
        problems = {fault.problem for fault in (await check(connection, anchor)).faults}
        assert any("older than the anchor" in each for each in problems)
        # The anchor that the service keeps by itself says so too, and nothing is sealed on top of it, at no start.
        for each in (sealer, Sealer(pool, PEPPER_KEY, tmp_path)):
            with pytest.raises(AnchorError, match="an older state was put back"):
                await each.round()
            found = await Proof(pool, each).verify(None, None, "")
            assert any("the anchor of this machine" in fault.problem for fault in found.faults)
        # Its owner may grow it on until the numbers fit: then it is another history.
        while (await load(connection)).number <= anchor.checkpoint.number:
            await act(connection)
            await seal(connection, KEYS)
        found = await check(connection, anchor)
        assert found.faults

    scenario(on_wheel, work, filled=False)


def test_with_database_and_pepper_history_can_be_rewritten_but_not_that_of_an_anchor(on_wheel: Databases) -> None:
    """The attacker has everything but the anchor: deletes all and writes it anew, with one row changed."""

    async def work(pool: Pool, connection: Any) -> None:
        anchor = anchor_of(await load(connection))
        await connection.execute(UNCHAIN)
        for table in STATE:
            await connection.execute(f"DELETE FROM helixflow.{table}")
        await connection.execute(UNDO)
        rows = [row(NOON_US + day * DAY_US + n, cost=day) for day in range(DAYS) for n in range(ROWS)]
        await Writer(pool, PEPPER_KEY).append("s", [encode(each) for each in rows])
        await act(connection, ENTRIES + 1)
        while (await seal(connection, KEYS))[0].number <= anchor.checkpoint.number:
            await act(connection)
        assert (await check(connection)).faults == []
        found = {(fault.chain, fault.day) for fault in (await check(connection, anchor)).faults}
        days = {(LEDGER, f"2026-03-0{n}") for n in (1, 2, 3)}
        assert days <= found
        assert AUDIT in {chain for chain, _ in found}

    scenario(on_wheel, work)


def test_an_anchor_holds_while_the_ledger_grows(databases: Databases) -> None:
    async def work(pool: Pool, connection: Any) -> None:
        anchors = [anchor_of(await load(connection))]
        for number in range(3):
            more = [row(NOON_US + number * DAY_US + 100), row(NOON_US + (10 + number) * DAY_US)]
            await Writer(pool, PEPPER_KEY).append("s", [encode(each) for each in more])
            await act(connection, 2)
            checkpoint, _ = await seal(connection, KEYS)
            anchors.append(anchor_of(checkpoint))
            assert (await check(connection, *anchors)).faults == []
        # One day alone.
        day = date(2026, 3, 2)
        assert (await verify(connection, PEPPER_KEY, day, day, anchors)).faults == []
        await connection.execute(f"DELETE FROM requests WHERE {ON_SECOND}; DELETE FROM ledger_days WHERE {SECOND}")
        assert len((await verify(connection, PEPPER_KEY, day, day, anchors)).faults) == 1

    scenario(databases, work)


def test_an_anchor_that_was_touched_is_none(on_wheel: Databases) -> None:
    async def work(_pool: Pool, connection: Any) -> None:
        checkpoint = await load(connection)
        text = seals.dump(checkpoint, KEYS).decode()
        assert seals.parse(text.encode(), KEYS, checkpoint.installation) == checkpoint
        other = SealKeys.of(b"x" * 32)
        for wrong, why in (
            (text.replace(',4,"', ',3,"', 1), "signature"),
            (text.replace(f'"number": {checkpoint.number}', '"number": 0'), "signature"),
            (text.replace('"format": 1', '"format": 2'), "format 2"),
            (text.replace(checkpoint.installation, "00000000-0000-0000-0000-000000000000"), "belongs to"),
            (text.replace("2026-03-02", "2026-03-09"), "signature"),
            (seals.dump(checkpoint.signed(other), other).decode(), "another key"),
            (text[:-20], "no anchor"),
            ("[]", "no anchor"),
            ("x" * (seals.ANCHOR_BYTES_MAX + 1), "larger than"),
            (text.replace(',4,"', ',-4,"', 1), "signature|no anchor"),
            (text.replace(',4,"', f',{1 << 70},"', 1), "signature|no anchor"),
        ):
            with pytest.raises(AnchorError, match=why):
                seals.parse(wrong.encode(), KEYS, checkpoint.installation)

    scenario(on_wheel, work)


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=3))
def test_no_byte_of_an_anchor_can_be_changed(place: int, with_: bytes) -> None:
    ends = {date(2026, 3, 1) + timedelta(n): seals.End(n, bytes([n]) * 32) for n in range(5)}
    made = seals.Checkpoint("i", 3, datetime(2026, 3, 1, tzinfo=UTC), ends, seals.End(9, b"a" * 32)).signed(KEYS)
    text = seals.dump(made, KEYS)
    changed = text[: place % len(text)] + with_ + text[place % len(text) + len(with_) :]
    try:
        found = seals.parse(changed, KEYS, "i")
    except AnchorError:
        return
    assert found == made, "only what says the same passes"


def test_the_service_refuses_a_wrong_anchor(on_wheel: Databases) -> None:
    async def work(pool: Pool, _connection: Any) -> None:
        proof = Proof(pool, Sealer(pool, PEPPER_KEY))
        anchor = await proof.anchor()
        assert (await proof.verify(None, None, anchor)).faults == []
        with pytest.raises(InvalidRequest) as refused:
            await proof.verify(None, None, anchor.replace(',4,"', ',3,"', 1))
        assert refused.value.param == "anchor"

    scenario(on_wheel, work)


def test_what_was_tampered_with_is_never_sealed(on_wheel: Databases) -> None:
    async def work(_pool: Pool, connection: Any) -> None:
        for name in ("tail removed", "day removed", "head altered", "checkpoint altered", "last entry removed"):
            async with connection.transaction():
                await snapshot(connection)
            await connection.execute(TAMPERINGS[name][1])
            await connection.execute(UNDO)
            before = await load(connection)
            await act(connection)
            try:
                await seal(connection, KEYS)
            except ChainError:
                assert (await load(connection)) == before
            assert (await check(connection)).faults
            await put_back(connection)
            for table in STATE:
                await connection.execute(f"DROP TABLE saved_{table}")
            assert (await check(connection)).faults == []

    scenario(on_wheel, work)


# --- entries of releases before, retention -----------------------------------------------


def test_entries_from_before_are_chained_too(on_wheel: Databases) -> None:
    async def work(_pool: Pool, connection: Any) -> None:
        old = ("INSERT INTO audit_log (actor, action, target, address, request_id, detail) "
               "VALUES ('ada', 'key.create', 'old', '', '', '{\"n\": 1.50, \"m\":   null}') RETURNING id")  # fmt: skip
        number = await connection.fetchval(old)
        await connection.execute("UPDATE meta SET audit_legacy = $1", number)
        await act(connection)
        await seal(connection, KEYS)
        found = await check(connection)
        assert (found.entries, found.faults) == (2, [])
        await connection.execute(f"{UNCHAIN}; UPDATE audit_log SET target = 'x' WHERE id = {number}; {UNDO}")
        await connection.execute("UPDATE meta SET audit_legacy = $1", number)
        assert [fault.id for fault in (await check(connection)).faults] == [str(number)]
        await connection.execute(UNDO)

    scenario(on_wheel, work, filled=False)


def test_an_entry_that_is_not_chained_in_time_is_none(on_wheel: Databases) -> None:
    async def work(_pool: Pool, connection: Any) -> None:
        await act(connection)
        assert (await check(connection)).faults == [], "it may have been written just now"
        await connection.execute(f"{UNCHAIN}; UPDATE audit_log SET at = at - interval '{LATE.seconds + 1} s'; {UNDO}")
        assert "no place in the chain" in (await check(connection)).faults[0].problem

    scenario(on_wheel, work, filled=False)


def test_retention_cuts_the_chain_in_one_place(databases: Databases) -> None:
    later = datetime.now(UTC) + timedelta(days=100)

    async def work(pool: Pool, connection: Any) -> None:
        anchor = anchor_of(await load(connection))
        assert await maintenance.prune_audit(pool, PEPPER_KEY, 90) == 0
        with pytest.raises(Exception, match="last 30 days"):
            await maintenance.prune_audit(pool, PEPPER_KEY, 90, now=later)
        assert (await check(connection)).faults == [], "nothing of it stays"
        # As if time had passed: entries that are 100 days old, and their chain.
        await connection.execute(
            f"{UNCHAIN}; DELETE FROM audit_log; DELETE FROM audit_chain; DELETE FROM audit_head; {UNDO}"
        )
        await connection.execute("DELETE FROM ledger_checkpoint; DELETE FROM ledger_sealed")
        clock = itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(audit, "datetime", _Clock(datetime.now(UTC) - timedelta(days=100), clock))
            await act(connection, 5)
        await act(connection, 3)
        checkpoint, _ = await seal(connection, KEYS)
        anchor = anchor_of(checkpoint)
        assert await maintenance.prune_audit(pool, PEPPER_KEY, 90) == 5
        found = await check(connection, anchor)
        assert (found.entries, found.faults) == (3, [])
        assert found.dropped == ["audit log: entries 1 to 5"]
        await act(connection)
        await seal(connection, KEYS)
        assert (await check(connection, anchor)).faults == []
        forged = "(SELECT hash FROM audit_chain WHERE sequence = 6)"
        await connection.execute(
            f"{UNCHAIN}; UPDATE audit_head SET dropped_sequence = 6, dropped_hash = {forged}; "
            "DELETE FROM audit_log WHERE id = (SELECT id FROM audit_chain WHERE sequence = 6); "
            f"DELETE FROM audit_chain WHERE sequence = 6; {UNDO}"
        )
        assert AUDIT in {fault.chain for fault in (await check(connection, anchor)).faults}

    scenario(databases, work)


class _Clock:
    """Stands in for `datetime` where entries get their time."""

    def __init__(self, first: datetime, count: "itertools.count[int]") -> None:
        self._first = first
        self._count = count

    def now(self, _zone: Any) -> datetime:
        return self._first + timedelta(seconds=next(self._count))
