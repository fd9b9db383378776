"""An engine that computes nothing: tokens from a script at a set pace, for tests and to measure what is around it."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helixflow.engine.base import Batch, Candidates, Capacity, EngineError, Int32
from helixflow.engine.folder import LARGEST_TOKENIZER
from helixflow.engine.reader import Reader, read_json

Script = Callable[[Int32], Int32]
"""Token ids for output indices (0: the first token after the prompt); int32 [R] to int32 [R]."""

SAMPLE_WORDS = 64
FALLBACK_LENGTH = 4096
WORD_MARKS = ("\u0120", "\u2581")  # how byte-level and metaspace vocabularies write a leading space


def repeat(ids: Sequence[int], *, end_after: int = 0, eos: int = 0) -> Script:
    """A script that repeats `ids`, and says `eos` from output index `end_after` on (0: never)."""
    table = np.asarray(ids, np.int32)
    if len(table) == 0:
        raise EngineError("a script needs at least one token id")

    def script(index: Int32) -> Int32:
        tokens: Int32 = table[index % len(table)]
        return np.where(index >= end_after, np.int32(eos), tokens) if end_after else tokens

    return script


class Gate:
    """Lets a test decide when each step ends: `allow(n)` lets n steps through, `open()` all of them."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._open = threading.Event()
        self._arrived = threading.Semaphore(0)

    def allow(self, steps: int = 1) -> None:
        """Lets `steps` more steps through."""
        for _ in range(steps):
            self._permits.release()

    def open(self) -> None:
        """Lets every step through from now on."""
        self._open.set()
        self._permits.release()

    def arrived(self, timeout: float) -> bool:
        """Waits until a further step has reached the gate; false when `timeout` seconds pass first."""
        return self._arrived.acquire(timeout=timeout)

    def wait(self) -> None:
        """Called by the engine in every step."""
        self._arrived.release()
        if not self._open.is_set():
            self._permits.acquire()


class ScriptedEngine:
    """See `base.Engine`; gives `token_ids`, the same for the same calls.

    A slot counts its outputs: a single token that is the last one it gave, at the position behind it, goes on;
    anything else begins a new sequence.
    """

    def __init__(
        self,
        capacity: Capacity,
        script: Script,
        *,
        step_s: float = 0.0,
        gate: Gate | None = None,
        fail_at_step: int | None = None,
        hang_at_step: int | None = None,
    ) -> None:
        """`step_s`: least duration of a step (seconds). `fail_at_step`: that step (from 0) raises EngineError.

        `hang_at_step`: that step (from 0) never ends.
        """
        self._capacity = capacity
        self._script = script
        self._step_s = step_s
        self._gate = gate
        self._fail_at = fail_at_step
        self._hang_at = hang_at_step
        self._next_position = np.full(capacity.slots, -1, np.int32)
        self._given = np.full(capacity.slots, -1, np.int32)
        self._index = np.zeros(capacity.slots, np.int32)
        self.steps = 0

    @classmethod
    def from_model(
        cls, model_dir: Path, *, slots: int, max_len: int = 0, tokens: int = 0, **options: Any
    ) -> "ScriptedEngine":
        """Repeats words of a checkpoint's vocabulary; `tokens`: outputs before the end (0: it never ends).

        `max_len` 0: as config.json says. `options`: as of the class. Raises EngineError.
        """
        path = model_dir / "config.json"
        read = Reader(path, read_json(path))
        capacity = Capacity(
            slots, max_len or read.count("max_position_embeddings", FALLBACK_LENGTH), read.count("vocab_size")
        )
        eos = _eos(model_dir, read)
        words = _words(model_dir, capacity.vocab_size, eos)
        return cls(capacity, repeat(words, end_after=tokens, eos=eos), **options)

    def capacity(self) -> Capacity:
        """See `base.Engine`."""
        return self._capacity

    def step(self, batch: Batch) -> Candidates:
        """See `base.Engine`."""
        started = time.monotonic()
        number, self.steps = self.steps, self.steps + 1
        if self._gate is not None:
            self._gate.wait()
        if number == self._fail_at:
            raise EngineError(f"step {number} fails, as the script says")
        if number == self._hang_at:
            _hang()
        tokens = self._outputs(batch)
        if self._step_s:
            time.sleep(max(0.0, self._step_s - (time.monotonic() - started)))
        return Candidates(token_ids=tokens)

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """See `base.Engine`; there is nothing to copy."""
        if not (0 <= src < self._capacity.slots and 0 <= dst < self._capacity.slots and length >= 0):
            raise EngineError(f"cannot copy {length} positions of slot {src} to {dst}")
        self._next_position[dst] = -1

    def close(self) -> None:
        """See `base.Engine`."""

    def _outputs(self, batch: Batch) -> Int32:
        slots, counts, wanted = batch.slots, batch.counts, batch.wanted
        ends = batch.past + counts
        if len(slots) and (ends.max() > self._capacity.max_len or slots.max() >= self._capacity.slots):
            raise EngineError("the batch does not fit into the slots")
        last = batch.token_ids[np.cumsum(counts) - 1]
        goes_on = (counts == 1) & (batch.past == self._next_position[slots]) & (last == self._given[slots])
        index = np.where(goes_on, self._index[slots] + 1, 0).astype(np.int32)
        tokens = self._script(index)
        heard = wanted > 0
        self._index[slots] = index
        self._given[slots] = np.where(heard, tokens, -1)
        self._next_position[slots] = ends
        return tokens[heard] if bool((wanted <= 1).all()) else np.repeat(tokens, wanted)


def _hang() -> None:
    """Never returns, as a device that does not answer."""
    while True:
        time.sleep(3600)


def _eos(model_dir: Path, read: Reader) -> int:
    value: Any = None
    if (model_dir / "generation_config.json").is_file():
        value = read_json(model_dir / "generation_config.json").get("eos_token_id")
    value = read.config.get("eos_token_id") if value is None else value
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else 0


def _words(model_dir: Path, vocab_size: int, eos: int) -> list[int]:
    """Ids of tokens that are readable words, so that scripted text looks like text; any ids when there are none."""
    path = model_dir / "tokenizer.json"
    vocabulary = read_json(path, LARGEST_TOKENIZER).get("model", {}).get("vocab", {}) if path.is_file() else {}
    if not isinstance(vocabulary, dict):
        vocabulary = {}
    words = [
        number
        for token, number in vocabulary.items()
        if token[:1] in WORD_MARKS and token[1:].isascii() and token[1:].isalpha() and number < vocab_size
    ]
    return sorted(words)[:SAMPLE_WORDS] or [i for i in range(min(vocab_size, SAMPLE_WORDS)) if i != eos]
