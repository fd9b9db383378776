"""What the ledger refused: bounded, sent again, each once."""

import asyncio
import base64
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.core_rs import InvalidRequest, Unavailable
from helixflow.ledger.record import Row, decode, encode
from helixflow.ledger.rejected import FILES, REJECTED, BusyError, Rejected, Resent, resend
from helixflow.ledger.writer import Writer

from .support import NOON_US, PEPPER_KEY, Databases, Store, names, opened, row

BIG = 1 << 30


def kept(root: Path) -> list[Row]:
    """What the files hold, the oldest first."""
    found = []
    for number in range(FILES - 1, -1, -1):
        path = root / (f"{REJECTED}.{number}" if number else REJECTED)
        if path.exists():
            found += [decode(base64.b64decode(json.loads(line)["record"])) for line in path.read_text().splitlines()]
    return [each for each in found if isinstance(each, Row)]


def test_the_files_are_bounded_and_the_newest_stay(tmp_path: Path) -> None:
    rejected, rows = Rejected(tmp_path, 16_000), [row(NOON_US + n) for n in range(400)]
    for each in rows:
        rejected.add("s", encode(each), "no")
    files = sorted(tmp_path.iterdir())
    assert len(files) == FILES
    assert sum(path.stat().st_size for path in files) <= 16_000
    found = kept(tmp_path)
    assert len(found) > 20
    assert found == rows[-len(found) :]


def test_everything_is_sent_again_once(tmp_path: Path) -> None:
    rejected, rows = Rejected(tmp_path, BIG), [row(NOON_US + n) for n in range(50)]
    for number, each in enumerate(rows):
        rejected.add(f"spool-{number // 20}", encode(each), "no")
    store = Store()
    assert asyncio.run(resend(rejected, store.append, 8)) == Resent(50, 0, 0)
    assert list(store.rows.values()) == rows
    assert store.written == 50
    assert {spool for spool, _ in store.calls} == {"spool-0", "spool-1", "spool-2"}
    assert names(tmp_path) == ["resend.lock"]
    assert asyncio.run(resend(rejected, store.append, 8)) == Resent(0, 0, 0)


@settings(max_examples=60)
@given(
    rows=st.integers(0, 60),
    bad=st.sets(st.integers(0, 59)),
    batch=st.integers(1, 20),
    fail=st.lists(st.sampled_from(["before", "after", "add"]), max_size=8),
    torn=st.booleans(),
)
def test_whatever_fails_in_between(rows: int, bad: set[int], batch: int, fail: list[str], torn: bool) -> None:
    """The ledger goes away before or after it has written, records come in meanwhile: each is there once in the end."""
    made = [row(NOON_US + n) for n in range(rows)]
    refused = {made[n].id for n in bad if n < rows}
    store = Store()

    async def append(spool: str, records: list[bytes]) -> None:
        if any(decode(data).id in refused for data in records):
            raise InvalidRequest("no")
        await store.append(spool, records)

    async def scenario(root: Path) -> None:
        rejected = Rejected(root, BIG)
        for each in made:
            rejected.add("s", encode(each), "no")
        if torn:
            with (root / REJECTED).open("ab") as file:
                file.write(b'{"spool": "s", "rec')
        for kind in fail:
            if kind == "add":
                made.append(row(NOON_US + len(made)))
                rejected.add("t", encode(made[-1]), "no")
                continue
            (store.before if kind == "before" else store.after).append(Unavailable("away"))
            if made and not refused:
                with pytest.raises(Unavailable):
                    await resend(rejected, append, batch)
            store.before.clear()
            store.after.clear()
        await resend(rejected, append, batch)
        done = await resend(rejected, append, batch)
        assert (done.sent, done.refused) == (0, len(refused))
        assert store.rows.keys() == {each.id for each in made} - refused
        assert store.written == len(store.rows)
        left = (root / REJECTED).read_text().splitlines() if refused or done.unreadable else []
        assert len(left) == len(refused) + done.unreadable

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Path(folder)))


def test_two_do_not_send_at_once(tmp_path: Path) -> None:
    rejected = Rejected(tmp_path, BIG)

    async def scenario() -> None:
        with rejected.alone(), pytest.raises(BusyError):
            await resend(rejected, Store().append, 8)

    asyncio.run(scenario())


def test_the_real_ledger_takes_each_once(on_wheel: Databases, tmp_path: Path) -> None:
    target = on_wheel.new()
    rejected, rows = Rejected(tmp_path, BIG), [row(NOON_US + n) for n in range(30)]
    for each in rows:
        rejected.add("s", encode(each), "no")

    async def scenario() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)
            assert await writer.append("s", [encode(each) for each in rows[:10]]) == (10, 0)

            async def append(spool: str, records: list[bytes]) -> None:
                await writer.append(spool, records)

            assert await resend(rejected, append, 7) == Resent(30, 0, 0)
            async with pool.acquire() as connection:
                assert await connection.fetchval("SELECT count(*) FROM requests") == 30

    asyncio.run(scenario())
