"""The network itself, interpreted in numpy: what its inputs mean, every option of a decoder, quantised weights."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.rope import frequencies, tables
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.interpreter import Interpreter
from helixflow.engine.tensorrt.library import Library, load
from helixflow.engine.tensorrt.linear import quantise_fp8, quantise_int4, quantise_int8
from helixflow.engine.tensorrt.network import Network, build_network
from helixflow.engine.tensorrt.numeric import unpack_int4
from helixflow.engine.tensorrt.options import INT4_BLOCK, AttentionForm, EngineOptions, GpuPrecision
from tests.engine.support import GOLDEN, GOLDEN_NAMES, Reference, Tensors, random_tensors, read_safetensors, tiny_config

FORMS: tuple[AttentionForm, ...] = ("posmask", "key_value_lengths")
Item = tuple[int, int, Sequence[int]]
"""Slot, positions it holds, tokens that follow."""
PADDING = 3


@pytest.fixture(scope="module")
def library() -> Library:
    return load("tensorrt-rtx")


class Machine:
    """A network, its weights, and caches that begin as garbage."""

    def __init__(self, network: Network, spec: ModelSpec, options: EngineOptions, tensors: Tensors) -> None:
        self.spec, self.options = spec, options
        self.interpreter = Interpreter(network.library.trt, network.definition)
        self.fixed: dict[str, Any] = {name: tensors[stored] for name, stored in network.weight_inputs.items()}
        cos, sin = tables(spec.rope, spec.head_dim, options.max_len, options.positions)
        self.fixed |= {"rope_cos": cos, "rope_sin": sin}
        random = np.random.default_rng(2)
        self.caches = {
            name: random.choice(np.array([-999, 7, 4096], np.float32), (options.cache_rows, *shape[1:]))
            for name, shape in network.inputs.items()
            if "_cache_" in name
        }

    def step(self, *items: Item) -> Float32:
        """Logits of every token of the items, in their order; single tokens go the way of decode steps."""
        rows = self.options.cache_rows
        ids, positions, counts, first = [0] * PADDING, list(range(PADDING)), [0, PADDING], [0] * rows
        start: dict[int, int] = {}
        for slot, past, tokens in sorted(items):
            counts += [counts[-1]] * (slot + 2 - len(counts))
            start[slot], first[slot + 1] = len(ids), past
            ids += tokens
            positions += range(past, past + len(tokens))
            counts.append(len(ids))
        counts += [len(ids)] * (rows + 1 - len(counts))
        decode_rows, decode_positions, back = np.zeros(rows, int), np.zeros(rows, int), np.zeros(len(ids), int)
        pieces = [item for item in items if len(item[2]) > 1]
        length = max((len(tokens) for _, _, tokens in pieces), default=1) + 1
        piece_rows, piece_positions = np.zeros((2, max(len(pieces), 1), length), int)
        for slot, past, tokens in items:
            if len(tokens) == 1:
                decode_rows[slot + 1], decode_positions[slot + 1] = start[slot], past
                back[start[slot]] = slot + 1
        for i, (slot, past, tokens) in enumerate(pieces):
            at = np.minimum(np.arange(length), len(tokens) - 1)
            piece_rows[i], piece_positions[i] = start[slot] + at, past + at
            back[start[slot] : start[slot] + len(tokens)] = rows + i * length + np.arange(len(tokens))
        wanted = [start[slot] + i for slot, _, tokens in items for i in range(len(tokens))]
        view = max((past + len(tokens) for _, past, tokens in pieces), default=1)
        feeds = {
            "input_ids": ids,
            "position_ids": positions,
            "cu_q": counts,
            "write_idx": first,
            "dec_idx": decode_rows,
            "dec_pos": decode_positions,
            "pre_idx": piece_rows,
            "pre_pos": piece_positions,
            "pre_slot": [item[0] + 1 for item in pieces] or [0],
            "pre_view": np.zeros(view, int),
            "back_idx": back,
            "last_idx": wanted,
        }
        if "kv_len" in self.interpreter.inputs:
            feeds["kv_len"] = decode_positions + 1
        ones = np.ones((len(wanted), 1), np.float32)
        sampling = {"inv_temp": ones, "top_p": ones, "top_k": ones.astype(np.int32), "min_z": ones * np.float32(-1e30)}
        noise = self.interpreter.inputs["gumbel"][1][1]
        sampling["gumbel"] = np.zeros((len(wanted), noise), np.float32)
        integers = {name: np.asarray(values, np.int32) for name, values in feeds.items()}
        out = self.interpreter.run({**self.fixed, **self.caches, **sampling, **integers})
        self.caches = {name: out[f"{name}_out"] for name in self.caches}
        logits: Float32 = out["logits"]
        decided = out["undecided"] == 0
        assert (out["next_ids"][decided] == logits.argmax(-1)[decided]).all()
        return logits


def machine(
    library: Library,
    spec: ModelSpec,
    tensors: Tensors,
    options: EngineOptions,
    scales: Mapping[str, float] | None = None,
) -> Machine:
    return Machine(build_network(library, spec, options, tensors.__getitem__, scales), spec, options, tensors)


def in_pieces(engine: Machine, ids: Sequence[int], others: Sequence[int]) -> Float32:
    """Logits of `ids`: two pieces, single tokens, a piece, while other slots are at work; slot 1 has a neighbour that
    stays idle, and one whose prompt is longer."""
    a = engine.step((2, 0, others[:9]), (1, 0, ids[:5]))
    b = engine.step((1, 5, ids[5:11]), (2, 9, others[9:10]))
    c = [engine.step((1, i, ids[i : i + 1]), (2, i - 1, others[i - 1 : i])) for i in range(11, 15)]
    d = engine.step((1, 15, ids[15:]))
    return np.concatenate([a[9:], b[:6], *(rows[:1] for rows in c), d])


def made_up(family: str = "llama", biases: Sequence[str] = (), **options: Any) -> tuple[Any, ModelSpec, Tensors]:
    """A small checkpoint whose widths are blocks of int4, but for o_proj's unless head_dim says so."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    config = tiny_config(family, **{**sizes, **options})
    spec = ModelSpec.parse(Path("config.json"), config).with_biases(f"x.{name}.bias" for name in biases)
    return config, spec, random_tensors(config, biases)


