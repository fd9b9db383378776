"""The onnx engine: ONNX Runtime over the graph of `onnx_graph`, with the KV caches in place, on the CPU or on a GPU.

A step is one call per prefill chunk (batch 1, on the chunk's slot) and a ragged decode call over a run of slots. Slots
inside a run that do not decode in this step get a dummy token, written behind the positions they hold, so that what
they remember survives; one spare position per slot takes the dummy of a full one.

On a GPU (provider cuda) graph and calls are the same; weights and caches are in its memory, and only the logits of
wanted rows come back. What the CPU promises bit for bit - that the logits of a token do not depend on its batch mates,
nor those of a prompt on how it is cut - a GPU does not: its kernels are chosen by the number of rows.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from helixflow.engine.base import Batch, Candidates, Capacity, EngineError
from helixflow.engine.items import Item, check_copy, unpack
from helixflow.engine.kinds import AnyPrecision, Provider
from helixflow.engine.memory import available_bytes
from helixflow.engine.onnx_calls import Cache, Calls
from helixflow.engine.onnx_graph import GRAPH_FILE, WEIGHTS_FILE, compute_type, padded_head
from helixflow.engine.onnx_memory import CudaMemory, HostMemory, Memory, open_cuda
from helixflow.engine.onnx_session import RUNTIME_ERRORS, check_cuda, check_type, cpu_session, cuda_session, failure
from helixflow.engine.plan import Costs, plan_runs
from helixflow.engine.rope import tables
from helixflow.engine.spec import ModelSpec

# A decode call costs as much as this many more rows in a call that is made anyway. On the CPU, from the time of a step
# at 1 to 32 sequences (80 M-parameter Llama, 2 cores): the part that does not grow with them over the part that does.
# On a GPU, from data sheets: rows are free until their products take longer than reading the weights, which at 75
# (GeForce) to 400 (L4) operations per byte is about 100 rows of 16-bit weights, and fewer where there are fewer bytes.
ROWS_PER_CALL: dict[Provider, dict[AnyPrecision, float]] = {
    "cpu": {"fp32": 10.0, "fp16": 10.0, "int8": 3.0, "int4": 1.5},
    "cuda": {"fp16": 100.0, "bf16": 100.0, "int8": 50.0, "int4": 25.0},
}
BF16_SM = 80


class OnnxEngine:
    """See `base.Engine`. On the CPU, weights are shared with the page cache where ONNX Runtime does not repack them."""

    def __init__(
        self,
        directory: Path,
        spec: ModelSpec,
        precision: AnyPrecision,
        *,
        slots: int,
        max_len: int,
        threads: int = 0,
        provider: Provider = "cpu",
        device: int = 0,
    ) -> None:
        """`directory`: built with `precision` for `provider`. `threads` (cpu) 0: one per core of this process. `device`
        (cuda): number of the GPU. Raises EngineError."""
        _check_limits(spec, slots, max_len)
        self._capacity = Capacity(slots, max_len, spec.vocab_size)
        self._provider: Provider = provider
        width, compute = padded_head(spec.head_dim), compute_type(precision, provider)
        cache = Cache(0, 2 * spec.layers, slots, spec.kv_heads, max_len + 1, width, compute)
        weights = (directory / WEIGHTS_FILE).stat().st_size
        position_bytes = cache.planes * cache.heads * cache.row_bytes
        self._costs = Costs(ROWS_PER_CALL[provider][precision], position_bytes / weights)
        self.session: Any = None
        self._calls: Calls | None = None
        self._memory = _open_memory(provider, device, precision)
        try:
            _check_memory(self._memory, cache, weights)
            self._lengths = [0] * slots
            # Slots whose last step gave logits: see `_decodes`.
            self._answered = [False] * slots
            self._cache = replace(cache, address=self._memory.zeros(cache.nbytes))
            graph = directory / GRAPH_FILE
            if isinstance(self._memory, CudaMemory):
                self.session = cuda_session(graph, self._memory)
            else:
                self.session = cpu_session(graph, threads)
            check_type(graph, self.session, compute)
            cos, sin = tables(spec.rope, spec.head_dim, max_len, cache.positions)
            extra = ((0, 0), (0, (width - spec.head_dim) // 2))
            rotary = (np.pad(cos, extra), np.pad(sin, extra))
            self._calls = Calls(self.session, self._memory, self._cache, rotary, spec.vocab_size)
        except EngineError:
            self.close()
            raise

    def capacity(self) -> Capacity:
        """See `base.Engine`."""
        return self._capacity

    def step(self, batch: Batch) -> Candidates:
        """See `base.Engine`. A step that raises leaves the slots it named with unspecified content behind `past`."""
        calls = self._open()
        items = unpack(batch, self._capacity, self._lengths)
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
            self._memory.finish()
        except RUNTIME_ERRORS as error:
            raise failure(f"the engine failed: {error}", self._provider) from error
        for item in items:
            self._lengths[item.slot] = item.past + len(item.tokens)
            self._answered[item.slot] = item.wanted > 0
        return Candidates(logits=calls.logits(rows))

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """See `base.Engine`."""
        self._open()
        held = self._lengths
        check_copy(src, dst, length, self._capacity, held)
        if src != dst and length:
            cache = self._cache
            pitch, taken = cache.positions * cache.row_bytes, length * cache.row_bytes
            for plane in range(cache.planes):
                self._memory.copy_rows(cache.at(plane, dst), cache.at(plane, src), pitch, taken, cache.heads)
        held[dst] = length
        self._answered[dst] = False

    def close(self) -> None:
        """See `base.Engine`."""
        self._calls = None
        self.session = None
        self._memory.close()

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


def _check_limits(spec: ModelSpec, slots: int, max_len: int) -> None:
    if slots < 1 or max_len < 1:
        raise EngineError(f"slots ({slots}) and max-len ({max_len}) must be at least 1")
    if max_len > spec.longest:
        raise EngineError(f"max-len {max_len} is more than the {spec.longest} positions this model was made for")


def _open_memory(provider: Provider, device: int, precision: AnyPrecision) -> Memory:
    if provider == "cpu":
        return HostMemory()
    check_cuda()
    memory = open_cuda(device)
    info = memory.info()
    if precision == "bf16" and info.sm < BF16_SM:
        memory.close()
        raise EngineError(f"device {device} ({info.name}) is older than Ampere and cannot compute in bf16: choose fp16")
    return memory


def _check_memory(memory: Memory, cache: Cache, weights: int) -> None:
    free = memory.available_bytes() if isinstance(memory, CudaMemory) else available_bytes()
    caches = cache.nbytes
    if caches + weights > free:
        raise EngineError(
            f"{cache.slots} slots of {cache.positions - 1} positions need {caches / 2**30:.1f} GiB beside "
            f"{weights / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB are available: choose fewer slots, "
            "a smaller max-len or a lower precision"
        )
