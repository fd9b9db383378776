"""What measuring on a device takes: memory, fresh random numbers, small networks, and time.

A step opens a `Bench` through `Tools`, which tests replace by a device in host memory, tiny sizes and a plain clock.
"""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError
from helixflow.engine.progress import silent
from helixflow.engine.tensorrt.artefact import Toolkit
from helixflow.engine.tensorrt.compile import Profile
from helixflow.engine.tensorrt.device import Context, Device, DeviceError, Program
from helixflow.engine.tensorrt.interpreter import Interpreter
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.network import Network
from helixflow.engine.tensorrt.numeric import NUMPY, DType
from helixflow.engine.tensorrt.ops import Ops, Shape
from helixflow.engine.tensorrt.options import Compute, EngineOptions, GpuPrecision, Kind
from perf.gpu.clock import EventClock
from perf.gpu.rows import SkippedError, Task
from perf.gpu.sizes import FULL, Sizes

Array = NDArray[Any]
Letters = Mapping[str, int]

STAGING = 16 << 20
# TensorRT wants addresses that are multiples of this.
ALIGNMENT = 256
# What every byte of an output holds before it is written: NaN in every type of float, -1 in integers.
POISON = 0xFF
WARM_UP = 3
REPEATS = 15
CHECKED = 32
"""Rows and columns of a large product that are computed again on the host."""


class Clock(Protocol):
    """Measures device time."""

    def seconds(self, work: Callable[[], None]) -> float:
        """Time on the device between the start and the end of what `work` enqueues."""


