"""The steps of the GPU check on a device in host memory, with tiny sizes: every line has run before a GPU sees it."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from helixflow.engine.base import Batch, Candidates, Capacity, EngineError
from helixflow.engine.progress import Progress
from helixflow.engine.tensorrt import kernels
from helixflow.engine.tensorrt.artefact import Toolkit
from helixflow.engine.tensorrt.compile import Profile
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.memory import RESERVED
from helixflow.engine.tensorrt.network import Network
from helixflow.engine.tensorrt.options import GpuPrecision
from perf.gpu import attention_cost, basics, costs, golden, large, onnx_cuda, primitives, selfcheck
from perf.gpu.bench import Tools
from perf.gpu.drive import LOGITS
from perf.gpu.rows import RefusedError, Report, SkippedError, Task
from perf.gpu.work import Work
from tests.engine.tensorrt.host_device import PLANS, HostDevice
from tests.perf.support import TINY, TOOLKIT, TOOLS, cpu_modules, interpreted, named, nothing, perform

pytestmark = pytest.mark.long

Step = Callable[[Task], None]
COMPARED: list[tuple[Step, str, int]] = [
    (basics.copy, "", 1),
    (basics.accept, "", 1),
    (basics.rate, "", 2),
    (primitives.cache_updates, "", 4),
    (primitives.attention, "", 12),
    (primitives.lengths, "", 4),
    (primitives.rows, "", 15),
    (primitives.linear, "", 6),
    (primitives.sampler, "", 3),
    (selfcheck.check, "bf16", 1),
    (golden.check_tensorrt, "fp16", 1),
    (golden.check_tensorrt, "int8", 1),
    (golden.check_tensorrt, "fp8", 1),
    (onnx_cuda.accept, "", 1),
    (onnx_cuda.rate, "", 1),
    (onnx_cuda.golden, "fp16", 1),
    (onnx_cuda.golden, "int4", 1),
    (onnx_cuda.large, "", 1),
    (large.check, "posmask", 1),
    (large.check, "split", 1),
    (costs.memory, "", 2),
]
"""Steps, options, and how many of their rows compare something."""
MEASURED: list[tuple[Step, int]] = [
    (attention_cost.check, 9),
    (costs.weights, 5),
    (costs.mixed, 1),
    (costs.sampling, 2),
    (costs.graph, 2),
]


@pytest.fixture(autouse=True)
def kernels_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compile_kernels", named)


def verdicts(report: Report) -> list[str]:
    return [row.verdict for row in report.rows]


@pytest.mark.parametrize(("step", "option", "compared"), COMPARED)
def test_what_compares_passes(step: Step, option: str, compared: int) -> None:
    report = perform(step, option)
    assert set(verdicts(report)) <= {"PASS", "measured"}, report.rows
    assert verdicts(report).count("PASS") == compared, report.rows


@pytest.mark.parametrize(("step", "rows"), MEASURED)
def test_what_measures_measures(step: Step, rows: int) -> None:
    report = perform(step)
    assert verdicts(report) == ["measured"] * rows, report.rows
    assert all(re.search(r"\d", row.figure) for row in report.rows)


# --- the comparisons can fail ---


class DeadDevice(HostDevice):
    """Launches programs, and nothing comes of it."""

    def enqueue(self, name: str, work: Callable[[], None]) -> None:
        super().enqueue(name, nothing if name in ("run", "launch") else work)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.enqueue("copy", nothing)


class Sloppy:
    """An interpreter whose results are a little wrong."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreter, name)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        results: dict[str, NDArray[Any]] = self._interpreter.run(feeds)
        for name, values in results.items():
            if values.dtype.kind == "i":
                results[name] = values ^ (name == "next_ids")
            elif not name.startswith(("k_cache", "v_cache")):  # which would grow with every step
                wrong = values.astype(np.float32)
                wrong[..., ::2] *= np.float32(1.2)
                results[name] = wrong.astype(values.dtype)
        return results


def sloppily(
    library: Library,
    network: Network,
    precision: GpuPrecision,
    profiles: Sequence[Profile],
    sms: Sequence[int],
    progress: Progress,
) -> bytes:
    plan = interpreted(library, network, precision, profiles, sms, progress)
    PLANS[plan].interpreter = Sloppy(PLANS[plan].interpreter)  # type: ignore[assignment]
    return plan


def tools(compiler: Any, device: Callable[[], HostDevice]) -> Tools:
    return Tools(Toolkit(compile=compiler, open_device=lambda library, index: device()), TINY, device)


DEAD = tools(interpreted, lambda: DeadDevice(modules=cpu_modules))
SLOPPY = tools(sloppily, lambda: HostDevice(modules=cpu_modules))
NOTICED = [entry for entry in COMPARED[1:11] if entry[0] is not selfcheck.check]


@pytest.mark.parametrize(("step", "option"), [(step, option) for step, option, _ in [COMPARED[0], *NOTICED]])
def test_a_device_that_does_nothing_is_noticed(step: Step, option: str) -> None:
    try:
        report = perform(step, option, DEAD)
    except RefusedError:
        assert step is basics.accept
        return
    assert "PASS" not in verdicts(report), report.rows
    assert "FAIL" in verdicts(report)


@pytest.mark.parametrize(("step", "option"), [(step, option) for step, option, _ in NOTICED])
def test_a_device_that_is_a_little_wrong_is_noticed(step: Step, option: str) -> None:
    report = perform(step, option, SLOPPY)
    assert "PASS" not in verdicts(report), report.rows
    assert "FAIL" in verdicts(report)


