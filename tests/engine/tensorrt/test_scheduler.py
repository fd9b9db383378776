"""Golden checkpoints behind a real pool: its scheduler cuts, mixes, reuses and copies, and the tokens stay the same."""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from helixflow import core_rs
from helixflow.engine.base import Batch, Candidates, Capacity, Engine, Float32, Sampling
from helixflow.engine.tensorrt.dense import dense_logits
from helixflow.engine.tensorrt.engine import RunOptions, TensorRtEngine
from helixflow.engine.tensorrt.options import AttentionForm, EngineOptions
from tests.engine.tensorrt.host_device import HostDevice
from tests.engine.tensorrt.rig import Golden, device_of, open_engine, spoil
from tests.engine.tensorrt.test_split import make_engine, new_device
from tests.pool.support import connect, finish

pytestmark = pytest.mark.long

SLOTS, MAX_LEN, STEP_TOKENS, TOKENS = 3, 160, 24, 24
FAMILIES = ("llama-tiny", "mistral-tiny", "qwen2-tiny", "qwen3-tiny")
TEMPERATURE = 0.8
SEEDED = {"temperature": TEMPERATURE, "top_p": 0.95, "top_k": 40, "min_p": 0.001, "n": 2}
# Of a logit, between the reference and the engine: a draw that it decides may go either way.
ROUNDING = 3e-5


class Watched:
    """An engine whose every choice is compared with the host's draw from the dense reference."""

    def __init__(self, golden: Golden, engine: TensorRtEngine) -> None:
        self.golden, self.engine = golden, engine
        self.held: list[list[int]] = [[] for _ in range(SLOTS)]
        self.chosen = self.left_open = 0
        self.wrong: list[str] = []

    def capacity(self) -> Capacity:
        return self.engine.capacity()

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        self.engine.copy_prefix(src, dst, length)
        self.held[dst] = self.held[src][:length]

    def close(self) -> None:
        self.engine.close()

    def step(self, batch: Batch) -> Candidates:
        answer = self.engine.step(batch)
        tokens, row = iter(batch.token_ids.tolist()), 0
        items = (array.tolist() for array in (batch.slots, batch.past, batch.counts, batch.wanted))
        for slot, past, count, wanted in zip(*items, strict=True):
            self.held[slot] = [*self.held[slot][:past], *itertools.islice(tokens, count)]
            row += wanted
            if wanted == 1 and answer.token_ids is not None and batch.sampling is not None:
                self.compare(self.held[slot], int(answer.token_ids[row - 1]), batch.sampling, row - 1)
        return answer

    def compare(self, ids: list[int], chosen: int, sampling: Sampling, row: int) -> None:
        if chosen < 0:
            self.left_open += not sampling.on_host[row]
            return
        self.chosen += 1
        spec, tensors = self.golden.spec, self.golden.tensors
        logits = dense_logits(spec, tensors.__getitem__, ids, MAX_LEN)[-1]
        random = np.random.default_rng(0)
        noises = [np.zeros_like(logits), *random.uniform(-ROUNDING, ROUNDING, (50, *logits.shape))]
        draws = (self.draw(np.asarray(logits + noise, np.float32), sampling, row) for noise in noises)
        if chosen not in draws:
            self.wrong.append(f"{chosen} behind {ids}")

    def draw(self, logits: Float32, sampling: Sampling, row: int) -> int:
        """The host's token."""
        greedy = sampling.inverse_temperature[row] == 0
        return core_rs.sample(
            logits,
            temperature=0.0 if greedy else TEMPERATURE,
            top_p=float(sampling.top_p[row]),
            top_k=int(sampling.top_k[row]),
            min_p=float(sampling.min_p[row]),
            seed=int(sampling.seed[row]),
            position=int(sampling.position[row]),
        )


@contextmanager
def pool(golden: Golden, engine: Engine) -> Iterator[tuple[core_rs.Pool, core_rs.PoolClient]]:
    """A pool that computes steps of few tokens."""
    options = core_rs.PoolOptions(model_id="golden", step_tokens=STEP_TOKENS)
    served = core_rs.Pool(str(golden.directory), options)
    client = None
    thread = threading.Thread(target=served.run, args=(engine,), daemon=True)
    try:
        address = served.serve("127.0.0.1:0", None)
        thread.start()
        client = connect(address)
        yield served, client
    finally:
        served.stop()
        thread.join(10)
        engine.close()


