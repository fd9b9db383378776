"""The onnx engine for a GPU, proven without one: its graphs by what CUDA has kernels for, its calls on host memory.

Device memory is a `HostDevice`: apart from the caller's, full of garbage, strict about bounds, and lazy, so that what
was not sent or not awaited is not there. The session computes on the CPU, which runs fp16 graphs as they are.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from helixflow.engine import onnx_memory
from helixflow.engine.base import EngineError, Float32
from helixflow.engine.kinds import AnyPrecision
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.onnx_graph import HEAD_BITS, LINEAR_BITS, OPSET, compute_type, write_onnx
from helixflow.engine.onnx_memory import CudaMemory, HostMemory
from helixflow.engine.quantize import dequantize, quantize
from helixflow.engine.spec import ModelSpec
from tests.engine.gpu import open_gpu, written
from tests.engine.support import (
    GOLDEN,
    GOLDEN_NAMES,
    Reference,
    caches,
    random_tensors,
    read_safetensors,
    step,
    tiny_config,
)
from tests.engine.tensorrt.host_device import HostDevice

PRECISIONS: tuple[AnyPrecision, ...] = ("fp16", "bf16", "int8", "int4")
FLOAT, HALF, BRAIN = int(TensorProto.FLOAT), int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)
INT32, INT64, UINT8 = int(TensorProto.INT32), int(TensorProto.INT64), int(TensorProto.UINT8)
# What CUDA has kernels for: version of the operator at opset 24, types of floating-point inputs, types of the others.
# From "Operators implemented by CUDAExecutionProvider" of ONNX Runtime's docs/OperatorKernels.md
# (https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md); the versions of Flatten, Pad, Reshape
# and Cast, which opset 24 raised, from where onnxruntime-gpu 1.31.1 places such nodes: a kernel without an upper bound
# serves only the very version it was registered for.
ALL = {FLOAT, HALF, BRAIN}
CUDA_KERNELS: dict[tuple[str, str], tuple[int, set[int], set[int]]] = {
    ("", "Add"): (14, ALL, set()),
    ("", "Cast"): (24, ALL, set()),
    ("", "Flatten"): (24, ALL, set()),
    ("", "Gather"): (13, ALL, {INT32, INT64}),
    ("", "Gemm"): (13, ALL, set()),
    ("", "MatMul"): (13, ALL, set()),
    ("", "Mul"): (14, ALL, set()),
    ("", "Pad"): (24, {FLOAT, HALF}, {INT64}),
    ("", "RMSNormalization"): (23, ALL, set()),
    ("", "Reshape"): (24, ALL, {INT64}),
    ("", "Sigmoid"): (13, ALL, set()),
    ("", "Slice"): (13, ALL, {INT32, INT64}),
    ("com.microsoft", "GroupQueryAttention"): (1, {HALF, BRAIN}, {INT32}),
    ("com.microsoft", "MatMulNBits"): (1, ALL, {UINT8}),
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": tiny_config(attention_bias=True, mlp_bias=True),
    "qwen2 tied": tiny_config("qwen2", tie_word_embeddings=True),
    "qwen3 head 24": tiny_config("qwen3", head_dim=24),
    "mistral window": tiny_config("mistral", sliding_window=9),
}


# --- graphs ---


def types_of(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, list[int]]]:
    """Every node with the types of its inputs; what a node returns has the type of its first input, or of the cast."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    for node in model.graph.node:
        yield node, [types[name] for name in node.input]
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), types[node.input[0]])
        types |= dict.fromkeys(node.output, to)
    for value in model.graph.output:
        assert types[value.name] == value.type.tensor_type.elem_type, value.name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_node_has_a_cuda_kernel(tmp_path: Path, name: str, precision: AnyPrecision) -> None:
    directory, _ = written(tmp_path / "cuda", precision, MODELS[name])
    onnx.checker.check_model(str(directory / "graph.onnx"))
    model = onnx.load(directory / "graph.onnx", load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET, "com.microsoft": 1}
    for node, inputs in types_of(model):
        version, floats, others = CUDA_KERNELS[node.domain, node.op_type]
        assert {kind for kind in inputs if kind in ALL} <= floats, node.op_type
        assert {kind for kind in inputs if kind not in ALL} <= others, node.op_type
        if not node.domain:
            assert onnx.defs.get_schema(node.op_type, max_inclusive_version=OPSET).since_version == version
    half = {"fp16": HALF, "bf16": BRAIN, "fp32": FLOAT}[compute_type(precision, "cuda")]
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert {kinds.pop(name) for name in ("ids", "seqlens", "total", "rows")} == {INT32}
    assert kinds.pop("logits") == FLOAT
    assert set(kinds.values()) == {half}


