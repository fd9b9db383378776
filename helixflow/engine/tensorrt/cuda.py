"""The GPU, through cuda-python: memory, two streams, events, CUDA graphs and kernels of our own (see `device`)."""

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.device import Argument, DeviceError, DeviceInfo, Failure
from helixflow.engine.tensorrt.library import EXTRAS, Library
from helixflow.engine.tensorrt.runtime import CudaProgram

OUT_OF_MEMORY = frozenset({"cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"})
LOST = frozenset(
    {
        "cudaErrorAssert",
        "cudaErrorContained",
        "cudaErrorContextIsDestroyed",
        "cudaErrorDeviceUninitialized",
        "cudaErrorDevicesUnavailable",
        "cudaErrorECCUncorrectable",
        "cudaErrorExternalDevice",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalAddress",
        "cudaErrorIllegalInstruction",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorLaunchFailure",
        "cudaErrorLaunchTimeout",
        "cudaErrorMisalignedAddress",
        "cudaErrorMpsClientTerminated",
        "cudaErrorMpsConnectionFailed",
        "cudaErrorMpsRpcFailure",
        "cudaErrorMpsServerNotReady",
        "cudaErrorNvlinkUncorrectable",
        "cudaErrorSystemNotReady",
        "cudaErrorTensorMemoryLeak",
        "cudaErrorUnknown",
    }
)
"""Errors after which nothing more can be done in this process: the hardware failed, or the context is broken."""
ADVICE = {
    "cudaErrorInsufficientDriver": "install a driver for CUDA 13 (580 or newer), or serve without a GPU (engine onnx)",
    "cudaErrorNoDevice": "no GPU is visible: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "cudaErrorInvalidDevice": "there is no such device: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "cudaErrorDevicesUnavailable": "another process has the device for itself, or it failed: look at `nvidia-smi`, and "
    "for `Xid` in the kernel log",
    "cudaErrorMemoryAllocation": "choose fewer slots, or end other programs that use the device",
    "cudaErrorSystemDriverMismatch": "driver and kernel module differ: restart the machine",
}
LOST_ADVICE = "the device or its context is lost: look for `Xid` in the kernel log; only a new process can go on"


