"""The engine protocol, and the errors of engines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from helixflow.errors import HelixError

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Precision = Literal["fp32", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")


class EngineError(HelixError):
    """An engine cannot be built, loaded or run; the message says why and what to do."""


class ModelError(EngineError):
    """A file of a model or engine is refused. Names the file, the key inside it (or "") and the reason."""

    def __init__(self, file: Path | str, key: str, reason: str) -> None:
        self.file = str(file)
        self.key = key
        self.reason = reason
        super().__init__(f"{file}: {key}: {reason}" if key else f"{file}: {reason}")


class UnsupportedModelError(ModelError):
    """The file is sound, but describes a model that this version does not compute."""


class DamagedFileError(ModelError):
    """The file is missing, truncated, changed, or not what it says it is."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine can hold: `slots` sequences of at most `max_len` positions each, over `vocab_size` tokens.

    `candidates` above 0: the engine chooses tokens itself, among that many of the best; batches then say how.
    """

    slots: int
    max_len: int
    vocab_size: int
    candidates: int = 0


@dataclass(frozen=True, slots=True)
class Candidates:
    """The result of a step; R = sum(batch.wanted) rows in batch order.

    `logits` alone: float32 [R, vocab_size], valid until the next `step` (the buffer is reused). `token_ids` alone:
    int32 [R], tokens that the engine has chosen. Both: -1 among `token_ids` stands for the next row of `logits`
    [number of -1, vocab_size], from which the caller chooses.
    """

    logits: Float32 | None = None
    token_ids: Int32 | None = None


class Sampling(Protocol):
    """How the tokens of a step are to be chosen, one entry per wanted row in batch order; all arrays C-contiguous."""

    @property
    def inverse_temperature(self) -> Float32:
        """Factor of the logits [R]; 0 is greedy, and `top_p`, `top_k` and `min_p` are neutral then."""

    @property
    def top_p(self) -> Float32:
        """Share of the probability that is kept [R]; 1 keeps all."""

    @property
    def top_k(self) -> Int32:
        """Number of tokens that are kept [R]; 0 keeps all."""

    @property
    def min_p(self) -> Float32:
        """Smallest kept probability as a share of the best token's [R]; 0 keeps all."""

    @property
    def seed(self) -> NDArray[np.uint64]:
        """Seed of the noise [R]."""

    @property
    def position(self) -> NDArray[np.int64]:
        """Position in its sequence of the token to be drawn [R]."""

    @property
    def on_host(self) -> NDArray[np.bool_]:
        """Rows [R] whose logits are wanted: the caller chooses, and a token is refused."""


class Batch(Protocol):
    """One step, packed; all arrays int32 and C-contiguous.

    `slots`, `past`, `counts`, `wanted` are [B]; sequence b owns the next `counts[b] >= 1` of `token_ids` [T], which go
    to positions `past[b] ...` of slot `slots[b]`; the logits of its last `wanted[b]` tokens are returned.
    """

    @property
    def token_ids(self) -> Int32:
        """Token ids [T]."""

    @property
    def slots(self) -> Int32:
        """Slot of each sequence [B]; a slot appears once."""

    @property
    def past(self) -> Int32:
        """Positions of the slot that are already computed [B]."""

    @property
    def counts(self) -> Int32:
        """Tokens of each sequence in this step [B]."""

    @property
    def wanted(self) -> Int32:
        """Trailing rows of logits wanted of each sequence [B]."""

    @property
    def sampling(self) -> Sampling | None:
        """How to choose tokens; None when the engine has `candidates` 0."""


class Engine(Protocol):
    """A model with `slots` contiguous KV caches. Used by one thread at a time."""

    def capacity(self) -> Capacity:
        """Fixed for the engine's life."""

    def step(self, batch: Batch) -> Candidates:
        """Computes every token of the batch and stores its keys and values. Raises EngineError."""

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """Copies the first `length` positions of slot `src` over those of slot `dst`. Raises EngineError."""

    def close(self) -> None:
        """Frees the caches and the weights; nothing may be called afterwards. May be called twice."""