class HostClock:
    """Host time between two synchronisations: for devices without events, and where the host's share is meant."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def seconds(self, work: Callable[[], None]) -> float:
        """See `Clock`."""
        self.device.synchronize()
        started = time.perf_counter()
        work()
        self.device.synchronize()
        return time.perf_counter() - started


def clock_of(device: Device) -> Clock:
    """The best clock that a device has."""
    try:
        from helixflow.engine.tensorrt.cuda import CudaDevice  # noqa: PLC0415 - only GPUs need it
    except ImportError:
        return HostClock(device)
    return EventClock(device) if isinstance(device, CudaDevice) else HostClock(device)


def open_bare() -> Device:
    """The GPU without a TensorRT. Raises SkippedError, DeviceError."""
    try:
        from cuda.bindings import driver, runtime  # noqa: PLC0415 - optional, and slow to load
    except ImportError as error:
        raise SkippedError(f"the package cuda-bindings is not installed ({error})") from error
    from helixflow.engine.tensorrt.cuda import Checked, CudaDevice  # noqa: PLC0415 - only GPUs need it

    # Only plans would need a library.
    return CudaDevice(cast("Any", None), Checked(runtime), Checked(driver), 0)


@dataclass(frozen=True, slots=True)
class Tools:
    """What steps work with. `toolkit`: where library, plans and device come from; `bare`: a device without a library;
    `onnx`: where ONNX Runtime computes (see `onnx_cuda.Runtime`), None: on the GPU."""

    toolkit: Toolkit = field(default_factory=Toolkit)
    sizes: Sizes = FULL
    bare: Callable[[], Device] = open_bare
    onnx: Any = None

    @contextlib.contextmanager
    def bench(self, backend: str) -> Iterator["Bench"]:
        """A device with a library. Raises SkippedError when something for it is not installed, DeviceError."""
        kind: Kind = "tensorrt-rtx" if backend == "tensorrt-rtx" else "tensorrt"
        try:
            library = self.toolkit.library(kind)
            device = self.toolkit.open_device(library, 0)
        except DeviceError:
            raise
        except EngineError as error:
            raise SkippedError(str(error)) from error
        try:
            yield Bench(device, library, self)
        finally:
            device.close()


def open_bench(task: Task) -> contextlib.AbstractContextManager["Bench"]:
    """The bench of a task. Raises SkippedError, DeviceError."""
    return (task.tools or Tools()).bench(task.backend)


@dataclass(frozen=True, slots=True)
class Small:
    """A small network. `outputs`: shapes with letters; `make` is kept alive by the network itself."""

    network: Network
    outputs: dict[str, Shape]
    precision: GpuPrecision


class Bench:
    """A device being measured; frees what it allocated when its owner closes the device."""

    def __init__(self, device: Device, library: Library | None, tools: Tools) -> None:
        """`library` None: only memory and time will be needed."""
        self.device, self.tools, self.sizes = device, tools, tools.sizes
        self.library = cast("Library", library)
        self.clock = clock_of(device)
        self.seed = int.from_bytes(os.urandom(4), "little")
        self.rng = np.random.default_rng(self.seed)
        self._staging: NDArray[np.uint8] | None = None
        self._held: list[int] = []
        self._blocks: dict[tuple[DType, float], tuple[int, int]] = {}

    # --- memory ---

    def allocate(self, nbytes: int) -> int:
        """Address of device memory, at least one unit of it."""
        address = self.device.allocate(max(-(-nbytes // ALIGNMENT) * ALIGNMENT, ALIGNMENT))
        self._held.append(address)
        return address

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Frees what is allocated inside."""
        before = len(self._held)
        try:
            yield
        finally:
            self.device.synchronize()
            for address in self._held[before:]:
                self.device.free(address)
            del self._held[before:]

    def put(self, values: Array) -> int:
        """An array's copy in device memory."""
        address = self.allocate(values.nbytes)
        self.write(address, values)
        return address

    def write(self, address: int, values: Array) -> None:
        """Overwrites device memory; done when it returns."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for start in range(0, len(data), STAGING):
            part = self._pinned(data[start : start + STAGING])
            self.device.upload(address + start, part)
            self.device.synchronize()

    def read(self, address: int, shape: Sequence[int], dtype: DType) -> Array:
        """A copy of device memory, after everything that was enqueued."""
        values = np.empty(tuple(shape), NUMPY[dtype])
        data = values.reshape(-1).view(np.uint8)
        for start in range(0, len(data), STAGING):
            part = self._pinned(None, min(STAGING, len(data) - start))
            self.device.download(part, address + start)
            self.device.synchronize()
            data[start : start + len(part)] = part
        return values

    def fill_random(self, address: int, count: int, dtype: DType, scale: float = 1.0) -> None:
        """Fills memory with normal numbers, from a block that was drawn on the host and stays on the device: what is
        larger holds it several times, and no two of them begin alike."""
        item = NUMPY[dtype].itemsize
        block, length = self._block(dtype, scale)
        start = int(self.rng.integers(length // ALIGNMENT)) * ALIGNMENT if length > ALIGNMENT else 0
        total, done = count * item, 0
        while done < total:
            if done < length:
                more = min(length - start, total - done)
                self.device.copy(address + done, block + start, more)
                start = 0
            else:
                more = min(done, total - done)
                self.device.copy(address + done, address, more)
            done += more
        self.device.synchronize()

    def _block(self, dtype: DType, scale: float) -> tuple[int, int]:
        """Address and size of the random block of a type and scale."""
        found = self._blocks.get((dtype, scale))
        if found is None:
            values = self.normal((self.sizes.random_block // NUMPY[dtype].itemsize,), dtype, scale)
            # Not to be freed with what a step allocates around it.
            found = self._blocks[dtype, scale] = (self.device.allocate(values.nbytes), values.nbytes)
            self.write(found[0], values)
        return found

    def random(self, count: int, dtype: DType, scale: float = 1.0) -> int:
        """New memory, filled so."""
        address = self.allocate(count * NUMPY[dtype].itemsize)
        self.fill_random(address, count, dtype, scale)
        return address

    def normal(self, shape: Sequence[int], dtype: DType, scale: float = 1.0) -> Array:
        """Normal numbers on the host, rounded to a type."""
        return (self.rng.standard_normal(tuple(shape), np.float32) * np.float32(scale)).astype(NUMPY[dtype])

    def _pinned(self, data: NDArray[np.uint8] | None, nbytes: int = 0) -> NDArray[np.uint8]:
        if self._staging is None:
            self._staging = self.device.pinned(STAGING)
        part = self._staging[: nbytes if data is None else len(data)]
        if data is not None:
            part[:] = data
        return part

    # --- networks ---

    def network(
        self,
        precision: GpuPrecision,
        make: Callable[[Ops], Mapping[str, tuple[Any, Shape]]],
        kind: Callable[[Library, Any, Compute], Ops] = Ops,
    ) -> Small:
        """A small network. `make` adds layers and returns its outputs: name -> (tensor, shape with letters); `kind`:
        of `Ops` to be used."""
        network = Network(self.library, EngineOptions(precision, slots=1, max_len=1))
        network.ops = kind(self.library, network.definition, network.ops.compute)
        outputs = make(network.ops)
        for name, (tensor, _) in outputs.items():
            network.ops.output(tensor, name)
        return Small(network, {name: shape for name, (_, shape) in outputs.items()}, precision)

    def compiled(self, small: Small, *wanted: Profile) -> bytes:
        """Its plan. Raises EngineError."""
        sms = capabilities(self.library, self.device.info().sm)
        return bytes(self.tools.toolkit.compile(self.library, small.network, small.precision, wanted, sms, silent))

    def loaded(self, small: Small, *wanted: Profile) -> "Loaded":
        """Compiled and loaded, for the first of the profiles."""
        return Loaded(self, small, self.device.load(self.compiled(small, *wanted)))

    # --- time ---

    def median(self, work: Callable[[], None], inner: int = 1, repeats: int = REPEATS) -> float:
        """Median seconds of one `work`, which is enqueued `inner` times between two events."""

        def enqueue() -> None:
            for _ in range(inner):
                work()

        for _ in range(WARM_UP):
            enqueue()
        self.device.synchronize()
        return statistics.median(self.clock.seconds(enqueue) for _ in range(repeats)) / inner


class Loaded:
    """A network on the device, bound to memory. Outputs that are caches lie where their inputs lie."""

    def __init__(self, bench: Bench, small: Small, program: Program, profile: int = 0) -> None:
        self.bench, self.small, self.program = bench, small, program
        self.context: Context = program.context(profile)
        self.addresses: dict[str, int] = {}
        self.letters: dict[str, int] = {}

    def shape(self, letters: Letters) -> None:
        """Sets the free sizes of all inputs, and gives every output memory of its own unless it has some."""
        self.letters = dict(letters)
        for name, shape in self.small.network.ops.symbols.items():
            if any(isinstance(size, str) for size in shape):
                self.context.set_shape(name, sizes(shape, letters))
        for name, shape in self.small.outputs.items():
            if name.removesuffix("_out") in self.small.network.ops.symbols:
                continue
            self.at(name, self.bench.allocate(self.nbytes(name, shape)))

    def at(self, name: str, address: int) -> None:
        """Where an input is read or an output is written."""
        self.addresses[name] = address
        self.context.set_address(name, address)
        if f"{name}_out" in self.small.outputs:
            self.addresses[f"{name}_out"] = address
            self.context.set_address(f"{name}_out", address)

    def feed(self, feeds: Mapping[str, Array]) -> None:
        """Inputs from the host, into memory of their own."""
        for name, values in feeds.items():
            self.at(name, self.bench.put(values))

    def randomise(self, scale: float = 1.0) -> None:
        """Gives every input of floats that has no memory yet random numbers of its own."""
        for name, info in self.program.tensors().items():
            if info.is_input and name not in self.addresses and info.dtype in ("fp32", "fp16", "bf16"):
                shape = sizes(self.small.network.ops.symbols[name], self.letters)
                kind: DType = {"fp32": "fp32", "fp16": "fp16"}.get(info.dtype, "bf16")  # type: ignore[assignment]
                self.at(name, self.bench.random(math.prod(shape), kind, scale))

    def poison(self) -> None:
        """Fills the outputs that are no caches with what no network computes."""
        for name, shape in self.small.outputs.items():
            if name.removesuffix("_out") not in self.small.network.ops.symbols:
                self.bench.device.fill(self.addresses[name], POISON, self.nbytes(name, shape))

    def run(self) -> None:
        """Enqueues it."""
        self.context.run()

    def results(self) -> dict[str, Array]:
        """Every output, after everything that was enqueued."""
        return {name: self.results_of(name) for name in self.small.outputs}

    def results_of(self, name: str) -> Array:
        """One output."""
        shape = sizes(self.small.outputs[name], self.letters)
        return self.bench.read(self.addresses[name], shape, _dtype(self.program.tensors()[name].dtype))

    def nbytes(self, name: str, shape: Shape) -> int:
        """Size of an output."""
        return math.prod(sizes(shape, self.letters)) * NUMPY[_dtype(self.program.tensors()[name].dtype)].itemsize

    def compare(self, letters: Letters, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Runs it on the device and in numpy: outputs of both. Called again with other feeds, it is run anew."""
        self.shape(letters)
        self.feed(feeds)
        self.poison()
        self.run()
        reference = Interpreter(self.bench.library.trt, self.small.network.definition).run(feeds)
        return self.results(), reference


