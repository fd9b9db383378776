"""A `Device` in host memory: plans are interpreted, work is put off as long as it may be, and misuse is an error.

What a GPU would answer with wrong tokens, now and then, is refused here every time: reads and writes out of bounds or
of freed memory, copies of overlapping ranges, host memory that is touched while a copy of it is under way.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.tensorrt.compile import Profile
from helixflow.engine.tensorrt.device import DeviceError, DeviceInfo, Event, Failure, Graph, Module, TensorInfo
from helixflow.engine.tensorrt.interpreter import Interpreter, InterpreterError
from helixflow.engine.tensorrt.network import Network
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.ops import Shape

Bytes = NDArray[np.uint8]
Garbage = Literal["finite", "nan"]
Pace = Literal["lazy", "eager", "random"]
Modules = Callable[["HostDevice", bytes], Module]
"""Makes what stands for a module of kernels; its work goes through `HostDevice.enqueue("kernel ...", work)`."""
ALIGNMENT = 256
POISON = 0x7F  # int32 2139062143, float32 3.4e38: no token, no logit


class MisuseError(AssertionError):
    """What a device would not survive, or would answer with wrong results."""


class Plan:
    """An interpreted network. `symbols`: shapes of its inputs with letters; `profiles`: ranges of the letters."""

    def __init__(self, interpreter: Interpreter, symbols: Mapping[str, Shape], profiles: Sequence[Profile]) -> None:
        self.interpreter, self.symbols, self.profiles = interpreter, symbols, profiles


PLANS: dict[bytes, Plan] = {}


def register(network: Network, profiles: Sequence[Profile] = ()) -> bytes:
    """What stands for the serialised plan of a network from now on. Without `profiles` any number and shape will do."""
    plan = b"interpreted network %d" % len(PLANS)
    interpreter = Interpreter(network.library.trt, network.definition)
    PLANS[plan] = Plan(interpreter, dict(network.ops.symbols), tuple(profiles))
    return plan


class HostEvent:
    """Behind the first `index` pieces of work."""

    def __init__(self, index: int) -> None:
        self.index = index


class HostDevice:
    """See the module and `device.Device`. Addresses are real ones.

    `garbage`: what fresh memory holds; "finite": numbers of about 1 to 30 in fp16, bf16 and fp32, "nan": NaN in each
    (and -1 in integers). `pace`: when queued work is done; "lazy": when it is awaited, "eager": at once, "random":
    anything between. `modules`: where kernels come from. `calls` counts calls by name: "upload", "run", "launch" (of
    graphs), "kernel ..."; "captured": a run or kernel that was only recorded.
    """

    def __init__(
        self,
        garbage: Garbage = "finite",
        pace: Pace = "lazy",
        *,
        modules: Modules | None = None,
        sm: int = 89,
        total_bytes: int = 2**34,
        seed: int = 0,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.pace = pace
        self._modules = modules
        self._random = np.random.default_rng(seed)
        self._garbage = self._garbage_block(garbage)
        self._sm, self._total = sm, total_bytes
        self._addresses: list[int] = []
        self._memory: dict[int, Bytes] = {}
        self._freed: dict[int, Bytes] = {}
        self._pinned: dict[int, Bytes] = {}
        self._queue: list[Callable[[], None]] = []
        self._done = 0
        self._recording: list[Callable[[], None]] | None = None
        self._fault: tuple[int, Failure, frozenset[str]] | None = None
        self._dead: DeviceError | None = None
        self.closed = False

    def _garbage_block(self, kind: Garbage) -> Bytes:
        if kind == "nan":
            return np.full(65536, 0xFF, np.uint8)
        block = self._random.integers(0, 256, 65536).astype(np.uint8)
        # The upper byte of every 16-bit word, and so of every 32-bit one, makes a small finite number.
        block[1::2] = self._random.choice([0x3F, 0x40, 0x41, 0xBF, 0xC0, 0xC1], 32768)
        return block

    # --- what tests ask for and look at ---

    def fail_after(self, calls: int, kind: Failure, *names: str) -> None:
        """The call after `calls` more of these (no names: of any) raises, and all that follow unless out of memory."""
        self._fault = (calls, kind, frozenset(names))

    @property
    def live_bytes(self) -> int:
        """Device memory in use."""
        return sum(len(memory) for memory in self._memory.values())

    def view(self, address: int, dtype: Any, shape: Sequence[int]) -> NDArray[Any]:
        """Device memory as an array, as it is now."""
        count = int(np.prod(shape, dtype=np.int64))
        array: NDArray[Any] = self.bytes_at(address, count * np.dtype(dtype).itemsize).view(dtype)
        return array.reshape(tuple(shape))

    def bytes_at(self, address: int, nbytes: int) -> Bytes:
        """Device memory, or MisuseError when not all of it is inside one allocation."""
        found = _containing(self._addresses, self._memory, address, nbytes)
        if found is None:
            freed = _containing(sorted(self._freed), self._freed, address, nbytes)
            raise MisuseError(f"{nbytes} bytes at {address:#x}: " + ("freed" if freed is not None else "out of bounds"))
        return found

    def enqueue(self, name: str, work: Callable[[], None]) -> None:
        """Puts work on the compute stream; counted as a call of `name`."""
        self._called(name)
        if self._recording is not None:
            self._recording.append(work)
            return
        self._queue.append(work)
        if self.pace == "eager":
            self._work(len(self._queue))
        elif self.pace == "random":
            self._work(int(self._random.integers(self._done, len(self._queue) + 1)))

    # --- the protocol ---

    def info(self) -> DeviceInfo:
        self._called("info")
        return DeviceInfo("host", self._sm, "0.0", self._total, self._total - self.live_bytes)

    def allocate(self, nbytes: int) -> int:
        self._called("allocate")
        if nbytes < 1:
            raise MisuseError(f"an allocation of {nbytes} bytes")
        if nbytes > self._total - self.live_bytes:
            raise DeviceError("out_of_memory", f"{nbytes} bytes are not available")
        memory = _aligned(nbytes)
        memory[:] = np.resize(self._garbage, nbytes)
        address = memory.ctypes.data
        self._memory[address] = memory
        bisect.insort(self._addresses, address)
        return address

    def free(self, address: int) -> None:
        self._called("free")
        if address not in self._memory:
            raise MisuseError(f"{address:#x} is no allocation")
        # Kept, so that its address is not given out again and a later use is noticed.
        self._freed[address] = self._memory.pop(address)
        self._addresses.remove(address)

    def pinned(self, nbytes: int) -> Bytes:
        self._called("pinned")
        memory = _aligned(nbytes)
        memory[:] = np.resize(self._garbage, nbytes)
        self._pinned[memory.ctypes.data] = memory
        return memory

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        def work() -> None:
            self.bytes_at(address, nbytes)[:] = byte

        self.enqueue("fill", work)

    def upload(self, address: int, source: NDArray[Any]) -> None:
        host = self._host(source)
        before = host.copy()

        def work() -> None:
            if not np.array_equal(host, before):
                raise MisuseError("the source of an upload was changed before it was awaited")
            self.bytes_at(address, len(host))[:] = host

        self.enqueue("upload", work)

    def download(self, target: NDArray[Any], address: int) -> None:
        host = self._host(target)
        host[:] = POISON

        def work() -> None:
            host[:] = self.bytes_at(address, len(host))

        self.enqueue("download", work)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.copy_rows(target, source, nbytes, nbytes, 1)

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        def work() -> None:
            if rows < 1 or width < 1:
                return
            reach = (rows - 1) * pitch + width
            if width > pitch or abs(target - source) < reach:
                raise MisuseError(f"{rows} rows of {width} bytes, {pitch} apart, overlap")
            for row in range(rows):
                self.bytes_at(target + row * pitch, width)[:] = self.bytes_at(source + row * pitch, width)

        self.enqueue("copy_rows", work)

    def fetch(self, target: NDArray[Any], address: int) -> None:
        self._called("fetch")
        host = self._host(target)
        # Overtakes the compute stream: whatever was not awaited may not have happened.
        host[:] = self.bytes_at(address, len(host))

    def record(self) -> Event:
        self._called("record")
        return HostEvent(len(self._queue))

    def wait(self, event: Event) -> None:
        assert isinstance(event, HostEvent)
        self._work(event.index)
        self._called("wait")

    def load(self, plan: bytes, cache: Path | None = None) -> "HostProgram":
        self._called("load")
        if bytes(plan) not in PLANS:
            raise DeviceError("failed", "the plan is not one of this version")
        return HostProgram(self, PLANS[bytes(plan)])

    def module(self, image: bytes) -> Module:
        self._called("module")
        if self._modules is None:
            raise DeviceError("failed", "this device has no kernels")
        return self._modules(self, image)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        self._called("capture")
        self._recording = []
        try:
            enqueue()
            return HostGraph(self, tuple(self._recording))
        finally:
            self._recording = None

    def synchronize(self) -> None:
        self._work(len(self._queue))
        self._called("synchronize")

    def close(self) -> None:
        self._queue.clear()
        self._done = 0
        self._freed |= self._memory
        self._memory.clear()
        self._addresses.clear()
        self.closed = True

    # --- inside ---

    def _called(self, name: str) -> None:
        if self.closed:
            raise MisuseError(f"{name} on a closed device")
        if self._dead is not None:
            raise self._dead
        if self._recording is not None and name.partition(" ")[0] not in ("run", "kernel"):
            raise MisuseError(f"{name} while a graph is captured")
        self.calls["captured" if self._recording is not None else name] += 1
        if self._fault is None:
            return
        left, kind, names = self._fault
        if names and name not in names:
            return
        if left > 0:
            self._fault = (left - 1, kind, names)
            return
        self._fault = None
        error = DeviceError(kind, f"injected: {kind}")
        if kind != "out_of_memory":
            self._dead = error
        raise error

    def _work(self, until: int) -> None:
        """Does queued work, in order, up to a point."""
        while self._done < until:
            self._done += 1
            self._queue[self._done - 1]()
            self._queue[self._done - 1] = _nothing

    def _host(self, array: NDArray[Any]) -> Bytes:
        """The bytes of a host array, which must lie in page-locked memory."""
        if not array.flags.c_contiguous:
            raise MisuseError("a host array is not contiguous")
        found = _containing(sorted(self._pinned), self._pinned, array.ctypes.data, array.nbytes)
        if found is None:
            raise MisuseError("a host array is not page-locked: it must be one that `pinned` made")
        return found


class HostProgram:
    """See `device.Program`."""

    scratch_bytes = 4096

    def __init__(self, device: HostDevice, plan: Plan) -> None:
        self.device, self.plan = device, plan
        self.closed = False

    def tensors(self) -> Mapping[str, TensorInfo]:
        plan = self.plan.interpreter
        tensors = {name: TensorInfo(shape, kind, True) for name, (kind, shape) in plan.inputs.items()}
        return tensors | {name: TensorInfo(shape, kind, False) for name, (kind, shape) in plan.outputs.items()}

    def context(self, profile: int) -> "HostContext":
        profiles = self.plan.profiles
        if profile < 0 or (profiles and profile >= len(profiles)):
            raise DeviceError("failed", f"there is no profile {profile}")
        return HostContext(self, profiles[profile] if profiles else {})

    def close(self) -> None:
        self.closed = True


class HostContext:
    """See `device.Context`."""

    def __init__(self, program: HostProgram, profile: Profile) -> None:
        self.program, self.profile = program, profile
        plan = program.plan.interpreter
        self.shapes = {name: shape for name, (_, shape) in plan.inputs.items()}
        self.addresses: dict[str, int] = {}

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        symbols = self.program.plan.symbols.get(name)
        if symbols is None or len(shape) != len(symbols):
            raise DeviceError("failed", f"{name} is {symbols}, not {shape}")
        for size, symbol in zip(shape, symbols, strict=True):
            low, high = _range(symbol, self.profile)
            if not low <= size <= high:
                raise DeviceError("failed", f"{name} {shape}: the profile takes {low} .. {high} for {symbol}")
        self.shapes[name] = tuple(int(size) for size in shape)

    def set_address(self, name: str, address: int) -> None:
        plan = self.program.plan.interpreter
        if name not in plan.inputs and name not in plan.outputs:
            raise DeviceError("failed", f"there is no tensor {name}")
        if address % ALIGNMENT:
            # NvInferRuntime.h, setTensorAddress: "The pointer must have at least 256-byte alignment."
            raise MisuseError(f"{name} lies at {address:#x}: TensorRT wants multiples of {ALIGNMENT}")
        self.addresses[name] = address

    def run(self) -> None:
        self.program.device.enqueue("run", self._recorded())

    def capture(self) -> Graph:
        return self.program.device.capture(self.run)

    def _recorded(self) -> Callable[[], None]:
        """One run with the shapes and addresses of this moment."""
        plan, device = self.program.plan.interpreter, self.program.device
        if self.program.closed:
            raise MisuseError("a program that is closed was run")
        sizes: dict[str, int] = {}
        for name, symbols in self.program.plan.symbols.items():
            for size, symbol in zip(self.shapes[name], symbols, strict=True):
                if size < 0:
                    raise DeviceError("failed", f"the shape of {name} was not set")
                letter, more = _letter(symbol)
                if sizes.setdefault(letter, size - more) != size - more:
                    raise DeviceError("failed", f"{name} is {self.shapes[name]}, but {letter} is {sizes[letter]}")
        missing = (plan.inputs.keys() | plan.outputs.keys()) - self.addresses.keys()
        if missing:
            raise DeviceError("failed", f"no address was set for {sorted(missing)}")
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        for output, cache in plan.aliases.items():
            if addresses[output] != addresses[cache]:
                raise DeviceError("failed", f"{output} must lie where {cache} lies")
        return lambda: _interpret(device, plan, shapes, addresses)


def _letter(symbol: int | str) -> tuple[str, int]:
    """("B", 1) of "B+1"; a fixed size is a letter of its own."""
    letter, _, more = str(symbol).partition("+")
    return letter, int(more or 0)


def _range(symbol: int | str, profile: Profile) -> tuple[int, int]:
    """Sizes that a dimension may have."""
    if isinstance(symbol, int):
        return symbol, symbol
    letter, more = _letter(symbol)
    low, _, high = profile.get(letter, (0, 0, 2**31 - 1))
    return low + more, high + more


class HostGraph:
    """See `device.Graph`."""

    def __init__(self, device: HostDevice, work: Sequence[Callable[[], None]]) -> None:
        self.device, self.work = device, work

    def launch(self) -> None:
        def replay() -> None:
            for work in self.work:
                work()

        self.device.enqueue("launch", replay)


def _interpret(
    device: HostDevice, plan: Interpreter, shapes: Mapping[str, Sequence[int]], addresses: Mapping[str, int]
) -> None:
    """Runs a plan from device memory to device memory."""
    feeds = {name: device.view(addresses[name], NUMPY[kind], shapes[name]) for name, (kind, _) in plan.inputs.items()}
    try:
        results = plan.run(feeds)
    except InterpreterError as error:
        raise MisuseError(str(error)) from error
    targets = {name: device.bytes_at(addresses[name], value.nbytes) for name, value in results.items() if value.nbytes}
    read = [(name, addresses[name], feed.nbytes) for name, feed in feeds.items()]
    written: list[tuple[str, int, int]] = []
    for name, target in targets.items():
        for other, start, size in (*read, *written):
            same = plan.aliases.get(name) == other
            if not same and addresses[name] < start + size and start < addresses[name] + len(target):
                raise MisuseError(f"output {name} overlaps {other}")
        written.append((name, addresses[name], len(target)))
    for name, target in targets.items():
        target[:] = np.ascontiguousarray(results[name]).reshape(-1).view(np.uint8)


def _containing(addresses: Sequence[int], blocks: Mapping[int, Bytes], address: int, nbytes: int) -> Bytes | None:
    """The bytes in question of the block that contains all of them; `addresses`: of the blocks, ascending."""
    at = bisect.bisect_right(addresses, address) - 1
    if at < 0:
        return None
    start = address - addresses[at]
    block = blocks[addresses[at]]
    return block[start : start + nbytes] if start + nbytes <= len(block) else None


def _aligned(nbytes: int) -> Bytes:
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]


def _nothing() -> None:
    """Work that is done."""
