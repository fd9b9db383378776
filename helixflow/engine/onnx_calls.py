"""Calls into ONNX Runtime with everything bound to fixed memory, so that a step costs few Python operations.

The caches of a run of slots are bound once and the binding is kept; the small inputs live in buffers that are written
in place before each call, and are bound again only when their shape changes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from helixflow.engine.base import Float32
from helixflow.engine.plan import Run

KEPT_PER_SLOT = 4


class Item(NamedTuple):
    """A sequence in a step: `tokens` for positions `past` ... of `slot`; its `wanted` rows begin at row `offset`."""

    slot: int
    past: int
    tokens: list[int]
    wanted: int
    offset: int


class Binding:
    """Caches and rotary tables of slots `low` .. `low + count - 1`, bound for one call shape after the other."""

    def __init__(self, io: Any, low: int, count: int) -> None:
        self.io = io
        self.low = low
        self.count = count
        self.tokens = -1
        # Address and rows of the logits: an array here would live as long as the binding.
        self.output = (0, 0)


class Calls:
    """Runs the graph of `onnx_graph` on caches float32 [2 * layers, slots, kv_heads, positions, width].

    `rotary`: cosines and sines float32 [positions, width / 2].
    """

    def __init__(self, session: Any, cache: Float32, rotary: tuple[Float32, Float32], vocab: int) -> None:
        self._session = session
        self._cache = cache
        self._rotary = [np.ascontiguousarray(table) for table in rotary]
        self._vocab = vocab
        slots, positions = cache.shape[1], cache.shape[3]
        self._kept = KEPT_PER_SLOT * slots
        self._bindings: dict[tuple[int, int], Binding] = {}
        self._ids = np.zeros(max(slots, positions, 2), np.int32)
        self._rows = np.zeros(max(slots, positions, 2), np.int32)
        self._seqlens = np.zeros(slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._few = np.empty((slots, vocab), np.float32)
        self._use(self._few)
        self._scattered = np.empty((slots, vocab), np.float32)

    def logits(self, rows: int) -> Float32:
        """The rows of the step that was run last, float32 [rows, vocab]; the next step reuses the memory."""
        return self._logits[:rows]

    def make_room(self, rows: int) -> None:
        """Called before a step: its items write rows 0 .. rows - 1. Memory for many is given back later."""
        if rows > len(self._logits):
            self._use(np.empty((rows, self._vocab), np.float32))
        elif self._logits is not self._few and rows <= len(self._few):
            self._use(self._few)

    def _use(self, logits: Float32) -> None:
        self._logits, self._address = logits, logits.ctypes.data

    def prefill(self, item: Item) -> None:
        """A piece of a prompt, alone on its slot, with a dummy behind it when its length is odd.

        The runtime attends by blocks of an even number of tokens (2 * head width, unless the processor's second cache
        is small), and with another kernel, whose sums differ in the last bits, for a block of one. Of an even length,
        no block of one is left over: a prompt gives the same logits wherever it is cut. (Not so with heads wider than
        128, which none of the usual models has: their sums are also split by how many positions are seen.)
        """
        count = len(item.tokens)
        length = count + count % 2
        self._ids[:length] = 0
        self._ids[:count] = item.tokens
        self._seqlens[0] = item.past + length - 1
        self._total[()] = item.past + length
        self._rows[: item.wanted] = range(count - item.wanted, count)
        self._run(self._binding(item.slot, 1), length, self._row(item.offset), item.wanted)

    def decode(self, items: Sequence[Item], run: Run, lengths: Sequence[int]) -> None:
        """One token for each of `items` (ascending slots, within the run), dummies for the other slots of the run."""
        low, count = run.low, run.high - run.low
        if count == len(items):
            ids, seqlens = [item.tokens[0] for item in items], [item.past for item in items]
        else:
            ids, seqlens = [0] * count, list(lengths[low : run.high])
            for item in items:
                ids[item.slot - low] = item.tokens[0]
                seqlens[item.slot - low] = item.past
        self._ids[:count] = ids
        self._seqlens[:count] = seqlens
        self._total[()] = max(seqlens) + 1
        wanted = sorted((item.offset, item.slot - low) for item in items if item.wanted)
        self._decode_rows(wanted, self._binding(low, count))

    def _decode_rows(self, wanted: list[tuple[int, int]], binding: Binding) -> None:
        """Asks for (output row, row of the call) pairs; rows that are not neighbours go through a buffer."""
        rows = len(wanted)
        first = wanted[0][0] if wanted else 0
        self._rows[:rows] = [row for _, row in wanted]
        if rows == 0 or wanted[-1][0] - first + 1 == rows:
            self._run(binding, 1, self._row(first), rows)
            return
        self._run(binding, 1, self._scattered.ctypes.data, rows)
        self._logits[[offset for offset, _ in wanted]] = self._scattered[:rows]

    def _row(self, index: int) -> int:
        """Address of a row of the logits."""
        return self._address + index * self._vocab * 4

    def _run(self, binding: Binding, tokens: int, address: int, rows: int) -> None:
        io = binding.io
        if binding.tokens != tokens:
            io.bind_input("ids", "cpu", 0, np.int32, [binding.count, tokens], self._ids.ctypes.data)
            binding.tokens = tokens
        if binding.output != (address, rows):
            io.bind_input("rows", "cpu", 0, np.int32, [rows], self._rows.ctypes.data)
            io.bind_output("logits", "cpu", 0, np.float32, [rows, self._vocab], address)
            binding.output = (address, rows)
        self._session.run_with_iobinding(io)

    def _binding(self, low: int, count: int) -> Binding:
        found = self._bindings.get((low, count))
        if found is not None:
            return found
        while len(self._bindings) >= self._kept:
            del self._bindings[next(iter(self._bindings))]
        io = self._session.io_binding()
        _, _, heads, positions, width = self._cache.shape
        for name, table in zip(("cos", "sin"), self._rotary, strict=True):
            io.bind_input(name, "cpu", 0, np.float32, list(table.shape), table.ctypes.data)
        io.bind_input("seqlens", "cpu", 0, np.int32, [count], self._seqlens.ctypes.data)
        io.bind_input("total", "cpu", 0, np.int32, [], self._total.ctypes.data)
        shape = [count, heads, positions, width]
        for i, cache in enumerate(self._cache):
            name = f"{'kv'[i % 2]}_{i // 2}"
            address = cache[low:].ctypes.data
            io.bind_input(f"past_{name}", "cpu", 0, np.float32, shape, address)
            io.bind_output(f"present_{name}", "cpu", 0, np.float32, shape, address)
        binding = Binding(io, low, count)
        self._bindings[low, count] = binding
        return binding
