"""Tenants with many clients on one pool: the pool, its engine and its client in this process, without a gateway."""

import contextlib
import json
import random
import select
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helixflow.core_rs import Call, GenerateRequest, Owner, Pool, PoolClient, PoolOptions, Prompt
from helixflow.engine.base import Engine
from perf import lab
from perf.bench_engine import SHAPE, write_weights

MODEL = "crowd"
DEMO = lab.ROOT / "engines" / "demo"
TOKENISER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Clients of one organisation, each of which sends its next request when the last one is answered."""

    organisation: int
    clients: int
    prompt: int
    """Tokens of a prompt; no two are alike."""
    answer: int
    prompts: int = 1
    """Prompts of one request."""
    choices: int = 1
    weight: float = 1.0


@dataclass(slots=True)
class Seen:
    """What the clients of one tenant saw while it was measured. Tokens: of requests that ended."""

    first_token_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between two pieces of one stream."""
    pieces: int = 0
    """Of streams: about a token each."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class _Client:
    tenant: int
    began: float
    last: float = 0.0


def checkpoint(directory: Path) -> Path:
    """An 88 M-parameter Llama shape with random weights and the demo model's tokeniser."""
    directory.mkdir(parents=True)
    config = {**SHAPE, "vocab_size": json.loads((DEMO / "config.json").read_text())["vocab_size"]}
    (directory / "config.json").write_text(json.dumps(config))
    for name in TOKENISER:
        shutil.copy(DEMO / name, directory / name)
    write_weights(directory)
    return directory


@contextlib.contextmanager
def serving(model: Path, engine: Engine, **options: Any) -> Iterator[tuple[Pool, PoolClient]]:
    """A pool that serves, and a client that is connected to it."""
    pool = Pool(str(model), PoolOptions(model_id=MODEL, queue_requests=4096, **options))
    client = PoolClient([pool.serve("127.0.0.1:0", None)], None)
    thread = threading.Thread(target=pool.run, args=(engine,))
    thread.start()
    try:
        while not client.models():
            time.sleep(0.01)
        yield pool, client
    finally:
        client.close()
        pool.stop()
        thread.join()
        engine.close()


class Crowd:
    """Keeps the clients of some tenants busy for a while."""

    def __init__(self, client: PoolClient, tenants: Sequence[Tenant], vocabulary: int) -> None:
        self._client = client
        self._tenants = tenants
        self._draw = random.Random(5)
        self._vocabulary = vocabulary
        self._calls: dict[int, tuple[Call, _Client]] = {}
        self._seen = [Seen() for _ in tenants]
        self._from = 0.0

    def run(self, warmup_s: float, seconds: float) -> list[Seen]:
        """Sends for `warmup_s` plus `seconds`, measures the latter, and cancels what is left."""
        self._from = time.monotonic() + warmup_s
        until = self._from + seconds
        for number, tenant in enumerate(self._tenants):
            for _ in range(tenant.clients):
                self._send(number)
        while time.monotonic() < until:
            select.select([self._client.fileno()], [], [], 0.1)
            for call in self._client.ready():
                self._hear(call)
        for left, _ in self._calls.values():
            left.cancel()
        self._calls.clear()
        return self._seen

    def _send(self, number: int) -> None:
        tenant = self._tenants[number]
        ids = [
            [self._draw.randrange(300, self._vocabulary) for _ in range(tenant.prompt)] for _ in range(tenant.prompts)
        ]
        name = tenant.organisation.to_bytes(16)
        request = GenerateRequest(
            request_id="crowd",
            model=MODEL,
            prompts=[Prompt.tokens(prompt) for prompt in ids],
            n=tenant.choices,
            max_tokens=tenant.answer,
            ignore_eos=True,
            timeout_ms=3_600_000,
            owner=Owner(prefixes=name, organisation=name, key=name, organisation_weight=tenant.weight),
        )
        call = self._client.complete(request, completion_id="crowd", created=0, stream=True, include_usage=True)
        self._calls[call.id] = (call, _Client(number, time.monotonic()))

    def _hear(self, number: int) -> None:
        if number not in self._calls:  # told once more what was taken already
            return
        call, client = self._calls[number]
        now = time.monotonic()
        seen = self._seen[client.tenant]
        pieces = call.take().count(b'"text":"')
        if now >= self._from:
            seen.pieces += pieces
        if pieces and client.last >= self._from:
            seen.gaps_s.append(now - client.last)
        elif pieces and not client.last and client.began >= self._from:
            seen.first_token_s.append(now - client.began)
        if pieces:
            client.last = now
        if call.done:
            del self._calls[number]
            usage = call.usage
            if usage is not None and now >= self._from:
                seen.prompt_tokens += usage.prompt_tokens * self._tenants[client.tenant].choices
                seen.completion_tokens += usage.completion_tokens
            self._send(client.tenant)
