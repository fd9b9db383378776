"""Plans on the GPU: TensorRT's runtime, engines and execution contexts, over the memory and streams of `cuda`."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from helixflow import log
from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.compile import DECODE
from helixflow.engine.tensorrt.device import DeviceError, DeviceInfo, Graph, TensorInfo
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.numeric import type_name

BUILD = "build it again with the installed version, for this device (`helixflow engine build`)"


class Host(Protocol):
    """What a program needs of the device (`cuda.CudaDevice`)."""

    library: Library
    stream: int

    def enter(self) -> None:
        """Makes the device current in this thread."""

    def info(self) -> DeviceInfo:
        """See `device.Device`."""

    def scratch(self, nbytes: int) -> tuple[int, int]:
        """Address and size of the shared work space, of at least so many bytes."""

    def capture(self, enqueue: Any) -> Graph:
        """See `device.Device`."""

    def broken(self, doing: str) -> DeviceError:
        """The error for a call that failed."""


class CudaProgram:
    """See `device.Program`."""

    def __init__(self, host: Host, plan: bytes, cache: Path | None) -> None:
        """`cache`: file that keeps what TensorRT-RTX compiles for the device. Raises EngineError."""
        self._host, self._path = host, cache
        self._library, self._trt = host.library, host.library.trt
        self._library.log.take()
        self._runtime = self._trt.Runtime(self._library.log)
        if self._library.rtx:
            self._check(plan)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise host.broken(
                f"the plan cannot be loaded; it must be one of {self._library.kind} {self._library.version} for "
                f"{host.info().name}: {BUILD}"
            )
        self._tensors = self._read_tensors()
        profiles = range(self._engine.num_optimization_profiles)
        self._scratch_bytes = max(self._engine.get_device_memory_size_for_profile_v2(i) for i in profiles)
        self._cache: Any = None
        self._kept = b""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `device.Program`."""
        return self._tensors

    @property
    def scratch_bytes(self) -> int:
        """See `device.Program`."""
        return int(self._scratch_bytes)

    def context(self, profile: int) -> "CudaContext":
        """See `device.Program`."""
        host = self._host
        host.enter()
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._library.rtx:
            self._configure(config, profile)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise host.broken(f"no context can be made for profile {profile}")
        if self._scratch_bytes:
            context.set_device_memory(*host.scratch(self.scratch_bytes))
        if not context.set_optimization_profile_async(profile, host.stream):
            raise host.broken(f"profile {profile} cannot be used")
        self._tell()
        return CudaContext(host, context)

    def close(self) -> None:
        """See `device.Program`."""
        if self._engine is None:
            return
        self.keep()
        self._engine = self._cache = self._runtime = None

    def keep(self) -> None:
        """Writes what was compiled for the device to the cache's file, if it is more than the file has."""
        if self._cache is None or self._path is None:
            return
        memory = self._cache.serialize()
        content = b"" if memory is None else bytes(memory)
        if content in (b"", self._kept):
            return
        self._kept = content
        try:
            _replace(self._path, content)
        except OSError as error:
            log.get("engine").warning(
                "what TensorRT compiled for this device cannot be kept; the next start compiles it again",
                file=str(self._path),
                error=error.strerror or str(error),
            )

    def _check(self, plan: bytes) -> None:
        """Asks TensorRT-RTX whether the plan is for this library and device, before it is read as a whole."""
        trt, info = self._trt, self._host.info()
        header = plan[: self._runtime.engine_header_size]
        validity, flags = self._runtime.get_engine_validity(header)
        if validity == trt.EngineValidity.INVALID:
            known = trt.EngineInvalidityDiagnostics.__members__.items()
            reasons = [name for name, value in known if int(value) & int(flags)] or ["no reason given"]
            words = self._library.log.take()
            raise EngineError(
                f"{self._library.kind} {self._library.version} refuses the plan on {info.name} (SM {info.sm}, "
                f"{info.driver}): {', '.join([*reasons, *words])}: {BUILD}"
            )
        if validity == trt.EngineValidity.SUBOPTIMAL:
            log.get("engine").warning(
                "the plan was made for another device; one made for this device may be faster", device=info.name
            )

    def _configure(self, config: Any, profile: int) -> None:
        """What only TensorRT-RTX has: it compiles kernels for the device when they are first needed.

        Decode launches have as many shapes as there are buckets, all of them seen before the first request: each gets
        kernels of its own, at once. Launches with prompts have new shapes all the time, and the kernels that fit every
        shape: compiling for each would hold up steps, and doing so in the background would take the cores of the
        gateway and change the last bits of results at some point. Graphs are recorded by us (see `forward.Recorded`).
        """
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = (
            strategies.EAGER if profile == DECODE else strategies.NONE
        )
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read_cache()
        if self._cache is not None and not config.set_runtime_cache(self._cache):
            self._cache = None

    def _read_cache(self) -> None:
        if self._path is None or self._cache is None:
            return
        try:
            content = self._path.read_bytes()
        except OSError:
            return
        # A cache of another version or device is refused as a whole, and written anew.
        if self._cache.deserialize(content):
            self._kept = content
        self._library.log.take()

    def _read_tensors(self) -> dict[str, TensorInfo]:
        engine, trt = self._engine, self._trt
        tensors = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineError(f"the plan wants {name} in the memory of the host: {BUILD}")
            try:
                dtype = type_name(trt, engine.get_tensor_dtype(name))
            except KeyError as error:
                raise EngineError(f"the type of {name} in the plan is unknown to this version: {BUILD}") from error
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            tensors[name] = TensorInfo(tuple(engine.get_tensor_shape(name)), dtype, is_input)
        return tensors

    def _tell(self) -> None:
        """Logs errors that TensorRT has reported, although the call went well."""
        for message in self._library.log.take():
            log.get("engine").warning("TensorRT reported an error", message=message)


class CudaContext:
    """See `device.Context`."""

    def __init__(self, host: Host, context: Any) -> None:
        self._host, self._context = host, context

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """See `device.Context`."""
        if not self._context.set_input_shape(name, shape):
            raise self._host.broken(f"{name} cannot have the shape {list(shape)}")

    def set_address(self, name: str, address: int) -> None:
        """See `device.Context`."""
        if not self._context.set_tensor_address(name, address):
            raise self._host.broken(f"{name} cannot lie at {address:#x}")

    def run(self) -> None:
        """See `device.Context`."""
        self._host.enter()
        if not self._context.execute_async_v3(self._host.stream):
            raise self._host.broken("a launch failed")

    def capture(self) -> Graph:
        """See `device.Context`."""
        if self._host.library.rtx and not self._context.is_stream_capturable(self._host.stream):
            raise DeviceError("failed", "TensorRT-RTX says that this engine cannot be recorded as a CUDA graph")
        return self._host.capture(self.run)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file as a whole, or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        whole = Path(file.name)
        try:
            file.write(content)
            file.close()
            whole.replace(path)
        except OSError:
            whole.unlink(missing_ok=True)
            raise
