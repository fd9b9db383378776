"""What can be said of the GPU's side without one: every name exists, and every failure is told in full."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog
from cuda.bindings import driver, runtime

import helixflow.engine.tensorrt.cuda as cuda_module
import helixflow.engine.tensorrt.runtime as runtime_module
from helixflow.engine.base import EngineError
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.compile import compile_network
from helixflow.engine.tensorrt.cuda import ADVICE, LOST, OUT_OF_MEMORY, Checked, CudaDevice, CudaEvent, open_device
from helixflow.engine.tensorrt.device import Device, DeviceError, DeviceInfo
from helixflow.engine.tensorrt.library import load
from helixflow.engine.tensorrt.network import build_network
from helixflow.engine.tensorrt.options import EngineOptions
from helixflow.engine.tensorrt.runtime import CudaContext, CudaProgram, _replace
from tests.engine.support import GOLDEN

NAME = re.compile(r"(cuda|cu)[A-Z]\w*")
WITHOUT_A_GPU = runtime.cudaGetDeviceCount()[0] != runtime.cudaError_t.cudaSuccess


def names(module: Any) -> list[tuple[str, ...]]:
    """Attributes named as those of CUDA are, with the enumeration they are taken from."""
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and NAME.fullmatch(node.attr):
            inner = node.value.attr if isinstance(node.value, ast.Attribute) else ""
            found.append((inner, node.attr) if NAME.fullmatch(inner) else (node.attr,))
    return found


@pytest.mark.parametrize("module", [cuda_module, runtime_module], ids=lambda module: module.__name__)
def test_every_name_of_cuda_exists(module: Any) -> None:
    for chain in names(module):
        place: Any = runtime if chain[0].startswith("cuda") else driver
        for name in chain:
            assert hasattr(place, name), chain
            place = getattr(place, name)
    if module is cuda_module:
        assert len(set(names(module))) > 35


def test_every_status_exists() -> None:
    known = {status.name for status in (*runtime.cudaError_t, *driver.CUresult)}
    assert LOST | OUT_OF_MEMORY | ADVICE.keys() <= known
    assert not LOST & OUT_OF_MEMORY


@pytest.mark.skipif(not WITHOUT_A_GPU, reason="there is a GPU")
def test_a_machine_without_a_gpu() -> None:
    with pytest.raises(DeviceError, match=r"cudaGetDeviceCount: cudaError\w+ \(.+\): ") as caught:
        open_device(load("tensorrt-rtx"))
    assert caught.value.kind == "failed"
    assert any(advice in str(caught.value) for advice in ADVICE.values())


def bare_device() -> CudaDevice:
    """A device that was never opened: every call reaches the bindings, and fails there."""
    device = object.__new__(CudaDevice)
    device.library, device.index = load("tensorrt-rtx"), 0
    device.cuda, device.driver = Checked(runtime), Checked(driver)
    device._compute = device._side = runtime.cudaStream_t(0)
    device._streams = [device._compute, device._side]
    device.stream, device._thread, device._closed = 0, 0, False
    device._allocated, device._programs, device._scratch, device._events = set(), [], (0, 0), []
    device._name, device._sm, device._driver = "none", 0, "0.0"
    return device


CALLS = {
    "info": lambda device: device.info(),
    "allocate": lambda device: device.allocate(16),
    "free": lambda device: device.free(256),
    "pinned": lambda device: device.pinned(16),
    "fill": lambda device: device.fill(256, 0, 16),
    "upload": lambda device: device.upload(256, np.zeros(4, np.float32)),
    "download": lambda device: device.download(np.zeros(4, np.float32), 256),
    "fetch": lambda device: device.fetch(np.zeros(4, np.float32), 256),
    "copy": lambda device: device.copy(256, 512, 16),
    "copy_rows": lambda device: device.copy_rows(256, 512, 16, 8, 2),
    "record": lambda device: device.record(),
    "wait": lambda device: device.wait(CudaEvent(runtime.cudaEvent_t(0), [])),
    "capture": lambda device: device.capture(lambda: None),
    "launch_graph": lambda device: device.launch_graph(runtime.cudaGraphExec_t(0)),
    "synchronize": lambda device: device.synchronize(),
    "module": lambda device: device.module(b"PTX"),
}


@pytest.mark.skipif(not WITHOUT_A_GPU, reason="there is a GPU, which these calls would reach")
@pytest.mark.parametrize("call", CALLS)
def test_every_call_fails_with_its_name(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings take the arguments as they are given, and what CUDA says becomes a DeviceError."""
    device = bare_device()
    monkeypatch.setattr(device, "enter", lambda: None)
    with pytest.raises(DeviceError, match=r"^cu\w+: ") as caught:
        CALLS[call](device)
    assert caught.value.kind == "failed"
    device.close()


def test_it_is_a_device() -> None:
    device: Device = bare_device()
    assert device is not None


