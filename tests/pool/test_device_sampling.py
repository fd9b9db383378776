"""Engines that choose tokens themselves, and what the extension gives them for it."""

import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helixflow import core_rs
from helixflow.engine.base import Batch, Candidates, Capacity, Float32, Sampling
from tests.pool.conftest import Running, Start
from tests.pool.support import VOCAB, NextByte, finish, request

CANDIDATES = 64
SAMPLING = {
    "inverse_temperature": np.float32,
    "top_p": np.float32,
    "top_k": np.int32,
    "min_p": np.float32,
    "seed": np.uint64,
    "position": np.int64,
    "on_host": np.bool_,
}


class Hashed:
    """Random logits that depend on everything the slot holds. Gives all of them."""

    candidates = 0

    def __init__(self) -> None:
        self.slots: list[list[int]] = [[] for _ in range(4)]

    def capacity(self) -> Capacity:
        return Capacity(slots=4, max_len=128, vocab_size=VOCAB, candidates=self.candidates)

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        self.slots[dst] = self.slots[src][:length]

    def close(self) -> None: ...

    def logits(self, batch: Batch) -> Float32:
        """Logits [R, VOCAB]."""
        rows: list[Any] = []
        tokens = iter(batch.token_ids.tolist())
        for slot, past, count, wanted in zip(batch.slots, batch.past, batch.counts, batch.wanted, strict=True):
            held = self.slots[slot]
            del held[past:]
            for number in range(count):
                held.append(next(tokens))
                if number + wanted >= count:
                    random = np.random.default_rng(zlib.crc32(np.array(held, np.int32).tobytes()))
                    rows.append(random.standard_normal(VOCAB, np.float32) * 2)
        return np.array(rows, np.float32).reshape(-1, VOCAB)

    def step(self, batch: Batch) -> Candidates:
        assert batch.sampling is None
        return Candidates(logits=self.logits(batch))


class Choosing(Hashed):
    """The same model; chooses the tokens of most rows, as the batch says, and leaves every third one open."""

    candidates = CANDIDATES

    def __init__(self) -> None:
        super().__init__()
        self.chosen = self.open = self.on_host = 0

    def step(self, batch: Batch) -> Candidates:
        logits, sampling = self.logits(batch), batch.sampling
        assert sampling is not None
        for name, dtype in SAMPLING.items():
            array = getattr(sampling, name)
            assert array.dtype == dtype
            assert array.shape == (len(logits),)
            assert array.flags.c_contiguous
        tokens = np.array([self.choose(sampling, row, logits[row]) for row in range(len(logits))], np.int32)
        rest = logits[tokens == -1]
        if len(rest) == len(logits):
            return Candidates(logits=logits)
        return Candidates(rest if len(rest) else None, tokens)

    def choose(self, sampling: Sampling, row: int, logits: Float32) -> int:
        if sampling.on_host[row]:
            self.on_host += 1
            return -1
        self.chosen += 1
        if self.chosen % 3 == 0:
            self.open += 1
            return -1
        inverse = float(sampling.inverse_temperature[row])
        assert sampling.top_k[row] <= CANDIDATES
        return core_rs.sample(
            logits,
            temperature=1 / inverse if inverse else 0.0,
            top_p=float(sampling.top_p[row]),
            top_k=int(sampling.top_k[row]),
            min_p=float(sampling.min_p[row]),
            seed=int(sampling.seed[row]),
            position=int(sampling.position[row]),
        )


def wanted(prompt: str, max_tokens: int = 16, **options: Any) -> core_rs.GenerateRequest:
    return core_rs.GenerateRequest(
        request_id="test",
        model="bytes",
        prompts=[core_rs.Prompt.text(prompt)],
        max_tokens=max_tokens,
        **{"temperature": 0.5, "seed": 11, **options},
    )