class Checked:
    """A module of cuda-python whose functions raise instead of returning a status; with one result, it is returned."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, int | type):
            return found

        def call(*arguments: Any) -> Any:
            try:
                status, *results = found(*arguments)
            except RuntimeError as error:  # the library behind the module cannot be loaded
                raise DeviceError("failed", f"{name}: {error}") from error
            if int(status):
                raise failure(name, getattr(status, "name", str(status)), self.describe(status))
            return results[0] if len(results) == 1 else tuple(results)

        # The next use of the name finds the function itself.
        setattr(self, name, call)
        return call

    def describe(self, status: Any) -> str:
        """What the driver says of a status."""
        if hasattr(self._module, "cudaGetErrorString"):
            text = self._module.cudaGetErrorString(status)[1]
        else:
            text = self._module.cuGetErrorString(status)[1]
        return text.decode() if text else "no description"


def failure(call: str, status: str, description: str) -> DeviceError:
    """The error for a status of a call."""
    kind: Failure = "out_of_memory" if status in OUT_OF_MEMORY else "lost" if status in LOST else "failed"
    advice = ADVICE.get(status, LOST_ADVICE if kind == "lost" else "")
    return DeviceError(kind, f"{call}: {status} ({description})" + (f": {advice}" if advice else ""))


def open_device(library: Library, index: int = 0) -> "CudaDevice":
    """Device `index` of those that CUDA_VISIBLE_DEVICES leaves. Raises EngineError when it cannot be used."""
    try:
        from cuda.bindings import driver, runtime  # noqa: PLC0415 - optional, and slow to load
    except ImportError as error:
        extra = EXTRAS[library.kind]
        raise EngineError(f"cuda-bindings is not installed ({error}): run `pip install '{extra}'`") from error
    return CudaDevice(library, Checked(runtime), Checked(driver), index)


class CudaDevice:
    """See `device.Device`. `stream`: handle of the compute stream."""

    def __init__(self, library: Library, cuda: Any, driver: Any, index: int) -> None:
        """`cuda`, `driver`: `Checked` modules `runtime` and `driver` of cuda.bindings. Raises DeviceError."""
        self.library, self.cuda, self.driver, self.index = library, cuda, driver, index
        self._closed = False
        self._allocated: set[int] = set()
        self._programs: list[CudaProgram] = []
        self._scratch = (0, 0)
        self._events: list[Any] = []
        count = cuda.cudaGetDeviceCount()
        if not 0 <= index < count:
            raise DeviceError("failed", f"there is no device {index}: {count} are visible")
        self._thread = 0
        self.enter()
        # A thread that waits must not take a core from the gateway and the scheduler.
        cuda.cudaSetDeviceFlags(cuda.cudaDeviceScheduleBlockingSync)
        properties = cuda.cudaGetDeviceProperties(index)
        name = properties.name
        self._name = name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)
        self._sm = properties.major * 10 + properties.minor
        version = cuda.cudaDriverGetVersion()
        self._driver = f"{version // 1000}.{version % 1000 // 10}"
        self._streams = [cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking) for _ in range(2)]
        self._compute, self._side = self._streams
        self.stream = int(self._compute)

    def enter(self) -> None:
        """Makes the device current in the calling thread, as every call of CUDA and TensorRT needs it."""
        if threading.get_ident() != self._thread:
            self.cuda.cudaSetDevice(self.index)
            self._thread = threading.get_ident()

    def info(self) -> DeviceInfo:
        """See `device.Device`; `driver` is the version of CUDA that it was made for."""
        self.enter()
        free, total = self.cuda.cudaMemGetInfo()
        return DeviceInfo(self._name, self._sm, f"CUDA {self._driver}", total, free)

    def allocate(self, nbytes: int) -> int:
        """See `device.Device`."""
        self.enter()
        address = int(self.cuda.cudaMalloc(nbytes))
        self._allocated.add(address)
        return address

    def free(self, address: int) -> None:
        """See `device.Device`; waits for the work that is under way."""
        self.enter()
        self.cuda.cudaFree(address)
        self._allocated.discard(address)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """See `device.Device`; given back with the last array that looks at it, even after the device was closed."""
        self.enter()
        address = int(self.cuda.cudaHostAlloc(nbytes, self.cuda.cudaHostAllocDefault))
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(buffer, _quietly, self.cuda.cudaFreeHost, address)
        return np.frombuffer(memoryview(buffer), np.uint8)

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """See `device.Device`."""
        self.enter()
        self.cuda.cudaMemsetAsync(address, byte, nbytes, self._compute)

    def upload(self, address: int, source: NDArray[Any]) -> None:
        """See `device.Device`."""
        self.enter()
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.cuda.cudaMemcpyAsync(address, source.ctypes.data, source.nbytes, kind, self._compute)

    def download(self, target: NDArray[Any], address: int) -> None:
        """See `device.Device`."""
        self._down(target, address, self._compute)

    def fetch(self, target: NDArray[Any], address: int) -> None:
        """See `device.Device`."""
        self._down(target, address, self._side)
        self.cuda.cudaStreamSynchronize(self._side)

    def _down(self, target: NDArray[Any], address: int, stream: Any) -> None:
        self.enter()
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.cuda.cudaMemcpyAsync(target.ctypes.data, address, target.nbytes, kind, stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See `device.Device`."""
        self.enter()
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.cuda.cudaMemcpyAsync(target, source, nbytes, kind, self._compute)

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """See `device.Device`."""
        self.enter()
        if width == 0 or rows == 0:
            return
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.cuda.cudaMemcpy2DAsync(target, pitch, source, pitch, width, rows, kind, self._compute)

    def record(self) -> "CudaEvent":
        """See `device.Device`."""
        self.enter()
        flags = self.cuda.cudaEventBlockingSync | self.cuda.cudaEventDisableTiming
        handle = self._events.pop() if self._events else self.cuda.cudaEventCreateWithFlags(flags)
        self.cuda.cudaEventRecord(handle, self._compute)
        return CudaEvent(handle, self._events)

    def wait(self, event: Any) -> None:
        """See `device.Device`."""
        self.enter()
        self.cuda.cudaEventSynchronize(event.handle)

    def load(self, plan: bytes, cache: Path | None = None) -> CudaProgram:
        """See `device.Device`. Raises EngineError for a plan of another version, library or device."""
        self.enter()
        program = CudaProgram(self, plan, cache)
        self._programs.append(program)
        return program

    def scratch(self, nbytes: int) -> tuple[int, int]:
        """Address and size of the block that all contexts share: as large as any loaded program needs."""
        address, size = self._scratch
        if size < nbytes:
            # Contexts that have the old block, and graphs that hold its address, go on with it.
            size = max(nbytes, *(program.scratch_bytes for program in self._programs))
            address = self.allocate(size)
            self._scratch = (address, size)
        return address, size

    def module(self, image: bytes) -> "CudaModule":
        """See `device.Device`."""
        self.enter()
        return CudaModule(self, self.driver.cuModuleLoadData(image + b"\0"))

    def capture(self, enqueue: Callable[[], None]) -> "CudaGraph":
        """See `device.Device`."""
        self.enter()
        cuda = self.cuda
        # What other threads do meanwhile must not break the recording.
        cuda.cudaStreamBeginCapture(self._compute, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
            graph = cuda.cudaStreamEndCapture(self._compute)
        except BaseException:
            # The stream must leave the mode of recording, and the error must not be found by the next call.
            _quietly(cuda.cudaStreamEndCapture, self._compute)
            _quietly(cuda.cudaGetLastError)
            raise
        try:
            return CudaGraph(self, cuda.cudaGraphInstantiate(graph, 0))
        finally:
            _quietly(cuda.cudaGraphDestroy, graph)

    def synchronize(self) -> None:
        """See `device.Device`; also brings the files up to date that keep what was compiled."""
        self.enter()
        for stream in self._streams:
            self.cuda.cudaStreamSynchronize(stream)
        for program in self._programs:
            program.keep()

    def launch_graph(self, graph: Any) -> None:
        """Enqueues an instantiated graph."""
        self.enter()
        self.cuda.cudaGraphLaunch(graph, self._compute)

    def broken(self, doing: str) -> DeviceError:
        """The error for a call of TensorRT that failed: of CUDA where that has one, with TensorRT's own words."""
        words = str(self.library.failure(doing))
        try:
            self.cuda.cudaGetLastError()
            # An error of the context shows in every call, whichever library made it.
            self.record()
        except DeviceError as error:
            return DeviceError(error.kind, f"{words}; {error}")
        return DeviceError("out_of_memory" if "out of memory" in words.lower() else "failed", words)

    def close(self) -> None:
        """See `device.Device`."""
        if self._closed:
            return
        self._closed = True
        cuda = self.cuda
        _quietly(self.enter)
        _quietly(cuda.cudaStreamSynchronize, self._compute)
        for program in self._programs:
            _quietly(program.close)
        for handle in self._events:
            _quietly(cuda.cudaEventDestroy, handle)
        for stream in self._streams:
            _quietly(cuda.cudaStreamDestroy, stream)
        for address in self._allocated:
            _quietly(cuda.cudaFree, address)
        self._events.clear()
        self._allocated.clear()


class CudaEvent:
    """See `device.Event`. Its handle is used again once nobody holds the event."""

    def __init__(self, handle: Any, unused: list[Any]) -> None:
        self.handle = handle
        self._unused = unused

    def __del__(self) -> None:
        self._unused.append(self.handle)


class CudaGraph:
    """See `device.Graph`."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph
        weakref.finalize(self, _quietly, device.cuda.cudaGraphExecDestroy, graph)

    def launch(self) -> None:
        """See `device.Graph`."""
        self._device.launch_graph(self._graph)


class CudaModule:
    """See `device.Module`. Unloaded with the process: kernels may still be part of graphs."""

    def __init__(self, device: CudaDevice, module: Any) -> None:
        self._device, self._module = device, module
        self._kernels: dict[str, Any] = {}

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        """See `device.Module`."""
        device = self._device
        device.enter()
        function = self._kernels.get(kernel)
        if function is None:
            function = self._kernels[kernel] = device.driver.cuModuleGetFunction(self._module, kernel.encode())
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = device.driver.CUstream(device.stream)
        device.driver.cuLaunchKernel(function, *grid, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0)


def _quietly(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls what can only fail when it no longer matters."""
    with contextlib.suppress(DeviceError, RuntimeError):
        function(*arguments)