IDS = [int(token) for token in np.random.default_rng(4).integers(0, 101, 24)]
OTHERS = [int(token) for token in np.random.default_rng(5).integers(0, 101, 24)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_logits_in_pieces(library: Library, name: str, form: AttentionForm) -> None:
    cases = json.loads((GOLDEN / name / "golden.json").read_text())["cases"]
    longest = max(range(len(cases)), key=lambda i: len(cases[i]["input_ids"]))
    ids = cases[longest]["input_ids"]
    golden = np.load(GOLDEN / name / "golden_logits.npz")[f"logits_{longest}"]
    options = EngineOptions("fp32", slots=4, max_len=160, attention=form)
    tensors = read_safetensors(GOLDEN / name / "model.safetensors")
    engine = machine(library, ModelSpec.load(GOLDEN / name), tensors, options)
    assert np.abs(in_pieces(engine, ids, ids[::-1]) - golden).max() <= 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("family", "biases", "options"),
    [
        ("mistral", (), {"sliding_window": 6}),
        ("qwen3", (), {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
        ("qwen2", (), {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("llama", ("o_proj", "gate_proj", "down_proj"), {"num_key_value_heads": 4}),
        ("llama", (), {"head_dim": 6, "vocab_size": 40}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_options_of_decoders(
    library: Library, family: str, biases: Sequence[str], options: dict[str, Any], form: AttentionForm
) -> None:
    config, spec, tensors = made_up(family, biases, **options)
    ids, others = ([token % spec.vocab_size for token in tokens] for tokens in (IDS, OTHERS))
    engine = machine(library, spec, tensors, EngineOptions("fp32", slots=4, max_len=30, attention=form))
    speeds = frequencies(spec.rope, spec.head_dim, 30)
    expected = Reference(config, tensors, speeds, windows=spec.windows).logits(ids)
    assert np.abs(in_pieces(engine, ids, others) - expected).max() <= 1e-4


def relative(found: Float32, expected: Any) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.003), ("bf16", 0.025)])
def test_16_bits(library: Library, precision: GpuPrecision, limit: float) -> None:
    config, spec, tensors = made_up("qwen3")
    engine = machine(library, spec, tensors, EngineOptions(precision, slots=4, max_len=30))
    assert relative(in_pieces(engine, IDS, OTHERS), Reference(config, tensors).logits(IDS)) < limit


def linears(tensors: Tensors) -> list[str]:
    return [name for name in tensors if "_proj.weight" in name]


def test_int8_is_the_network_of_its_rounded_weights(library: Library) -> None:
    config, spec, tensors = made_up("qwen2")
    engine = machine(library, spec, tensors, EngineOptions("int8", slots=4, max_len=30))
    rounded = dict(tensors)
    for name in linears(tensors):
        codes, steps = quantise_int8(tensors[name], "fp16")
        rounded[name] = np.multiply(codes, steps[:, None], dtype=np.float32)
    found = in_pieces(engine, IDS, OTHERS)
    assert relative(found, Reference(config, rounded).logits(IDS)) < 0.003
    assert 0.003 < relative(found, Reference(config, tensors).logits(IDS)) < 0.03


def test_int4_is_the_network_of_its_rounded_weights(library: Library) -> None:
    """o_proj is 96 wide, no multiple of the block: it stays an input, and the network says so."""
    config, spec, tensors = made_up("llama", head_dim=24)
    options = EngineOptions("int4", slots=4, max_len=30)
    network = build_network(library, spec, options, tensors.__getitem__)
    assert network.unquantised == tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(spec.layers))
    rounded = dict(tensors)
    for name in linears(tensors):
        if "o_proj" not in name:
            packed, steps = quantise_int4(tensors[name], "fp16")
            rounded[name] = np.multiply(unpack_int4(packed), np.repeat(steps, INT4_BLOCK, axis=1), dtype=np.float32)
    found = in_pieces(Machine(network, spec, options, tensors), IDS, OTHERS)
    assert relative(found, Reference(config, rounded).logits(IDS)) < 0.003
    assert 0.05 < relative(found, Reference(config, tensors).logits(IDS)) < 0.5


def test_fp8_uses_the_scales_of_its_inputs(library: Library) -> None:
    config, spec, tensors = made_up("mistral", ("up_proj",))
    scales = dict.fromkeys((name.removesuffix(".weight") for name in linears(tensors)), 16 / 448)
    options = EngineOptions("fp8", slots=4, max_len=30)
    expected = Reference(config, tensors).logits(IDS)
    assert relative(in_pieces(machine(library, spec, tensors, options, scales), IDS, OTHERS), expected) < 0.15
    # Inputs beyond 448 steps are cut off: with a scale that is far too small, nothing right remains.
    small = dict.fromkeys(scales, 0.1 / 448)
    assert relative(in_pieces(machine(library, spec, tensors, options, small), IDS, OTHERS), expected) > 0.5


def test_signature(library: Library) -> None:
    _, spec, _ = made_up("qwen2", tie_word_embeddings=True, num_hidden_layers=1)
    options = EngineOptions("bf16", slots=4, max_len=30)
    network = build_network(library, spec, options)
    small = {name: shape for name, shape in network.inputs.items() if not name.startswith("w.")}
    lists = ["input_ids", "position_ids", "last_idx", "back_idx", "cu_q", "write_idx", "dec_idx", "dec_pos"]
    vectors = [*lists, "pre_slot", "pre_view"]
    cache = (-1, spec.kv_heads, 31, 32)
    assert small == {
        **dict.fromkeys(vectors, (-1,)),
        **dict.fromkeys(["pre_idx", "pre_pos"], (-1, -1)),
        **dict.fromkeys(["rope_cos", "rope_sin"], (31, 16)),
        **dict.fromkeys(["k_cache_0", "v_cache_0"], cache),
        **dict.fromkeys(["inv_temp", "top_p", "top_k", "min_z"], (-1, 1)),
        "gumbel": (-1, 65),
    }
    weights = {name: name.removeprefix("w.") for name in network.inputs if name.startswith("w.")}
    assert network.weight_inputs == {**weights, "w.lm_head.weight": "model.embed_tokens.weight"}
    assert set(network.weight_inputs.values()) == set(spec.tensors())
    found = Interpreter(library.trt, network.definition)
    assert found.outputs == {
        "logits": ("fp32", (-1, spec.vocab_size)),
        **dict.fromkeys(["next_ids", "undecided"], ("int32", (-1,))),
        **dict.fromkeys(["k_cache_0_out", "v_cache_0_out"], ("bf16", cache)),
    }
    assert found.aliases == {"k_cache_0_out": "k_cache_0", "v_cache_0_out": "v_cache_0"}
    assert {kind for name, (kind, _) in found.inputs.items() if name in vectors} == {"int32"}
    lengthy = build_network(library, spec, dataclasses.replace(options, attention="key_value_lengths"))
    assert lengthy.inputs.items() - network.inputs.items() == {("kv_len", (-1,))}


def test_lengths_are_no_input_where_every_layer_has_a_window(library: Library) -> None:
    _, spec, _ = made_up("mistral", sliding_window=6)
    options = EngineOptions("fp16", slots=4, max_len=30, attention="key_value_lengths")
    assert "kv_len" not in build_network(library, spec, options).inputs


def test_what_is_refused(library: Library) -> None:
    _, spec, tensors = made_up()
    with pytest.raises(EngineError, match="not one network"):
        build_network(library, spec, EngineOptions("fp16", slots=4, max_len=30, attention="split"))
    with pytest.raises(EngineError, match=r"q_proj: int8 weights are constants, but there is nothing to read"):
        build_network(library, spec, EngineOptions("int8", slots=4, max_len=30))
    with pytest.raises(EngineError, match=r"layers\.0\.self_attn\.q_proj: fp8 needs the scale of its input"):
        build_network(library, spec, EngineOptions("fp8", slots=4, max_len=30), tensors.__getitem__)
    with pytest.raises(EngineError, match=r"q_proj\.weight is \[128, 64\], expected \[128, 128\]"):
        build_network(library, spec, EngineOptions("int8", slots=4, max_len=30), lambda name: tensors[name][:, :64])
    with pytest.raises(EngineError, match="4000000 slots of 4000 positions are too many"):
        build_network(library, spec, EngineOptions("fp16", slots=4_000_000, max_len=4000))


@st.composite
def matrices(draw: st.DrawFn) -> Float32:
    """Weights [out, in] of any size of numbers, with outliers, zeros, and rows of zeros."""
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = random.standard_normal((rows, blocks * INT4_BLOCK)) * 10.0 ** draw(st.integers(-6, 2))
    weight[random.random(weight.shape) < draw(st.sampled_from([0.0, 0.01, 0.9]))] *= draw(st.sampled_from([0, 30]))
    weight[draw(st.integers(0, rows - 1))] *= draw(st.sampled_from([0, 1]))
    return weight.astype(np.float32)


@given(weight=matrices())
@settings(max_examples=150, deadline=None)
def test_rounded_weights_are_within_half_a_step(weight: Float32) -> None:
    """Where steps are so small that fp16 rounds them by much, the last code may be cut off a little earlier."""
    codes, steps = quantise_int8(weight, "fp16")
    wide = steps[:, None].astype(np.float32)
    cut = np.maximum(np.abs(weight) - 127 * wide, 0)
    assert (np.abs(codes * wide - weight) <= wide * 0.501 + cut).all()
    assert (cut <= 2.0**-18 + np.abs(weight) * 2.0**-10).all()
    packed, steps = quantise_int4(weight, "fp16")
    wide = np.repeat(steps.astype(np.float32), INT4_BLOCK, axis=1)
    # A positive outlier may be cut off by one step, when that is better for the rest of its block.
    assert (np.abs(unpack_int4(packed) * wide - weight) <= wide * 1.01 + 2.0**-20).all()
    assert np.isfinite(steps).all()
    assert (steps > 0).all()


@given(weight=matrices())
@settings(max_examples=100, deadline=None)
def test_fp8_rounds_to_4_bits_of_precision(weight: Float32) -> None:
    codes, step = quantise_fp8(weight, "fp16")
    wide = step.astype(np.float32)
    assert np.isfinite(codes.astype(np.float32)).all()
    error = np.abs(codes.astype(np.float32) * wide - weight)
    cut = np.maximum(np.abs(weight) - 448 * wide, 0)
    # Half of the last bit of a number, or of the smallest subnormal one.
    assert (error <= np.maximum(np.abs(weight) / 16, wide * 2.0**-10) * 1.001 + cut).all()
    assert (cut <= 448 * 2.0**-25 + np.abs(weight) * 2.0**-10).all()


def test_int4_takes_the_better_step() -> None:
    """A positive outlier at code 7 wastes code -8; one step less for it makes the others finer."""
    weight = np.full((1, INT4_BLOCK), -0.875, np.float32)
    weight[0, 0] = 1.0
    packed, steps = quantise_int4(weight, "fp32")
    assert steps[0, 0] == np.float32(1 / 8)
    assert unpack_int4(packed)[0].tolist() == [7] + [-7] * (INT4_BLOCK - 1)
    assert list(itertools.chain(*quantise_int4(-weight, "fp32")[1].tolist())) == [0.125]
