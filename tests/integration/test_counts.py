"""10,000 mixed requests: what the clients saw, the ledger, the gateway's counters and the limits agree exactly."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import uvloop

from helixflow.db.embedded import Embedded
from helixflow.db.target import connect
from helixflow.limits.model import Metric

from .accounts import Platform, platform
from .stack import context
from .wire import CHAT, COMPLETIONS, STATUS, Answer, Line, chat, request

REQUESTS = 10_000
LINES = 40
PRICE = {"prompt": 500, "cached": 100, "completion": 2000}
"""Nano units a token."""
UNKNOWN = "hf-" + "0" * 49
"""Well formed it is not, known even less."""
LONG = 3000
"""Tokens of an answer that its client does not wait for: seconds."""

WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
WEIGHTS = {
    "chat": 30, "chat_stream": 14, "chat_choices": 6, "completion": 10, "completion_stream": 6, "prompts": 4,
    "tokenize": 6, "detokenize": 3, "invalid": 4, "not_json": 2, "unknown_model": 3, "too_long": 1, "unknown_key": 2,
    "few_requests": 2, "few_tokens": 2, "few_at_once": 2, "in_a_hurry": 1, "left": 3, "left_early": 1,
}  # fmt: skip
UNRECORDED = ("invalid", "not_json", "unknown_key")
"""Refused before anything is counted."""


@dataclass(slots=True)
class Seen:
    """One request as its client saw it."""

    kind: str
    status: int = 0
    code: str = ""
    tokens: tuple[int, int, int] = (0, 0, 0)
    """Prompt, of it cached, completion; of a stream that was left: at least so many."""

    @property
    def recorded(self) -> bool:
        """Whether the ledger must know it."""
        return self.kind not in UNRECORDED and self.kind != "left_early" and self.status != 429


HELD = """
SELECT coalesce(sum(held), 0) FROM limit_holds
WHERE metric > $1 OR to_timestamp(window_start + 60) > clock_timestamp()
"""
"""What gateways hold of windows that are not over; $1: the last metric of minutes. Of others nobody needs it back."""


@dataclass
class Run:
    """What is left when the load is over."""

    platform: Platform
    keys: dict[str, dict[str, Any]]
    seen: dict[str, Seen] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    used: dict[tuple[str, int], int] = field(default_factory=dict)
    """By subject and metric: what the limits have counted, all windows together."""
    counters: dict[str, Any] = field(default_factory=dict)

    def line(self) -> Line:
        """A connection to the gateway."""
        return Line(int(self.platform.gateways[0].address.rpartition(":")[2]), context(self.platform.certs))

    def exported(self) -> list[dict[str, Any]]:
        """The ledger's rows as the command line exports them."""
        return [json.loads(line) for line in self.platform.run("usage", "export", "--format", "jsonl").splitlines()]


def completion(draw: random.Random, **options: Any) -> dict[str, Any]:
    return {"model": "gpt-4", "prompt": words(draw), "max_tokens": draw.randint(1, 6), "ignore_eos": True, **options}


def words(draw: random.Random) -> str:
    return " ".join(draw.choices(("you", "and", "the", "story"), k=draw.randint(1, 12)))


def few(draw: random.Random, **options: Any) -> dict[str, Any]:
    return {**chat(draw.randint(1, 6)), **options}


WRONG: tuple[dict[str, Any], ...] = (
    {"max_tokens": -1}, {"n": 0}, {"messages": 5}, {"echo": True}, {"temperature": "hot"},
)  # fmt: skip
MAKE: dict[str, Callable[[random.Random], tuple[str, Any]]] = {
    "chat_stream": lambda draw: (CHAT, few(draw, **WITH_USAGE)),
    "chat_choices": lambda draw: (CHAT, few(draw, n=draw.randint(2, 3), **draw.choice(({}, WITH_USAGE)))),
    "completion": lambda draw: (COMPLETIONS, completion(draw)),
    "completion_stream": lambda draw: (COMPLETIONS, completion(draw, **WITH_USAGE)),
    "prompts": lambda draw: (COMPLETIONS, completion(draw, prompt=[words(draw), "Hello"], n=2)),
    "tokenize": lambda draw: ("/tokenize", {"model": "gpt-4", "prompt": words(draw)}),
    "detokenize": lambda draw: ("/detokenize", {"model": "gpt-4", "tokens": [draw.randrange(1000)]}),
    "invalid": lambda draw: (CHAT, few(draw, **draw.choice(WRONG))),
    "not_json": lambda draw: (draw.choice((CHAT, COMPLETIONS, "/tokenize")), b'{"model": "gpt-4", '),
    "unknown_model": lambda draw: (CHAT, few(draw, model="no-such-model")),
    "too_long": lambda draw: (COMPLETIONS, completion(draw, prompt="the " * 5000)),
    "left": lambda draw: (CHAT, chat(LONG, stream=True)),
    "left_early": lambda draw: (CHAT, chat(LONG)),
}
"""Path and body of each kind; of the others, a plain chat."""


