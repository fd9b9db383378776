"""One key, four gateways, 200 streams, whole minutes: how much of the limit is settled in each window.

The gateways, one auth-service, PostgreSQL, Redis, a pool with the scripted engine and the clients share the machine.
"""

import argparse
import asyncio
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from helixflow.db.embedded import Embedded
from helixflow.db.target import connect
from perf import lab
from tests.integration.accounts import Platform, platform
from tests.integration.stack import context
from tests.integration.wire import CHAT, Answer, Line, chat, request

GATEWAYS = 4
STREAMS = 200
LIMIT = 10_000
"""Tokens a minute."""
TOKENS = (20, 120)
"""Shortest and longest answer."""
LEFT = 0.1
"""The part of the streams whose client goes away after a few events."""
MINUTE_S = 60
RETRY_S = (0.2, 1.0)
"""A refused client comes back after this time (seconds), whatever Retry-After says: the limit is under pressure."""
SETTLED_S = 15.0
"""Time for the last rows to arrive (seconds)."""
ENGINE = {"pool_slots": "256", "pool_script_step_ms": "10"}
QUERY = """
SELECT extract(epoch FROM date_trunc('minute', at))::bigint AS minute,
    sum(prompt_tokens + completion_tokens)::bigint AS tokens, count(*) AS requests,
    count(*) FILTER (WHERE finish = 'cancelled') AS cancelled, count(DISTINCT gateway) AS gateways
FROM requests WHERE key_id = $1 GROUP BY 1 ORDER BY 1
"""


@contextlib.contextmanager
def running(redis: bool) -> Iterator[Platform]:
    """Everything, with four gateways; `redis`: what counts."""
    with tempfile.TemporaryDirectory(prefix="helix-limits-") as folder, contextlib.ExitStack() as exits:
        certs = Path(folder) / "certs"
        command = [sys.executable, "-m", "helixflow", "pki", "init", "--dir", str(certs), "--key-type", "ecdsa-p256"]
        subprocess.run(command, check=True, capture_output=True)
        url = ""
        if redis:
            sockets = f"{folder}/redis.sock"
            server = subprocess.Popen(
                ["redis-server", "--port", "0", "--unixsocket", sockets, "--save", "", "--loglevel", "warning"],
                stdout=subprocess.DEVNULL,
                cwd=folder,
            )
            exits.callback(server.wait)
            exits.callback(server.terminate)
            url = f"unix://{sockets}"
        options = {f"HELIX_{name.upper()}": value for name, value in ENGINE.items()}
        yield exits.enter_context(platform(certs, gateways=GATEWAYS, **options, HELIX_REDIS_URL=url))


class Proof:
    """One backend."""

    def __init__(self, started: Platform, windows: int) -> None:
        self._platform = started
        self._windows = windows
        key = started.json(
            "key",
            "add",
            "limited",
            "--user",
            "owner@localhost",
            "--tokens-per-minute",
            str(LIMIT),
            "--tokens-per-day",
            "1G",
        )
        self._key = key["key"]["id"]
        self._secret = key["secret"]
        self._tls = context(started.certs)
        self.answers: dict[str, int] = {}

    async def run(self) -> list[Any]:
        """Streams through whole windows; what the ledger says of each."""
        first = (time.time() // MINUTE_S + 1) * MINUTE_S
        end = first + self._windows * MINUTE_S
        # Everybody is there a moment before the first window begins.
        await asyncio.sleep(max(0.0, first - 2 - time.time()))
        await asyncio.gather(*(self._client(number, end) for number in range(STREAMS)))
        rows = [row for row in await self._settled() if first <= row["minute"] < end]
        return [(row["tokens"], row["requests"], row["cancelled"], row["gateways"]) for row in rows]

    async def _client(self, number: int, end: float) -> None:
        draw = random.Random(number)
        gateway = self._platform.gateways[number % GATEWAYS]
        line = Line(int(gateway.address.rpartition(":")[2]), self._tls)
        while time.time() < end:
            body = chat(draw.randint(*TOKENS), stream=True, stream_options={"include_usage": True})
            data = request(CHAT, body, self._secret, f"limits-{number}")
            if draw.random() < LEFT:
                status, _ = await line.leave(data, draw.randint(1, 10))
            else:
                answer: Answer = await line.ask(data)
                status = answer.status
            self.answers[str(status)] = self.answers.get(str(status), 0) + 1
            if status != 200:
                await asyncio.sleep(draw.uniform(*RETRY_S))
        line.close()

    async def _settled(self) -> list[Any]:
        """The ledger's sums by minute, once they are those of the limits: rows take a moment."""
        database = await connect(Embedded(self._platform.place / "postgres").target, search_path="helixflow")
        try:
            async with asyncio.timeout(SETTLED_S):
                while True:
                    rows = list(await database.fetch(QUERY, self._key))
                    query = "SELECT sum(used)::bigint FROM limit_budgets WHERE subject = $1"
                    if await database.fetchval(query, f"key:{self._key}") == sum(row["tokens"] for row in rows):
                        return rows
                    await asyncio.sleep(0.1)
        finally:
            await database.close()


def lines(backend: str, found: list[Any]) -> list[str]:
    """One line of the table for each window."""
    return [
        f"| {backend} | {number} | {tokens:,} | {tokens / LIMIT:.1%} | {requests:,} | {cancelled:,} | {gateways} |"
        for number, (tokens, requests, cancelled, gateways) in enumerate(found, 1)
    ]


def main() -> None:
    """Measures and writes `perf/results/limits.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4, help="whole minutes for each backend")
    options = parser.parse_args()
    rows = []
    shares = []
    for backend in ("PostgreSQL", "Redis"):
        with running(backend == "Redis") as started:
            proof = Proof(started, options.windows)
            found = uvloop.run(proof.run())
        print(f"{backend}: {found}, answers {proof.answers}", flush=True)
        rows += lines(backend, found)
        shares += [tokens / LIMIT for tokens, *_ in found]
    text = f"""# One limit over four gateways

{lab.machine()}
- method: `perf/limits_proof.py`: {GATEWAYS} gateways with one worker each, auth-service, pool with the scripted
  engine (10 ms a step), clients on one machine; {STREAMS} clients, each with one stream at a time of {TOKENS[0]} to
  {TOKENS[1]} tokens, one in ten left by its client after a few events; a refused client comes back after
  {RETRY_S[0]:g} to {RETRY_S[1]:g} s. One key with {LIMIT:,} tokens a minute. A window is a whole minute of UTC; its
  tokens are those that the ledger has settled for the requests admitted in it (prompt and completion, streams that were
  left included).

| backend | window | tokens | of the limit | requests | of them left | gateways |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

From {min(shares):.1%} to {max(shares):.1%}; the goal is 95 to 102 % in every window.
"""
    lab.write("limits.md", text)


if __name__ == "__main__":
    main()
