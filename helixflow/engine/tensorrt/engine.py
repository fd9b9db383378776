"""The GPU engine: batches become launches, and plain decoding runs one step ahead of its caller.

When every sequence of a step has drawn its token on the device, the next step is enqueued at once: its tokens are the
ids of this one, copied on the device. It is used where the caller then asks for just that, and forgotten elsewhere: it
wrote at one position behind what each slot holds, and whatever comes later runs later.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import Batch, Candidates, Capacity, EngineError, Float32
from helixflow.engine.items import Item, check_copy, unpack
from helixflow.engine.rope import tables
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.ahead import UNKNOWN, Ahead, Part
from helixflow.engine.tensorrt.device import Device, DeviceError
from helixflow.engine.tensorrt.draws import Draws
from helixflow.engine.tensorrt.forward import Forward, Programs
from helixflow.engine.tensorrt.launches import NOBODY, Launch, plan, runs
from helixflow.engine.tensorrt.memory import Memory
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import CANDIDATES, EngineOptions
from helixflow.engine.tensorrt.runner import Answer, Runner

# Each kind of launch in both parities, and twice: graphs are recorded in the second run.
WARM_RUNS = 4


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a built engine is used. `slots`, `max_len`: at most what it was built for, 0 for just that.

    `ahead`: decode one step ahead; `warm`: run every kind of launch once before the first request, so that nothing is
    compiled or recorded while one waits.
    """

    slots: int = 0
    max_len: int = 0
    ahead: bool = True
    warm: bool = True


DEFAULTS = RunOptions()


