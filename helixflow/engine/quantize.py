"""Weight-only quantisation in the layout of ONNX Runtime's MatMulNBits (docs/ContribOperators.md, com.microsoft).

Symmetric blocks of 32 along the input dimension, each with one scale: `w ~ scale * (q - 2^(bits-1))`, where the scale
maps the block's largest magnitude to q = 0. This is what ONNX Runtime's own quantiser writes; that one needs the whole
model in memory and a further package, this one takes a tensor at a time.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import Float32

BLOCK = 32
ROWS_AT_ONCE = 2048


def quantize(weight: Float32, bits: int, scale_type: Any = np.float32) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Quantises `weight` float32 [out, in] to `bits` (4 or 8).

    Returns packed uint8 [out, blocks, 32 * bits / 8] (low nibble first) and scales [out, blocks] of `scale_type`, where
    blocks = ceil(in / 32); a last block that is not full is padded with zeros. Scales are rounded to their type before
    the codes are chosen; one that it cannot hold becomes infinite.
    """
    rows, width = weight.shape
    blocks = -(-width // BLOCK)
    packed = np.empty((rows, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), scale_type)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = weight[start : start + ROWS_AT_ONCE]
        if width % BLOCK:
            part = np.pad(part, ((0, 0), (0, blocks * BLOCK - width)))
        end = start + len(part)
        packed[start:end], scales[start:end] = _quantize_rows(
            part.reshape(len(part), blocks, BLOCK), bits, scales.dtype
        )
    return packed, scales


def _quantize_rows(values: Float32, bits: int, scale_type: Any) -> tuple[NDArray[np.uint8], Float32]:
    half = 1 << (bits - 1)
    high, low = values.max(axis=-1), values.min(axis=-1)
    exact = (np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-half)).astype(np.float32)
    with np.errstate(over="ignore"):
        scales = exact.astype(scale_type).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    scaled = values * inverse[..., None]
    codes = np.clip(np.rint(scaled + np.float32(half)), 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales


def dequantize(packed: NDArray[np.uint8], scales: Float32, bits: int, width: int) -> Float32:
    """The float32 [out, width] matrix that `quantize` stands for."""
    codes = np.stack((packed & 15, packed >> 4), axis=-1) if bits == 4 else packed
    codes = codes.reshape(*packed.shape[:2], BLOCK)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return values.reshape(len(packed), -1)[:, :width]
