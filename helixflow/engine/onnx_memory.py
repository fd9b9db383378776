"""Memory that an ONNX Runtime session is bound to: caches, rotary tables and the small inputs of a call.

On the CPU it is plain memory, and what a call reads is where the caller wrote it. On a GPU the two are apart: `send`
carries the small inputs over. Everything of a `CudaMemory` goes to one stream, which the session computes on as well,
so that copies and computation happen in the order of the calls; `finish` waits for them.
"""

import ctypes
import math
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError, Int32
from helixflow.engine.memory import lazy_zeros
from helixflow.engine.tensorrt.device import Device, DeviceInfo

MIB = 1 << 20
# Beside caches and weights: handles and workspaces of the CUDA libraries, and the activations of a step.
RESERVE = 512 * MIB
# int32 values that are on their way to the device at most; a step is waited for when it has more.
STAGED = 1 << 18


class Buffer:
    """A small int32 input. The caller writes `host`; a call reads what was sent to `address`."""

    def __init__(self, host: Int32, address: int) -> None:
        self.host = host
        self.address = address


class Memory(Protocol):
    """See the module. Addresses are of the device; every call may raise DeviceError."""

    @property
    def device(self) -> str:
        """ONNX Runtime's name of the device, for bindings."""

    @property
    def index(self) -> int:
        """Number of the device."""

    @property
    def fewest_rows(self) -> int:
        """Rows of logits that a call asks for at least: not all CUDA kernels can be started over none."""

    def zeros(self, nbytes: int) -> int:
        """Address of new memory that is zero."""

    def place(self, array: NDArray[Any]) -> int:
        """Address of a copy of an array that never changes."""

    def buffer(self, length: int) -> Buffer:
        """A small input of up to `length` values."""

    def send(self, buffer: Buffer, count: int) -> None:
        """Lets later calls see the first `count` values of a buffer; `host` may be written again at once."""

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Copies the first `width` bytes of each of `rows` rows that lie `pitch` bytes apart."""

    def finish(self) -> None:
        """Waits for everything before it."""

    def close(self) -> None:
        """Frees everything, after the session that uses it. May be called twice."""


class HostMemory:
    """Memory of the CPU."""

    device, index, fewest_rows = "cpu", 0, 0

    def __init__(self) -> None:
        self._arrays: dict[int, NDArray[Any]] = {}

    def zeros(self, nbytes: int) -> int:  # noqa: D102 - documented by the protocol
        return self._keep(lazy_zeros((-(-nbytes // 4),)))

    def place(self, array: NDArray[Any]) -> int:  # noqa: D102
        return self._keep(np.ascontiguousarray(array))

    def buffer(self, length: int) -> Buffer:  # noqa: D102
        host = np.zeros(length, np.int32)
        return Buffer(host, host.ctypes.data)

    def send(self, buffer: Buffer, count: int) -> None:  # noqa: D102
        pass

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:  # noqa: D102
        for offset in range(0, rows * pitch, pitch):
            ctypes.memmove(target + offset, source + offset, width)

    def finish(self) -> None:  # noqa: D102
        pass

    def close(self) -> None:  # noqa: D102
        self._arrays.clear()

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """What `zeros` returned, as an array."""
        flat: NDArray[Any] = self._arrays[address].view(dtype)
        return flat[: math.prod(shape)].reshape(shape)

    def _keep(self, array: NDArray[Any]) -> int:
        address = array.ctypes.data
        self._arrays[address] = array
        return address


class CudaMemory:
    """Memory of a GPU. `stream`: handle of the stream that `gpu` works on; the session must compute on it as well."""

    device, fewest_rows = "cuda", 1

    def __init__(self, gpu: Device, index: int, stream: int) -> None:
        self.index, self.stream = index, stream
        self._gpu = gpu
        self._staged: Int32 = gpu.pinned(4 * STAGED).view(np.int32)
        self._used = 0

    def info(self) -> DeviceInfo:
        """What the GPU is, and how much of its memory is free."""
        return self._gpu.info()

    def available_bytes(self) -> int:
        """What caches and weights may take."""
        return max(self._gpu.info().free_bytes - RESERVE, 0)

    def zeros(self, nbytes: int) -> int:  # noqa: D102 - documented by the protocol
        address = self._gpu.allocate(nbytes)
        self._gpu.fill(address, 0, nbytes)
        return address

    def place(self, array: NDArray[Any]) -> int:  # noqa: D102
        source = self._gpu.pinned(array.nbytes)
        source[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self._gpu.allocate(array.nbytes)
        self._gpu.upload(address, source)
        self.finish()
        return address

    def buffer(self, length: int) -> Buffer:  # noqa: D102
        return Buffer(np.zeros(length, np.int32), self._gpu.allocate(4 * length))

    def send(self, buffer: Buffer, count: int) -> None:  # noqa: D102
        # The GPU reads later: from page-locked memory, which is left alone until it has.
        for start in range(0, count, STAGED):
            part = buffer.host[start : min(count, start + STAGED)]
            if self._used + len(part) > STAGED:
                self.finish()
            staged = self._staged[self._used : self._used + len(part)]
            staged[:] = part
            self._gpu.upload(buffer.address + 4 * start, staged)
            self._used += len(part)

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:  # noqa: D102
        self._gpu.copy_rows(target, source, pitch, width, rows)

    def finish(self) -> None:  # noqa: D102
        self._gpu.synchronize()
        self._used = 0

    def close(self) -> None:  # noqa: D102
        self._gpu.close()


def gpu_available_bytes(index: int) -> int:
    """What caches and weights may take of the memory of a GPU. Raises EngineError when it cannot be used."""
    memory = open_cuda(index)
    try:
        return memory.available_bytes()
    finally:
        memory.close()


def open_cuda(index: int) -> CudaMemory:
    """GPU `index` of those that CUDA_VISIBLE_DEVICES leaves. Raises EngineError when it cannot be used."""
    try:
        from cuda.bindings import driver, runtime  # noqa: PLC0415 - optional, and slow to load
    except ImportError as error:
        raise EngineError(f"cuda-bindings is not installed ({error}): run `pip install 'helixflow[cuda]'`") from error
    from helixflow.engine.tensorrt.cuda import Checked, CudaDevice  # noqa: PLC0415 - the CPU needs none of it

    # Only plans would need a TensorRT.
    gpu = CudaDevice(cast("Any", None), Checked(runtime), Checked(driver), index)
    return CudaMemory(gpu, index, gpu.stream)