def capabilities(library: Library, sm: int) -> tuple[int, ...]:
    """What a plan is compiled for, as `helixflow engine build` does it: RTX for this device, if it names it."""
    return (sm,) if library.rtx and f"SM{sm}" in library.trt.ComputeCapability.__members__ else ()


def sizes(shape: Shape, letters: Letters) -> tuple[int, ...]:
    """A shape with its letters replaced; "B+1" is one more than "B"."""
    result = []
    for size in shape:
        if isinstance(size, str):
            letter, _, more = size.partition("+")
            size = letters[letter] + int(more or 0)  # noqa: PLW2901 - a number from here on
        result.append(size)
    return tuple(result)


def fixed(letters: Letters) -> Profile:
    """The profile for these sizes and no others."""
    return {letter: (size, size, size) for letter, size in letters.items()}


def ranged(*several: Letters) -> Profile:
    """The profile that takes all of these, tuned for the last."""
    return {
        letter: (
            min(one[letter] for one in several), several[-1][letter], max(one[letter] for one in several)
        )
        for letter in several[0]
    }  # fmt: skip


def distance(out: Array, reference: Array) -> float:
    """‖out - reference‖ / ‖reference‖ in float64; infinite when one of them holds what is no finite number, and for a
    reference of zeros, which would compare nothing."""
    a, b = out.astype(np.float64), reference.astype(np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    scale = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / scale if scale else math.inf


def _dtype(name: str) -> DType:
    known: dict[str, DType] = {str(kind): kind for kind in NUMPY}
    return known[name]
