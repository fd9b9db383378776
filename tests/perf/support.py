"""What the tests of the GPU check work with instead of a GPU."""

import ast
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.kinds import AnyPrecision
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.onnx_session import cpu_session
from helixflow.engine.progress import Progress
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.artefact import Toolkit
from helixflow.engine.tensorrt.compile import Profile
from helixflow.engine.tensorrt.device import Argument, DeviceError, Module
from helixflow.engine.tensorrt.kernels import AttentionShape
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.network import Network
from helixflow.engine.tensorrt.options import GpuPrecision
from perf.gpu.bench import Tools
from perf.gpu.plan import BACKENDS
from perf.gpu.rows import Report, Task
from perf.gpu.sizes import Sizes, decoder
from tests.engine.gpu import HostCuda, Ordered, open_gpu
from tests.engine.tensorrt.cpu_kernels import CpuModule, build
from tests.engine.tensorrt.host_device import HostDevice, register

MODEL = decoder(hidden=32, inner=64, layers=3, heads=4, kv_heads=2, head_dim=8, vocab=200, positions=256)
TINY = Sizes(
    random_block=1024,
    copy=1 << 16,
    matrix=32,
    positions=40,
    vocab=200,
    widths=(16,),
    groups=(1, 2),
    features=128,
    large=MODEL,
    narrow=MODEL,
    rows=3,
    lengths=(5, 20, 60),
    capacities=(32, 64),
    tokens=(1, 3, 8),
    vocabularies=(100, 200),
    sampled=5,
    slots=4,
    max_len=120,
    sequences=(1, 4),
    past=20,
    prompts=(12, 40),
    chunk=32,
    steps=2,
    rounds=2,
    halves=("fp16",),
    forms=("posmask",),
    golden=("qwen3-tiny",),
)


def interpreted(
    library: Library,
    network: Network,
    precision: GpuPrecision,
    profiles: Sequence[Profile],
    sms: Sequence[int],
    progress: Progress,
) -> bytes:
    """Stands for the plan of a network."""
    return register(network, profiles)


def named(shape: AttentionShape, sm: int, cache: Path | None = None) -> bytes:
    """Stands for compiled kernels: what they are compiled for (see `kernels.compile_kernels`)."""
    return repr(dataclasses.astuple(shape)).encode()


def cpu_modules(device: HostDevice, image: bytes) -> CpuModule:
    """Our own kernels, compiled for the CPU."""
    return CpuModule(build(AttentionShape(*ast.literal_eval(image.decode()))), device.enqueue)


class HostOnnx:
    """See `onnx_cuda.Runtime`: sessions on the CPU behind a device in host memory."""

    def check(self) -> None:
        pass

    def engine(self, directory: Path, spec: ModelSpec, precision: AnyPrecision, slots: int, max_len: int) -> OnnxEngine:
        return open_gpu(directory, spec, precision, HostDevice(), slots, max_len)

    def session(self, graph: Path) -> tuple[Any, HostCuda]:
        gpu = HostDevice()
        return Ordered(cpu_session(graph, 1), gpu), HostCuda(gpu, 0, 0)


TOOLKIT = Toolkit(
    compile=interpreted, open_device=lambda library, index: HostDevice(pace="random", modules=cpu_modules)
)
TOOLS = Tools(TOOLKIT, TINY, HostDevice, HostOnnx())


def perform(step: Callable[[Task], None], option: str = "", tools: Tools = TOOLS, seconds: float = 60) -> Report:
    """Runs a step on what is not a GPU; its report, which has all facts that others would have found."""
    facts = {"bandwidth": 1e12, **{f"rate.{backend}.{kind}": 1e14 for backend in BACKENDS for kind in ("fp16", "bf16")}}
    report = Report(io.StringIO(), facts, seconds)
    backend = "onnx" if step.__module__ == "perf.gpu.onnx_cuda" else "tensorrt-rtx"
    step(Task(report, backend, option, tools))
    return report


def nothing() -> None:
    """Work that is not done."""


class DryDevice(HostDevice):
    """A large device that checks shapes, addresses and sizes, and computes nothing: whatever is read is zero."""

    def __init__(self, total_bytes: int = 80 << 30) -> None:
        super().__init__(sm=120, total_bytes=total_bytes)
        self._sizes: dict[int, int] = {}
        self._next = 1 << 32
        self.most = 0

    @property
    def live_bytes(self) -> int:
        return sum(self._sizes.values())

    def allocate(self, nbytes: int) -> int:
        if nbytes > self._total - self.live_bytes:
            raise DeviceError("out_of_memory", f"{nbytes} bytes are not available")
        address, self._next = self._next, self._next + -(-nbytes // 4096) * 4096
        self._sizes[address] = nbytes
        self.most = max(self.most, self.live_bytes)
        return address

    def free(self, address: int) -> None:
        del self._sizes[address]

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return np.zeros(nbytes, np.uint8)

    def enqueue(self, name: str, work: Callable[[], None]) -> None:
        self._called(name)

    def upload(self, address: int, source: NDArray[Any]) -> None:
        self.enqueue("upload", nothing)

    def download(self, target: NDArray[Any], address: int) -> None:
        target.reshape(-1).view(np.uint8)[:] = 0

    def fetch(self, target: NDArray[Any], address: int) -> None:
        self.download(target, address)

    def module(self, image: bytes) -> Module:
        return DryModule(self)


class DryModule:
    """See `device.Module`."""

    def __init__(self, device: DryDevice) -> None:
        self.device = device

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        """The limits of CUDA for a grid."""
        assert 0 < grid[0] < 2**31
        assert all(0 < size < 2**16 for size in grid[1:])
        self.device.enqueue(f"kernel {kernel}", nothing)