class Answers:
    """A module of cuda-python whose functions give what a device would."""

    cudaGetErrorString = staticmethod(runtime.cudaGetErrorString)  # noqa: N815 - CUDA's name
    cudaStreamDefault = runtime.cudaStreamDefault  # noqa: N815 - CUDA's name

    def __init__(self, *answers: Any) -> None:
        self.cudaFree = lambda *_: answers


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("cudaErrorMemoryAllocation", "out_of_memory", r"\(out of memory\): choose fewer slots"),
        ("cudaErrorIllegalAddress", "lost", "look for `Xid`"),
        ("cudaErrorLaunchFailure", "lost", r"\(unspecified launch failure\): the device or its context is lost"),
        ("cudaErrorECCUncorrectable", "lost", "only a new process"),
        ("cudaErrorDevicesUnavailable", "lost", "another process has the device"),
        ("cudaErrorInvalidValue", "failed", r"\(invalid argument\)$"),
    ],
)
def test_kinds_of_failure(status: str, kind: str, words: str) -> None:
    with pytest.raises(DeviceError, match=f"^cudaFree: {status} .*{words}") as caught:
        Checked(Answers(getattr(runtime.cudaError_t, status))).cudaFree(0)
    assert caught.value.kind == kind


def test_results_of_checked_calls() -> None:
    fine = runtime.cudaError_t.cudaSuccess
    assert Checked(Answers(fine)).cudaFree() == ()
    assert Checked(Answers(fine, 7)).cudaFree() == 7
    assert Checked(Answers(fine, 7, 8)).cudaFree() == (7, 8)
    assert Checked(runtime).cudaStreamNonBlocking == runtime.cudaStreamNonBlocking
    assert Checked(runtime).cudaMemcpyKind is runtime.cudaMemcpyKind


class Machine:
    """What a program needs of a device, where there is none (see `runtime.Host`)."""

    library, stream = load("tensorrt-rtx"), 0

    def enter(self) -> None:
        pass

    def info(self) -> DeviceInfo:
        return DeviceInfo("GeForce", 89, "CUDA 13.0", 1, 1)

    def scratch(self, nbytes: int) -> tuple[int, int]:
        return 256, nbytes

    def capture(self, enqueue: Any) -> Any:
        return enqueue

    def broken(self, doing: str) -> DeviceError:
        return DeviceError("failed", doing)


@pytest.mark.skipif(not WITHOUT_A_GPU, reason="there is a GPU")
def test_a_plan_that_tensorrt_refuses() -> None:
    """The real library, with a real plan: the refusal says for whom the plan is not, and what to run."""
    library, options = load("tensorrt-rtx"), EngineOptions("fp16", 2, 16)
    spec = ModelSpec.load(GOLDEN / "llama-tiny")
    plan = compile_network(library, build_network(library, spec, options), options, [89])
    message = rf"tensorrt-rtx {library.version} refuses the plan on GeForce \(SM 89, CUDA 13.0\): .*engine build"
    with pytest.raises(EngineError, match=message):
        CudaProgram(Machine(), plan, None)
    with pytest.raises(EngineError, match="MALFORMED_ENGINE"):
        CudaProgram(Machine(), bytes(len(plan)), None)
    with pytest.raises(EngineError, match="MALFORMED_ENGINE"):
        CudaProgram(Machine(), b"", None)


class Refusing:
    """An execution context to which nothing is right."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return False

    def set_tensor_address(self, name: str, address: int) -> bool:
        return False

    def execute_async_v3(self, stream: int) -> bool:
        return False

    def is_stream_capturable(self, stream: int) -> bool:
        return False


def test_a_context_that_refuses() -> None:
    context = CudaContext(Machine(), Refusing())
    for call, message in (
        (lambda: context.set_shape("x", (1, 2)), r"x cannot have the shape \[1, 2\]"),
        (lambda: context.set_address("x", 256), "x cannot lie at 0x100"),
        (context.run, "a launch failed"),
        (context.capture, "cannot be recorded"),
    ):
        with pytest.raises(DeviceError, match=message):
            call()


class Cache:
    def __init__(self, content: bytes | None) -> None:
        self.content = content

    def serialize(self) -> bytes | None:
        return self.content


def test_what_was_compiled_is_kept(tmp_path: Path) -> None:
    """Written when it is new, as a whole, and never in the way of serving."""
    program = object.__new__(CudaProgram)
    program._path, program._kept, program._cache = tmp_path / "new" / "plan.cache", b"", None
    program.keep()
    program._cache = Cache(None)
    program.keep()
    assert not program._path.exists()
    program._cache = Cache(b"kernels")
    program.keep()
    assert program._path.read_bytes() == b"kernels"
    program._path.unlink()
    program.keep()
    assert not program._path.exists()
    (tmp_path / "file").write_text("")
    program._path, program._kept = tmp_path / "file" / "plan.cache", b""
    with structlog.testing.capture_logs() as logs:
        program.keep()
    assert [line["log_level"] for line in logs] == ["warning"]
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        _replace(tmp_path / "directory", b"kernels")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file", "new"]


def test_the_work_space_grows_with_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for all; contexts that have an older one keep it."""
    device = bare_device()
    taken: list[int] = []

    def allocate(nbytes: int) -> int:
        taken.append(nbytes)
        return 4096 * len(taken)

    monkeypatch.setattr(device, "allocate", allocate)
    programs: Any = [SimpleNamespace(scratch_bytes=100), SimpleNamespace(scratch_bytes=300)]
    device._programs = programs
    assert device.scratch(100) == (4096, 300)
    assert device.scratch(300) == (4096, 300)
    programs.append(SimpleNamespace(scratch_bytes=500))
    assert device.scratch(500) == (8192, 500)
    assert taken == [300, 500]