def opened(golden: Golden, form: AttentionForm) -> TensorRtEngine:
    """An engine whose caches are full of what a long run would have left."""
    options = EngineOptions(
        "fp32", SLOTS, MAX_LEN, attention=form, chunk_tokens=16, chunks=2, step_tokens=STEP_TOKENS, rows=8
    )
    if form == "split":
        device = new_device(golden.spec, options, "finite", "random")
        engine = make_engine(golden.spec, options, golden.tensors, RunOptions(), device)
    else:
        engine = open_engine(golden.spec, golden.tensors, options, RunOptions(), HostDevice("finite", "random"))
    spoil(engine)
    return engine


ONE = core_rs.Owner(prefixes=bytes(16), organisation=bytes(16), key=bytes(16))
"""One organisation: its requests start from each other's prefixes."""


def ask(golden: Golden, client: core_rs.PoolClient, number: int, tokens: int = TOKENS, **options: Any) -> core_rs.Call:
    """Asks for the continuation of a golden prompt."""
    request = core_rs.GenerateRequest(
        request_id=f"golden-{number}",
        model="golden",
        prompts=[core_rs.Prompt.tokens(golden.cases[number]["input_ids"])],
        max_tokens=tokens,
        ignore_eos=True,
        owner=ONE,
        **{"temperature": 0.0, "seed": number, **options},
    )
    return client.complete(request, completion_id="cmpl-1", created=0, stream=False)


def answers(golden: Golden, client: core_rs.PoolClient, **options: Any) -> list[core_rs.Call]:
    """Asks for the continuation of every golden prompt, all at once."""
    return [ask(golden, client, number, **options) for number in range(len(golden.cases))]


def choices(client: core_rs.PoolClient, call: core_rs.Call) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(finish(client, call))["choices"]
    return sorted(found, key=lambda choice: int(choice["index"]))


def continuation(golden: Golden, number: int, ids: list[int]) -> str:
    """The text of `ids` behind a golden prompt: its first space depends on what stands before."""
    tokenizer = Tokenizer.from_file(str(golden.directory / "tokenizer.json"))
    prompt = golden.cases[number]["input_ids"]
    return str(tokenizer.decode(prompt + ids))[len(tokenizer.decode(prompt)) :]


def logprobs(logits: Float32) -> Float32:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Float32 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


@pytest.mark.parametrize("form", ["posmask", "key_value_lengths", "split"])
@pytest.mark.parametrize("name", FAMILIES)
def test_golden_tokens_and_logits(name: str, form: AttentionForm) -> None:
    golden = Golden(name)
    engine = opened(golden, form)
    watched = Watched(golden, engine)
    with pool(golden, watched) as (served, client):
        # The last prompt is computed in one slot while another one becomes free: its prefix is copied there.
        longest = len(golden.cases) - 1
        order = [(longest, TOKENS), (0, 2), (1, TOKENS), (longest, TOKENS)]
        reused = [ask(golden, client, number, tokens) for number, tokens in order]
        for (number, tokens), call in zip(order, reused, strict=True):
            ids = golden.cases[number]["greedy_24"][:tokens]
            assert choices(client, call)[0]["text"] == continuation(golden, number, ids)
        greedy = answers(golden, client)
        looked_at = answers(golden, client, echo=True, logprobs=5)
        drawn = answers(golden, client, **SEEDED)
        for i, (case, logits, call, look) in enumerate(
            zip(golden.cases, golden.logits, greedy, looked_at, strict=True)
        ):
            expected = continuation(golden, i, case["greedy_24"])
            assert choices(client, call)[0]["text"] == expected
            # Of the whole prompt, and of the first token behind it.
            [choice] = choices(client, look)
            ids = [*case["input_ids"][1:], case["greedy_24"][0]]
            wanted = logprobs(logits)[np.arange(len(ids)), ids]
            got = choice["logprobs"]["token_logprobs"][1 : len(ids) + 1]
            assert np.abs(np.array(got) - wanted).max() <= 1e-3
            assert choice["text"].endswith(expected)
        texts = {choice["text"] for call in drawn for choice in choices(client, call)}
        assert len(texts) > len(golden.cases)
        stats = served.stats()
        assert stats.cached_tokens > 0
        assert stats.decode_tokens > 0
        assert not watched.wrong
        assert watched.left_open < watched.chosen / 20
        calls = device_of(engine).calls
        assert calls["copy_rows"] > 0
        assert calls["launch"] > 0