def test_precisions_of_the_providers() -> None:
    with pytest.raises(
        EngineError, match=r"precision fp32 cannot be computed .* on cuda: choose one of fp16, bf16, int8"
    ):
        compute_type("fp32", "cuda")
    with pytest.raises(EngineError, match=r"precision bf16 cannot be computed .* on cpu"):
        compute_type("bf16")


@pytest.mark.parametrize(
    ("precision", "name", "factor"),
    [("fp16", "model.norm.weight", 1e5), ("int8", "model.layers.1.mlp.up_proj.weight", 1e9)],
)
def test_values_beyond_fp16_are_refused(tmp_path: Path, precision: AnyPrecision, name: str, factor: float) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors[name][-1] *= np.float32(factor)
    with pytest.raises(EngineError, match=rf"{name} holds values that fp16 cannot: choose bf16"):
        written(tmp_path / "cuda", precision, config, tensors)


# --- quantisation with 16-bit scales ---


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_follow_the_rounded_scales(bits: int) -> None:
    weight = np.random.default_rng(5).standard_normal((40, 96)).astype(np.float32) * np.float32(1e-2)
    weight[0] = 0
    packed, scales = quantize(weight, bits, np.float16)
    assert scales.dtype == np.float16
    error = np.abs(dequantize(packed, scales, bits, 96) - weight)
    blocks = np.abs(scales.astype(np.float32)).repeat(32, axis=1)
    # Half a step, but for the largest values of the other sign, of which one code is missing.
    assert (error <= 0.501 * blocks).mean() > 0.95
    assert (error <= 1.01 * blocks).all()
    exact, _ = quantize(weight, bits)
    assert np.abs(exact.astype(int) - packed.astype(int)).mean() < 1


# --- a bf16 graph, computed in fp32 ---


def widened(directory: Path, target: Path) -> Path:
    """A copy of a bf16 engine that computes in fp32, with the same weights: the CPU has no bf16 kernels."""
    model = onnx.load(directory / "graph.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == BRAIN:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == BRAIN:
            value.type.tensor_type.elem_type = FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to":
                attribute.CopyFrom(helper.make_attribute("to", FLOAT))
    target.mkdir()
    onnx.save(model, target / "graph.onnx")
    (target / "weights.bin").write_bytes(b"0" * 1024)
    return target


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_graph_computes_what_it_should(tmp_path: Path, name: str) -> None:
    config, tensors = MODELS[name], random_tensors(MODELS[name])
    directory, spec = written(tmp_path / "cuda", "bf16", config, tensors)
    engine = OnnxEngine(widened(directory, tmp_path / "fp32"), spec, "fp32", slots=2, max_len=64, threads=1)
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 101, 30)]
    got = np.concatenate(
        [step(engine, (1, 0, ids[:20], 20)), *(step(engine, (1, i, [ids[i]], 1)) for i in range(20, 30))]
    )
    engine.close()
    rounded = {name: tensor.astype(ml_dtypes.bfloat16).astype(np.float32) for name, tensor in tensors.items()}
    windows = [config["sliding_window"]] * 2 if config["sliding_window"] else None
    expected = Reference(config, rounded, windows=windows).logits(ids)
    assert np.abs(got - expected).max() <= 2e-4 * max(1.0, float(np.abs(expected).max()))


