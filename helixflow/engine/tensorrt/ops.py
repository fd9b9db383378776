"""Adds layers to a TensorRT network: the primitives that every builder of a network here is made of.

A handle is an `ITensor`. Shapes are tuples in which a free dimension is a letter ("T" tokens, "B" rows of the cache,
"R" rows of logits, ...), so that optimisation profiles can be stated once per letter (see `compile`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.numeric import NUMPY, DType, trt_types
from helixflow.engine.tensorrt.options import WEIGHT_PREFIX, Compute

Shape = tuple[int | str, ...]
FREE = -1


class Ops:
    """Layers of one network. Every method but the inputs raises EngineError when TensorRT refuses the layer.

    `definition`: the INetworkDefinition; `compute`: name of the type of activations and weights; `symbols`: shape of
    each input, free dimensions as letters; `weight_inputs`: inputs that are weights -> their tensor in the checkpoint.
    TensorRT does not copy constants: an `Ops` must live until the network is built.
    """

    def __init__(self, library: Library, definition: Any, compute: Compute) -> None:
        self.library = library
        self.trt = library.trt
        self.definition = definition
        self.compute: Compute = compute
        self.types = trt_types(self.trt)
        self.symbols: dict[str, Shape] = {}
        self.weight_inputs: dict[str, str] = {}
        self._inputs: dict[str, Any] = {}
        self._kept: list[NDArray[Any]] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of each input, -1 for free dimensions."""
        return {name: _numbers(shape) for name, shape in self.symbols.items()}

    def input(self, name: str, shape: Shape, dtype: DType = "int32") -> Any:
        """An input of the network; asked for again, the same one."""
        if name not in self._inputs:
            tensor = self.definition.add_input(name, self.types[dtype], _numbers(shape))
            self._inputs[name] = self.made(tensor, f"input {name} {list(shape)}")
            self.symbols[name] = shape
        return self._inputs[name]

    def weight(self, name: str, shape: tuple[int, ...], stored: str = "") -> Any:
        """A weight that is an input, `w.` + `name`; `stored`: its tensor in the checkpoint, when that differs."""
        self.weight_inputs[WEIGHT_PREFIX + name] = stored or name
        return self.input(WEIGHT_PREFIX + name, shape, self.compute)

    def output(self, x: Any, name: str) -> None:
        """Makes a tensor an output of the network."""
        x.name = name
        self.definition.mark_output(x)

    def constant(self, values: NDArray[Any] | Sequence[float] | float, dtype: DType, shape: Sequence[int] = ()) -> Any:
        """A constant of the network; equal ones are one. `shape`: () keeps that of `values`."""
        array = np.ascontiguousarray(np.asarray(values).astype(NUMPY[dtype]))
        array = array.reshape(tuple(shape) or np.shape(values))
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.packed(array, dtype, array.shape)
        return self._constants[key]

    def packed(self, memory: NDArray[Any], dtype: DType, shape: Sequence[int]) -> Any:
        """A constant of `shape` over memory that already is as TensorRT wants it (int4: two in a byte)."""
        self._kept.append(memory)
        count = int(np.prod(shape, dtype=np.int64))
        weights = self.trt.Weights(self.types[dtype], memory.ctypes.data, count)
        return self._only(self.definition.add_constant(tuple(shape), weights), f"constant {list(shape)}")

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """At most one size of `shape` is -1; 0 keeps the size at that place."""
        layer = self.made(self.definition.add_shuffle(x), "reshape")
        layer.reshape_dims = tuple(shape)
        return layer.get_output(0)

    def transpose(self, x: Any, order: Sequence[int]) -> Any:
        """Axis i of the result is axis `order[i]` of `x`."""
        layer = self.made(self.definition.add_shuffle(x), "transpose")
        layer.first_transpose = tuple(order)
        return layer.get_output(0)

    def cast(self, x: Any, dtype: DType) -> Any:
        """`x` in another type; itself when it has it."""
        if x.dtype == self.types[dtype]:
            return x
        return self._only(self.definition.add_cast(x, self.types[dtype]), f"cast to {dtype}")

    def binary(self, a: Any, b: Any, operation: Any) -> Any:
        """`operation`: a `trt.ElementWiseOperation`. Sizes of 1 are repeated."""
        return self._only(self.definition.add_elementwise(a, b, operation), f"{operation} of {a.shape} and {b.shape}")

    def add(self, a: Any, b: Any) -> Any:
        """`a + b`."""
        return self.binary(a, b, self.trt.ElementWiseOperation.SUM)

    def subtract(self, a: Any, b: Any) -> Any:
        """`a - b`."""
        return self.binary(a, b, self.trt.ElementWiseOperation.SUB)

    def multiply(self, a: Any, b: Any) -> Any:
        """`a * b`."""
        return self.binary(a, b, self.trt.ElementWiseOperation.PROD)

    def less(self, a: Any, b: Any) -> Any:
        """`a < b`, bool; false for NaN."""
        return self.binary(a, b, self.trt.ElementWiseOperation.LESS)

    def both(self, a: Any, b: Any) -> Any:
        """`a and b`, of bools."""
        return self.binary(a, b, self.trt.ElementWiseOperation.AND)

    def either(self, a: Any, b: Any) -> Any:
        """`a or b`, of bools."""
        return self.binary(a, b, self.trt.ElementWiseOperation.OR)

    def unary(self, x: Any, operation: Any) -> Any:
        """`operation`: a `trt.UnaryOperation`."""
        return self._only(self.definition.add_unary(x, operation), f"{operation}")

    def exp(self, x: Any) -> Any:
        """`e ** x`."""
        return self.unary(x, self.trt.UnaryOperation.EXP)

    def negate(self, x: Any) -> Any:
        """`not x`, of bools."""
        return self.unary(x, self.trt.UnaryOperation.NOT)

    def select(self, condition: Any, a: Any, b: Any) -> Any:
        """`a` where the condition holds, elsewhere `b`."""
        return self._only(self.definition.add_select(condition, a, b), "select")

    def where(self, condition: Any, x: Any) -> Any:
        """`x` where the condition holds, elsewhere 0; fp32. Not a product: what is left out may be infinite."""
        return self.select(condition, x, self.constant(0, "fp32", (1,) * len(condition.shape)))

    def maximum(self, a: Any, b: Any) -> Any:
        """The greater of both."""
        return self.binary(a, b, self.trt.ElementWiseOperation.MAX)

    def clamp(self, x: Any, size: int) -> Any:
        """int32 [R, N] forced into 0 .. size - 1."""
        low, high = (self.constant(value, "int32", (1, 1)) for value in (0, size - 1))
        return self.binary(self.maximum(x, low), high, self.trt.ElementWiseOperation.MIN)

    def sum(self, x: Any, axis: int) -> Any:
        """Sums along an axis, which stays with size 1."""
        return self.reduce(x, axis, self.trt.ReduceOperation.SUM)

    def reduce(self, x: Any, axis: int, operation: Any) -> Any:
        """`operation`: a `trt.ReduceOperation`; the axis stays with size 1."""
        return self._only(self.definition.add_reduce(x, operation, 1 << axis, True), f"{operation}")

    def top(self, x: Any, count: int, axis: int = 1) -> tuple[Any, Any]:
        """The `count` largest along an axis, largest first: values, and int32 indices. Ties in no promised order."""
        layer = self.definition.add_topk(x, self.trt.TopKOperation.MAX, count, 1 << axis)
        self.made(layer, f"the best {count} of {x.shape}")
        return layer.get_output(0), layer.get_output(1)

    def gather(self, x: Any, index: Any, axis: int = 0) -> Any:
        """Slices of `x` along an axis; the shape of `index` takes the place of the axis."""
        return self._only(self.definition.add_gather(x, index, axis), f"gather from {x.shape}")

    def pick(self, x: Any, index: Any) -> Any:
        """`x[r, index[r, i]]` for `x` [R, N], `index` int32 [R, I]."""
        layer = self.definition.add_gather_v2(x, index, self.trt.GatherMode.ELEMENT)
        self.made(layer, f"elements of {x.shape}")
        layer.axis = 1
        return layer.get_output(0)

    def concatenate(self, parts: Sequence[Any], axis: int = 0) -> Any:
        """Parts one after another."""
        layer = self.made(self.definition.add_concatenation(list(parts)), "concatenation")
        layer.axis = axis
        return layer.get_output(0)

    def size(self, x: Any) -> Any:
        """The shape of `x` as a tensor, int64 [rank]."""
        return self._only(self.definition.add_shape(x), "shape")

    def cut(self, x: Any, length: Any) -> Any:
        """The first `length` (int64 [1]) entries of `x` [N]."""
        layer = self.made(self.definition.add_slice(x, (0,), (1,), (1,)), "slice")
        layer.set_input(2, length)
        return layer.get_output(0)

    def columns(self, x: Any, first: int, count: int) -> Any:
        """Columns `first` .. `first + count - 1` of `x` [rows, columns]."""
        rows = self._only(self.definition.add_slice(self.size(x), (0,), (1,), (1,)), "number of rows")
        layer = self.made(self.definition.add_slice(x, (0, first), (1, count), (1, 1)), "slice")
        layer.set_input(2, self.concatenate([rows, self.constant([count], "int64")]))
        return layer.get_output(0)

    def matmul(self, x: Any, weight: Any, name: str = "") -> Any:
        """`x @ weight.T`; `name`: what errors of TensorRT call it."""
        operation = self.trt.MatrixOperation
        layer = self.definition.add_matrix_multiply(x, operation.NONE, weight, operation.TRANSPOSE)
        product = self._only(layer, f"product {name} of {x.shape} and {weight.shape}")
        if name:
            layer.name = name
        return product

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """`x / sqrt(mean(x^2) + eps) * weight` along the last axis; `weight` [size of it]. In fp32 up to the weight, as
        the models were trained (`transformers`, LlamaRMSNorm)."""
        rank = len(x.shape)
        wide = self.cast(x, "fp32")
        mean = self.reduce(self.multiply(wide, wide), rank - 1, self.trt.ReduceOperation.AVG)
        root = self.unary(self.add(mean, self.constant(eps, "fp32", (1,) * rank)), self.trt.UnaryOperation.SQRT)
        normed = self.multiply(wide, self.unary(root, self.trt.UnaryOperation.RECIP))
        return self.multiply(self.cast(normed, self.compute), self.reshape(weight, (1,) * (rank - 1) + (-1,)))

    def linear(self, x: Any, name: str, shape: tuple[int, int], bias: bool) -> Any:
        """`x @ name.weight.T`, plus `name.bias` when `bias`; weights are inputs, `shape` is [out, in]."""
        product = self.matmul(x, self.weight(name + ".weight", shape), name)
        return self.biased(product, name, shape[0]) if bias else product

    def biased(self, x: Any, name: str, size: int) -> Any:
        """`x + name.bias`; the bias [size] is an input."""
        return self.add(x, self.reshape(self.weight(name + ".bias", (size,)), (1, size)))

    def swiglu(self, gate: Any, up: Any) -> Any:
        """`silu(gate) * up`."""
        layer = self.definition.add_activation(gate, self.trt.ActivationType.SIGMOID)
        return self.multiply(self.multiply(gate, self._only(layer, "sigmoid")), up)

    def rotate(self, x: Any, cos: Any, sin: Any, positions: Any) -> Any:
        """Rotary embedding of `x` [T, heads, 1, D]: pairs (i, i + D / 2), tables [S, D / 2], positions int32 [T, 1]."""
        layer = self.definition.add_rotary_embedding(x, cos, sin, False, 0)
        self.made(layer, f"rotary embedding of {x.shape}")
        layer.set_input(3, positions)
        return layer.get_output(0)

    def scaled(self, x: Any, factor: float) -> Any:
        """`x * factor`, rounded once: in 16 bits the factor itself would be rounded, and with it every product."""
        wide = self.multiply(self.cast(x, "fp32"), self.constant(factor, "fp32", (1,) * len(x.shape)))
        return self.cast(wide, self.compute)

    def heads(self, x: Any, heads: int, width: int) -> Any:
        """Rows [T, heads * width] as [T, heads, 1, width]."""
        return self.reshape(x, (-1, heads, 1, width))

    def made(self, layer: Any, what: str) -> Any:
        """The layer. Raises EngineError when TensorRT made none."""
        if layer is None:
            raise self.library.failure(f"{what} cannot be added")
        return layer

    def _only(self, layer: Any, what: str) -> Any:
        """The output of a layer that has one."""
        return self.made(layer, what).get_output(0)


def _numbers(shape: Shape) -> tuple[int, ...]:
    return tuple(FREE if isinstance(size, str) else size for size in shape)
