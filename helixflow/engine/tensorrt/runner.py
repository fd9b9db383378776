"""Launches under way: inputs go up, the programs run, ids come down; two sets of everything take turns."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import Candidates, Float32, Int32
from helixflow.engine.tensorrt.device import Device, Event
from helixflow.engine.tensorrt.draws import Draws
from helixflow.engine.tensorrt.forward import Forward
from helixflow.engine.tensorrt.launches import Launch, runs
from helixflow.engine.tensorrt.memory import Memory

FETCHED_ROWS = 8
"""Rows of logits that are fetched at once."""
Feed = tuple[int, int, int]
"""Ids of the launch before that become tokens: first row there, first token here, how many."""


class Flight:
    """A launch under way. `ids` int32 [R] and `undecided` bool [R]: once awaited."""

    def __init__(self, launch: Launch, parity: int, event: Event) -> None:
        self.launch, self.parity, self.event = launch, parity, event
        self.ids: Int32 | None = None
        self.undecided: NDArray[np.bool_] = np.zeros(0, np.bool_)


class Runner:
    """Enqueues launches and brings back what they give. `parity`: of the next launch. May raise DeviceError."""

    def __init__(self, device: Device, forward: Forward, memory: Memory, vocab: int) -> None:
        self.parity = 0
        self._device, self._forward, self._memory, self._vocab = device, forward, memory, vocab
        self._blocks = [device.pinned(memory.layout.nbytes) for _ in range(2)]
        self._arrays = [memory.layout.arrays(block) for block in self._blocks]
        self._results = [device.pinned(2 * memory.results_stride) for _ in range(2)]
        self._flights: list[Flight | None] = [None, None]
        self._stage: Float32 | None = None

    def enqueue(self, launch: Launch, draws: Draws, feeds: Sequence[Feed] = ()) -> Flight:
        """Enqueues a launch, whose rows are drawn as the entries of `draws` say that `launch.rows` names.

        It takes the place of the launch before the last, whose results must have been used by now.
        """
        device, parity, rows = self._device, self.parity, len(launch.rows)
        self._await_place()
        addresses = self._memory.addresses
        step, output = addresses.step(parity), addresses.output(parity)
        launch.write(self._arrays[parity])
        draws.write(self._arrays[parity], launch.rows)
        used = self._memory.layout.used(rows, prompts=not launch.decode)
        device.upload(self._memory.blocks[parity], self._blocks[parity][:used])
        before = addresses.output(1 - parity)["next_ids"]
        for row, token, count in feeds:
            device.copy(step["input_ids"] + 4 * token, before + 4 * row, 4 * count)
        if launch.decode:
            self._forward.decode(launch.shapes.T, parity)
        else:
            self._forward.mixed(launch.shapes, parity)
        device.download(self._results[parity][: self._memory.results_stride + 4 * rows], output["next_ids"])
        flight = self._flights[parity] = Flight(launch, parity, device.record())
        self.parity = 1 - parity
        return flight

    def _await_place(self) -> None:
        before = self._flights[self.parity]
        if before is not None:
            self.wait(before)

    def wait(self, flight: Flight) -> Int32:
        """Blocks until a launch is done; takes its ids before another one overwrites them, and returns them."""
        if flight.ids is not None:
            return flight.ids
        self._device.wait(flight.event)
        rows, stride = len(flight.launch.rows), self._memory.results_stride
        results = self._results[flight.parity]
        flight.undecided = results[stride : stride + 4 * rows].view(np.int32) != 0
        flight.ids = results[: 4 * rows].view(np.int32).copy()
        return flight.ids

    def fetch(self, flight: Flight, rows: Sequence[int], targets: Sequence[Float32]) -> None:
        """Brings rows of the logits of an awaited launch, each to its own target [vocab]."""
        if self._stage is None:
            pinned = self._device.pinned(FETCHED_ROWS * self._vocab * 4)
            self._stage = pinned.view(np.float32).reshape(FETCHED_ROWS, self._vocab)
        logits = self._memory.addresses.output(flight.parity)["logits"]
        for row, first, length in runs([(row, i) for i, row in enumerate(rows)]):
            for start in range(0, length, FETCHED_ROWS):
                count = min(FETCHED_ROWS, length - start)
                self._device.fetch(self._stage[:count], logits + (row + start) * self._vocab * 4)
                for i in range(count):
                    targets[first + start + i][:] = self._stage[i]


class Answer:
    """The result of a step while its launches come in. `host`: rows [R] that the caller chooses.

    `token_ids`: -1 for rows that have no token yet, and for those that the caller chooses; `rows`: their logits;
    `unsound`: rows whose logits are not all finite.
    """

    def __init__(self, host: NDArray[np.bool_], rows: Float32) -> None:
        """`rows`: memory for the logits of the rows in `host`, in order."""
        self.host, self.token_ids = host, np.full(len(host), -1, np.int32)
        self.rows, self._places = rows, np.cumsum(host) - 1
        self.unsound: set[int] = set()
        self._late: dict[int, Float32] = {}

    def row(self, index: int) -> Float32:
        """Where the logits of a row go to, [vocab]."""
        if self.host[index]:
            wanted: Float32 = self.rows[self._places[index]]
            return wanted
        return self._late.setdefault(index, np.empty(self.rows.shape[1], np.float32))

    def candidates(self) -> Candidates:
        """The result, once every row has a token or its logits."""
        if not self._late:
            return Candidates(self.rows if self.host.any() else None, self.token_ids)
        # Rare: rows that the device left open stand between those that were asked for.
        open_rows = np.flatnonzero(self.token_ids < 0).tolist()
        return Candidates(np.stack([self.row(index) for index in open_rows]), self.token_ids)