# --- the engine on device memory ---


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxEngine, Any, Any]:
    source, directory = GOLDEN / request.param, tmp_path_factory.mktemp(request.param)
    tensors = read_safetensors(source / "model.safetensors")
    spec = ModelSpec.load(source, tensors)
    write_onnx(spec, "fp16", tensors.__getitem__, directory, "cuda")
    cases = json.loads((source / "golden.json").read_text())["cases"]
    stored = np.load(source / "golden_logits.npz")
    engine = open_gpu(directory, spec, "fp16", HostDevice("nan"))
    return engine, cases, [stored[f"logits_{i}"] for i in range(len(cases))]


def near(got: Float32, expected: Float32) -> bool:
    """Within what 11 bits of precision leave of logits after three layers."""
    return bool(np.abs(got - expected).max() <= 0.01 * np.abs(expected).max())


@pytest.mark.parametrize("chunks", [(), (5, 11), (1, 2, 1, 7)], ids=str)
def test_golden_logits_in_fp16(half: tuple[OnnxEngine, Any, Any], chunks: tuple[int, ...]) -> None:
    """Half of each prompt in pieces, then token by token for several sequences at once, with holes between."""
    engine, cases, logits = half
    slots, prompts = [4, 0, 5, 2, 1], [case["input_ids"] for case in cases]
    done = [(len(prompt) + 1) // 2 for prompt in prompts]
    for slot, prompt, end, expected in zip(slots, prompts, done, logits, strict=True):
        past = 0
        for size in (*chunks, end):
            piece = prompt[past : min(end, past + size)]
            if piece:
                past += len(piece)
                rows = step(engine, (slot, past - len(piece), piece, 1 if past == end else 0))
        assert near(rows[0], expected[end - 1])
    for i in range(9):
        chosen = [k for k, prompt in enumerate(prompts) if done[k] < len(prompt) and (i + k) % 3]
        rows = step(engine, *((slots[k], done[k], prompts[k][done[k] : done[k] + 1], 1) for k in chosen))
        for k, row in zip(chosen, rows, strict=True):
            assert near(row, logits[k][done[k]])
            done[k] += 1


def test_a_prefix_is_copied_on_the_device(half: tuple[OnnxEngine, Any, Any]) -> None:
    engine, cases, logits = half
    ids, expected = cases[-1]["input_ids"], logits[-1]
    step(engine, (5, 0, ids[:40], 0))
    engine.copy_prefix(5, 1, 30)
    engine.copy_prefix(5, 5, 40)
    engine.copy_prefix(5, 3, 0)
    rows = step(engine, (1, 30, ids[30:], len(ids) - 30), (5, 40, ids[40:41], 1))
    assert near(rows, np.concatenate([expected[30:], expected[40:41]]))


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.03), ("int4", 0.03)])
def test_quantised_weights_with_activations_in_fp16(tmp_path: Path, precision: AnyPrecision, bound: float) -> None:
    """Against the very weights that the engine stands for; the CPU rounds activations to 8 bits, a GPU does not."""
    config = tiny_config(hidden_size=80, intermediate_size=144, attention_bias=True)
    tensors = random_tensors(config)
    directory, spec = written(tmp_path / "cuda", precision, config, tensors)
    engine = open_gpu(directory, spec, precision, HostDevice())
    ids = [int(i) for i in np.random.default_rng(2).integers(0, 101, 50)]
    got = np.concatenate(
        [step(engine, (1, 0, ids[:40], 40)), *(step(engine, (1, i, [ids[i]], 1)) for i in range(40, 50))]
    )
    engine.close()
    stood_for = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "embed" not in name:
            bits = cast("int", (HEAD_BITS if name.startswith("lm_head") else LINEAR_BITS)[precision])
            stood_for[name] = dequantize(*quantize(tensor, bits, np.float16), bits, tensor.shape[1])
    expected = Reference(config, stood_for).logits(ids)
    assert float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean())) <= bound


SLOTS, MAX_LEN, VOCAB = 5, 24, 101


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxEngine, OnnxEngine]:
    """The same engine on device memory and on the CPU."""
    directory = tmp_path_factory.mktemp("pair")
    config = tiny_config("mistral", sliding_window=11)
    tensors = random_tensors(config)
    spec = ModelSpec.parse(Path("config.json"), config)
    write_onnx(spec, "fp16", tensors.__getitem__, directory, "cuda")
    here = OnnxEngine(directory, spec, "fp16", slots=SLOTS, max_len=MAX_LEN, threads=1)
    there = open_gpu(directory, spec, "fp16", HostDevice("nan"), SLOTS, MAX_LEN)
    there._costs = here._costs
    return here, there


