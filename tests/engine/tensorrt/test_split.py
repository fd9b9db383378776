"""Attention form `split`: its engines, and the whole of it through the real runner, with the kernels on the CPU."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.spec import FAMILIES, ModelSpec
from helixflow.engine.tensorrt import split_forward
from helixflow.engine.tensorrt.compile import compile_plan, profiles
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.engine.tensorrt.engine import RunOptions, TensorRtEngine
from helixflow.engine.tensorrt.kernels import AttentionShape, Spread
from helixflow.engine.tensorrt.library import Library, load
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import EngineOptions, GpuPrecision
from helixflow.engine.tensorrt.split import BETWEEN, FIRST, LAST, PARTS, SplitBuilder, build_split, weight_of_layer
from helixflow.engine.tensorrt.split_forward import SplitPrograms
from helixflow.engine.weights import Checkpoint
from tests.engine.support import GOLDEN, GOLDEN_NAMES, Reference, batch, random_tensors, tiny_config
from tests.engine.tensorrt.cpu_kernels import CpuModule, build
from tests.engine.tensorrt.host_device import Garbage, HostDevice, Pace, register

pytestmark = pytest.mark.long

DEVICES = (80, 89, 120)
OPTIONS = EngineOptions("fp16", slots=4, max_len=255, attention="split")
TOLERANCE = 1e-4  # 1e-3 is asked for; 1e-5 is what comes out
SLOTS, MAX_LEN = 6, 160


@pytest.fixture(scope="module")
def library() -> Library:
    return load("tensorrt-rtx")


@pytest.fixture
def spread_thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a few tokens take several blocks of the kernels."""
    monkeypatch.setattr(split_forward, "DECODE_SPREAD", Spread(8, 5))
    monkeypatch.setattr(split_forward, "PROMPT_SPREAD", Spread(32, 2))


def make_engine(
    spec: ModelSpec,
    options: EngineOptions,
    tensors: Mapping[str, Float32],
    run: RunOptions,
    device: HostDevice | None = None,
) -> TensorRtEngine:
    """An engine over interpreted networks; `device`: one with kernels (see `new_device`)."""
    networks = build_split(load("tensorrt-rtx"), spec, options)
    plans = {part: register(network, profiles(options)) for part, network in networks.items()}
    device = device or new_device(spec, options)
    programs = SplitPrograms(device, plans, spec, options)
    dtype = NUMPY[options.compute]
    return TensorRtEngine(device, spec, options, programs, {name: t.astype(dtype) for name, t in tensors.items()}, run)


def new_device(spec: ModelSpec, options: EngineOptions, garbage: Garbage = "nan", pace: Pace = "lazy") -> HostDevice:
    kernels = build(AttentionShape.of(spec, options))
    return HostDevice(garbage, pace, modules=lambda device, _: CpuModule(kernels, device.enqueue))


