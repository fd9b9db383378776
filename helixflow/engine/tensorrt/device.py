"""One GPU, seen through what a step needs of it. `cuda` is the implementation; proofs without a GPU bring their own.

All work goes to one compute stream, in order; only `fetch` runs beside it. An array that is given to `upload` or
`download` must be one that `pinned` made, and must be left alone until an event recorded behind the call was awaited.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.numeric import DType

Failure = Literal["out_of_memory", "lost", "failed"]
Argument = ctypes.c_void_p | ctypes.c_int
"""Of a kernel: an address, or a number."""


class DeviceError(EngineError):
    """The device refused or failed. `kind`: what it means for the process; all but `out_of_memory` are final."""

    def __init__(self, kind: Failure, message: str) -> None:
        self.kind: Failure = kind
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """`sm`: compute capability times ten (8.9 is 89). `free_bytes`: at the time of the call."""

    name: str
    sm: int
    driver: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of a program; -1 in `shape` is free."""

    shape: tuple[int, ...]
    dtype: DType
    is_input: bool


class Event(Protocol):
    """A point in the compute stream."""


class Graph(Protocol):
    """Work of one `run`, recorded with its addresses and shapes."""

    def launch(self) -> None:
        """Enqueues it on the compute stream. Raises DeviceError."""


class Context(Protocol):
    """A program with shapes and addresses."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Shape of an input with free dimensions. Raises DeviceError when the profile has no such shape."""

    def set_address(self, name: str, address: int) -> None:
        """Where an input is read or an output is written."""

    def run(self) -> None:
        """Enqueues the program on the compute stream. Raises DeviceError."""

    def capture(self) -> Graph:
        """Records what `run` would enqueue. Raises DeviceError when the program cannot be recorded."""


class Program(Protocol):
    """A deserialised plan."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Inputs and outputs by name."""

    @property
    def scratch_bytes(self) -> int:
        """Memory beside inputs and outputs; one block is shared by all contexts of a device."""

    def context(self, profile: int) -> Context:
        """A context for the shapes of a profile. Raises DeviceError."""

    def close(self) -> None:
        """Frees it, after its contexts."""


class Module(Protocol):
    """Kernels of ours, compiled for the device."""

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        """Enqueues `grid` blocks of `threads` on the compute stream; arguments are copied before the call returns."""


class Device(Protocol):
    """See the module. Every call may raise DeviceError."""

    def info(self) -> DeviceInfo:
        """What the device is, and how much of its memory is free."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory with unspecified content."""

    def free(self, address: int) -> None:
        """Gives memory back."""

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory."""

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Sets every byte."""

    def upload(self, address: int, source: NDArray[Any]) -> None:
        """Host to device."""

    def download(self, target: NDArray[Any], address: int) -> None:
        """Device to host."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Device to device."""

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """The first `width` bytes of each of `rows` rows that lie `pitch` bytes apart, device to device."""

    def fetch(self, target: NDArray[Any], address: int) -> None:
        """Device to host beside the compute stream; returns when `target` holds it."""

    def record(self) -> Event:
        """An event behind everything enqueued so far."""

    def wait(self, event: Event) -> None:
        """Blocks until the event has happened; other threads run meanwhile."""

    def load(self, plan: bytes, cache: Path | None = None) -> Program:
        """Deserialises a plan; `cache`: file that keeps what is compiled for this device between starts."""

    def module(self, image: bytes) -> Module:
        """Loads kernels: a cubin, or PTX for the driver to compile (see `kernels`). Freed with the device."""

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Records what `enqueue` enqueues instead of doing it: any number of `run` and `launch`, in order."""

    def synchronize(self) -> None:
        """Blocks until everything enqueued is done."""

    def close(self) -> None:
        """Frees everything. May be called twice."""
