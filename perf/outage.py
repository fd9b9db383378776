"""PostgreSQL away for minutes under an open load, and a gateway killed midway: what is lost, and what clients notice.

Two gateways, one auth-service, one PostgreSQL, one pool with the scripted engine, and the clients share the machine.
Clients know both gateways: whoever gets no answer, or 503, asks the other one.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from helixflow.auth.keys import make
from helixflow.db.embedded import Embedded
from helixflow.db.target import connect
from perf import lab
from tests.integration.accounts import Platform, platform
from tests.integration.pressure import Pressure, Sent, Verdict, answered, judge
from tests.integration.stack import Process, context
from tests.integration.wire import CHAT, STATUS, Line, chat, request

KEYS = 20
CLIENTS = 64
BEFORE_S = 30.0
"""Load before the outage, for comparison, and after it (seconds)."""
WARM_S = 5.0
"""The beginning of the load, in which clients connect, is not compared with (seconds)."""
SHIPPED_S = 600.0
"""Everything must be in the ledger within this time after the database is back (seconds)."""
AROUND_S = (1.0, 5.0)
"""What belongs to the gateway's death (seconds before and after it)."""
PROBE_S = 1.0
"""How often an unknown key is tried (seconds)."""


@dataclass
class Seen:
    """What the run has found, beside its requests."""

    down_s: float = 0.0
    up_s: float = 0.0
    killed_s: float = 0.0
    """Seconds after the start of the load."""
    caught_up_s: float = 0.0
    """From the database's return until everything was in the ledger (seconds)."""
    spool_bytes: int = 0
    strangers: list[int] = field(default_factory=list)
    """Statuses that unknown keys got during the outage."""


@contextlib.contextmanager
def running() -> Iterator[Platform]:
    """Everything, with two gateways."""
    with tempfile.TemporaryDirectory(prefix="helix-outage-") as folder:
        certs = Path(folder) / "certs"
        command = [sys.executable, "-m", "helixflow", "pki", "init", "--dir", str(certs), "--key-type", "ecdsa-p256"]
        subprocess.run(command, check=True, capture_output=True)
        with platform(certs, gateways=2, HELIX_POOL_SLOTS="64") as started:
            yield started


def port(gateway: Process) -> int:
    """Of its endpoint."""
    return int(gateway.address.rpartition(":")[2])


def spools(gateway: Process) -> int:
    """Its own, and those that it has not adopted yet."""
    return sum(entry.is_dir() for entry in Path(gateway.environ["HELIX_LEDGER_SPOOL"]).iterdir())


def spooled(started: Platform) -> int:
    """Bytes in the spools of all gateways."""
    return sum(path.stat().st_size for path in started.place.glob("spool*/*/*.log"))


class Outage:
    """One run."""

    def __init__(self, started: Platform, rate: float, minutes: float) -> None:
        self.seen = Seen()
        self._platform = started
        self._rate = rate
        self._away_s = minutes * 60
        self._hands = ThreadPoolExecutor(1)  # a process dies with the thread that has started it
        keys = [started.json("key", "add", f"key{n}", "--user", "owner@localhost") for n in range(KEYS)]
        self._keys = [key["secret"] for key in keys]
        started.admin_key  # noqa: B018 - made now, while the database is there
        self._tls = context(started.certs)
        ports = [port(gateway) for gateway in started.gateways]
        self.load = Pressure(lambda: ports, self._tls, self._keys, "outage", clients=CLIENTS)

    async def run(self) -> Verdict:
        """Load, outage, end of the load, and the reckoning."""
        for gateway in self._platform.gateways:
            for key in ("demo-key", *self._keys):
                await self._ask(gateway, key)
        await asyncio.gather(self.load.run(self._rate, 2 * BEFORE_S + self._away_s), self._act(time.perf_counter()))
        rows = await self._arrived()
        return judge(self.load.sent, rows)

    async def _act(self, start: float) -> None:
        seen = self.seen
        database = self._platform.database
        assert database is not None
        await asyncio.sleep(BEFORE_S)
        seen.down_s = time.perf_counter() - start
        await self._do(database.stop, signal.SIGINT)
        probing = asyncio.create_task(self._strangers())
        await asyncio.sleep(self._away_s / 2)
        seen.killed_s = time.perf_counter() - start
        os.kill(lab.tree(self._platform.gateways[0].popen.pid)[-1], signal.SIGKILL)
        await asyncio.sleep(self._away_s / 2)
        probing.cancel()
        seen.spool_bytes = spooled(self._platform)
        await self._do(database.start)
        seen.up_s = time.perf_counter() - start
        seen.caught_up_s = await self._caught_up()

    async def _strangers(self) -> None:
        """A key that nobody has issued, again and again."""
        while True:
            self.seen.strangers.append(await self._ask(self._platform.gateways[1], make()))
            await asyncio.sleep(PROBE_S)

    async def _caught_up(self) -> float:
        """Waits until the rows of everything before the database's return are in the ledger; how long that took."""
        began = time.perf_counter()
        wanted = len(answered(self.load.sent))
        while await self._count() < wanted:  # noqa: ASYNC110 - a table sends no event
            await asyncio.sleep(0.25)
        return time.perf_counter() - began

    async def _count(self) -> int:
        return int((await self._sql("SELECT count(*) FROM requests WHERE request_id LIKE 'outage-%'"))[0][0])

    async def _arrived(self) -> Sequence[Any]:
        """The rows once every gateway has handed over everything, or what is there when the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHIPPED_S):
                while not all([await self._shipped(each) for each in self._platform.gateways]):  # noqa: ASYNC110
                    await asyncio.sleep(0.25)
        query = "SELECT request_id, status, finish, completion_tokens FROM requests WHERE request_id LIKE 'outage-%'"
        return await self._sql(query)

    async def _shipped(self, gateway: Process) -> bool:
        line = Line(port(gateway), self._tls)
        ledger = (await line.ask(request(STATUS, None, self._platform.admin_key))).json()["ledger"]
        line.close()
        # What it has adopted counts as shipped, too.
        return spools(gateway) == 1 and not ledger["pending"] and ledger["shipped"] >= ledger["ended"]

    async def _sql(self, query: str) -> Sequence[Any]:
        database = await connect(Embedded(self._platform.place / "postgres").target, search_path="helixflow")
        try:
            return list(await database.fetch(query))
        finally:
            await database.close()

    async def _ask(self, gateway: Process, key: str) -> int:
        line = Line(port(gateway), self._tls)
        status = (await line.ask(request(CHAT, chat(1), key))).status
        line.close()
        return status

    async def _do(self, act: Any, *arguments: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._hands, act, *arguments)


def quantile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000 if ordered else 0.0


def phases(sent: Sequence[Sent], seen: Seen) -> list[tuple[str, list[Sent]]]:
    """The load before the outage, during it, and around the gateway's death."""
    around = (seen.killed_s - AROUND_S[0], seen.killed_s + AROUND_S[1])
    return [
        ("before", [one for one in sent if WARM_S <= one.at_s < seen.down_s]),
        (
            "away",
            [one for one in sent if seen.down_s <= one.at_s < seen.up_s and not around[0] <= one.at_s < around[1]],
        ),
        ("the gateway's death", [one for one in sent if around[0] <= one.at_s < around[1]]),
        ("after", [one for one in sent if one.at_s >= seen.up_s]),
    ]


