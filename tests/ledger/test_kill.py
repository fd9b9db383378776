"""A worker that is killed while it writes: each request that it had accepted is in the ledger once."""

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path

from helixflow.ledger.record import INTERRUPTED
from helixflow.ledger.shipper import Shipper
from helixflow.ledger.spool import Spool
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer

from .support import PEPPER_KEY, Databases, ledger_options, names, opened, until

# Tells of each request only after the spool has taken it. Small segments: some kills hit a change of them.
WORKER = """
import os, random, sys
from pathlib import Path
from helixflow.ledger.spool import Spool
from tests.ledger.support import begin, ledger_options
spool = Spool(Path(sys.argv[1]), ledger_options(spool_max_bytes=1 << 20, when_full="serve"))
chance = random.Random(int(sys.argv[2]))
running = []
def tell(kind, request):
    os.write(1, f"{kind} {request.id.hex()}\\n".encode())
while True:
    one = begin()
    spool.begin(one)
    if one.id not in spool._open:
        break  # full: what it holds is enough
    tell("b", one)
    running.append(one)
    if len(running) > chance.randrange(8):
        done = running.pop(chance.randrange(len(running)))
        spool.end(done.row(finish="stop", status=200))
        tell("e", done)
print("full", flush=True)
sys.stdin.read()
"""


def killed(root: Path, seed: int, after: int) -> tuple[set[bytes], set[bytes]]:
    """What a worker said it had begun and ended before it was killed, at any point of its work."""
    command = [sys.executable, "-c", WORKER, str(root), str(seed)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as worker:
        assert worker.stdout is not None
        lines = []
        for line in worker.stdout:
            lines.append(line)
            if len(lines) == after:
                worker.send_signal(signal.SIGKILL)
            if line == b"full\n":
                worker.kill()
    whole = [line.split() for line in lines if line[:2] in (b"b ", b"e ") and line.endswith(b"\n")]
    begun, ended = ({bytes.fromhex(name.decode()) for k, name in whole if k == kind} for kind in (b"b", b"e"))
    return begun, ended


def test_killed_workers_lose_nothing(on_wheel: Databases, tmp_path: Path) -> None:
    target = on_wheel.new()
    chance = random.Random(7)
    begun, ended = set[bytes](), set[bytes]()
    for seed, after in enumerate((1, 2, chance.randrange(3, 50), chance.randrange(50, 2000), 3500)):
        both = killed(tmp_path, seed, after)
        begun |= both[0]
        ended |= both[1]

    async def adopt() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)

            async def append(spool: str, records: list[bytes]) -> None:
                await writer.append(spool, records)

            spool = Spool(tmp_path, ledger_options())
            ship = Shipper(spool, append, ledger_options(batch_rows=300))
            running = asyncio.create_task(ship.run())
            await until(lambda: ship.stats.adopted == 5)
            assert await ship.drain(10)
            await running
            assert names(tmp_path) == []
            async with pool.acquire() as connection:
                rows = {row[0].bytes: row[1] for row in await connection.fetch("SELECT id, finish FROM requests")}
                assert await connection.fetchval("SELECT count(*) FROM requests") == len(rows)
                assert await connection.fetchval("SELECT sum(requests) FROM usage_daily") == len(rows)
                assert (await verify(connection, PEPPER_KEY)).faults == []
        # One more of each may have been written when the kill came before its line.
        assert begun <= rows.keys()
        assert len(rows) <= len(begun) + 5
        assert all(rows[each] == "stop" for each in ended)
        interrupted = {each for each, finish in rows.items() if finish == INTERRUPTED}
        assert len(begun - ended) - 5 <= len(interrupted) <= len(begun - ended) + 5
        assert interrupted

    asyncio.run(adopt())


SHIPPING = """
import asyncio, sys
from pathlib import Path
from helixflow.db.pool import Pool
from helixflow.db.target import Target
from helixflow.ledger.shipper import Shipper
from helixflow.ledger.spool import Spool
from helixflow.ledger.writer import Writer
from tests.db.support import options
from tests.ledger.support import PEPPER_KEY, begin, ledger_options
async def main():
    pool = await Pool.open(options(), Target.parse(sys.argv[2]), name="killed")
    writer = Writer(pool, PEPPER_KEY)
    async def append(spool, records):
        await writer.append(spool, records)
    spool = Spool(Path(sys.argv[1]), ledger_options())
    running = asyncio.create_task(Shipper(spool, append, ledger_options(batch_rows=50)).run())
    for number in range(100_000):
        one = begin()
        spool.begin(one)
        spool.end(one.row(finish="stop", status=200))
        print("told", one.id.hex(), flush=True)
        await asyncio.sleep(0)
asyncio.run(main())
"""


def test_killed_while_shipping(on_wheel: Databases, tmp_path: Path) -> None:
    target = on_wheel.new()
    told = set[bytes]()
    for after in (200, 777):
        command = [sys.executable, "-c", SHIPPING, str(tmp_path), target.dsn()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as worker:
            assert worker.stdout is not None
            lines = []
            for line in worker.stdout:
                lines.append(line)
                if len(lines) == after:
                    worker.kill()
        whole = [line.split() for line in lines if line.startswith(b"told ") and line.endswith(b"\n")]
        told |= {bytes.fromhex(words[1].decode()) for words in whole}

    async def adopt() -> None:
        async with opened(target) as pool:
            writer = Writer(pool, PEPPER_KEY)

            async def append(spool: str, records: list[bytes]) -> None:
                await writer.append(spool, records)

            spool = Spool(tmp_path, ledger_options())
            ship = Shipper(spool, append, ledger_options())
            running = asyncio.create_task(ship.run())
            await until(lambda: ship.stats.adopted == 2)
            assert await ship.drain(10)
            await running
            async with pool.acquire() as connection:
                rows = [row[0].bytes for row in await connection.fetch("SELECT id FROM requests")]
                assert len(rows) == len(set(rows)) <= len(told) + 2
                assert told <= set(rows)
                assert (await verify(connection, PEPPER_KEY)).faults == []

    asyncio.run(adopt())
