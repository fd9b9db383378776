"""The GPU check at the sizes that a GPU is given: plans are built for real, launches are checked but not computed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx
import pytest

from helixflow.engine.base import EngineError
from helixflow.engine.progress import Progress
from helixflow.engine.tensorrt import kernels
from helixflow.engine.tensorrt.artefact import Toolkit
from helixflow.engine.tensorrt.compile import Profile, compile_plan
from helixflow.engine.tensorrt.device import Program
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.network import Network
from helixflow.engine.tensorrt.options import GpuPrecision
from perf.gpu import attention_cost, basics, costs, end_to_end, golden, large, onnx_cuda, primitives
from perf.gpu.bench import Tools
from perf.gpu.rows import Task
from perf.gpu.sizes import FULL
from perf.gpu.work import WARM_STEPS
from tests.perf.support import DryDevice, interpreted, named, perform

pytestmark = pytest.mark.long


def built(
    library: Library,
    network: Network,
    precision: GpuPrecision,
    profiles: Sequence[Profile],
    sms: Sequence[int],
    progress: Progress,
) -> bytes:
    """Stands for a plan that could be built."""
    assert compile_plan(library, network, precision, profiles, sms, progress).nbytes > 1000
    return interpreted(library, network, precision, profiles, sms, progress)


class Refusing(DryDevice):
    """Loads nothing: what is left of a step is that its plans could be built."""

    def load(self, plan: bytes, cache: object = None) -> Program:  # type: ignore[override]
        raise EngineError("built")


def dry(compiler: Callable[..., bytes], device: Callable[[], DryDevice] = DryDevice) -> Tools:
    return Tools(Toolkit(compile=compiler, open_device=lambda library, index: device()), FULL, device)


@pytest.fixture(autouse=True)
def kernels_are_compiled_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compile_kernels", named)


@pytest.mark.parametrize(
    ("step", "rows"),
    [
        (primitives.attention, 2),
        (primitives.lengths, 2),
        (primitives.cache_updates, 8),
        (primitives.rows, 3),
        (primitives.linear, 3),
        (primitives.sampler, 3),
    ],
)
def test_plans_of_the_primitives_can_be_built(step: Callable[[Task], None], rows: int) -> None:
    tools = dry(built, Refusing)
    if step in ATTENTIONS:  # every shape is built with the others, then alone
        tools = replace(tools, sizes=replace(FULL, widths=(128,), groups=(1, 8)))
    report = perform(step, "", tools)
    assert {(row.verdict, row.note) for row in report.rows} == {("REFUSED", "built")}
    assert sum("all shapes" in row.what for row in report.rows) == (rows if step in ATTENTIONS else 0)


ATTENTIONS = (primitives.attention, primitives.lengths)


@pytest.mark.parametrize(
    ("step", "rows"), [(basics.rate, 2), (attention_cost.check, 12), (costs.mixed, 1), (costs.sampling, 2)]
)
def test_launches_fit_their_profiles(step: Callable[[Task], None], rows: int) -> None:
    report = perform(step, "", dry(built))
    assert len(report.rows) == rows
    # Zeros are no product of random matrices.
    assert {row.verdict for row in report.rows} == {"FAIL" if step is basics.rate else "measured"}


@pytest.mark.parametrize(("step", "option"), [(costs.graph, ""), (large.check, "posmask"), (large.check, "split")])
def test_whole_engines_fit(step: Callable[[Task], None], option: str) -> None:
    """Their plans are built by the tests of the engines."""
    report = perform(step, option, dry(interpreted))
    assert {row.verdict for row in report.rows} <= {"measured", "PASS"}


def test_an_8b_engine_is_given_as_many_slots_as_fit() -> None:
    report = perform(large.check, "posmask", dry(interpreted, lambda: DryDevice(24 << 30)))
    assert next(row for row in report.rows if row.what == "slots").figure.startswith("8 of 2559 positions, ")


def test_memory_is_what_was_predicted() -> None:
    report = perform(costs.memory, "", dry(interpreted))
    assert [row.verdict for row in report.rows] == ["PASS", "PASS"]


def test_the_sizes_go_together() -> None:
    steps = FULL.past + WARM_STEPS + FULL.steps * FULL.rounds
    assert max(steps, *FULL.prompts) <= FULL.max_len <= min(FULL.large.longest, FULL.narrow.longest)
    assert max(FULL.sequences) <= FULL.slots
    assert max(FULL.capacities) <= FULL.large.longest
    assert all(any(length < capacity - 1 for length in FULL.lengths) for capacity in FULL.capacities)
    assert 7.5e9 < FULL.large.parameters() < 8.5e9
    # Weights are read from memory, not from a cache of 50 MiB.
    layer = sum(math.prod(shape) for name, shape in FULL.large.tensors().items() if ".layers.0." in name)
    assert FULL.layers * layer * 2 > 8 * (50 << 20)
    assert set(FULL.golden) == {path.name for path in golden.GOLDEN.iterdir() if path.is_dir()}
    shape = end_to_end.Shape()
    assert shape.past + WARM_STEPS + FULL.steps * FULL.rounds < shape.positions // 2
    assert shape.positions // 2 > 3 * end_to_end.WORDS + end_to_end.TOKENS


def test_the_onnx_graph_of_the_large_shape() -> None:
    model, shapes = onnx_cuda.graph_without_weights(FULL.large, "bf16")
    onnx.checker.check_model(model)
    assert sum(math.prod(shape) for shape in shapes.values()) == FULL.large.parameters()