@given(data=st.data())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_schedule_sends_all_that_a_call_reads(pair: tuple[OnnxEngine, OnnxEngine], data: st.DataObject) -> None:
    """Bit for bit what the same session computes when everything is where it was written."""
    held = [0] * SLOTS
    for engine in pair:
        engine._lengths[:] = held
        engine._answered[:] = [False] * SLOTS
    for _ in range(data.draw(st.integers(1, 6), label="steps")):
        if data.draw(st.booleans(), label="copy"):
            src, dst = data.draw(st.integers(0, SLOTS - 1)), data.draw(st.integers(0, SLOTS - 1))
            held[dst] = data.draw(st.integers(0, held[src]))
            for engine in pair:
                engine.copy_prefix(src, dst, held[dst])
        items = []
        for slot in data.draw(st.permutations(range(SLOTS)), label="slots")[: data.draw(st.integers(1, SLOTS))]:
            past = held[slot] if data.draw(st.booleans()) else data.draw(st.integers(0, held[slot]))
            count = min(MAX_LEN - past, data.draw(st.sampled_from([1, 1, 1, 2, 5, 13])))
            if count:
                tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=count, max_size=count))
                items.append((slot, past, tokens, data.draw(st.integers(0, count))))
                held[slot] = past + count
        expected, got = (step(engine, *items) for engine in pair)
        assert np.array_equal(got, expected)


def test_caches_begin_as_zeros_and_everything_is_given_back(tmp_path: Path) -> None:
    gpu = HostDevice("nan")
    directory, spec = written(tmp_path / "cuda", "fp16")
    engine = open_gpu(directory, spec, "fp16", gpu, slots=2, max_len=8)
    gpu.synchronize()
    cache = engine._cache
    assert cache.nbytes == 2 * 2 * 2 * 2 * 9 * 16 * 2
    assert not gpu.bytes_at(cache.address, cache.nbytes).any()
    engine.close()
    engine.close()
    assert gpu.live_bytes == 0


def test_small_inputs_are_staged_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the page-locked memory holds: then it is waited for, and nothing under way is overwritten."""
    monkeypatch.setattr(onnx_memory, "STAGED", 8)
    gpu = HostDevice("nan")
    memory = CudaMemory(gpu, 0, 0)
    buffers = [memory.buffer(length) for length in (5, 20)]
    for value in range(4):
        for buffer in buffers:
            buffer.host[:] = value + np.arange(len(buffer.host))
            memory.send(buffer, len(buffer.host))
    memory.send(buffers[0], 0)
    for buffer in buffers:
        buffer.host[:] = -1
    memory.finish()
    for buffer, length in zip(buffers, (5, 20), strict=True):
        assert np.array_equal(gpu.view(buffer.address, np.int32, (length,)), 3 + np.arange(length))


def test_host_memory() -> None:
    memory = HostMemory()
    address = memory.zeros(6 * 10 * 2)
    view = memory.view(address, (6, 10), np.float16)
    assert not view.any()
    view[:3] = np.arange(30).reshape(3, 10)
    memory.copy_rows(address + 60, address, pitch=20, width=8, rows=3)
    assert np.array_equal(view[3:, :4], view[:3, :4])
    assert not view[3:, 4:].any()
    memory.close()


def test_the_cpu_engine_remembers_in_its_own_type(tmp_path: Path) -> None:
    directory, spec = written(tmp_path / "cuda", "fp16")
    engine = OnnxEngine(directory, spec, "fp16", slots=3, max_len=8, threads=1)
    step(engine, (1, 0, [1, 2, 3, 4], 1))
    memory = caches(engine)
    assert memory.dtype == np.float16
    assert memory.shape == (4, 3, 2, 9, 16)
    assert memory[:, 1, :, :4].any()
    assert not memory[:, 0].any()
    engine.close()