class TensorRtEngine:
    """See `base.Engine`. After a DeviceError, every call raises it again."""

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        options: EngineOptions,
        programs: Programs,
        weights: Mapping[str, NDArray[Any]],
        run: RunOptions = DEFAULTS,
    ) -> None:
        """`options`: what `programs` were built for; `weights`: by name in the checkpoint, in the types that the
        programs want, read once. Takes device and programs over: they are closed with it, or when it cannot be made.

        Raises EngineError.
        """
        self._device, self._programs, self._run_options = device, programs, run
        self._forward: Forward | None = None
        self._memory: Memory | None = None
        self._closed = False
        self._dead: DeviceError | None = None
        try:
            self._options = _used(options, run)
            slots, max_len = self._options.slots, run.max_len or options.max_len
            self._capacity = Capacity(slots, max_len, spec.vocab_size, CANDIDATES)
            self._held = [0] * slots
            self._poisoned: set[int] = set()
            self._ahead: Ahead | None = None
            # Logits that the caller asked for; memory for many rows is given back after their step.
            self._few = np.empty((0, spec.vocab_size), np.float32)
            self._memory = Memory(device, spec, self._options, programs.weights, programs.nbytes)
            cos, sin = tables(spec.rope, spec.head_dim, max_len, options.positions)
            dtype = NUMPY[options.compute]
            self._memory.upload(weights, programs.weights, (cos.astype(dtype), sin.astype(dtype)))
            self._forward = programs.forward(self._memory.addresses)
            self._runner = Runner(device, self._forward, self._memory, spec.vocab_size)
            if run.warm:
                self._warm()
        except BaseException:
            self.close()
            raise

    def capacity(self) -> Capacity:
        """See `base.Engine`."""
        return self._capacity

    @property
    def caches(self) -> Mapping[str, int]:
        """Addresses of the caches on the device (see `forward.Addresses`), for who checks or spoils them."""
        return self._open().addresses.caches

    def step(self, batch: Batch) -> Candidates:
        """See `base.Engine`. Without `batch.sampling`, all rows of logits are returned."""
        memory = self._open()
        items = unpack(batch, self._capacity, self._held)
        draws = Draws.of(batch.sampling, sum(item.wanted for item in items))
        answer = Answer(draws.host, self._rows(int(draws.host.sum())))
        try:
            self._run(memory, items, draws, answer)
        except DeviceError as error:
            self._dead = error
            raise
        return answer.candidates() if batch.sampling is not None else Candidates(logits=answer.rows)

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """See `base.Engine`."""
        memory = self._open()
        check_copy(src, dst, length, self._capacity, self._held)
        if self._ahead is not None:
            self._ahead.forget(dst)
        try:
            if src != dst:
                if dst in self._poisoned:
                    memory.clear_slot(dst)
                    self._poisoned.discard(dst)
                if src in self._poisoned:
                    self._poisoned.add(dst)
                memory.copy_slot(src, dst, length)
        except DeviceError as error:
            self._dead = error
            raise
        self._held[dst] = length

    def close(self) -> None:
        """See `base.Engine`."""
        if self._closed:
            return
        self._closed = True
        self._ahead = None
        # A device that is lost can free nothing, and need not.
        with contextlib.suppress(DeviceError):
            self._device.synchronize()
            if self._forward is not None:
                self._forward.close()
            if self._memory is not None:
                self._memory.free()
            self._programs.close()
        self._device.close()

    def _open(self) -> Memory:
        if self._dead is not None:
            raise self._dead
        if self._closed or self._memory is None:
            raise EngineError("the engine is closed")
        return self._memory

    def _warm(self) -> None:
        nobody = Draws.of(None, 0)
        for bucket in reversed(self._options.decode_buckets):
            for _ in range(WARM_RUNS):
                self._runner.enqueue(Launch([Item(bucket - 1, 0, [0], 0, 0)], self._options), nobody)
        count = min(self._options.chunk_tokens, self._capacity.max_len)
        if count > 1:
            for _ in range(WARM_RUNS):
                self._runner.enqueue(Launch([Item(0, 0, [0] * count, 0, 0)], self._options), nobody)
        self._device.synchronize()

    def _rows(self, count: int) -> Float32:
        """Memory for rows of logits, float32 [count, vocab]; for few rows it is the same in every step."""
        if len(self._few) < count <= self._capacity.slots:
            self._few = np.empty((self._capacity.slots, self._capacity.vocab_size), np.float32)
        if count <= len(self._few):
            return self._few[:count]
        return np.empty((count, self._capacity.vocab_size), np.float32)

    def _run(self, memory: Memory, items: Sequence[Item], draws: Draws, answer: Answer) -> None:
        """Computes a step. Raises DeviceError."""
        self._heal(memory, items)
        ahead, self._ahead = self._ahead, None
        parts: list[Part] = []
        left = list(items)
        if ahead is not None:
            part, left = ahead.serve(left, draws)
            if part.rows:
                parts.append(part)
        for launch in plan(left, self._options):
            self._make_place(parts, answer)
            flight = self._runner.enqueue(launch, draws)
            rows = [row for row, target in enumerate(launch.rows) if target != NOBODY]
            parts.append(Part(flight, rows, [launch.rows[row] for row in rows]))
        if self._run_options.ahead and not draws.host.any() and all(item.wanted == 1 for item in items):
            self._make_place(parts, answer)
            self._ahead = self._look_ahead(items, draws, parts, answer)
        for part in parts:
            self._collect(part, answer)
        for item in items:
            self._held[item.slot] = item.past + len(item.tokens)
            if answer.unsound and answer.unsound & set(range(item.offset, item.offset + item.wanted)):
                self._poisoned.add(item.slot)

    def _heal(self, memory: Memory, items: Sequence[Item]) -> None:
        """Clears what a sequence with numbers beyond all bounds has left: attention gives positions that are not seen
        no weight, and no weight times NaN is NaN."""
        for item in items if self._poisoned else ():
            if item.past == 0 and item.slot in self._poisoned:
                memory.clear_slot(item.slot)
                self._poisoned.discard(item.slot)

    def _make_place(self, parts: Sequence[Part], answer: Answer) -> None:
        """Takes what the launch before the last gave, which the next one is going to overwrite."""
        for part in parts:
            if part.flight.parity == self._runner.parity:
                self._collect(part, answer)

    def _collect(self, part: Part, answer: Answer) -> None:
        """Puts the results of a launch into the answer, once."""
        if part.collected:
            return
        part.collected = True
        ids = self._runner.wait(part.flight)
        rows, targets = np.array(part.rows, np.int64), np.array(part.targets, np.int64)
        undecided = part.flight.undecided[rows] | answer.host[targets]
        answer.token_ids[targets[~undecided]] = ids[rows[~undecided]]
        if undecided.any():
            places = {target: answer.row(target) for target in targets[undecided].tolist()}
            self._runner.fetch(part.flight, rows[undecided].tolist(), list(places.values()))
            answer.unsound |= {target for target, row in places.items() if not _finite(row)}

    def _look_ahead(self, items: Sequence[Item], draws: Draws, parts: Sequence[Part], answer: Answer) -> Ahead | None:
        """Enqueues the next token of every sequence that has one, if there are any."""
        places = {target: (part, row) for part in parts for row, target in zip(part.rows, part.targets, strict=True)}
        chosen: list[Item] = []
        sources: list[Item] = []
        rows: list[int] = []
        for item in sorted(items):
            past, (part, row) = item.past + len(item.tokens), places[item.offset]
            token = int(answer.token_ids[item.offset]) if part.collected else UNKNOWN
            if past < self._capacity.max_len and (token >= 0 or not part.collected):
                chosen.append(Item(item.slot, past, [max(token, 0)], 1, len(chosen)))
                rows.append(UNKNOWN if part.collected else row)
                sources.append(item)
        if not chosen:
            return None
        launch = Launch(chosen, self._options)
        pairs = [(row, launch.pads + i) for i, row in enumerate(rows) if row != UNKNOWN]
        following = draws.following([item.offset for item in sources])
        before = next((part.flight for part in parts if not part.collected), None)
        return Ahead(self._runner.enqueue(launch, following, runs(pairs)), following, before, rows)


def _used(options: EngineOptions, run: RunOptions) -> EngineOptions:
    """The options with as many slots as are used. Raises EngineError for more than the engine was built for."""
    for name, wanted, built in (("slots", run.slots, options.slots), ("max-len", run.max_len, options.max_len)):
        if not 0 <= wanted <= built:
            raise EngineError(f"{name} {wanted} is more than the engine was built for ({built}): build it again")
    used = replace(options, slots=run.slots or options.slots)
    if used.slots > options.positions:
        # Padding of a step lies in one spare row.
        raise EngineError(f"{used.slots} slots are more than max-len + 1 ({options.positions}): choose fewer slots")
    return used


def _finite(row: Float32) -> bool:
    """Whether all logits are finite: a sum is much cheaper than a look at each, and errs to the side of caution."""
    with np.errstate(invalid="ignore", over="ignore"):
        return math.isfinite(row.sum())
