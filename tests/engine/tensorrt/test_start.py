"""`load_engine` for TensorRT: the self-test decides, engines are built when needed, refusals say what to run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from helixflow.cli import build_parser
from helixflow.engine.base import Candidates, EngineError
from helixflow.engine.build import build
from helixflow.engine.cli import recipe_of
from helixflow.engine.load import load_engine
from helixflow.engine.recipe import Recipe
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt import start as starting
from helixflow.engine.tensorrt.dense import dense_logits
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.engine.tensorrt.options import AttentionForm, Compute
from helixflow.engine.tensorrt.selftest import Result
from helixflow.engine.tensorrt.start import build_for_device
from helixflow.engine.weights import Checkpoint
from tests.engine.support import batch, random_tensors, tiny_config, write_checkpoint
from tests.engine.tensorrt.ground import Ground
from tests.engine.tensorrt.host_device import HostDevice

SIZES: dict[str, Any] = {"slots": 3, "max_len": 40}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("qwen3")
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", config, random_tensors(config))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "engines"


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stands for what the self-test would find: form -> reason; asked for is recorded under "asked"."""
    reasons: dict[str, str] = {"asked": ""}

    def results(_: Any, forms: Any, compute: Compute) -> Iterator[Result]:
        for form in forms:
            reasons["asked"] += f"{form}/{compute} "
            yield Result(form, compute, reason=reasons.get(form, ""))

    monkeypatch.setattr(starting, "_results", results)
    return reasons


def load(path: Path, root: Path, ground: Ground, **options: Any) -> Any:
    return load_engine(path, "tensorrt-rtx", engines=root, toolkit=ground.toolkit, **{**SIZES, **options})


def built(model: Path, root: Path, ground: Ground | None = None, **options: Any) -> Path:
    recipe = Recipe("tensorrt-rtx", **{**SIZES, "sms": (89,), **options})
    return build(model, root, recipe, toolkit=(ground or Ground()).toolkit).directory


def command_in(error: pytest.ExceptionInfo[EngineError]) -> Recipe:
    found = re.search(r"run `(helixflow engine build .*)`", str(error.value))
    assert found, error.value
    return recipe_of(build_parser().parse_args(shlex.split(found[1])[1:]))


def test_from_a_checkpoint_to_right_logits(model: Path, root: Path) -> None:
    """All of it, the real self-test included."""
    ground = Ground()
    seen: set[str] = set()
    with structlog.testing.capture_logs() as logs:
        engine = load(model, root, ground, progress=lambda what, *_: seen.add(what))
    assert [(entry["event"], entry["form"], entry["passed"]) for entry in logs if "form" in entry] == [
        ("self-test of the GPU", "posmask", True)
    ]
    assert {"self-test fp16", "writing the weights", "verifying the engine", "loading the engine"} <= seen
    capacity = engine.capacity()
    assert (capacity.slots, capacity.max_len, capacity.vocab_size, capacity.candidates) == (3, 40, 101, 64)
    tokens = np.random.default_rng(1).integers(0, 101, 30).tolist()
    answer: Candidates = engine.step(batch((2, 0, tokens, 30)))
    checkpoint = Checkpoint(model)
    expected = dense_logits(ModelSpec.load(model), checkpoint.tensor, tokens, 40)
    assert answer.logits is not None
    assert float(np.abs(answer.logits - expected).max()) < 0.05
    engine.close()
    assert all(device.closed for device in ground.devices)
    compiled = ground.compiled
    load(model, root, ground, slots=2).close()
    # Found, and used for fewer slots; nothing was built.
    assert ground.compiled == compiled
    [directory] = [path.parent for path in root.glob("tiny/*/manifest.json")]
    engine = load(directory, root, ground, slots=0, max_len=0)
    assert (engine.capacity().slots, engine.capacity().max_len) == (3, 40)
    engine.close()