REQUESTS = [
    wanted("greedy", temperature=0.0, top_k=100),
    wanted("a seed", seed=2**64 - 1),
    wanted("choices", n=3),
    wanted("hot", temperature=4.0),
    wanted("nucleus", top_p=0.5),
    wanted("no nucleus", top_p=0.0),
    wanted("few", top_k=5),
    wanted("all candidates", top_k=CANDIDATES),
    wanted("more than the candidates", top_k=CANDIDATES + 1),
    wanted("the vocabulary", top_k=VOCAB),
    wanted("likely", min_p=0.1),
    wanted("all cuts", top_p=0.9, top_k=40, min_p=0.01),
    wanted("stop", stop=["e", "qu"], max_tokens=60),
    wanted("on and on", ignore_eos=True),
    wanted("echo", echo=True),
    wanted("logprobs", logprobs=2),
    wanted("echo and logprobs", echo=True, logprobs=0),
    wanted("only the prompt", echo=True, logprobs=1, max_tokens=0),
    wanted("presence", presence_penalty=1.5),
    wanted("frequency", frequency_penalty=1.5),
    wanted("repetition", repetition_penalty=1.5),
    wanted("bias", logit_bias=[(101, 5.0)]),
]


def answers(running: Running) -> list[Any]:
    """Choices and token counts of all requests, which run at the same time."""
    client = running.client
    calls = [client.complete(one, completion_id="c", created=0, stream=False) for one in REQUESTS]
    bodies = [json.loads(finish(client, call)) for call in calls]
    return [(body["choices"], body["usage"]["completion_tokens"]) for body in bodies]


def test_an_engine_that_chooses_gives_the_answers_of_one_that_does_not(start: Start) -> None:
    engine = Choosing()
    expected, given = answers(start(Hashed())), answers(start(engine))
    for number, (one, other) in enumerate(zip(expected, given, strict=True)):
        assert one == other, number
    assert min(engine.chosen - engine.open, engine.open, engine.on_host) > 20


class Wrong(NextByte):
    """Gives one result whatever was asked."""

    def __init__(self, candidates: int, result: Callable[[Float32], object]) -> None:
        super().__init__(result)
        self.candidates = candidates

    def capacity(self) -> Capacity:
        return Capacity(slots=4, max_len=128, vocab_size=VOCAB, candidates=self.candidates)


def outcome(start: Start, engine: Wrong, one: core_rs.GenerateRequest) -> Exception:
    """What ends the loop; the call fails as `engine_failed`."""
    running = start(engine)
    call = running.client.complete(one, completion_id="c", created=0, stream=False)
    with pytest.raises(core_rs.EngineFailed) as failure:
        finish(running.client, call)
    assert failure.value.retryable
    [error] = running.ended()
    return error


def ids(*values: int) -> Any:
    return np.array(values, np.int32)


@pytest.mark.parametrize("candidates", [0, CANDIDATES])
@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda logits: Candidates(logits, ids(98)), "1 rows of logits for 0"),
        (lambda logits: Candidates(logits[:0], ids(-1)), "0 rows of logits for 1"),
        (lambda logits: Candidates(logits, ids(-1, 98)), "2 token ids for 1 rows"),
        (lambda logits: Candidates(logits[:0], ids(VOCAB)), f"token {VOCAB}"),
        (lambda logits: Candidates(logits[:0], ids(-2)), "token -2"),
        (lambda logits: Candidates(None, ids(-1)), "token -1"),
        (lambda logits: Candidates(logits, np.array([-1])), "int32 [R], not int64 (1,)"),
        (lambda logits: Candidates(logits[:, 1:].copy(), ids(-1)), "256 logits for 1 rows of 257"),
        (lambda logits: Candidates(logits.astype(np.float16), ids(-1)), "float32 [R, V], not float16"),
    ],
)
def test_a_wrong_mixture_is_refused(start: Start, candidates: int, result: Any, words: str) -> None:
    error = outcome(start, Wrong(candidates, result), request("a"))
    assert isinstance(error, core_rs.EngineFailed)
    assert words in str(error)


def test_a_token_for_a_row_of_the_host_is_refused(start: Start) -> None:
    engine = Wrong(CANDIDATES, lambda _: Candidates(None, ids(98)))
    error = outcome(start, engine, request("a", logprobs=0))
    assert isinstance(error, core_rs.EngineFailed)
    assert "token 98 for row 0" in str(error)