class Load:
    """The clients."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._draw = random.Random(11)
        self._left = REQUESTS

    async def run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(LINES)))

    async def _client(self) -> None:
        line, other = self._run.line(), self._run.line()
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        while self._left:
            self._left -= 1
            number = REQUESTS - self._left
            kind = self._draw.choices(kinds, weights)[0]
            path, body = MAKE[kind](self._draw) if kind in MAKE else (CHAT, few(self._draw))
            secret = UNKNOWN if kind == "unknown_key" else self._run.keys.get(kind, self._run.keys["main"])["secret"]
            name = f"{kind}-{number}"
            seen = self._run.seen[name] = Seen(kind)
            hurry = {"x_request_timeout_ms": "1"} if kind == "in_a_hurry" else {}
            data = request(path, body, secret, name, **hurry)
            if kind == "left":
                events = self._draw.randint(1, 8)
                seen.status, part = await other.leave(data, events)
                seen.tokens = (0, 0, part.count(b'"content":" '))
            elif kind == "left_early":
                await other.leave(data, 0)
            else:
                note(seen, await line.ask(data))
        line.close()


def note(seen: Seen, answer: Answer) -> None:
    """Writes down what came back."""
    seen.status = answer.status
    if answer.status != 200:
        seen.code = answer.code
        return
    document = answer.json() if b"content-length: " in answer.head else answer.events()[-1]
    usage = document.get("usage")
    if usage is not None:
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        seen.tokens = (usage["prompt_tokens"], cached, usage["completion_tokens"])


@pytest.fixture(scope="module")
def made(certs: Path) -> Iterator[Run]:
    """Everything runs, and the keys are there."""
    with platform(certs, HELIX_POOL_SCRIPT_STEP_MS="1", HELIX_POOL_SLOTS="64") as started:
        started.run("price", "set", "helixflow-demo", "--prompt", "0.5", "--cached", "0.1", "--completion", "2")
        limits = {
            "main": ("--tokens-per-minute", "1G", "--tokens-per-day", "10G", "--cost-per-day", "1000"),
            "few_requests": ("--requests-per-minute", "40", "--tokens-per-day", "10G"),
            "few_tokens": ("--tokens-per-day", "600"),
            "few_at_once": ("--concurrent-requests", "1", "--tokens-per-day", "10G"),
        }
        keys = {
            name: started.json("key", "add", name, "--user", "owner@localhost", *options)
            for name, options in limits.items()
        }
        yield Run(started, keys)


@pytest.fixture(scope="module")
def run(made: Run) -> Run:
    """The load is over, and everything that was counted has arrived."""
    uvloop.run(_load(made))
    return made


async def _load(run: Run) -> None:
    database = await connect(Embedded(run.platform.place / "postgres").target, search_path="helixflow")
    try:
        await Load(run).run()
        run.counters = await _settled(run, database)
        run.rows = [dict(row) for row in await database.fetch("SELECT * FROM requests ORDER BY id")]
        counted = await database.fetch("SELECT subject, metric, sum(used)::bigint FROM limit_budgets GROUP BY 1, 2")
        run.used = {(subject, metric): used for subject, metric, used in counted}
    finally:
        await database.close()


async def _settled(run: Run, database: Any) -> dict[str, Any]:
    """Waits until the gateway has handed over what it knew; its counters."""
    line = run.line()
    while True:
        found: dict[str, Any] = (await line.ask(request(STATUS, None, run.platform.admin_key))).json()
        ledger = found["ledger"]
        held = await database.fetchval(HELD, Metric.TOKENS_PER_MINUTE)
        told = found["front"].get("requests", 0) > len(run.seen)
        if told and not ledger["pending"] and ledger["shipped"] == ledger["ended"] and not held:
            line.close()
            return found
        await asyncio.sleep(0.05)


def test_a_price_reaches_the_gateway(made: Run) -> None:
    """A moment after it is set; what is sent before costs nothing."""

    async def probe() -> None:
        line = made.line()
        for number in range(100):
            seen = made.seen[f"probe-{number}"] = Seen("probe")
            note(seen, await line.ask(request(CHAT, chat(1), made.keys["main"]["secret"], f"probe-{number}")))
            # Nobody tells when a row has arrived.
            while not (rows := made.exported()) or rows[-1]["request_id"] != f"probe-{number}":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            if Decimal(rows[-1]["cost"]):
                break
            seen.kind = "unpriced"
        line.close()

    asyncio.run(probe())


def test_ten_thousand_requests_of_all_kinds_are_through(run: Run) -> None:
    kinds = Counter(seen.kind for seen in run.seen.values())
    assert kinds.total() >= REQUESTS
    assert min(kinds[kind] for kind in WEIGHTS) > 50


def test_every_recorded_request_has_one_row_as_its_client_saw_it(run: Run) -> None:
    rows = {row["request_id"]: row for row in run.rows}
    assert len(rows) == len(run.rows), "a request has two rows"
    must = {name for name, seen in run.seen.items() if seen.recorded}
    may = {name for name, seen in run.seen.items() if seen.kind == "left_early"}
    assert must - rows.keys() == set()
    assert rows.keys() - must - may == set()
    for name, row in rows.items():
        seen = run.seen[name]
        tokens = (row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"])
        if seen.kind in ("left", "left_early"):
            assert (row["status"], row["finish"], row["error"]) == (499, "cancelled", ""), row
            assert seen.tokens[2] <= tokens[2] < LONG, row
        else:
            assert (row["status"], row["error"], tokens) == (seen.status, seen.code, seen.tokens), row


def test_costs_are_those_of_the_prices(run: Run) -> None:
    for row in run.rows:
        cached, seen = row["cached_tokens"], run.seen[row["request_id"]]
        cost = (row["prompt_tokens"] - cached) * PRICE["prompt"] + cached * PRICE["cached"]
        cost += row["completion_tokens"] * PRICE["completion"]
        assert row["cost"] == (0 if seen.kind == "unpriced" else cost), row


def test_the_gateway_counts_the_same(run: Run) -> None:
    counts: dict[str, int] = run.counters["requests"]
    assert counts["requests"] == len(run.rows)
    for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        assert counts[name] == sum(row[name] for row in run.rows)
    assert part(counts, "finish.") == Counter(row["finish"] for row in run.rows)
    assert part(counts, "error.") == Counter(row["error"] for row in run.rows if row["error"])
    refused = Counter(seen.code for seen in run.seen.values() if seen.status == 429)
    assert min(refused["rate_limit_exceeded"], refused["insufficient_quota"]) > 50
    assert part(counts, "refused.") == refused
    assert counts["refused"] == refused.total()
    ledger = run.counters["ledger"]
    assert (ledger["begun"], ledger["ended"], ledger["shipped"]) == (len(run.rows),) * 3


def test_the_front_door_has_counted_too(run: Run) -> None:
    front = run.counters["front"]
    assert front["accepted"] >= LINES
    assert front["requests"] > len(run.seen)
    for trouble in ("refused", "crowded", "crowded_client", "silent", "stalled", "floods", "revoked"):
        assert front[trouble] == 0, trouble


def part(counts: dict[str, int], prefix: str) -> dict[str, int]:
    """The counters that begin so."""
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}


@pytest.mark.parametrize("key", ["main", "few_requests", "few_tokens", "few_at_once"])
def test_limits_were_settled_to_the_token(run: Run, key: str) -> None:
    """Streams that were left are among them: what had come is counted, and nothing else of what they had reserved."""
    identifier = run.keys[key]["key"]["id"]
    rows = [row for row in run.rows if str(row["key_id"]) == identifier]
    assert rows
    used = {metric: used for (subject, metric), used in run.used.items() if subject == f"key:{identifier}"}
    assert used.pop(Metric.TOKENS_PER_DAY) == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
    assert used.pop(Metric.COST_PER_DAY, None) == (sum(row["cost"] for row in rows) if key == "main" else None)
    assert not used
    if key == "main":
        left = [row["completion_tokens"] for row in rows if row["finish"] == "cancelled"]
        assert len(left) > 200
        assert 0 < sum(left) < len(left) * LONG / 10


def test_usage_and_export_say_the_same(run: Run) -> None:
    sums = run.platform.json("usage", "show", "--by", "endpoint")["data"]
    for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "cost"):
        assert sum(line[name] for line in sums) == sum(row[name] for row in run.rows)
    assert {line["endpoint"]: line["requests"] for line in sums} == Counter(row["endpoint"] for row in run.rows)
    failed = sum(row["status"] >= 400 and row["finish"] != "cancelled" for row in run.rows)
    assert sum(line["errors"] for line in sums) == failed
    lines = run.exported()
    assert sorted(line["request_id"] for line in lines) == sorted(row["request_id"] for row in run.rows)
    assert sum(line["completion_tokens"] for line in lines) == sum(row["completion_tokens"] for row in run.rows)
    assert sum(Decimal(line["cost"]) for line in lines) * 10**9 == sum(row["cost"] for row in run.rows)


def test_the_chain_of_the_day_holds(run: Run) -> None:
    report = run.platform.json("audit", "verify")
    assert report["ok"]
    assert report["rows"] == len(run.rows)
