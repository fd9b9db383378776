"""`helixflow engine` with TensorRT-RTX itself, which builds without a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helixflow.cli import main
from helixflow.engine import cli
from helixflow.engine.tensorrt import artefact
from tests.engine.support import random_tensors, tiny_config, write_checkpoint
from tests.engine.tensorrt.ground import Ground

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = tiny_config(hidden_size=64, head_dim=32)
    return write_checkpoint(tmp_path / "tiny", config, random_tensors(config))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(["engine", *arguments, "--engines", str(tmp_path / "engines")])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_build_list_show_verify(run: Run, model: Path, tmp_path: Path) -> None:
    build = ["build", str(model), "--backend", "tensorrt-rtx", "--slots", "4", "--max-len", "128", "--sm", "89,120"]
    status, out, err = run(*build)
    assert (status, out.endswith("(built)\n")) == (0, True)
    for stage in ("reading the checkpoint", "compiling the engine", "writing the weights"):
        assert f"{stage} 100%\n" in err
    status, out, _ = run(*build, "--json")
    told = json.loads(out)
    assert (status, told["cached"], told["backend"], told["precision"]) == (0, True, "tensorrt-rtx", "fp16")
    assert (told["slots"], told["max_len"], told["options"]["sms"]) == (4, 128, [89, 120])
    directory = Path(told["directory"])
    assert (directory / "plan.bin").stat().st_size > 1_000_000
    [listed] = json.loads(run("list", "--json")[1])
    assert (listed["backend"], listed["key"]) == ("tensorrt-rtx", directory.name)
    shown = run("show", directory.name)[1]
    command = f"helixflow engine build {model} --backend tensorrt-rtx --precision fp16 --slots 4 --max-len 128"
    assert command + " --attention posmask --chunk-tokens 128 --sm 89 --sm 120 --engines" in shown
    assert "engine     tensorrt-rtx\n" in shown
    assert run("verify")[0] == 0
    (directory / "weights.json").write_text("{}")
    status, out, _ = run("verify")
    assert (status, f"run `{command}" in out) == (1, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sm", "90"], "does not build for SM 90: choose among 75, 80, 86, 89, 120, 121"),
        (["--sm", "8.9"], "--sm takes whole numbers, 89 for compute capability 8.9, not 8.9"),
        (["--precision", "fp32"], "precision of tensorrt-rtx: 'fp32' is unknown: choose one of auto, fp16, bf16, int8"),
        (["--precision", "fp8", "--sm", "80"], "fp8 needs SM 89 (Ada) or newer, not SM 80"),
        (["--precision", "int4", "--attention", "split"], "attention 'split' needs weights as inputs"),
        (["--provider", "cuda"], "provider cuda is an option of onnx: tensorrt-rtx always runs on a GPU"),
        (["--slots", "-1"], "cannot be negative"),
        (["--max-len", "1000"], "max-len 1000 is more than the 256 positions this model was made for"),
        (["--backend", "onnx", "--sm", "89"], "sm is an option of tensorrt-rtx: onnx does not build for other devices"),
        (["--backend", "onnx", "--precision", "fp8"], "precision of onnx: 'fp8' is unknown: choose one of auto, fp32"),
        (["--backend", "onnx", "--chunk-tokens", "9"], "chunk-tokens is an option of tensorrt and tensorrt-rtx"),
    ],
)
def test_refusals(run: Run, model: Path, options: list[str], message: str) -> None:
    status, out, err = run("build", str(model), "--backend", "tensorrt-rtx", "--quiet", *options)
    assert (status, out) == (1, "")
    assert err.startswith("helixflow: ")
    assert message in err


def test_selftest_prints_a_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ground = Ground()
    monkeypatch.setattr(artefact, "Toolkit", lambda: ground.toolkit)
    monkeypatch.setattr(cli, "SELFTESTED", ("fp16",))
    status, out, _ = run("selftest", "--json", "--device", "2")
    results = json.loads(out)
    # `split` needs kernels, which this device does not run.
    assert [(result["form"], result["passed"]) for result in results] == [
        ("posmask", True),
        ("key_value_lengths", True),
        ("split", False),
    ]
    assert (status, set(ground.indices)) == (0, {2})
    assert results[2]["reason"]


def test_attention_auto_asks_the_device(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground = Ground(sm=120)
    monkeypatch.setattr("helixflow.engine.tensorrt.start.Toolkit", lambda: ground.toolkit)
    status, out, err = run(
        "build", str(model), "--backend", "tensorrt-rtx", "--attention", "auto", "--json", "--slots", "2"
    )
    told = json.loads(out)
    assert (status, err) == (0, "")
    assert (told["options"]["attention"], told["options"]["sms"], told["slots"]) == ("posmask", [120], 2)
