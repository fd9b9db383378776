"""The CPU engine: ONNX Runtime over the graph of `onnx_graph`, with the KV caches in place.

A step is one call per prefill chunk (batch 1, on the chunk's slot) and a ragged decode call over a run of slots. Slots
inside a run that do not decode in this step get a dummy token, written behind the positions they hold, so that what
they remember survives; one spare position per slot takes the dummy of a full one.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from helixflow.engine.base import Batch, Candidates, Capacity, EngineError, Precision
from helixflow.engine.memory import available_bytes, cores, lazy_zeros
from helixflow.engine.onnx_calls import Calls, Item
from helixflow.engine.onnx_graph import GRAPH_FILE, WEIGHTS_FILE, padded_head
from helixflow.engine.plan import Costs, plan_runs
from helixflow.engine.rope import tables
from helixflow.engine.spec import ModelSpec

# A decode call costs as much as this many more rows in a call that is made anyway. From the time of a step at 1 to 32
# sequences (80 M-parameter Llama, 2 cores): the part that does not grow with them over the part that does.
ROWS_PER_CALL: dict[Precision, float] = {"fp32": 10.0, "int8": 3.0, "int4": 1.5}


class OnnxEngine:
    """See `base.Engine`. Weights are shared with the page cache where ONNX Runtime does not repack them."""

    def __init__(
        self, directory: Path, spec: ModelSpec, precision: Precision, *, slots: int, max_len: int, threads: int = 0
    ) -> None:
        """`threads` 0: one per core of this process. Raises EngineError."""
        _check_limits(spec, slots, max_len)
        self._capacity = Capacity(slots, max_len, spec.vocab_size)
        width, positions = padded_head(spec.head_dim), max_len + 1
        shape = (2 * spec.layers, slots, spec.kv_heads, positions, width)
        weights = (directory / WEIGHTS_FILE).stat().st_size
        _check_memory(math.prod(shape) * 4, weights, slots, max_len)
        self._cache = lazy_zeros(shape)
        self._lengths = [0] * slots
        # Slots whose last step gave logits: see `_decodes`.
        self._answered = [False] * slots
        position_bytes = math.prod(shape) * 4 // (slots * positions)
        self._costs = Costs(ROWS_PER_CALL[precision], position_bytes / weights)
        cos, sin = tables(spec.rope, spec.head_dim, max_len, positions)
        extra = ((0, 0), (0, (width - spec.head_dim) // 2))
        rotary = (np.pad(cos, extra), np.pad(sin, extra))
        self.session = new_session(directory / GRAPH_FILE, threads)
        self._calls: Calls | None = Calls(self.session, self._cache, rotary, spec.vocab_size)

    def capacity(self) -> Capacity:
        """See `base.Engine`."""
        return self._capacity

    def step(self, batch: Batch) -> Candidates:
        """See `base.Engine`. A step that raises leaves the slots it named with unspecified content behind `past`."""
        calls = self._open()
        items = self._items(batch)
        rows = items[-1].offset + items[-1].wanted if items else 0
        calls.make_room(rows)
        chunks: list[Item] = []
        decoding: list[Item] = []
        for item in items:
            (decoding if self._decodes(item) else chunks).append(item)
        try:
            if decoding:
                decoding.sort()
                for run in plan_runs([item.slot for item in decoding], self._lengths, self._costs):
                    calls.decode(decoding[run.first : run.last], run, self._lengths)
            for item in chunks:
                calls.prefill(item)
        except (ort.OrtException, RuntimeError) as error:
            raise EngineError(f"the engine failed: {error}") from error
        for item in items:
            self._lengths[item.slot] = item.past + len(item.tokens)
            self._answered[item.slot] = item.wanted > 0
        return Candidates(logits=calls.logits(rows))

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """See `base.Engine`."""
        self._open()
        slots, held = self._capacity.slots, self._lengths
        if not (0 <= src < slots and 0 <= dst < slots):
            raise EngineError(f"cannot copy slot {src} to {dst}: there are {slots} slots")
        if not 0 <= length <= held[src]:
            raise EngineError(f"cannot copy {length} positions of slot {src}: it holds {held[src]}")
        if src != dst:
            self._cache[:, dst, :, :length] = self._cache[:, src, :, :length]
        held[dst] = length
        self._answered[dst] = False

    def close(self) -> None:
        """See `base.Engine`."""
        self._calls = None
        self.session = None
        self._cache = np.zeros((0,), np.float32)

    def _open(self) -> Calls:
        if self._calls is None:
            raise EngineError("the engine is closed")
        return self._calls

    def _decodes(self, item: Item) -> bool:
        """Whether an item is a generated token, rather than a piece of a prompt.

        The runtime attends with another kernel for single tokens than for pieces of prompts. A lone prompt token must
        not go that way: its logits would differ in the last bits from those of the same prompt cut elsewhere, and so
        depend on who shares the steps.
        """
        return len(item.tokens) == 1 and self._answered[item.slot] and item.past == self._lengths[item.slot]

    def _items(self, batch: Batch) -> list[Item]:
        """Takes the batch apart, and refuses what would reach outside its slots: to the runtime they are raw memory.

        Plain lists, because after a step has streamed all weights through the caches, every numpy call costs 5 us.
        """
        limit, tokens = self._capacity, batch.token_ids.tolist()
        slots, pasts, counts, wanted = (a.tolist() for a in (batch.slots, batch.past, batch.counts, batch.wanted))
        if sum(counts) != len(tokens) or len({len(slots), len(pasts), len(counts), len(wanted)}) != 1:
            raise EngineError("the arrays of the batch do not match")
        if len(set(slots)) != len(slots):
            raise EngineError(f"a slot appears twice among {slots}")
        if tokens and not 0 <= min(tokens) <= max(tokens) < limit.vocab_size:
            raise EngineError(f"a token id is outside the vocabulary of {limit.vocab_size}")
        items = []
        start = offset = 0
        for slot, past, count, rows in zip(slots, pasts, counts, wanted, strict=True):
            if not 0 <= slot < limit.slots:
                raise EngineError(f"slot {slot} is none of the {limit.slots}")
            if count < 1 or not 0 <= rows <= count:
                raise EngineError(f"slot {slot}: {rows} rows of {count} tokens cannot be had")
            if not 0 <= past <= self._lengths[slot] or past + count > limit.max_len:
                held = self._lengths[slot]
                raise EngineError(
                    f"slot {slot}: {count} tokens at {past}; it holds {held} of {limit.max_len} positions"
                )
            items.append(Item(slot, past, tokens[start : start + count], rows, offset))
            start += count
            offset += rows
        return items


def _check_limits(spec: ModelSpec, slots: int, max_len: int) -> None:
    if slots < 1 or max_len < 1:
        raise EngineError(f"slots ({slots}) and max-len ({max_len}) must be at least 1")
    if max_len > spec.longest:
        raise EngineError(f"max-len {max_len} is more than the {spec.longest} positions this model was made for")


def _check_memory(caches: int, weights: int, slots: int, max_len: int) -> None:
    free = available_bytes()
    if caches + weights > free:
        raise EngineError(
            f"{slots} slots of {max_len} positions need {caches / 2**30:.1f} GiB beside {weights / 2**30:.1f} GiB of "
            f"weights, {free / 2**30:.1f} GiB are available: choose fewer slots, a smaller max-len or a lower precision"
        )


def new_session(graph: Path, threads: int) -> Any:
    """An ONNX Runtime session over a built graph; `threads` 0: one per core. Raises EngineError."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    # Memory patterns are kept per input shape; chunk lengths vary without end.
    options.enable_mem_pattern = False
    # Spinning threads would take the cores from the gateway between two steps.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except (ort.OrtException, RuntimeError) as error:
        raise EngineError(f"{graph}: ONNX Runtime cannot load the graph: {error}") from error
