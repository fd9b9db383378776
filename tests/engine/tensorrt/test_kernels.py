"""The attention kernels: compiled for every device, and run on the CPU against numpy."""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt import kernels
from helixflow.engine.tensorrt.kernels import (
    THREADS,
    WARP,
    WARPS,
    Attention,
    AttentionShape,
    LayerCaches,
    Spread,
    Tokens,
    compile_kernels,
)
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import Compute
from tests.engine.tensorrt.cpu_kernels import CpuModule, build

pytestmark = pytest.mark.long

LLAMA_8B = AttentionShape(32, 8, 128, 8193, "fp16")
QWEN_05B = AttentionShape(14, 2, 64, 4097, "fp16")
SHARED_BYTES = 48 * 1024
# Half a unit in the last place, relative.
ROUNDING: dict[Compute, float] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
SHAPES = (
    AttentionShape(4, 2, 16, 96, "fp32"),
    AttentionShape(8, 1, 32, 96, "fp32"),
    AttentionShape(3, 3, 64, 96, "fp16"),
    AttentionShape(8, 2, 128, 96, "fp16"),
    AttentionShape(8, 1, 128, 96, "bf16"),
    AttentionShape(11, 1, 80, 96, "fp16"),  # two blocks a group, and lanes with nothing to hold
    AttentionShape(2, 2, 6, 96, "bf16"),  # heads of 12 bytes
    AttentionShape(4, 2, 320, 96, "fp16"),  # two vectors a lane, of which some are none
)


