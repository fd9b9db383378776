"""Calls into ONNX Runtime with everything bound to fixed memory, so that a step costs few Python operations.

The caches of a run of slots are bound once and the binding is kept; the small inputs live in buffers that are written
in place before each call, and are bound again only when their shape changes. `total` and the logits are on the host
whatever the device: GroupQueryAttention reads the one there, and the sampler the other.

A call is not recorded as a CUDA graph: GroupQueryAttention lays its work out by `total`, and a recorded call would keep
the length at which it was recorded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helixflow.engine.base import Float32
from helixflow.engine.items import Item
from helixflow.engine.onnx_graph import NUMPY_TYPES, ONNX_TYPES, Compute
from helixflow.engine.onnx_memory import Memory
from helixflow.engine.plan import Run

KEPT_PER_SLOT = 4


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of all slots, [planes, slots, heads, positions, width] at `address`.

    Plane 2 i holds the keys of layer i, plane 2 i + 1 its values.
    """

    address: int
    planes: int
    slots: int
    heads: int
    positions: int
    width: int
    compute: Compute

    @property
    def nbytes(self) -> int:
        """Of everything."""
        return self.planes * self.slots * self.slot_bytes

    @property
    def row_bytes(self) -> int:
        """Of one position of one head."""
        return self.width * NUMPY_TYPES[self.compute].itemsize

    @property
    def slot_bytes(self) -> int:
        """Of one slot in one plane."""
        return self.heads * self.positions * self.row_bytes

    def at(self, plane: int, slot: int) -> int:
        """Address of a slot in a plane."""
        return self.address + (plane * self.slots + slot) * self.slot_bytes


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
    """Runs the graph of `onnx_graph` on a cache.

    `rotary`: cosines and sines float32 [positions, width / 2]. `vocab`: width of the logits.
    """

    def __init__(self, session: Any, memory: Memory, cache: Cache, rotary: tuple[Float32, Float32], vocab: int) -> None:
        self._session = session
        self._memory = memory
        self._cache = cache
        dtype = NUMPY_TYPES[cache.compute]
        self._rotary = [memory.place(table.astype(dtype)) for table in rotary]
        self._vocab = vocab
        slots, positions = cache.slots, cache.positions
        self._kept = KEPT_PER_SLOT * slots
        self._bindings: dict[tuple[int, int], Binding] = {}
        self._ids = memory.buffer(max(slots, positions, 2))
        self._rows = memory.buffer(max(slots, positions, 2))
        self._seqlens = memory.buffer(slots)
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
        128, which none of the usual models has: their sums are also split by how many positions are seen.) All this is
        about the CPU. On a GPU the dummy costs next to nothing and promises nothing: its matrix products choose a
        kernel by the number of rows, so the last bits depend on the cut anyway.
        """
        count = len(item.tokens)
        length = count + count % 2
        ids = self._ids.host
        ids[:length] = 0
        ids[:count] = item.tokens
        self._seqlens.host[0] = item.past + length - 1
        self._total[()] = item.past + length
        self._rows.host[: item.wanted] = range(count - item.wanted, count)
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
        self._ids.host[:count] = ids
        self._seqlens.host[:count] = seqlens
        self._total[()] = max(seqlens) + 1
        wanted = sorted((item.offset, item.slot - low) for item in items if item.wanted)
        self._decode_rows(wanted, self._binding(low, count))

    def _decode_rows(self, wanted: list[tuple[int, int]], binding: Binding) -> None:
        """Asks for (output row, row of the call) pairs; rows that are not neighbours go through a buffer."""
        rows = len(wanted)
        first = wanted[0][0] if wanted else 0
        self._rows.host[:rows] = [row for _, row in wanted]
        if rows == 0 or wanted[-1][0] - first + 1 == rows:
            self._run(binding, 1, self._row(first), rows)
            return
        self._run(binding, 1, self._scattered.ctypes.data, rows)
        self._memory.finish()
        self._logits[[offset for offset, _ in wanted]] = self._scattered[:rows]

    def _row(self, index: int) -> int:
        """Address of a row of the logits."""
        return self._address + index * self._vocab * 4

    def _run(self, binding: Binding, tokens: int, address: int, rows: int) -> None:
        io, memory = binding.io, self._memory
        if rows < memory.fewest_rows:
            rows, address = memory.fewest_rows, self._scattered.ctypes.data
            self._rows.host[:rows] = 0
        if binding.tokens != tokens:
            self._bind_input(io, "ids", np.int32, [binding.count, tokens], self._ids.address)
            binding.tokens = tokens
        if binding.output != (address, rows):
            self._bind_input(io, "rows", np.int32, [rows], self._rows.address)
            io.bind_output("logits", "cpu", 0, np.float32, [rows, self._vocab], address)
            binding.output = (address, rows)
        memory.send(self._ids, binding.count * tokens)
        memory.send(self._seqlens, binding.count)
        memory.send(self._rows, rows)
        self._session.run_with_iobinding(io)

    def _bind_input(self, io: Any, name: str, element: Any, shape: list[int], address: int) -> None:
        io.bind_input(name, self._memory.device, self._memory.index, element, shape, address)

    def _binding(self, low: int, count: int) -> Binding:
        found = self._bindings.get((low, count))
        if found is not None:
            return found
        while len(self._bindings) >= self._kept:
            del self._bindings[next(iter(self._bindings))]
        io, memory, cache = self._session.io_binding(), self._memory, self._cache
        element = ONNX_TYPES[cache.compute]
        for name, address in zip(("cos", "sin"), self._rotary, strict=True):
            self._bind_input(io, name, element, [cache.positions, cache.width // 2], address)
        self._bind_input(io, "seqlens", np.int32, [count], self._seqlens.address)
        io.bind_input("total", "cpu", 0, np.int32, [], self._total.ctypes.data)
        shape = [count, cache.heads, cache.positions, cache.width]
        for plane in range(cache.planes):
            name = f"{'kv'[plane % 2]}_{plane // 2}"
            address = cache.at(plane, low)
            self._bind_input(io, f"past_{name}", element, shape, address)
            io.bind_output(f"present_{name}", memory.device, memory.index, element, shape, address)
        binding = Binding(io, low, count)
        self._bindings[low, count] = binding
        return binding
