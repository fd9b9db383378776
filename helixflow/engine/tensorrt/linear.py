"""Linear layers: weights as inputs (fp32, fp16, bf16), or constants of fewer bits (int8, int4, fp8).

An input lies in memory that several engines may share, and is no part of the plan. A quantised weight has to be a
constant: given as an input, it would be widened as a whole in every step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.tensorrt.numeric import LARGEST_FP8, NUMPY, DType, pack_int4
from helixflow.engine.tensorrt.ops import Ops
from helixflow.engine.tensorrt.options import INT4_BLOCK, GpuPrecision

Read = Callable[[str], Float32]
ROWS_AT_ONCE = 1024


class Linears:
    """The linear layers of one network. `unquantised`: those that stay inputs although others are quantised.

    `read(name)`: a tensor of the checkpoint, for constants; asked for one at a time. `scales`: of the inputs of each
    layer, for fp8 (see `calibrate`).
    """

    def __init__(
        self, ops: Ops, precision: GpuPrecision, read: Read | None, scales: Mapping[str, float] | None
    ) -> None:
        self.ops, self.precision, self.read = ops, precision, read
        self.scales = scales or {}
        self.unquantised: list[str] = []

    def apply(self, x: Any, name: str, shape: tuple[int, int], bias: bool) -> Any:
        """`x @ name.weight.T`, plus `name.bias` when `bias`; `shape` is [out, in]. Raises EngineError."""
        if self.precision in ("fp32", "fp16", "bf16"):
            return self.ops.linear(x, name, shape, bias)
        if self.precision == "int4" and shape[1] % INT4_BLOCK:
            self.unquantised.append(name)
            return self.ops.linear(x, name, shape, bias)
        product = self._product(x, name, shape)
        return self.ops.biased(product, name, shape[0]) if bias else product

    def _product(self, x: Any, name: str, shape: tuple[int, int]) -> Any:
        ops = self.ops
        if self.read is None:
            raise EngineError(f"{name}: {self.precision} weights are constants, but there is nothing to read them from")
        weight = self.read(name + ".weight")
        if weight.shape != shape:
            raise EngineError(f"{name}.weight is {list(weight.shape)}, expected {list(shape)}")
        if self.precision == "int8":
            codes, steps = quantise_int8(weight, ops.compute)
            wide = self._widened(ops.packed(codes, "int8", shape), steps, axis=0)
        elif self.precision == "int4":
            halves, steps = quantise_int4(weight, ops.compute)
            wide = self._widened(ops.packed(halves, "int4", shape), steps)
        else:
            bits, steps = quantise_fp8(weight, ops.compute)
            wide = self._widened(ops.packed(bits, "fp8", shape), steps)
            x = self._narrowed(x, name)
        return ops.matmul(x, wide, name)

    def _widened(self, codes: Any, steps: NDArray[Any], axis: int | None = None) -> Any:
        """Codes times steps; `axis`: the one that has a step per entry."""
        ops = self.ops
        scale = ops.packed(steps, ops.compute, steps.shape)
        layer = ops.definition.add_dequantize(codes, scale, ops.types[ops.compute])
        ops.made(layer, f"dequantisation of {codes.shape}")
        if axis is not None:
            layer.axis = axis
        return layer.get_output(0)

    def _narrowed(self, x: Any, name: str) -> Any:
        """The input as fp8 and back: TensorRT recognises the pair, and multiplies in fp8."""
        ops = self.ops
        if name not in self.scales:
            raise EngineError(f"{name}: fp8 needs the scale of its input: calibrate the checkpoint first")
        scale = ops.constant(_steps(np.array(self.scales[name]), ops.compute), ops.compute)
        layer = ops.definition.add_quantize(x, scale, ops.types["fp8"])
        ops.made(layer, f"quantisation of {x.shape}")
        layer = ops.definition.add_dequantize(layer.get_output(0), scale, ops.types[ops.compute])
        return ops.made(layer, f"dequantisation of {x.shape}").get_output(0)


def quantise_int8(weight: Float32, compute: DType) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Symmetric per output: codes int8 [out, in], -127 .. 127, and steps [out] in the type `compute`."""
    codes = np.empty(weight.shape, np.int8)
    steps = _steps(_largest(weight) / 127, compute)
    for part in _parts(weight):
        scaled = weight[part] / steps[part, None].astype(np.float32)
        codes[part] = np.clip(np.rint(scaled), -127, 127)
    return codes, steps


def quantise_int4(weight: Float32, compute: DType) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Symmetric per block of 128 inputs: codes -8 .. 7, two in a byte [out, in / 2], and steps [out, in / 128].

    Of the steps that put a block's largest magnitude at 7 and at 8, the one with the smaller squared error: the second
    cuts off a positive outlier, and is finer for everything else.
    """
    rows, width = weight.shape
    packed = np.empty((rows, width // 2), np.uint8)
    steps = np.empty((rows, width // INT4_BLOCK), NUMPY[compute])
    for part in _parts(weight):
        blocks = weight[part].reshape(-1, width // INT4_BLOCK, INT4_BLOCK)
        largest = _largest(blocks)
        found = [_int4_blocks(blocks, _steps(largest / top, compute)) for top in (7, 8)]
        better = (found[1][2] < found[0][2])[..., None]
        packed[part] = pack_int4(np.where(better, found[1][0], found[0][0])).reshape(-1, width // 2)
        steps[part] = np.where(better[..., 0], found[1][1], found[0][1])
    return packed, steps


def _int4_blocks(blocks: Float32, steps: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[Any], Float32]:
    """Codes, the steps, and the squared error of each block."""
    wide = steps[..., None].astype(np.float32)
    codes = np.clip(np.rint(blocks / wide), -8, 7)
    return codes.astype(np.int8), steps, np.square(codes * wide - blocks).sum(-1)


def quantise_fp8(weight: Float32, compute: DType) -> tuple[NDArray[Any], NDArray[Any]]:
    """e4m3 with one step: codes [out, in], and the step, a scalar in the type `compute`."""
    codes = np.empty(weight.shape, NUMPY["fp8"])
    step = _steps(_largest(_largest(weight)) / LARGEST_FP8, compute)
    for part in _parts(weight):
        # Beyond the largest number, the type has nothing but NaN.
        codes[part] = np.clip(weight[part] / step.astype(np.float32), -LARGEST_FP8, LARGEST_FP8)
    return codes, step


def _parts(weight: Float32) -> list[slice]:
    """Rows that are worked on at once, so that temporary copies stay small."""
    return [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(weight), ROWS_AT_ONCE)]


def _largest(values: Float32) -> Float32:
    """Largest magnitude along the last axis."""
    largest: Float32 = np.maximum(values.max(-1, initial=0), -values.min(-1, initial=0))
    return largest


def _steps(wanted: NDArray[Any], compute: DType) -> NDArray[Any]:
    """Steps in the type they are stored in, before anything is divided by them: never 0, and 1 where all is 0."""
    dtype = NUMPY[compute]
    smallest = 2.0**-24 if compute == "fp16" else 2.0**-126
    positive = np.where(wanted > 0, np.maximum(wanted, smallest), 1.0)
    return np.asarray(positive.astype(dtype))