@dataclass
class Case:
    """Positions held and new tokens of each row, and the arrays of a launch; caches hold NaN where nothing lies."""

    shape: AttentionShape
    pasts: Sequence[int]
    counts: Sequence[int]
    seed: int = 0

    def __post_init__(self) -> None:
        random, shape = np.random.default_rng(self.seed), self.shape
        dtype, tokens, rows = NUMPY[shape.dtype], sum(self.counts), len(self.counts)

        def draw(*size: int, scale: float = 1.0) -> NDArray[Any]:
            return (random.standard_normal(size) * scale).astype(dtype)

        self.cu_q = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        held = [np.arange(past, past + n) for past, n in zip(self.pasts, self.counts, strict=True)]
        self.positions = np.concatenate(held).astype(np.int32)
        self.q = draw(tokens, shape.heads, shape.head_dim, scale=3.0)
        self.k, self.v = (draw(tokens, shape.kv_heads, shape.head_dim) for _ in "kv")
        self.caches = [np.full((rows, shape.kv_heads, shape.positions, shape.head_dim), np.nan, dtype) for _ in "kv"]
        for cache in self.caches:
            for row, past in enumerate(self.pasts):
                cache[row, :, :past] = draw(shape.kv_heads, past, shape.head_dim)
        self.out = np.full((tokens, shape.heads, shape.head_dim), np.nan, dtype)

    def run(self, window: int | None, spread: Spread, backwards: bool = False) -> CpuModule:
        """Both kernels on the CPU; `out` and the caches then hold their results."""
        module = CpuModule(build(self.shape), backwards=backwards)
        attention, tokens = Attention(module, self.shape), len(self.positions)
        work = np.full(attention.workspace_bytes(tokens, spread) // 4 + 1, np.nan, np.float32)
        launch = Tokens(tokens, len(self.counts), self.cu_q.ctypes.data, self.positions.ctypes.data, spread)
        caches = LayerCaches(*(cache.ctypes.data for cache in self.caches))
        attention.append(launch, self.k.ctypes.data, self.v.ctypes.data, caches)
        attention.attend(launch, self.q.ctypes.data, caches, window, self.out.ctypes.data, work.ctypes.data)
        return module

    def appended(self) -> list[NDArray[Any]]:
        """What the caches have to hold afterwards."""
        expected = [cache.copy() for cache in self.caches]
        for cache, new in zip(expected, (self.k, self.v), strict=True):
            for row, (start, end) in enumerate(zip(self.cu_q[:-1], self.cu_q[1:], strict=True)):
                for token in range(start, end):
                    cache[row, :, self.positions[token]] = new[token]
        return expected

    def check(self, window: int | None) -> None:
        """Compares `out` with attention in fp64."""
        shape = self.shape
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        for token, (row, position) in enumerate(zip(rows, self.positions, strict=True)):
            seen = slice(max(0, position - (window or position + 1) + 1), position + 1)
            for head in range(shape.heads):
                group = head * shape.kv_heads // shape.heads
                k, v = (cache[row, group, seen].astype(np.float64) for cache in self.caches)
                scores = k @ self.q[token, head].astype(np.float64) / np.sqrt(shape.head_dim)
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ v
                error = np.abs(self.out[token, head].astype(np.float64) - expected)
                assert (error <= 2 * ROUNDING[shape.dtype] * np.abs(expected) + 2e-5).all()


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("shape", [QWEN_05B, LLAMA_8B], ids=["64", "128"])
def test_compiles_for_every_device(shape: AttentionShape, dtype: Compute, sm: int) -> None:
    image = compile_kernels(replace(shape, dtype=dtype), sm)
    assert image[:4] == b"\x7fELF"
    assert all(name in image for name in (b"append", b"attend", b"combine"))


def test_an_unknown_device_gets_ptx() -> None:
    image = compile_kernels(LLAMA_8B, 999)
    assert b".visible .entry attend" in image


def test_devices_that_cannot() -> None:
    with pytest.raises(EngineError, match="NVRTC does not compile for SM 61"):
        compile_kernels(LLAMA_8B, 61)
    with pytest.raises(EngineError, match="bf16 needs SM 80"):
        compile_kernels(replace(LLAMA_8B, dtype="bf16"), 75)


def test_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kernels"
    image = compile_kernels(QWEN_05B, 89, kept)
    (file,) = kept.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_compile", None)
        assert compile_kernels(QWEN_05B, 89, kept) == image
    file.write_bytes(file.read_bytes()[:-1])
    assert compile_kernels(QWEN_05B, 89, kept) == image
    assert compile_kernels(replace(QWEN_05B, positions=99), 89, kept) == image  # not a constant of the kernels
    compile_kernels(replace(QWEN_05B, heads=2), 89, kept)
    assert len(list(kept.iterdir())) == 2
    # A place that cannot be written costs time, nothing else.
    assert compile_kernels(QWEN_05B, 89, file / "below") == image


def test_errors_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "source", lambda: "int broken(;")
    with pytest.raises(EngineError, match=r"NVRTC cannot compile attention.cu .*error"):
        compile_kernels(QWEN_05B, 89)
    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", _no_library)
    with pytest.raises(EngineError, match=r"needs the CUDA compiler NVRTC \(libnvrtc is not there\): run `pip"):
        compile_kernels(QWEN_05B, 89)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"needs cuda-bindings .* `pip install 'helixflow\[rtx\]'"):
        compile_kernels(QWEN_05B, 89)


def _no_library() -> None:
    raise RuntimeError("libnvrtc is not there")


@given(
    heads=st.integers(1, 128),
    groups=st.integers(1, 16),
    half=st.integers(1, 256),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
)
def test_tiling_covers_heads(heads: int, groups: int, half: int, dtype: Compute) -> None:
    shape = AttentionShape(heads * groups, groups, 2 * half, 100, dtype)
    tiling, item = shape.tiling, kernels.ITEM_BYTES[dtype]
    assert WARP % tiling.lanes == 0
    assert shape.head_dim * item % tiling.vector_bytes == 0
    assert tiling.lanes * tiling.sweeps * tiling.vector_bytes >= shape.head_dim * item
    assert heads <= tiling.parts * tiling.block_heads < heads + tiling.block_heads
    teams = THREADS // tiling.lanes
    shared = tiling.block_heads * (teams + 1 + WARPS * (1 + shape.head_dim)) * 4
    assert shared <= SHARED_BYTES