@pytest.mark.parametrize(
    ("precision", "broken", "asked"),
    [
        ("auto", (), "posmask/fp16 "),
        ("bf16", ("posmask",), "posmask/bf16 key_value_lengths/bf16 "),
        ("int8", ("posmask",), "posmask/fp16 key_value_lengths/fp16 "),
        ("fp8", (), "posmask/fp16 "),
    ],
)
def test_the_first_form_that_passes_is_built(
    model: Path, root: Path, verdicts: dict[str, str], precision: str, broken: tuple[str, ...], asked: str
) -> None:
    verdicts |= dict.fromkeys(broken, "logits differ")
    load(model, root, Ground(), precision=precision).close()
    assert verdicts["asked"] == asked
    [path] = root.glob("tiny/*/manifest.json")
    assert f'"attention": "{asked.rsplit(maxsplit=1)[-1].partition("/")[0]}"' in path.read_text()
    assert '"sms": [\n      89\n    ]' in path.read_text()


def test_nothing_is_built_or_served_when_no_form_passes(model: Path, root: Path, verdicts: dict[str, str]) -> None:
    verdicts |= {"posmask": "tokens differ", "key_value_lengths": "logits differ", "split": "no kernel"}
    ground = Ground()
    with pytest.raises(
        EngineError, match=r"nothing is served from it:\n  posmask .*: tokens differ\n  key_.*\n  split"
    ):
        load(model, root, ground)
    assert verdicts["asked"].count("/") == 3
    with pytest.raises(EngineError, match=r"nothing is served from it:\n  posmask .*\n  key_value_lengths [^\n]*$"):
        load(model, root, ground, precision="int8")
    with pytest.raises(EngineError, match=r"nothing is served from it:\n  split [^\n]*: no kernel$"):
        load(model, root, ground, attention="split")
    assert (ground.compiled, list(root.glob("tiny/*/manifest.json"))) == (0, [])
    assert all(device.closed for device in ground.devices)


def test_a_built_engine_is_used_as_it_is_or_refused(model: Path, root: Path, verdicts: dict[str, str]) -> None:
    directory = built(model, root, attention="key_value_lengths")
    load(directory, root, Ground()).close()
    assert verdicts["asked"] == "key_value_lengths/fp16 "
    load(directory, root, Ground(), attention="key_value_lengths", slots=1, max_len=7).close()
    with pytest.raises(EngineError, match="built with attention key_value_lengths, posmask is wanted: run") as caught:
        load(directory, root, Ground(), attention="posmask")
    assert command_in(caught) == Recipe(
        "tensorrt-rtx", precision="fp16", slots=3, max_len=40, chunk_tokens=40, sms=(89,), attention="posmask"
    )
    for sizes, wanted in (({"slots": 4}, (4, 40)), ({"max_len": 41}, (3, 41)), ({"slots": 9, "max_len": 1}, (9, 40))):
        with pytest.raises(EngineError, match=r"was built for 3 slots of 40 positions, .* are wanted: run") as caught:
            load(directory, root, Ground(), **sizes)
        assert (command_in(caught).slots, command_in(caught).max_len) == wanted
    verdicts |= {"key_value_lengths": "logits differ"}
    with pytest.raises(
        EngineError, match=r"key_value_lengths, which fails the self-test .* posmask passes: run"
    ) as caught:
        load(directory, root, Ground())
    assert command_in(caught).attention == "posmask"
    with pytest.raises(EngineError, match="nothing is served"):
        load(directory, root, Ground(), attention="key_value_lengths")


def test_a_built_engine_of_another_kind_is_refused(model: Path, root: Path, verdicts: dict[str, str]) -> None:
    directory = built(model, root)
    with pytest.raises(
        EngineError, match="is an engine of tensorrt-rtx, not of onnx: set HELIX_POOL_ENGINE="
    ) as caught:
        load_engine(directory, engines=root)
    assert command_in(caught).backend == "onnx"
    with pytest.raises(EngineError, match="not of tensorrt: set HELIX_POOL_ENGINE=tensorrt-rtx, or run") as caught:
        load_engine(directory, "tensorrt", engines=root, toolkit=Ground().toolkit)
    with pytest.raises(EngineError, match="built with precision fp16, int8 is wanted: run") as caught:
        load(directory, root, Ground(), precision="int8")
    assert command_in(caught).precision == "int8"
    with pytest.raises(EngineError, match=r"built for SM 89, this device is host \(SM 120\)"):
        load(directory, root, Ground(sm=120))
    assert verdicts["asked"] == ""


