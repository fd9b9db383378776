"""The decoder in numpy, over whole sequences at once and in float32: what engines are compared with and calibrated by.

No cache, no batch: every sequence attends densely to itself. Each weight is read once, used and dropped.
"""

from collections.abc import Callable, Sequence

import numpy as np

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.decoder import write_decoder
from helixflow.engine.rope import tables
from helixflow.engine.spec import ModelSpec

Read = Callable[[str], Float32]
"""A tensor of the checkpoint by name, float32, shape as on disk."""
Watch = Callable[[str, Float32], None]
"""Called with the name of a linear layer (without `.weight`) and its input, float32 [tokens, features]."""


def _unwatched(name: str, x: Float32) -> None:
    """Looks at nothing."""


class NumpyBuilder:
    """The `Builder` (see `decoder`) whose handles are float32 [tokens of all sequences, features]; computes at once."""

    def __init__(
        self,
        spec: ModelSpec,
        read: Read,
        sequences: Sequence[Sequence[int]],
        max_len: int,
        *,
        watch: Watch = _unwatched,
        head: bool = True,
    ) -> None:
        """`max_len`: of the engine that is compared (rotary scaling may depend on it). `head`: compute logits.

        Raises EngineError for sequences that are empty, too long or outside the vocabulary.
        """
        lengths = [len(sequence) for sequence in sequences]
        if not lengths or min(lengths) < 1 or max(lengths) > max_len:
            raise EngineError(f"sequences of {lengths} tokens: each must have 1 .. {max_len}")
        self._ids = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])
        if not 0 <= self._ids.min() <= self._ids.max() < spec.vocab_size:
            raise EngineError(f"a token id is outside the vocabulary of {spec.vocab_size}")
        self._spec, self._read, self._watch, self._head = spec, read, watch, head
        ends = np.cumsum(lengths).tolist()
        self._parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        positions = np.concatenate([np.arange(length) for length in lengths])
        cos, sin = tables(spec.rope, spec.head_dim, max_len, max(lengths))
        self._cos, self._sin = cos[positions][:, None], sin[positions][:, None]
        self.logits: Float32 = np.zeros((0, spec.vocab_size), np.float32)
        """Logits of every token of every sequence, float32 [tokens, vocab]; after `write_decoder`."""

    def embed(self, weight: str) -> Float32:  # noqa: D102 - documented by the protocol
        rows: Float32 = self._read(weight)[self._ids]
        return rows

    def rms_norm(self, x: Float32, weight: str, eps: float, groups: int = 1) -> Float32:  # noqa: D102
        parts = x.reshape(len(x), groups, -1)
        size = np.sqrt(np.mean(parts * parts, axis=-1, keepdims=True) + np.float32(eps), dtype=np.float32)
        normed: Float32 = parts / size * self._read(weight)
        return normed.reshape(x.shape)

    def linear(self, x: Float32, name: str, bias: bool) -> Float32:  # noqa: D102
        self._watch(name, x)
        y: Float32 = x @ self._read(name + ".weight").T
        return y + self._read(name + ".bias") if bias else y

    def attention(  # noqa: D102
        self,
        layer: int,  # noqa: ARG002 - there is no cache to choose
        q: Float32,
        k: Float32,
        v: Float32,
        window: int | None,
    ) -> Float32:
        spec = self._spec
        heads = q.reshape(len(q), spec.heads, spec.head_dim)
        keys, values = (x.reshape(len(x), spec.kv_heads, spec.head_dim) for x in (k, v))
        heads, keys = self._rotate(heads) * np.float32(spec.head_dim**-0.5), self._rotate(keys)
        out = np.empty_like(heads)
        for part in self._parts:
            # One query per row, seen positions per column.
            ago = np.subtract.outer(np.arange(part.stop - part.start), np.arange(part.stop - part.start))
            seen = (ago >= 0) & (ago < (window or len(ago)))
            for head in range(spec.heads):
                group = head * spec.kv_heads // spec.heads
                scores = np.where(seen, heads[part, head] @ keys[part, group].T, np.float32(-np.inf))
                scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
                out[part, head] = scores @ values[part, group] / scores.sum(axis=-1, keepdims=True)
        return out.reshape(q.shape)

    def swiglu(self, gate: Float32, up: Float32) -> Float32:  # noqa: D102
        # A strongly negative gate overflows the exponential, and rightly becomes 0.
        with np.errstate(over="ignore"):
            silu: Float32 = gate / (1 + np.exp(-gate))
        return silu * up

    def add(self, a: Float32, b: Float32) -> Float32:  # noqa: D102
        return a + b

    def wanted(self, x: Float32) -> Float32:  # noqa: D102
        return x

    def lm_head(self, x: Float32, weight: str) -> None:  # noqa: D102
        if self._head:
            self.logits = x @ self._read(weight).T

    def _rotate(self, x: Float32) -> Float32:
        """Rotary pairs are (i, i + head_dim / 2); x [tokens, heads, head_dim]."""
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * self._cos - b * self._sin, b * self._cos + a * self._sin], axis=-1)


def dense_logits(spec: ModelSpec, read: Read, ids: Sequence[int], max_len: int) -> Float32:
    """Logits of every position of one sequence, float32 [len(ids), vocab]. Raises EngineError, and as `read` does."""
    builder = NumpyBuilder(spec, read, [ids], max_len)
    write_decoder(spec, builder)
    return builder.logits