def test_fp16_on_the_cpu() -> None:
    """The stand-in for the GPU's conversion rounds as numpy does."""
    library = build(SHAPES[3])
    library.narrow_pair.argtypes = [ctypes.c_float, ctypes.c_float]
    library.narrow_pair.restype = ctypes.c_uint
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)[::7]
    between = (halves[1:] + halves[:-1]) / 2
    values = [0.0, 65519.0, 65520.0, 1e30, np.inf, 2.0**-25, 2.0**-26, *between.tolist(), *halves.tolist()]
    values += np.nextafter(between, np.float32(np.inf)).tolist() + np.nextafter(between, np.float32(0)).tolist()
    with np.errstate(over="ignore"):
        expected = np.array(values, np.float32).astype(np.float16).view(np.uint16).tolist()
    got = [library.narrow_pair(value, -value) for value in values]
    assert [pair & 0xFFFF for pair in got] == expected
    assert [pair >> 16 for pair in got] == [half | 0x8000 for half in expected]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_launch(data: st.DataObject) -> None:
    """Ragged and empty rows, windows, spreads, either order of threads, NaN behind what was written."""
    shape = data.draw(st.sampled_from(SHAPES))
    counts = data.draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 9]), min_size=1, max_size=6).filter(any))
    pasts = [data.draw(st.integers(0, shape.positions - count)) for count in counts]
    window = data.draw(st.none() | st.integers(1, shape.positions + 10))
    spread = Spread(data.draw(st.sampled_from([3, 16, 64, 256])), data.draw(st.sampled_from([1, 2, 5, 32])))
    case = Case(shape, pasts, counts, data.draw(st.integers(0, 99)))
    expected = case.appended()
    module = case.run(window, spread, backwards=data.draw(st.booleans()))
    for cache, wanted in zip(case.caches, expected, strict=True):
        assert np.array_equal(cache, wanted, equal_nan=True)
    case.check(window)
    splits = min(spread.most, -(-min(shape.positions, window or shape.positions) // spread.least))
    assert [name for name, _ in module.launched] == ["append", "attend", "combine"][: 2 + (splits > 1)]


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("spread", [Spread(16, 32), Spread(16, 2), Spread(256, 32)], ids=str)
def test_a_token_does_not_depend_on_its_batch_mates(shape: AttentionShape, spread: Spread) -> None:
    """Bit for bit, whatever else is in the launch."""
    together = Case(shape, [40, 7, 0, 90], [1, 5, 0, 1])
    alone = [replace(together) for _ in range(7)]
    rows = np.repeat(np.arange(4), together.counts)
    for token, (case, row) in enumerate(zip(alone, rows, strict=True)):
        first = int(together.cu_q[row])
        # The tokens before it in its row are in the cache already.
        case.caches = [cache[row : row + 1].copy() for cache in together.appended()]
        case.counts, case.cu_q = [1], np.array([0, 1], np.int32)
        case.positions = together.positions[token : token + 1]
        case.q, case.k, case.v = (x[token : token + 1].copy() for x in (together.q, together.k, together.v))
        case.out = together.out[:1].copy()
        assert first <= token
        case.run(None, spread)
    together.run(None, spread)
    assert np.array_equal(np.concatenate([case.out for case in alone]), together.out)


def test_tokens_outside_the_caches_write_nothing() -> None:
    """No launch of ours has such tokens; if one had, the memory of others would stay whole."""
    case = Case(SHAPES[0], [3, 5], [1, 1])
    before = [cache.copy() for cache in case.caches]
    case.positions[:] = [-1, case.shape.positions]
    case.run(None, Spread(16, 32))
    case.positions[:] = [3, 5]
    case.cu_q[:] = [2, 2, 2]
    case.run(None, Spread(16, 32))
    assert all(np.array_equal(cache, old, equal_nan=True) for cache, old in zip(case.caches, before, strict=True))
    assert np.isnan(case.out).all()


def test_scores_of_every_size() -> None:
    """Large scores neither overflow nor drown: the softmax is that of their differences."""
    for scale in (1e-4, 30.0):
        case = Case(SHAPES[0], [80], [1])
        case.q *= np.float32(scale)
        case.run(None, Spread(16, 32))
        case.check(None)


def test_nan_is_answered_with_nan() -> None:
    case = Case(SHAPES[3], [20, 20], [1, 1])
    case.caches[0][0, 0, 4, 0] = np.nan
    case.run(None, Spread(256, 32))
    group = case.shape.heads // case.shape.kv_heads
    assert np.isnan(case.out[0, :group]).all()
    assert not np.isnan(case.out[0, group:]).any()
    assert not np.isnan(case.out[1]).any()
