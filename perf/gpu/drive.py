"""Batches for an engine, as a scheduler would make them."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import Candidates, Engine, Float32, Int32


@dataclass(frozen=True, slots=True)
class Sampling:
    """See `helixflow.engine.base.Sampling`."""

    inverse_temperature: Float32
    top_p: Float32
    top_k: Int32
    min_p: Float32
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    on_host: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """See `helixflow.engine.base.Batch`."""

    token_ids: Int32
    slots: Int32
    past: Int32
    counts: Int32
    wanted: Int32
    sampling: Sampling | None = None


class Part(NamedTuple):
    """A sequence of a step: `tokens` for positions `past` ... of `slot`; its last `wanted` rows are wanted."""

    slot: int
    past: int
    tokens: Sequence[int]
    wanted: int = 1


class Choice(NamedTuple):
    """How tokens are chosen: greedily at temperature 0; `host`: not at all, logits are wanted."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    host: bool = False


GREEDY, LOGITS = Choice(), Choice(host=True)


def batch(parts: Sequence[Part], choice: Choice | None = GREEDY) -> Batch:
    """Packs parts; `choice` None: for engines that do not choose."""

    def int32(values: Sequence[int]) -> Int32:
        return np.array(values, np.int32)

    tokens = int32([token for part in parts for token in part.tokens])
    numbers = [(part.slot, part.past, len(part.tokens), part.wanted) for part in parts]
    slots, past, counts, wanted = (int32(column) for column in zip(*numbers, strict=True))
    return Batch(tokens, slots, past, counts, wanted, None if choice is None else _sampling(parts, choice))


def _sampling(parts: Sequence[Part], choice: Choice) -> Sampling:
    ends = [(part.slot, part.past + len(part.tokens)) for part in parts for _ in range(part.wanted)]
    backwards = [i for part in parts for i in range(part.wanted - 1, -1, -1)]
    rows = len(ends)
    return Sampling(
        np.full(rows, 1 / choice.temperature if choice.temperature else 0, np.float32),
        np.full(rows, choice.top_p, np.float32),
        np.full(rows, choice.top_k, np.int32),
        np.zeros(rows, np.float32),
        np.array([slot + 1 for slot, _ in ends], np.uint64),
        np.array([end - i for (_, end), i in zip(ends, backwards, strict=True)], np.int64),
        np.full(rows, choice.host),
    )


def choices(engine: Engine, choice: Choice) -> Choice | None:
    """The choice, for an engine that chooses."""
    return choice if engine.capacity().candidates else None


def logits_of(engine: Engine, parts: Sequence[Part]) -> Float32:
    """Rows of logits of a step, copied."""
    logits = engine.step(batch(parts, choices(engine, LOGITS))).logits
    assert logits is not None
    return logits.copy()


def tokens_of(engine: Engine, parts: Sequence[Part], choice: Choice = GREEDY) -> list[int]:
    """A token for every wanted row, chosen by the engine where it does so, else the one with the largest logit."""
    return chosen(engine.step(batch(parts, choices(engine, choice))))


def chosen(answer: Candidates) -> list[int]:
    """The tokens of an answer; greedily where the choice was left to the caller."""
    best = [] if answer.logits is None else answer.logits.argmax(axis=-1).tolist()
    if answer.token_ids is None:
        return best
    left = iter(best)
    return [next(left) if token < 0 else token for token in answer.token_ids.tolist()]


def prefill(engine: Engine, slot: int, tokens: Sequence[int], pieces: Sequence[int] = ()) -> None:
    """Puts a prompt into a slot, in pieces of these lengths, and a last one."""
    past = 0
    for size in (*pieces, len(tokens)):
        piece = tokens[past : past + size]
        if piece:
            engine.step(batch([Part(slot, past, piece, 0)], choices(engine, GREEDY)))
            past += len(piece)


class Decoding:
    """Sequences that decode together in slots 0 .. n - 1, from the same length on."""

    def __init__(self, engine: Engine, sequences: int, past: int, choice: Choice = GREEDY) -> None:
        self.engine, self.past, self.choice = engine, past, choices(engine, choice)
        self.tokens = [1] * sequences
        self.logits_are_numbers = True

    def step(self) -> None:
        """One token each."""
        parts = [Part(slot, self.past, [token]) for slot, token in enumerate(self.tokens)]
        answer = self.engine.step(batch(parts, self.choice))
        if answer.logits is not None and not np.isfinite(answer.logits).all():
            self.logits_are_numbers = False
        self.tokens = chosen(answer)
        self.past += 1

    def seconds(self, steps: int, rounds: int) -> float:
        """Host seconds of a step: `steps` are timed together, since they may overlap; median of `rounds`."""
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(steps):
                self.step()
            times.append((time.perf_counter() - started) / steps)
        return statistics.median(times)


def step_seconds(engine: Engine, parts: Sequence[Part], rounds: int) -> float:
    """Median host seconds of a step that is made again and again."""
    work, times = batch(parts, choices(engine, GREEDY)), []
    for number in range(2 * rounds + 2):
        started = time.perf_counter()
        engine.step(work)
        if number > 1:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def random_tokens(rng: np.random.Generator, count: int, vocab: int) -> list[int]:
    """A prompt."""
    tokens: Any = rng.integers(0, vocab, count).tolist()
    return list(tokens)
