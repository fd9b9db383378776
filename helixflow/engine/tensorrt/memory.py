"""Everything an engine keeps on the device: how much it is, whether it fits, and getting it there."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.device import Device, DeviceError, Event, TensorInfo
from helixflow.engine.tensorrt.forward import Addresses
from helixflow.engine.tensorrt.layout import ZEROS, Layout, aligned
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import EngineOptions

STAGE = 16 << 20
"""Bytes of each of the two halves of the page-locked buffer that weights go through."""
# Taken by the driver while an engine runs: contexts, recorded graphs, the local memory of kernels.
RESERVED = 128 << 20
MIB, GIB = 2**20, 2**30
ROPE = ("rope_cos", "rope_sin")


class Memory:
    """What an engine has on the device. `addresses`: of each thing; `blocks`: of the inputs of each parity;
    `results_stride`: bytes from `next_ids` to `undecided`."""

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        options: EngineOptions,
        weights: Mapping[str, TensorInfo],
        other_bytes: int,
    ) -> None:
        """Allocates all of it; caches are zeroed. `options`: with as many slots as the caches are to have; `weights`:
        to be uploaded; `other_bytes`: what the programs take by themselves. Raises DeviceError when it does not fit;
        then the device has to be closed.
        """
        self.device, self.layout = device, Layout(options, spec.vocab_size)
        item = NUMPY[options.compute].itemsize
        self._heads, self._position = spec.kv_heads, spec.head_dim * item
        self._pitch = options.positions * self._position
        self._row = spec.kv_heads * self._pitch
        self.results_stride = aligned(options.rows * 4)
        self._logits = options.rows * spec.vocab_size * 4
        self._rope = options.positions * spec.head_dim // 2 * item
        self._weights = {name: _nbytes(info) for name, info in weights.items()}
        self._check(spec, options, other_bytes)
        self.blocks: list[int] = []
        self._held: list[int] = []
        self.addresses = self._allocate_all(spec, options)

    def _check(self, spec: ModelSpec, options: EngineOptions, other_bytes: int) -> None:
        """Compares the sum with what is free. Raises DeviceError that says what could be made smaller."""
        info = self.device.info()
        row = 2 * spec.layers * self._row
        weights = sum(self._weights.values())
        caches = options.cache_rows * row
        other = other_bytes + 2 * (self._logits + 2 * self.results_stride + self.layout.nbytes + self._rope)
        left = info.free_bytes - RESERVED - weights - other
        if caches <= left:
            return
        fitting = left // row - 1
        if fitting >= 1:
            advice = f"choose at most {fitting} slots, or a smaller --max-len when building"
        else:
            advice = "choose a precision of fewer bits, a smaller --max-len when building, or a larger device"
        raise DeviceError(
            "out_of_memory",
            f"the engine does not fit on {info.name}: weights {_text(weights)}, caches of {options.slots} slots of "
            f"{options.max_len} positions {_text(caches)}, logits and work space {_text(other)}, kept for the driver "
            f"{_text(RESERVED)}; {_text(info.free_bytes)} of {_text(info.total_bytes)} are free: {advice}",
        )

    def _allocate_all(self, spec: ModelSpec, options: EngineOptions) -> Addresses:
        weights = {name: self._allocate(size) for name, size in self._weights.items()}
        caches = {
            f"{kind}_cache_{layer}": self._allocate(options.cache_rows * self._row)
            for layer in range(spec.layers)
            for kind in "kv"
        }
        for address in caches.values():
            self.device.fill(address, 0, options.cache_rows * self._row)
        zeros = self._allocate(ZEROS)
        self.device.fill(zeros, 0, ZEROS)
        steps, outputs = [], []
        for _ in range(2):
            block = self._allocate(self.layout.nbytes)
            # Inputs of a kind of launch that has not come yet are garbage, and nobody reads them.
            self.device.fill(block, 0, self.layout.nbytes)
            self.blocks.append(block)
            steps.append(self.layout.addresses(block))
            results = self._allocate(2 * self.results_stride)
            outputs.append(
                {
                    "next_ids": results,
                    "undecided": results + self.results_stride,
                    "logits": self._allocate(self._logits),
                }
            )
        rope = {name: self._allocate(self._rope) for name in ROPE}
        return Addresses(weights, caches, rope, zeros, (steps[0], steps[1]), (outputs[0], outputs[1]))

    def _allocate(self, nbytes: int) -> int:
        address = self.device.allocate(max(nbytes, 1))
        self._held.append(address)
        return address

    def upload(
        self, weights: Mapping[str, NDArray[Any]], wanted: Mapping[str, TensorInfo], rope: tuple[NDArray[Any], ...]
    ) -> None:
        """Uploads the weights and the rotary tables (cosines, sines; [positions, head_dim / 2]), one after the other
        through a small page-locked buffer: maps of files are read once, and there is never a second copy of a model in
        memory. Raises EngineError for what is missing or does not fit.
        """
        for name, info in wanted.items():
            found = weights.get(name)
            if found is None:
                raise EngineError(f"the weights lack {name}: build the engine again")
            if found.shape != info.shape or found.dtype != NUMPY[info.dtype]:
                raise EngineError(
                    f"{name} is {found.dtype} {list(found.shape)}, the plan wants {info.dtype} {list(info.shape)}: "
                    "build the engine again"
                )
        sources = {self.addresses.weights[name]: weights[name] for name in wanted}
        sources |= dict(zip((self.addresses.rope[name] for name in ROPE), rope, strict=True))
        stage = _Stage(self.device, max(source.nbytes for source in sources.values()))
        for address, source in sources.items():
            stage.upload(address, source)
        self.device.synchronize()

    def copy_slot(self, src: int, dst: int, length: int) -> None:
        """Copies the first `length` positions of a slot over those of another. Raises DeviceError."""
        for address in self.addresses.caches.values():
            source, target = (address + (slot + 1) * self._row for slot in (src, dst))
            self.device.copy_rows(target, source, self._pitch, length * self._position, self._heads)

    def clear_slot(self, slot: int) -> None:
        """Zeroes all positions of a slot. Raises DeviceError."""
        for address in self.addresses.caches.values():
            self.device.fill(address + (slot + 1) * self._row, 0, self._row)

    def free(self) -> None:
        """Gives everything back. Raises DeviceError."""
        while self._held:
            self.device.free(self._held.pop())


class _Stage:
    """Uploads arrays of any size through two halves of page-locked memory: one is filled while the other is read."""

    def __init__(self, device: Device, largest: int) -> None:
        """`largest`: bytes of the largest array."""
        self.device = device
        self.halves: list[tuple[NDArray[np.uint8], Event | None]] = [
            (device.pinned(min(STAGE, largest)), None) for _ in range(2)
        ]

    def upload(self, address: int, source: NDArray[Any]) -> None:
        """Returns when the source has been read."""
        data = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        for start in range(0, len(data), STAGE):
            half, event = self.halves.pop(0)
            if event is not None:
                self.device.wait(event)
            part = data[start : start + STAGE]
            half[: len(part)] = part
            self.device.upload(address + start, half[: len(part)])
            self.halves.append((half, self.device.record()))


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * NUMPY[info.dtype].itemsize


def _text(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB"
