"""Limits over four gateways with processes and a store of their own: together they admit what one would."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helixflow.db.embedded import Embedded
from helixflow.db.target import connect
from helixflow.limits.model import Metric
from helixflow.limits.store import HOLD_S

from .accounts import Platform, platform
from .stack import Process, context
from .wire import CHAT, Line, chat, request

GATEWAYS = 4
STREAMS = 200
LEFT = 150
"""Tokens of an answer that its client does not wait for."""
TOKENS_PER_MINUTE = 10_000
FILLING_S = 4.0
"""The window is full well before that, and its end must not come within it (seconds)."""
AT_ONCE = 6
ENDLESS = 4000
"""Tokens of a stream that does not end by itself within a test."""


@dataclass
class Killed:
    """What a gateway held when it was killed."""

    gateway: Process | None = None
    key: str = ""
    at: float = 0.0
    permits: int = 0
    lines: list[Line] = field(default_factory=list)
    """Streams at the other gateways, which go on."""


@pytest.fixture(scope="module")
def four(certs: Path) -> Iterator[Platform]:
    with platform(certs, gateways=GATEWAYS, HELIX_POOL_SCRIPT_STEP_MS="6", HELIX_POOL_SLOTS="256") as started:
        yield started


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests: streams of one test go on in the next."""
    with asyncio.Runner() as running:
        yield running


@pytest.fixture(scope="module")
def killed(four: Platform, runner: asyncio.Runner) -> Iterator[Killed]:
    """Handed from test to test: the time that a dead gateway's permits take to come back is used for another one."""
    found = Killed()
    yield found
    runner.run(hang_up(found.lines))


def port(process: Process) -> int:
    return int(process.address.rpartition(":")[2])


def new_key(four: Platform, *limits: str) -> dict[str, Any]:
    made: dict[str, Any] = four.json("key", "add", "a", "--user", "owner@localhost", *limits)
    return made


async def sql(four: Platform, query: str, *values: Any) -> list[Any]:
    database = await connect(Embedded(four.place / "postgres").target, search_path="helixflow")
    try:
        return list(await database.fetch(query, *values))
    finally:
        await database.close()


async def hang_up(lines: Sequence[Line]) -> None:
    for line in lines:
        line.close()
    await asyncio.sleep(0.01)  # the loop closes their sockets


async def try_all(four: Platform, key: str, gateways: Sequence[Process], name: str) -> list[tuple[Process, Line]]:
    """Endless streams, one for each of `gateways`, at once; those that were let in. The others must be refused well."""
    data = request(CHAT, chat(ENDLESS, stream=True), key, name)
    lines = [Line(port(gateway), context(four.certs)) for gateway in gateways]
    answers = await asyncio.gather(*(line.start(data) for line in lines))
    refused = {answer.code for answer in answers if answer is not None}
    assert refused <= {"rate_limit_exceeded"}
    assert {answer.header("retry-after") for answer in answers if answer is not None} <= {"1"}
    await hang_up([line for line, answer in zip(lines, answers, strict=True) if answer is not None])
    all_ = zip(gateways, lines, answers, strict=True)
    return [(gateway, line) for gateway, line, answer in all_ if answer is None]