def test_random_weights_that_give_no_numbers_are_noticed() -> None:
    class Broken:
        def capacity(self) -> Capacity:
            return Capacity(1, 100, 8)

        def step(self, batch: Batch) -> Candidates:
            return Candidates(np.full((1, 8), np.nan, np.float32))

        def copy_prefix(self, src: int, dst: int, length: int) -> None:
            pass

        def close(self) -> None:
            pass

    def step(task: Task) -> None:
        Work(task.report, "", TINY.large, TINY, np.random.default_rng()).sound(Broken(), LOGITS)

    assert verdicts(perform(step)) == ["FAIL"]


# --- refusals, missing parts, errors of the device ---


def refusing(*arguments: Any) -> bytes:
    raise EngineError("tensorrt 11.4: the engine cannot be built: no kernel for this device")


REFUSING = tools(refusing, lambda: HostDevice(sm=90))


@pytest.mark.parametrize(
    "step", [basics.rate, primitives.attention, primitives.linear, primitives.sampler, costs.memory]
)
def test_refusals_are_recorded_word_for_word(step: Step) -> None:
    report = perform(step, "", REFUSING)
    assert set(verdicts(report)) == {"REFUSED"}
    assert {row.note for row in report.rows} == {"tensorrt 11.4: the engine cannot be built: no kernel for this device"}


def test_a_device_that_is_not_accepted() -> None:
    report = Report(io.StringIO(), {}, 60)
    with pytest.raises(RefusedError, match=r"as engines are built: .*no kernel for this device / capability CURRENT: "):
        basics.accept(Task(report, "tensorrt-rtx", tools=REFUSING))
    assert verdicts(report)[:2] == ["measured", "REFUSED"]


def test_a_shape_that_is_refused_as_a_whole() -> None:
    with pytest.raises(RefusedError, match="no kernel for this device"):
        perform(large.check, "posmask", REFUSING)


@pytest.mark.parametrize("step", [primitives.attention, primitives.rows, golden.check_tensorrt, attention_cost.check])
def test_an_error_of_the_device_is_no_refusal(step: Step) -> None:
    def broken() -> HostDevice:
        device = HostDevice()
        device.fail_after(3, "lost", "run", "launch", "upload")
        return device

    with pytest.raises(DeviceError, match="injected"):
        perform(step, "fp16", tools(interpreted, broken))


def test_what_is_not_installed_is_skipped() -> None:
    def absent(*arguments: Any) -> Any:
        raise EngineError("tensorrt is not installed: run `pip install 'helixflow[tensorrt]'`")

    for toolkit in (Toolkit(library=absent), Toolkit(compile=interpreted, open_device=absent)):
        with pytest.raises(SkippedError, match="is not installed"):
            perform(primitives.rows, "", Tools(toolkit, TINY))


def test_onnx_runtime_for_the_cpu_is_skipped() -> None:
    with pytest.raises(SkippedError, match="cannot use a GPU"):
        perform(onnx_cuda.golden, "fp16", Tools(TOOLKIT, TINY))


def test_fp8_on_an_older_device() -> None:
    old = tools(interpreted, lambda: HostDevice(sm=86))
    with pytest.raises(SkippedError, match="SM 86 has no fp8"):
        perform(golden.check_tensorrt, "fp8", old)
    report = perform(primitives.linear, "", old)
    assert verdicts(report).count("SKIPPED") == 1


class Counting(HostDevice):
    """Knows how much was taken at most."""

    most = 0

    def allocate(self, nbytes: int) -> int:
        address = super().allocate(nbytes)
        self.most = max(self.most, self.live_bytes)
        return address


def test_a_device_with_little_memory_gets_fewer_slots() -> None:
    """Weights, programs and one slot fit, four do not; then not even one."""
    ample = Counting()
    report = perform(large.check, "posmask", tools(interpreted, lambda: ample))
    assert next(row for row in report.rows if row.what == "slots").figure.startswith("4 of 120 positions, ")
    report = perform(
        large.check, "posmask", tools(interpreted, lambda: HostDevice(total_bytes=RESERVED + ample.most - 40_000))
    )
    slots = next(row for row in report.rows if row.what == "slots")
    assert slots.figure.startswith("1 of 120 positions, ")
    assert "does not fit" in slots.note
    with pytest.raises(RefusedError, match="does not fit"):
        perform(large.check, "posmask", tools(interpreted, lambda: HostDevice(total_bytes=RESERVED + 1000)))


def test_one_of_both_forwards_is_never_recorded() -> None:
    device = HostDevice()
    perform(costs.graph, "", tools(interpreted, lambda: device))
    each = 2 * (costs.LAUNCHES + 3)
    assert (device.calls["run"], device.calls["launch"]) == (each + 2, each - 2)
    report = perform(costs.graph, "", tools(interpreted, lambda: unrecorded(HostDevice())))
    assert all("it cannot be recorded" in row.figure for row in report.rows)


def unrecorded(device: HostDevice) -> HostDevice:
    """A device that records nothing, and is otherwise well."""

    def refuse(enqueue: Callable[[], None]) -> Any:
        raise DeviceError("failed", "no graphs here")

    device.capture = refuse  # type: ignore[method-assign]
    return device


def test_a_session_that_is_short_of_time() -> None:
    report = perform(golden.check_tensorrt, "fp16", TOOLS, seconds=5)
    assert [row.note for row in report.rows] == ["time is up"]


def test_the_graph_without_weights_asks_for_all_of_them() -> None:
    model, shapes = onnx_cuda.graph_without_weights(TINY.large, "fp16")
    assert not [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
    names = {value.name for value in model.graph.input}
    assert shapes.keys() <= names
    matrices = [shape for shape in TINY.large.tensors().values() if len(shape) == 2]
    assert sorted(int(np.prod(shape)) for shape in shapes.values()) == sorted(int(np.prod(shape)) for shape in matrices)
