"""Networks become plans: every family, precision and device, with TensorRT-RTX, which builds without a GPU."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.spec import FAMILIES, ModelSpec
from helixflow.engine.tensorrt import compile as compiling
from helixflow.engine.tensorrt.compile import DECODE, MIXED, compile_network, compile_plan, profiles
from helixflow.engine.tensorrt.library import Library, load
from helixflow.engine.tensorrt.network import Network, build_network
from helixflow.engine.tensorrt.options import GPU_PRECISIONS, AttentionForm, EngineOptions, GpuPrecision
from tests.engine.support import GOLDEN, tiny_config

pytestmark = pytest.mark.long

DEVICES = (80, 89, 120)
OPTIONS = EngineOptions("fp16", slots=4, max_len=255)


@pytest.fixture(scope="module")
def library() -> Library:
    return load("tensorrt-rtx")


def small(family: str = "llama", **options: Any) -> ModelSpec:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "head_dim": 64,
        "vocab_size": 1000,
        "sliding_window": 64 if family == "mistral" else None,
        "tie_word_embeddings": family == "qwen2",
    }
    return ModelSpec.parse(Path("config.json"), tiny_config(family, **{**sizes, **options}))


def network(library: Library, spec: ModelSpec, options: EngineOptions) -> Network:
    """With random weights, where they are constants."""
    shapes = spec.tensors()
    random = np.random.default_rng(5)

    def read(name: str) -> Float32:
        return random.standard_normal(shapes[name]).astype(np.float32)

    scales = {name.removesuffix(".weight"): 0.01 for name in shapes}
    return build_network(library, spec, options, read, scales)


@pytest.mark.parametrize("precision", GPU_PRECISIONS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_and_precision_on_every_device(library: Library, family: str, precision: GpuPrecision) -> None:
    """One plan for all devices: one that cannot run it is refused, as the next test shows of TensorRT itself."""
    options = dataclasses.replace(OPTIONS, precision=precision)
    devices = tuple(sm for sm in DEVICES if (sm, precision) != (80, "fp8"))
    plan = compile_network(library, network(library, small(family), options), options, devices)
    assert len(plan) > 1_000_000


def test_one_device_that_cannot_run_a_plan_stops_it(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(OPTIONS, precision="fp8")
    built = network(library, small(), options)
    monkeypatch.setattr(compiling, "OLDEST_SM", {})
    with pytest.raises(EngineError, match=r"cannot be built: .*Cannot compile for target\(s\) sm80"):
        compile_network(library, built, options, (89, 80))


@pytest.mark.parametrize(
    ("precision", "devices", "message"),
    [
        ("fp8", (80,), r"fp8 needs SM 89 \(Ada\) or newer, not SM 80: choose another precision"),
        ("fp8", (120, 86), "fp8 needs SM 89"),
        ("bf16", (75,), "bf16 needs SM 80"),
        ("int4", (75, 89), "int4 needs SM 80"),
        ("fp16", (90,), r"1\.7\.\S+ does not build for SM 90: choose among 75, 80, 86, 89, 120, 121"),
    ],
)
def test_devices_that_are_refused(
    library: Library, precision: GpuPrecision, devices: tuple[int, ...], message: str
) -> None:
    options = dataclasses.replace(OPTIONS, precision=precision)
    with pytest.raises(EngineError, match=message):
        compile_network(library, network(library, small(), options), options, devices)


def test_enterprise_takes_no_list_of_devices(library: Library) -> None:
    enterprise = dataclasses.replace(library, kind="tensorrt")
    with pytest.raises(EngineError, match="builds for the device it runs on"):
        compile_network(enterprise, network(library, small(), OPTIONS), OPTIONS, (89,))


@pytest.mark.parametrize("name", ["llama-tiny", "qwen3-tiny"])
def test_the_golden_checkpoints(library: Library, name: str) -> None:
    """Their heads are of 16 and 32; for all devices that RTX takes by itself, with progress."""
    seen: list[tuple[int, int]] = []
    options = EngineOptions("bf16", slots=6, max_len=160)
    built = network(library, ModelSpec.load(GOLDEN / name), options)
    compile_network(library, built, options, progress=lambda what, done, total: seen.append((done, total)))
    assert len(seen) > 2
    assert all(0 <= done <= total for done, total in seen)
    assert [done < total for done, total in seen] == [True] * (len(seen) - 1) + [False]


@pytest.mark.parametrize(
    ("head_dim", "form"), [(16, "posmask"), (80, "posmask"), (128, "posmask"), (128, "key_value_lengths")]
)
def test_usual_heads_have_kernels_of_their_own(library: Library, head_dim: int, form: AttentionForm) -> None:
    """Nothing is left to be computed by products and a softmax, which would read the cache several times."""
    options = dataclasses.replace(OPTIONS, attention=form)
    built = network(library, small(head_dim=head_dim, num_hidden_layers=1), options)
    found = 0
    for i in range(built.definition.num_layers):
        layer = built.definition.get_layer(i)
        if library.trt.ILayer.type.fget(layer) == library.trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = library.trt.IAttentionInputLayer
            layer.attention.decomposable = False
            found += 1
    assert found == 2
    assert compile_network(library, built, options, DEVICES)


@pytest.mark.parametrize("head_dim", [2, 512])
def test_other_heads_build(library: Library, head_dim: int) -> None:
    built = network(library, small(head_dim=head_dim, num_hidden_layers=1), OPTIONS)
    assert compile_network(library, built, OPTIONS, DEVICES)


@pytest.mark.parametrize(("precision", "vocab"), [("fp32", 1), ("fp16", 40), ("fp16", 65)])
def test_vocabularies_around_the_number_of_candidates(library: Library, precision: GpuPrecision, vocab: int) -> None:
    options = dataclasses.replace(OPTIONS, precision=precision, slots=1)
    built = network(library, small(vocab_size=vocab, num_hidden_layers=1), options)
    assert compile_network(library, built, options, DEVICES)


def test_what_tensorrt_says_is_in_the_error(library: Library) -> None:
    built = network(library, small(num_hidden_layers=1), OPTIONS)
    decode, mixed = profiles(OPTIONS)
    with pytest.raises(EngineError, match=r"tensorrt-rtx 1\.7\.\S+: .*(profile|dimension)"):
        compile_plan(library, built, "fp16", [{**decode, "T": (4, 2, 1)}, mixed], DEVICES)


@pytest.mark.parametrize(("slots", "max_len", "chunk"), [(1, 1, 512), (3, 40, 16), (32, 4096, 512), (300, 100, 512)])
def test_profiles_hold_every_launch(slots: int, max_len: int, chunk: int) -> None:
    options = EngineOptions("fp16", slots=slots, max_len=max_len, chunk_tokens=chunk)
    both = profiles(options)
    for profile in both:
        assert all(1 <= low <= usual <= high for low, usual, high in profile.values())
    decode, mixed = both[DECODE], both[MIXED]
    for bucket in options.decode_buckets:
        for letter, size in {"T": bucket, "R": bucket, "B": bucket + 1, "P": 1, "C": 1, "W": 1}.items():
            assert decode[letter][0] <= size <= decode[letter][2]
    assert mixed["T"] == (1, mixed["T"][1], options.step_tokens)
    assert options.step_tokens >= slots + options.chunk_tokens
    assert mixed["W"][2] == max_len + 1
    assert mixed["C"][2] == min(chunk, max_len)
    assert mixed["B"][2] == slots + 1
    assert mixed["R"][2] >= slots


BIG = """
import json, resource, sys, time
from pathlib import Path
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.compile import compile_network
from helixflow.engine.tensorrt.library import load
from helixflow.engine.tensorrt.network import build_network
from helixflow.engine.tensorrt.options import EngineOptions
config, precision = json.load(sys.stdin)
spec = ModelSpec.parse(Path("config.json"), config)
options = EngineOptions(precision, slots=32, max_len=8192)
library = load("tensorrt-rtx")
plan = compile_network(library, build_network(library, spec, options), options, (89,))
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
answer = {"parameters": spec.parameters(), "plan": len(plan), "seconds": time.process_time(), "bytes": used}
json.dump(answer, sys.stdout)
"""


def build_8b(precision: GpuPrecision) -> Mapping[str, float]:
    """Shapes of Llama 3.1 8B; a process of its own, for its memory and its processor time: others may be at work."""
    config = tiny_config(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    done = subprocess.run(
        [sys.executable, "-c", BIG], input=json.dumps([config, precision]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: Mapping[str, float] = json.loads(done.stdout)
    return answer


@pytest.mark.timeout(120)
def test_a_model_of_8b_parameters_builds_in_a_minute_and_2_gb() -> None:
    found = build_8b("fp16")
    assert found["parameters"] > 8e9
    assert found["seconds"] < 60
    assert found["bytes"] < 2e9
    assert found["plan"] < 200e6


@pytest.mark.parametrize("precision", get_args(GpuPrecision))
def test_plans_of_weights_as_inputs_do_not_hold_them(precision: GpuPrecision) -> None:
    spec = small()
    built = network(load("tensorrt-rtx"), spec, dataclasses.replace(OPTIONS, precision=precision))
    held = set(built.weight_inputs.values())
    linears = {name for name in spec.tensors() if "_proj.weight" in name}
    assert held == spec.tensors().keys() - (linears if precision in ("int8", "int4", "fp8") else set())
