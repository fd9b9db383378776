"""Weight-only int8 and int4: the layout, the rounding, and what is lost."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from onnxruntime.capi import _pybind_state as runtime

from helixflow.engine.base import Float32
from helixflow.engine.quantize import BLOCK, dequantize, quantize
from tests.engine.support import Reference, Tensors, open_engine, random_tensors, step, tiny_config, write_checkpoint


def matrix(rows: int, width: int) -> Float32:
    return np.random.default_rng(5).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(7, 64), (3, 33), (2100, 32), (5, 1)], ids=str)
def test_same_bytes_as_the_runtimes_own_quantiser(bits: int, shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    weight[0] = 0
    packed, scales = quantize(weight, bits)
    theirs, their_scales = np.zeros_like(packed), np.zeros_like(scales)
    zero_points = np.zeros((shape[0], (packed.shape[1] * bits + 7) // 8), np.uint8)
    padded = np.pad(weight, ((0, 0), (0, packed.shape[1] * BLOCK - shape[1])))
    write = runtime.quantize_matmul_4bits if bits == 4 else runtime.quantize_matmul_8bits
    write(theirs, np.ascontiguousarray(padded.T), their_scales, zero_points, BLOCK, shape[0], padded.shape[1], True)
    assert np.array_equal(scales, their_scales)
    ours, others = (dequantize(codes, scales, bits, shape[1]) for codes in (packed, theirs))
    # A value halfway between two codes may go either way.
    differing = np.abs(ours - others) > 1e-6
    assert differing.mean() <= 1e-3


@pytest.mark.parametrize(("bits", "steps"), [(4, 8), (8, 128)])
def test_error_is_at_most_one_step(bits: int, steps: int) -> None:
    weight = matrix(50, 96)
    blocks = np.abs(weight).reshape(50, 3, 32).max(-1, keepdims=True)
    error = np.abs(dequantize(*quantize(weight, bits), bits, 96) - weight).reshape(50, 3, 32)
    # Half a step, and a whole one at the end of the range that has one code less.
    assert (error <= blocks / steps * 1.0001).all()
    assert np.median(error / (blocks / steps)) <= 0.5


def rounded(tensors: Tensors, bits: int, head_bits: int) -> Tensors:
    """The weights that the quantised engine stands for."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "embed" not in name:
            width = head_bits if name.startswith("lm_head") else bits
            result[name] = dequantize(*quantize(tensor, width), width, tensor.shape[1])
    return result


@pytest.mark.parametrize(
    ("precision", "bits", "against_rounded", "against_exact"), [("int8", 8, 0.03, 0.03), ("int4", 4, 0.03, 0.3)]
)
def test_logits(
    tmp_path: Path, precision: Literal["int8", "int4"], bits: int, against_rounded: float, against_exact: float
) -> None:
    """Against the rounded weights only the 8-bit activations are left; against the exact ones, the precision's price.

    Random weights are the worst case: nothing in them is redundant.
    """
    config = tiny_config(hidden_size=80, intermediate_size=144, attention_bias=True)
    tensors = random_tensors(config)
    engine = open_engine(write_checkpoint(tmp_path / "model", config, tensors), tmp_path / "engines", precision)
    ids = [int(i) for i in np.random.default_rng(2).integers(0, 101, 60)]
    got = np.concatenate(
        [step(engine, (1, 0, ids[:40], 40)), *(step(engine, (1, i, [ids[i]], 1)) for i in range(40, 60))]
    )
    engine.close()

    def error(expected: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
        return float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))

    exact = Reference(config, tensors).logits(ids)
    assert error(Reference(config, rounded(tensors, bits, 8)).logits(ids)) <= against_rounded
    assert error(exact) <= against_exact
    if precision == "int8":
        assert (got.argmax(-1) == exact.argmax(-1)).mean() >= 0.9