def uniform(seed: int, position: int, rank: int) -> float:
    """Splitmix64's finaliser over (seed, position, rank), as `crates/sample` documents it."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
        return bits ^ bits >> 31

    stream = mix(seed ^ mix((position + golden) & mask))
    return ((mix((stream + (rank + 1) * golden) & mask) >> 12) + 0.5) / 2**52


@pytest.mark.parametrize("rows", [0, 1, 100])  # The last is enough to let go of the GIL.
@pytest.mark.parametrize("columns", [0, 1, CANDIDATES + 1])
def test_gumbel_is_a_function_of_seed_position_and_rank(rows: int, columns: int) -> None:
    seeds = np.array([2**64 - 1 - 7 * row for row in range(rows)], np.uint64)
    positions = np.array([1000 * row for row in range(rows)], np.int64)
    noise = np.full((rows, columns), np.nan, np.float32)
    core_rs.gumbel(seeds, positions, noise)
    expected = [
        [-np.log(-np.log(uniform(int(seed), int(position), rank))) for rank in range(columns)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    np.testing.assert_allclose(noise, np.array(expected).reshape(rows, columns), rtol=1e-6)


def arrays(rows: int = 2, columns: int = 3) -> list[Any]:
    return [np.zeros(rows, np.uint64), np.zeros(rows, np.int64), np.zeros((rows, columns), np.float32)]


@pytest.mark.parametrize(
    ("index", "value", "error", "words"),
    [
        (0, np.zeros(3, np.uint64), ValueError, "3 seeds and 2 positions for 2 rows"),
        (1, np.zeros(1, np.int64), ValueError, "2 seeds and 1 positions for 2 rows"),
        (1, np.array([0, -1]), ValueError, "position -1 is negative"),
        (2, np.zeros((2, 66), np.float32), ValueError, "66 ranks"),
        (2, np.zeros((2, 6), np.float32)[:, ::2], ValueError, "out must be C-contiguous"),
        (0, np.zeros(4, np.uint64)[::2], ValueError, "seeds must be C-contiguous"),
        (2, np.frombuffer(bytearray(25), np.uint8)[1:].view(np.float32).reshape(2, 3), ValueError, "aligned"),
        (0, np.zeros(2, np.int64), TypeError, "uint64"),
        (2, np.zeros((2, 3)), TypeError, "float32"),
        (2, np.zeros(2, np.float32), TypeError, "dimension"),
        (2, np.frombuffer(bytes(24), np.float32).reshape(2, 3), TypeError, "writeable"),
    ],
)
def test_gumbel_refuses_what_does_not_fit(index: int, value: Any, error: type[Exception], words: str) -> None:
    given = arrays()
    given[index] = value
    with pytest.raises(error, match=words):
        core_rs.gumbel(*given)


@pytest.mark.parametrize("vocab", [VOCAB, 40_000])  # The second is enough to let go of the GIL.
def test_sample_is_greedy_or_the_largest_sum_with_the_noise(vocab: int) -> None:
    logits = np.random.default_rng(5).standard_normal(vocab, np.float32)
    assert core_rs.sample(logits, temperature=0.0, position=0) == logits.argmax()
    best = np.argsort(-logits)[:40]
    noise = np.zeros((1, 40), np.float32)
    for position in range(20):
        core_rs.gumbel(np.array([9], np.uint64), np.array([position], np.int64), noise)
        expected = best[np.argmax(logits[best] / np.float32(0.5) + noise[0])]
        assert core_rs.sample(logits, temperature=0.5, top_k=40, seed=9, position=position) == expected


@pytest.mark.parametrize(
    ("logits", "options", "error", "words"),
    [
        (np.full(4, np.nan, np.float32), {}, ValueError, "not a number"),
        (np.full(4, -np.inf, np.float32), {}, ValueError, "every token is excluded"),
        (np.zeros(0, np.float32), {}, ValueError, "empty"),
        (np.zeros(8, np.float32)[::2], {}, ValueError, "logits must be C-contiguous"),
        (np.zeros(4), {}, TypeError, "float32"),
        (np.zeros(4, np.float32), {"temperature": -1.0}, ValueError, "temperature is -1"),
        (np.zeros(4, np.float32), {"top_p": 0.0}, ValueError, "top_p is 0"),
        (np.zeros(4, np.float32), {"min_p": 2.0}, ValueError, "min_p is 2"),
    ],
)
def test_sample_refuses_what_allows_no_choice(
    logits: Any, options: dict[str, float], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        core_rs.sample(logits, position=0, **options)  # type: ignore[arg-type]
