"""Steps of continuous batching that drive an engine through everything a scheduler asks of it; for `selftest`.

Prompts come in pieces, alone and beside decoding slots; slots are skipped, copied from, left full and used again; the
same slots decode for so long that a runner computes ahead; tokens are chosen by the host, and by the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helixflow import core_rs
from helixflow.engine.base import Engine, Float32, Int32

SEED = 20
SLOTS, MAX_LEN = 6, 256
"""What an engine must have."""


class Sampler(NamedTuple):
    """How a token is drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def inverse(self) -> np.float32:
        """As batches carry it."""
        return np.float32(1) / np.float32(self.temperature) if self.temperature else np.float32(0)

    def on_host(self, row: Float32, seed: int, position: int) -> int:
        """The token that a pool draws from a row of logits; any, when there is something in it that is no number."""
        if not np.isfinite(row).all():
            return 0
        return core_rs.sample(
            row,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=seed,
            position=position,
        )


GREEDY = Sampler(0.0)
SAMPLERS = (
    Sampler(0.8, top_p=0.9),
    Sampler(1.5, top_p=0.5),
    Sampler(1.0, top_k=20),
    Sampler(0.7, min_p=0.05),
    Sampler(1.3),
)


@dataclass(frozen=True)
class _Sampling:
    """See `base.Sampling`."""

    inverse_temperature: Float32
    top_p: Float32
    top_k: Int32
    min_p: Float32
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    on_host: NDArray[np.bool_]


@dataclass(frozen=True)
class _Batch:
    """See `base.Batch`."""

    token_ids: Int32
    slots: Int32
    past: Int32
    counts: Int32
    wanted: Int32
    sampling: _Sampling


@dataclass
class History:
    """What a slot holds: `tokens`, of which the first `past` are computed; rows of logits and tokens by position."""

    tokens: list[int]
    past: int = 0
    logits: dict[int, Float32] = field(default_factory=dict)
    chosen: dict[int, int] = field(default_factory=dict)


class Answer(NamedTuple):
    """To the token at `position` of a slot: the logits, unless the device chose, and the token that follows."""

    slot: int
    position: int
    logits: Float32 | None
    token: int


class Scenario:
    """Drives an engine; keeps what it answered."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.engine = engine
        self.random = np.random.default_rng(SEED)
        self.vocab_size = vocab_size
        self.live: dict[int, History] = {}
        self.ended: list[History] = []
        self.seed = self.drawn = self.differing = 0

    def run(self) -> None:
        """All of it. Raises EngineError as the engine does."""
        self.begin(2, 75)
        self.step({2: 75})
        self.begin(4, 40)
        self.step({2: 1, 4: 33}, on_host=True)
        self.begin(0, 3)
        self.step({2: 1, 4: 7, 0: 3})
        for turn in range(4):
            self.step({0: 1, 2: 1, 4: 1}, on_host=turn % 2 == 0)
        self.copy(2, 5, 64, more=10)
        self.step({0: 1, 2: 1, 4: 1, 5: 10}, on_host=True)
        self.draw({0: 1, 2: 1, 4: 1, 5: 1})
        self.step({0: 1, 2: 1, 4: 1, 5: 1})
        self.end(4)
        self.begin(4, 20)
        self.step({4: 20, 2: 1, 5: 1}, on_host=True)
        # The same slots over and over: the runner computes ahead.
        for _ in range(6):
            self.step({2: 1, 4: 1, 5: 1})
        self.begin(1, 40)
        self.draw({1: 40}, rows=40)
        self.step({1: 40, 4: 1}, on_host=True, rows=40)
        self.step({0: 1, 1: 1, 2: 1, 4: 1, 5: 1})
        for slot in list(self.live):
            self.end(slot)

    def begin(self, slot: int, length: int) -> None:
        """A new prompt."""
        self.live[slot] = History(self.random.integers(0, self.vocab_size, length).tolist())

    def end(self, slot: int) -> None:
        """A sequence is over; its slot keeps what is in it."""
        self.ended.append(self.live.pop(slot))

    def copy(self, source: int, target: int, length: int, more: int) -> None:
        """A prompt that begins like another one."""
        self.engine.copy_prefix(source, target, length)
        fresh = self.random.integers(0, self.vocab_size, more).tolist()
        self.live[target] = History([*self.live[source].tokens[:length], *fresh], length)

    def step(self, counts: dict[int, int], *, on_host: bool = False, rows: int = 1) -> None:
        """Computes the next tokens of some slots, greedily; `rows`: of logits wanted, of the first one."""
        wanted = {slot: rows if index == 0 else 1 for index, slot in enumerate(counts)}
        answers = self._ask(counts, wanted, on_host=on_host)
        for slot, count in counts.items():
            self.live[slot].past += count
        for answer in answers:
            sequence = self.live[answer.slot]
            if answer.logits is not None:
                sequence.logits[answer.position] = answer.logits
            sequence.chosen[answer.position] = answer.token
            if answer.position + 1 == len(sequence.tokens):
                sequence.tokens.append(answer.token)

    def draw(self, counts: dict[int, int], *, rows: int = 1) -> None:
        """The next tokens of some slots, `rows` of each, drawn by host and device, which must not differ."""
        wanted = dict.fromkeys(counts, rows)
        by_host = self._ask(counts, wanted, on_host=True)
        for sampler in SAMPLERS:
            self.seed += 1
            by_device = self._ask(counts, wanted, sampler=sampler)
            for one, other in zip(by_host, by_device, strict=True):
                if one.logits is not None:
                    self.drawn += 1
                    self.differing += other.token != sampler.on_host(one.logits, self.seed, one.position + 1)

    def _ask(
        self, counts: dict[int, int], wanted: dict[int, int], *, on_host: bool = False, sampler: Sampler = GREEDY
    ) -> list[Answer]:
        """One step; the wanted rows in order."""
        tokens: list[int] = []
        places: list[tuple[int, int]] = []
        for slot, count in counts.items():
            sequence = self.live[slot]
            end = sequence.past + count
            tokens += sequence.tokens[sequence.past : end]
            places += [(slot, position) for position in range(end - wanted[slot], end)]
        rows = len(places)
        batch = _Batch(
            _int32(tokens),
            _int32([*counts]),
            _int32([self.live[slot].past for slot in counts]),
            _int32([*counts.values()]),
            _int32([wanted[slot] for slot in counts]),
            _Sampling(
                np.full(rows, sampler.inverse, np.float32),
                np.full(rows, sampler.top_p, np.float32),
                np.full(rows, sampler.top_k, np.int32),
                np.full(rows, sampler.min_p, np.float32),
                np.full(rows, self.seed, np.uint64),
                np.array([position + 1 for _, position in places], np.int64),
                np.full(rows, on_host),
            ),
        )
        result = self.engine.step(batch)
        ids = [-1] * rows if result.token_ids is None else result.token_ids.tolist()
        left: Iterator[Float32] = iter(() if result.logits is None else result.logits.copy())
        answers = []
        for (slot, position), token in zip(places, ids, strict=True):
            logits = next(left) if token < 0 else None
            chosen = token if logits is None else sampler.on_host(logits, self.seed, position + 1)
            answers.append(Answer(slot, position, logits, chosen))
        return answers


def _int32(values: Sequence[int]) -> Int32:
    return np.array(values, np.int32)