def step(engine: TensorRtEngine, *items: tuple[int, int, Sequence[int], int]) -> Float32:
    logits = engine.step(batch(*items)).logits
    assert logits is not None
    return logits.copy()


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


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_builds_for_every_device(library: Library, family: str, precision: GpuPrecision) -> None:
    options = dataclasses.replace(OPTIONS, precision=precision)
    networks = build_split(library, small(family), options)
    assert tuple(networks) == PARTS
    for network in networks.values():
        assert len(compile_plan(library, network, precision, profiles(options), DEVICES)) > 100_000


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_model_of_8b_parameters_builds_in_seconds(library: Library, precision: GpuPrecision) -> None:
    spec = small(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    options = EngineOptions(precision, slots=64, max_len=8192, attention="split")
    start = time.monotonic()
    for network in build_split(library, spec, options).values():
        assert len(compile_plan(library, network, precision, profiles(options), DEVICES)) < 20e6
    assert time.monotonic() - start < 20


def test_what_cannot_be_split_is_refused(library: Library) -> None:
    for precision in ("int8", "int4", "fp8"):
        with pytest.raises(EngineError, match=f"weights as inputs, which {precision} ones are not: choose fp16 or"):
            build_split(library, small(), EngineOptions(precision, 4, 255, "split"))
    with pytest.raises(EngineError, match="'posmask' is one network"):
        build_split(library, small(), EngineOptions("fp16", 4, 255))


def test_only_one_tensor_may_cross_attention(library: Library) -> None:
    """A decoder that carries more past its attention would be cut wrongly."""
    builder = SplitBuilder(library, small(), OPTIONS)
    x = builder.embed("model.embed_tokens.weight")
    y = builder.rms_norm(x, "model.norm.weight", 1e-5)
    q, k, v = (builder.linear(x, f"model.layers.0.self_attn.{name}_proj", False) for name in "qkv")
    builder.attention(0, q, k, v, None)
    builder.add(x, x)
    with pytest.raises(EngineError, match="more than one tensor crosses"):
        builder.add(x, y)
    first = builder.networks[0].definition
    outputs = [first.get_output(i).name for i in range(first.num_outputs)]
    assert outputs == ["q", "k", "v", "x_out"]


def test_weights_of_layers() -> None:
    name = "w.model.layers.{}.self_attn.o_proj.weight"
    assert weight_of_layer(FIRST, 0, 9, name.format(0)) == name.format(0)
    assert weight_of_layer(BETWEEN, 6, 9, name.format(0)) == name.format(6)
    assert weight_of_layer(BETWEEN, 6, 9, name.format(1)) == name.format(7)
    assert weight_of_layer(LAST, 0, 12, name.format(1)) == name.format(11)
    assert weight_of_layer(LAST, 0, 2, name.format(1)) == name.format(1)
    assert weight_of_layer(LAST, 0, 1, name.format(0)) == name.format(0)
    assert weight_of_layer(LAST, 0, 9, "lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_programs_name_every_weight_of_the_model(family: str, layers: int) -> None:
    spec = small(family, num_hidden_layers=layers)
    networks = build_split(load("tensorrt-rtx"), spec, OPTIONS)
    device = new_device(spec, OPTIONS)
    programs = SplitPrograms(device, {part: register(network) for part, network in networks.items()}, spec, OPTIONS)
    assert {name: info.shape for name, info in programs.weights.items()} == spec.tensors()
    assert programs.nbytes > 0
    programs.close()
    device.close()


class Golden:
    """A golden checkpoint in fp32, and an engine for it."""

    def __init__(self, name: str) -> None:
        directory = GOLDEN / name
        checkpoint = Checkpoint(directory)
        self.spec = ModelSpec.load(directory, checkpoint.entries)
        self.options = EngineOptions("fp32", SLOTS, MAX_LEN, "split", chunk_tokens=32)
        self.tensors = {name: checkpoint.tensor(name) for name in self.spec.tensors()}
        self.cases: list[dict[str, Any]] = json.loads((directory / "golden.json").read_text())["cases"]
        stored = np.load(directory / "golden_logits.npz")
        self.logits = [stored[f"logits_{i}"] for i in range(len(self.cases))]

    def engine(self, garbage: Garbage = "nan", pace: Pace = "lazy", **run: Any) -> tuple[TensorRtEngine, HostDevice]:
        device = new_device(self.spec, self.options, garbage, pace)
        options = RunOptions(**{"warm": False, **run})
        return make_engine(self.spec, self.options, self.tensors, options, device), device


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def model(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.mark.usefixtures("spread_thin")
def test_golden_logits_and_tokens(model: Golden) -> None:
    """Prompts in pieces, then ragged decoding with a hole among the slots."""
    engine, _ = model.engine()
    slots = [0, 1, 3, 4, 5][: len(model.cases)]
    tokens = []
    for slot, case, expected in zip(slots, model.cases, model.logits, strict=True):
        rows, past = [], 0
        for size in (5, 11, 1, 2, MAX_LEN):
            piece = case["input_ids"][past : past + size]
            if piece:
                rows.append(step(engine, (slot, past, piece, len(piece))))
                past += len(piece)
        assert np.abs(np.concatenate(rows) - expected).max() <= TOLERANCE
        tokens.append([int(rows[-1][-1].argmax())])
    for i in range(23):
        items = zip(slots, model.cases, tokens, strict=True)
        rows = list(step(engine, *((slot, len(c["input_ids"]) + i, t[-1:], 1) for slot, c, t in items)))
        for sequence, row in zip(tokens, rows, strict=True):
            sequence.append(int(row.argmax()))
    assert tokens == [case["greedy_24"] for case in model.cases]
    engine.close()


@pytest.mark.parametrize(("garbage", "pace"), [("nan", "random"), ("finite", "eager")])
def test_golden_tokens_in_mixed_steps(model: Golden, garbage: Garbage, pace: Pace) -> None:
    """Prompts enter in pieces while others decode; slots come in any order, and one is a copy of another's prefix."""
    engine, device = model.engine(garbage, pace, warm=True)
    cases = model.cases
    slots = [4, 0, 5, 2, 1][: len(cases)]
    done = [0] * len(cases)
    tokens: list[list[int]] = [[] for _ in cases]
    while any(len(sequence) < 24 for sequence in tokens):
        items, wanting = [], []
        for i, case in enumerate(cases):
            ids = (case["input_ids"] + tokens[i])[done[i] :]
            if len(tokens[i]) < 24:
                chunk = ids[: 6 + i]
                final = len(chunk) == len(ids)
                items.append((slots[i], done[i], chunk, 1 if final else 0))
                done[i] += len(chunk)
                wanting += [i] if final else []
        for i, row in zip(wanting, step(engine, *items), strict=True):
            tokens[i].append(int(row.argmax()))
    assert tokens == [case["greedy_24"] for case in cases]
    longest = max(range(len(cases)), key=lambda i: len(cases[i]["input_ids"]))
    ids = cases[longest]["input_ids"]
    engine.copy_prefix(slots[longest], 3, len(ids) - 4)
    rows = step(engine, (3, len(ids) - 4, ids[-4:], 4))
    assert np.abs(rows - model.logits[longest][-4:]).max() <= TOLERANCE
    engine.close()
    assert device.live_bytes == 0


def test_decode_steps_are_graphs() -> None:
    golden = Golden("llama-tiny")
    engine, device = golden.engine(warm=True)
    assert device.calls["capture"] == 2 * len(golden.options.decode_buckets)
    engine.step(batch((0, 0, [1, 2, 3], 1)))
    before = device.calls.copy()
    for past in range(3, 9):
        engine.step(batch((0, past, [past], 1)))
    made = device.calls - before
    assert made["launch"] >= 6
    assert made["run"] == made["kernel attend"] == made["capture"] == 0
    engine.close()


def test_a_device_that_records_no_graphs_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden("mistral-tiny")
    ids = golden.cases[0]["input_ids"]
    engine, device = golden.engine()
    monkeypatch.setattr(device, "capture", _cannot)
    rows = [step(engine, (0, 0, ids[:4], 4)), *(step(engine, (0, i, ids[i : i + 1], 1)) for i in range(4, len(ids)))]
    assert np.abs(np.concatenate(rows) - golden.logits[0]).max() <= TOLERANCE
    engine.close()


def _cannot(work: object) -> None:
    raise DeviceError("failed", "no graphs here")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_close(precision: GpuPrecision) -> None:
    golden = Golden("qwen3-tiny")
    options = dataclasses.replace(golden.options, precision=precision)
    engine = make_engine(golden.spec, options, golden.tensors, RunOptions(warm=False))
    for case, expected in zip(golden.cases, golden.logits, strict=True):
        rows = step(engine, (2, 0, case["input_ids"], len(case["input_ids"])))
        error = np.abs(rows - expected).max() / np.abs(expected).max()
        assert error <= (2e-2 if precision == "fp16" else 1e-1)
    engine.close()


VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one layer": ({"num_hidden_layers": 1}, ()),
    "two layers, biases everywhere": (
        {"num_hidden_layers": 2},
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "four layers, windows in two, tied": (
        {
            "family": "qwen2",
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
        (),
    ),
}


@pytest.mark.usefixtures("spread_thin")
@pytest.mark.parametrize("variant", VARIANTS)
def test_options_of_models(variant: str) -> None:
    options, biases = VARIANTS[variant]
    config = tiny_config(**options)
    tensors = random_tensors(config, biases)
    spec = ModelSpec.parse(Path("config.json"), config).with_biases(tensors)
    engine = make_engine(spec, EngineOptions("fp32", 3, 40, "split"), tensors, RunOptions(warm=False))
    ids: NDArray[np.int64] = np.random.default_rng(0).integers(0, 101, 30)
    expected = Reference(config, tensors, windows=spec.windows).logits(ids.tolist())
    rows = [step(engine, (1, 0, ids[:13].tolist(), 13), (2, 0, ids[:1].tolist(), 1))[:13]]
    rows += [step(engine, (1, i, ids[i : i + 1].tolist(), 1)) for i in range(13, 30)]
    assert np.allclose(np.concatenate(rows), expected, atol=1e-3)
    engine.close()


@pytest.fixture(scope="module")
def windowed() -> tuple[TensorRtEngine, Reference]:
    config = tiny_config("mistral", sliding_window=11, num_hidden_layers=3)
    tensors = random_tensors(config)
    spec = ModelSpec.parse(Path("config.json"), config)
    options = EngineOptions("fp32", 4, 24, "split", chunk_tokens=8, chunks=2, step_tokens=16)
    engine = make_engine(spec, options, tensors, RunOptions(warm=False), new_device(spec, options, pace="random"))
    return engine, Reference(config, tensors, windows=[11] * 3)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_schedule(windowed: tuple[TensorRtEngine, Reference], data: st.DataObject) -> None:
    """Pieces, decodes, idle and full slots, copies, restarts, in any order."""
    engine, reference = windowed
    slots, longest = engine.capacity().slots, engine.capacity().max_len
    held: list[list[int]] = [[] for _ in range(slots)]
    for _ in range(data.draw(st.integers(1, 5), label="steps")):
        if data.draw(st.booleans(), label="copy"):
            src, dst = data.draw(st.integers(0, slots - 1)), data.draw(st.integers(0, slots - 1))
            length = data.draw(st.integers(0, len(held[src])))
            if held[src]:
                engine.copy_prefix(src, dst, length)
                held[dst] = held[src][:length]
        items, expected = [], []
        for slot in data.draw(st.permutations(range(slots)), label="slots")[: data.draw(st.integers(1, slots))]:
            keep = len(held[slot]) if data.draw(st.booleans()) else data.draw(st.integers(0, len(held[slot])))
            count = min(longest - keep, data.draw(st.sampled_from([1, 1, 1, 2, 5, 13])))
            if count == 0:
                continue
            tokens = data.draw(st.lists(st.integers(0, 100), min_size=count, max_size=count))
            wanted = data.draw(st.integers(0, count))
            held[slot] = held[slot][:keep] + tokens
            items.append((slot, keep, tokens, wanted))
            if wanted:
                expected.append(reference.logits(held[slot])[-wanted:])
        if items:
            rows = step(engine, *items)
            want = np.concatenate(expected) if expected else np.zeros((0, 101))
            assert rows.shape == want.shape
            assert np.allclose(rows, want, atol=2e-3)