def test_requests_at_once_are_counted_over_all_gateways(four: Platform, killed: Killed, runner: asyncio.Runner) -> None:
    key = new_key(four, "--concurrent-requests", str(AT_ONCE))["secret"]

    async def act() -> list[tuple[Process, Line]]:
        let_in = await try_all(four, key, four.gateways * 10, "crowd")
        assert len(let_in) == AT_ONCE
        assert await try_all(four, key, four.gateways, "more") == []
        gateway, line = let_in.pop()
        line.close()
        # Nobody tells when the gateway has noticed.
        while not (next_in := await try_all(four, key, [gateway], "next")):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert await try_all(four, key, four.gateways * 2, "more") == []
        return let_in + next_in

    let_in = runner.run(asyncio.wait_for(act(), 20))
    victim = let_in[0][0]
    worker = Path(f"/proc/{victim.popen.pid}/task/{victim.popen.pid}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    killed.gateway, killed.key, killed.at = victim, key, time.monotonic()
    killed.permits = sum(gateway is victim for gateway, _ in let_in)
    killed.lines = [line for _, line in let_in]


def test_a_full_window_is_full_at_all_gateways(four: Platform, runner: asyncio.Runner) -> None:
    """200 streams, some of which are left: what is settled stays within the limit, and comes up to it."""
    key = new_key(four, "--tokens-per-minute", str(TOKENS_PER_MINUTE), "--tokens-per-day", "1M")
    draw = random.Random(7)
    end = time.monotonic()

    async def client(number: int) -> None:
        line = Line(port(four.gateways[number % GATEWAYS]), context(four.certs))
        while time.monotonic() < end:
            leaves = draw.random() < 0.2
            # What is left must not be over before anybody can see that it is left.
            tokens = LEFT if leaves else draw.randint(5, 25)
            body = chat(tokens, stream=True, stream_options={"include_usage": True})
            data = request(CHAT, body, key["secret"], f"fill-{number}")
            if leaves:
                await line.leave(data, 3)
            elif (await line.ask(data)).status == 429:
                await asyncio.sleep(0.2)
        line.close()

    async def fill() -> None:
        nonlocal end
        if (left := 60 - time.time() % 60) < FILLING_S + 2:
            await asyncio.sleep(left)
        end = time.monotonic() + FILLING_S
        await asyncio.gather(*(client(number) for number in range(STREAMS)))

    async def settled() -> tuple[int, int]:
        """By the ledger, and by the limits, once they agree: nobody tells when everything has arrived."""
        subject = f"key:{key['key']['id']}"
        while True:
            rows = await sql(
                four,
                "SELECT coalesce(sum(prompt_tokens + completion_tokens), 0)::bigint, count(DISTINCT gateway), "
                "count(*) FILTER (WHERE finish = 'cancelled') FROM requests WHERE key_id = $1",
                key["key"]["id"],
            )
            used = await sql(four, "SELECT used FROM limit_budgets WHERE subject = $1", subject)
            held = await sql(four, "SELECT sum(held) FROM limit_holds WHERE subject = $1", subject)
            if used[0][0] == rows[0][0] and not held[0][0]:
                break
            await asyncio.sleep(0.1)
        counted = await sql(four, "SELECT sum(used)::bigint FROM limit_counters WHERE subject = $1", subject)
        assert rows[0][1] == GATEWAYS
        assert rows[0][2] > 5
        return rows[0][0], counted[0][0]

    runner.run(asyncio.wait_for(fill(), 20))
    tokens, counted = runner.run(asyncio.wait_for(settled(), 5))
    assert counted == tokens
    assert 0.95 * TOKENS_PER_MINUTE <= tokens <= TOKENS_PER_MINUTE


def test_a_gateway_that_stops_tells_what_was_used_and_returns_what_it_holds(
    four: Platform, killed: Killed, runner: asyncio.Runner
) -> None:
    key = new_key(four, "--tokens-per-minute", "1M", "--tokens-per-day", "1G", "--concurrent-requests", "100")
    gateway = killed.gateway  # no endless stream keeps it: they died with its first worker
    assert gateway is not None, "the test that kills it comes before"
    four.gateways.remove(gateway)
    subject = f"key:{key['key']['id']}"

    async def ask() -> int:
        line = Line(port(gateway), context(four.certs))
        usage = [(await line.ask(request(CHAT, chat(3), key["secret"]))).json()["usage"] for _ in range(20)]
        gateway.popen.send_signal(signal.SIGTERM)
        line.close()
        return sum(each["total_tokens"] for each in usage)

    used = runner.run(asyncio.wait_for(ask(), 10))
    assert gateway.wait() == 0
    query = "SELECT metric, sum(used)::bigint FROM limit_budgets WHERE subject = $1 GROUP BY 1"
    assert [tuple(row) for row in runner.run(sql(four, query, subject))] == [(Metric.TOKENS_PER_DAY, used)]
    assert runner.run(sql(four, "SELECT * FROM limit_holds WHERE subject = $1", subject)) == []


def test_permits_of_a_dead_gateway_come_back(four: Platform, killed: Killed, runner: asyncio.Runner) -> None:
    """As many as it had, and no more: when its spool is adopted, at the latest when it was silent for the hold time."""
    assert killed.permits, "the test that kills it comes before"

    async def act() -> int:
        came_back = 0
        while came_back < killed.permits:
            let_in = await try_all(four, killed.key, four.gateways, "again")
            killed.lines += [line for _, line in let_in]
            came_back += len(let_in)
            assert time.monotonic() - killed.at < HOLD_S + 3
            await asyncio.sleep(0.2)
        assert await try_all(four, killed.key, four.gateways, "again") == []
        return came_back

    assert runner.run(asyncio.wait_for(act(), 25)) == killed.permits
