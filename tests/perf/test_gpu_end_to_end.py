"""The last step of the GPU check, with real services around an engine on the CPU."""

import io
from pathlib import Path

import pytest

from helixflow.config import load as load_config
from helixflow.engine.kinds import BACKENDS
from helixflow.engine.spec import ModelSpec
from helixflow.engine.weights import Checkpoint
from perf import lab
from perf.gpu import end_to_end
from perf.gpu.end_to_end import Shape, Target
from perf.gpu.rows import Report, SkippedError, Task

pytestmark = pytest.mark.long

SMALL = Shape(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, head_dim=16, positions=1024, past=40)


def report(**facts: object) -> Report:
    return Report(io.StringIO(), facts, 60)


def test_tokens_go_through_gateway_and_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the client in Python; the load generator is what the other benchmarks use."""
    monkeypatch.setattr(end_to_end, "_usable", lambda: False)
    found = report()
    end_to_end.run(found, Target("onnx", "cpu", "fp32"), SMALL, streams=3, seconds=1)
    model, alone, ready, through = found.rows
    assert "onnx" in model.figure
    assert ready.figure.endswith(" s")
    assert alone.value is not None
    assert through.value is not None
    assert 0 < through.value < 2 * alone.value
    assert "load by httpx" in through.figure


def test_the_checkpoint_is_one(tmp_path: Path) -> None:
    spec = end_to_end.write_checkpoint(tmp_path / "model", SMALL)
    checkpoint = Checkpoint(tmp_path / "model")
    checkpoint.check(spec.tensors(), frozenset())
    assert ModelSpec.load(tmp_path / "model") == spec
    weight = checkpoint.tensor("model.layers.1.mlp.up_proj.weight")
    assert 0.01 < float(weight.std()) < 0.03
    assert (checkpoint.tensor("model.norm.weight") == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_services_take_the_configuration(tmp_path: Path, backend: str) -> None:
    target = Target(next(name for name in BACKENDS if name == backend), "cuda" if backend == "onnx" else "cpu")
    environ = end_to_end.environment(target, tmp_path, tmp_path / "engines", Shape(), 64)
    config = load_config(None, {"HELIX_PROFILE": "development", **environ})
    assert (config.pool.engine, config.pool.slots, config.pool.max_len) == (backend, 64, 1024)
    assert (config.pool.precision, config.pool.prefix_reuse, config.gateway.accounts) == ("bf16", False, False)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkippedError, match="no back end has passed"):
        end_to_end.check(Task(report(), ""))
    monkeypatch.setattr(end_to_end, "NEEDED", ("numpy", "no_such_package", "nor_this_one"))
    with pytest.raises(SkippedError, match="not installed: no_such_package, nor_this_one"):
        end_to_end.check(Task(report(ranking=["onnx"]), ""))


def test_a_load_generator_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "LOADGEN", tmp_path / "missing")
    assert not end_to_end._usable()
    other = tmp_path / "other"
    other.write_bytes(b"\x7fELF of another processor")
    other.chmod(0o755)
    monkeypatch.setattr(lab, "LOADGEN", other)
    assert not end_to_end._usable()
    other.write_text("#!/bin/sh\nexit 0\n")
    assert end_to_end._usable()