def test_a_device_that_cannot_is_refused_before_anything_is_built(
    model: Path, root: Path, verdicts: dict[str, str]
) -> None:
    cases: tuple[tuple[Any, Any, str], ...] = (
        ({"precision": "bf16"}, {"sm": 75}, r"bf16 needs SM 80 \(Ampere\) or newer, this device is host \(SM 75\)"),
        ({"precision": "fp8"}, {"sm": 86}, r"fp8 needs SM 89"),
        ({}, {"sm": 90}, r"does not build for SM 90"),
    )
    for options, changes, message in cases:
        ground = Ground(**changes)
        with pytest.raises(EngineError, match=message):
            load(model, root, ground, **options)
        assert ground.compiled == 0
    assert verdicts["asked"] == ""


def test_enterprise_engines_are_bound_to_their_device(model: Path, root: Path, verdicts: dict[str, str]) -> None:
    ground = Ground(name="A card", sm=90)
    options: dict[str, Any] = {"engines": root, "toolkit": ground.toolkit, "device": 3, **SIZES}
    load_engine(model, "tensorrt", **options).close()
    assert set(ground.indices) == {3}
    [path] = root.glob("tiny/*/manifest.json")
    assert '"device": "A card (SM 90)"' in path.read_text()
    load_engine(model, "tensorrt", **options).close()
    assert ground.compiled == 1
    with pytest.raises(EngineError, match=r"was built on A card \(SM 90\), this device is B \(SM 90\): run"):
        load_engine(path.parent, "tensorrt", **{**options, "toolkit": Ground(name="B", sm=90).toolkit})


def test_damage_is_refused_when_loading_and_repaired_by_a_build(
    model: Path, root: Path, verdicts: dict[str, str]
) -> None:
    load(model, root, Ground()).close()
    [path] = root.glob("tiny/*/plan.bin")
    path.write_bytes(b"damaged")
    for source in (model, path.parent):
        with pytest.raises(EngineError, match=r"plan\.bin: files\.plan\.bin: differs .* run `helixflow engine build"):
            load(source, root, Ground())
    recipe = Recipe("tensorrt-rtx", attention="auto", **SIZES)
    heard: list[AttentionForm] = []
    ground = Ground()
    repaired = build_for_device(model, root, recipe, lambda result: heard.append(result.form), toolkit=ground.toolkit)
    assert (repaired.directory, repaired.cached, heard) == (path.parent, False, ["posmask"])
    load(model, root, Ground()).close()


@pytest.mark.parametrize("kind", ["out_of_memory", "failed", "lost"])
@pytest.mark.parametrize("call", ["allocate", "load", "upload"])
def test_failures_of_the_device_are_told_and_leave_nothing_open(
    model: Path, root: Path, verdicts: dict[str, str], kind: Any, call: str
) -> None:
    directory = built(model, root)

    def failing() -> HostDevice:
        device = HostDevice()
        device.fail_after(0, kind, call)
        return device

    ground = Ground(failing)
    with pytest.raises(DeviceError, match=f"injected: {kind}") as caught:
        load(directory, root, ground)
    assert caught.value.kind == kind
    assert all(device.closed for device in ground.devices)


def test_engines_that_cannot_be_written_to_are_served(
    model: Path, root: Path, verdicts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = built(model, root)
    real = Path.mkdir

    def refusing(path: Path, *arguments: Any, **options: Any) -> None:
        if path == directory / "cache":
            raise PermissionError(13, "Permission denied")
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refusing)
    load(directory, root, Ground()).close()