def report(outage: Outage, verdict: Verdict, options: argparse.Namespace) -> str:
    """The result file."""
    seen = outage.seen
    parts = phases(outage.load.sent, seen)
    away = [one for one in outage.load.sent if seen.down_s <= one.at_s < seen.up_s]
    times = {name: [quantile([one.latency_s for one in part], share) for share in (0.5, 0.99)] for name, part in parts}
    rows = [f"| {name} | {len(part):,} | {times[name][0]:.2f} | {times[name][1]:.2f} |" for name, part in parts]
    strangers = ", ".join(f"{count} times {status}" for status, count in sorted(Counter(seen.strangers).items()))
    return f"""# PostgreSQL away, and a gateway killed

{lab.machine()}
- method: `perf/outage.py`: two gateways with one worker each, auth-service, embedded PostgreSQL, pool with the scripted
  engine and the clients on one machine; {options.rate:g} requests/s (open loop, TLS 1.3, kept alive, 2 tokens, {KEYS}
  keys without limits); PostgreSQL stopped for {options.minutes:g} min, the worker of one gateway killed (SIGKILL) in
  the middle of it. A client knows both gateways: without an answer, or after 503, it asks the other one and stays
  there. Counted is what such a client sees; latency is from the moment a request was due to its last answer.

| | | goal |
| --- | --- | --- |
| requests while PostgreSQL was away | {len(away):,} | |
| of these (known keys) served | {sum(one.served for one in away) / len(away):.4%} | at least 99.9 % |
| served by the second gateway that was asked, or later | {sum(len(one.tries) > 1 for one in away):,} | |
| answered requests without their row | {len(verdict.lost)} | 0 |
| rows twice | {len(verdict.duplicated)} | 0 |
| rows of nobody's request, or with other figures | {len(verdict.strange)} | 0 |
| rows of interrupted requests | {verdict.interrupted} | |
| answers to unknown keys meanwhile | {strangers} | none 200 |
| added p99 while away (ms) | {times["away"][1] - times["before"][1]:+.2f} | at most 1 |
| spools when PostgreSQL came back (MiB) | {seen.spool_bytes / 2**20:.1f} | |
| from then until every row was there (s) | {seen.caught_up_s:.1f} | |

| | requests | p50 (ms) | p99 (ms) |
| --- | --- | --- | --- |
{chr(10).join(rows)}

The gateway's death is apart: from {AROUND_S[0]:g} s before to {AROUND_S[1]:g} s after it, its clients wait for broken
connections and open new ones. Its next worker is told by the auth-service what PostgreSQL had said of the keys.
"""


def main() -> None:
    """Measures and writes `perf/results/outage.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long PostgreSQL is away")
    parser.add_argument("--rate", type=float, default=500.0, help="requests/s")
    options = parser.parse_args()
    gc.disable()  # a pause for a million objects would be the client's latency
    with running() as started:
        outage = Outage(started, options.rate, options.minutes)
        verdict = uvloop.run(outage.run())
        text = report(outage, verdict, options)
    lab.write("outage.md", text)


if __name__ == "__main__":
    main()
