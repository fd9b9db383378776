"""What each TensorRT layer computes, in numpy: one function per layer type makes a closure from a layer's attributes.

Floats are float32 arrays whose values the caller rounds to the layer's type; fp8 is float32, int4 is int8. Semantics:
the operator pages of the TensorRT documentation (`_static/operators/<Operator>.html`), and docstrings of the bindings.
A layer or an option that is not computed exactly as described there is refused, never approximated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.numeric import LARGEST_FP8, DType

Array = NDArray[Any]
Operation = Callable[..., Any]
FLOATS: frozenset[DType] = frozenset({"fp32", "fp16", "bf16"})
INTEGERS: frozenset[DType] = frozenset({"int32", "int64"})

ELEMENTWISE: Mapping[str, Operation] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "SUB": np.subtract,
    "DIV": np.divide,
    "POW": np.power,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "FLOOR_DIV": np.floor_divide,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
}
UNARY: Mapping[str, Operation] = {
    "EXP": np.exp,
    "LOG": np.log,
    "SQRT": np.sqrt,
    "RECIP": np.reciprocal,
    "ABS": np.absolute,
    "NEG": np.negative,
    "SIN": np.sin,
    "COS": np.cos,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ROUND": np.rint,
    "SIGN": np.sign,
    "NOT": np.logical_not,
    "ISINF": np.isinf,
    "ISNAN": np.isnan,
}
# These divide or round integers in numpy's way, not in TensorRT's.
FLOAT_ONLY = frozenset({"DIV", "POW", "EXP", "LOG", "SQRT", "RECIP", "SIN", "COS", "CEIL", "FLOOR", "ROUND"})
REDUCTIONS: Mapping[str, np.ufunc] = {"SUM": np.add, "PROD": np.multiply, "MAX": np.maximum, "MIN": np.minimum}


class InterpreterError(EngineError):
    """A network cannot be interpreted: a layer or option that is not computed, or values that no device would take."""


@dataclass(frozen=True, slots=True)
class Node:
    """A layer being prepared: `layer` is the TensorRT object in its own class, `inputs` and `outputs` its tensors.

    `takes` and `gives`: types of those inputs that are there, and of the outputs. `reverse_ties`: see `Interpreter`.
    """

    layer: Any
    kind: str
    name: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    takes: tuple[DType, ...]
    gives: tuple[DType, ...]
    reverse_ties: bool = False

    def refuse(self, reason: str) -> InterpreterError:
        """The error that names this layer."""
        return InterpreterError(f"layer {self.name!r} ({self.kind}): {reason}")

    def require(self, holds: bool, reason: str) -> None:
        """Refuses the layer unless something holds."""
        if not holds:
            raise self.refuse(reason)

    def needs_floats(self) -> None:
        """Refuses inputs of any other type."""
        self.require(FLOATS.issuperset(self.takes), f"inputs of type {', '.join(self.takes)} are not computed")

    def operation(self, known: Mapping[str, Any], chosen: str) -> Any:
        """What a table knows for the layer's operation."""
        self.require(chosen in known, f"operation {chosen} is not computed")
        return known[chosen]

    def axis(self, bits: int) -> int:
        """The one axis of a bit mask."""
        self.require(bits > 0 and bits & (bits - 1) == 0, f"axes {bits:#b} are not exactly one")
        return bits.bit_length() - 1


def _elementwise(node: Node) -> Operation:
    chosen = node.layer.op.name
    if chosen in FLOAT_ONLY:
        node.needs_floats()
    operation: Operation = node.operation(ELEMENTWISE, chosen)
    return operation


def _unary(node: Node) -> Operation:
    chosen = node.layer.op.name
    if chosen in FLOAT_ONLY:
        node.needs_floats()
    operation: Operation = node.operation(UNARY, chosen)
    return operation


def _activation(node: Node) -> Operation:
    node.needs_floats()
    one = np.float32(1)
    known: Mapping[str, Operation] = {
        "SIGMOID": lambda x: one / (one + np.exp(-x)),
        "TANH": np.tanh,
        "RELU": lambda x: np.maximum(x, np.float32(0)),
    }
    operation: Operation = node.operation(known, node.layer.type.name)
    return operation


def _reduce(node: Node) -> Operation:
    bits, keep = node.layer.axes, node.layer.keep_dims
    axes = tuple(axis for axis in range(bits.bit_length()) if bits >> axis & 1)
    node.require(bool(axes), "no axis to reduce")
    if node.layer.op.name == "AVG":
        node.needs_floats()
        add = np.add.reduce

        def average(x: Array) -> Any:
            total = add(x, axis=axes, keepdims=keep)
            return total / np.float32(x.size // max(total.size, 1))

        return average
    reduce = node.operation(REDUCTIONS, node.layer.op.name).reduce
    return lambda x: reduce(x, axis=axes, keepdims=keep)


def _softmax(node: Node) -> Operation:
    node.needs_floats()
    axis = node.axis(node.layer.axes)

    def softmax(x: Array) -> Any:
        weights = np.exp(x - x.max(axis, keepdims=True))
        return weights / weights.sum(axis, keepdims=True)

    return softmax


def _matrix_multiply(node: Node) -> Operation:
    node.needs_floats()
    operations = (node.layer.op0.name, node.layer.op1.name)
    node.require(set(operations) <= {"NONE", "TRANSPOSE"}, f"operations {operations} are not computed")
    first, second = (operation == "TRANSPOSE" for operation in operations)
    return lambda a, b: np.matmul(a.swapaxes(-1, -2) if first else a, b.swapaxes(-1, -2) if second else b)


def _checked(index: Array) -> Array:
    """Refuses negative indices, which numpy would count from the end; too large ones raise IndexError by themselves."""
    if index.size and index.min() < 0:
        raise IndexError(f"index {index.min()} is negative")
    return index


def _gather(node: Node) -> Operation:
    axis, mode = node.layer.axis, node.layer.mode.name
    node.require(node.layer.num_elementwise_dims == 0, "elementwise dimensions are not computed")
    if mode == "DEFAULT":
        return lambda x, index: np.take(x, _checked(index), axis=axis)
    node.require(mode == "ELEMENT", f"mode {mode} is not computed")
    return lambda x, index: np.take_along_axis(x, _checked(index).astype(np.int64), axis=axis)


def _shuffle(node: Node) -> Operation:
    layer = node.layer
    rank = len(node.inputs[0].shape)
    first, second = tuple(layer.first_transpose)[:rank], tuple(layer.second_transpose)
    dynamic = len(node.inputs) > 1 and node.inputs[1] is not None
    static = None if dynamic or layer.reshape_dims is None else tuple(layer.reshape_dims)
    copies = layer.zero_is_placeholder
    moved = first != tuple(range(rank))

    def shuffle(x: Array, wanted: Array | None = None) -> Any:
        y = x.transpose(first) if moved else x
        shape = static if wanted is None else tuple(wanted.tolist())
        if shape is not None:
            y = y.reshape([y.shape[i] if size == 0 and copies else size for i, size in enumerate(shape)])
        turn = second[: y.ndim]
        return y.transpose(turn) if turn != tuple(range(y.ndim)) else y

    return shuffle


def _slice(node: Node) -> Operation:
    layer = node.layer
    node.require(layer.mode.name == "STRICT_BOUNDS", f"mode {layer.mode.name} is not computed")
    given = (*node.inputs, None, None, None, None, None, None)
    node.require(layer.axes is None and given[5] is None, "chosen axes are not computed")
    node.require(given[4] is None, "a fill value is not computed")
    # A tensor takes the place of the attribute, which then reads as None.
    static = [
        None if tensor is not None or dims is None else tuple(dims)
        for tensor, dims in zip(given[1:4], (layer.start, layer.shape, layer.stride), strict=True)
    ]

    def cut(x: Array, *tensors: Array) -> Any:
        found = iter(tensors)
        bounds = [next(found).tolist() if dims is None else dims for dims in static]
        parts = []
        for size, start, count, stride in zip(x.shape, *bounds, strict=True):
            last = start + (count - 1) * stride
            if count and not (0 <= start < size and 0 <= last < size and stride > 0):
                raise IndexError(f"slice {start} + {count} * {stride} of {size} is out of bounds")
            parts.append(slice(start, start + count * stride, stride))
        return x[tuple(parts)]

    return cut


def _concatenation(node: Node) -> Operation:
    axis = node.layer.axis
    return lambda *parts: np.concatenate(parts, axis=axis)


def _topk(node: Node) -> Operation:
    """Values and indices, the largest first. NaN ranks last, about which TensorRT says nothing either."""
    layer = node.layer
    node.require(layer.op.name == "MAX", f"operation {layer.op.name} is not computed")
    node.require(len(node.inputs) == 1, "a k that is a tensor is not computed")
    axis, count, reverse = node.axis(layer.axes), layer.k, node.reverse_ties

    def top(x: Array) -> tuple[Array, Array]:
        if count > x.shape[axis]:
            raise IndexError(f"the best {count} of {x.shape[axis]} do not exist")
        if reverse:
            order = x.shape[axis] - 1 - np.argsort(-np.flip(x, axis), axis=axis, kind="stable")
        else:
            order = np.argsort(-x, axis=axis, kind="stable")
        order = order.take(range(count), axis=axis)
        return np.take_along_axis(x, order, axis), order

    return top


def _cumulative(node: Node) -> Operation:
    layer = node.layer
    node.require(layer.op.name == "SUM", f"operation {layer.op.name} is not computed")
    exclusive, backward = layer.exclusive, layer.reverse

    def accumulate(x: Array, axis: Array) -> Array:
        along = int(axis)
        source = np.flip(x, along) if backward else x
        sums = np.cumsum(source, axis=along, dtype=x.dtype)
        if exclusive:
            shifted = np.zeros_like(sums)
            np.moveaxis(shifted, along, 0)[1:] = np.moveaxis(sums, along, 0)[:-1]
            sums = shifted
        return np.flip(sums, along) if backward else sums

    return accumulate


def _rotary_embedding(node: Node) -> Operation:
    """x [T, heads, S, D], tables [positions, D / 2], position ids [T, S]; pairs are (i, i + D / 2)."""
    node.require(not node.layer.interleaved, "interleaved pairs are not computed")
    node.require(node.layer.rotary_embedding_dim == 0, "rotating a part of a head is not computed")
    node.require(len(node.inputs) == 4 and node.inputs[3] is not None, "tables without position ids are not computed")

    def rotate(x: Array, cos: Array, sin: Array, positions: Array) -> Array:
        half = x.shape[-1] // 2
        at = _checked(positions)
        cosines, sines = cos[at][:, None], sin[at][:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)

    return rotate


def _kv_cache_update(node: Node) -> Operation:
    """Cache [B, heads, positions, D]; update padded [B, heads, S, D], or packed [T, heads, D] with running counts."""
    layer = node.layer
    node.require(layer.cache_mode.name == "LINEAR", f"cache mode {layer.cache_mode.name} is not computed")
    form = layer.update_form.name
    node.require(form in ("PACKED_NHD", "PADDED_BHND"), f"update form {form} is not computed")
    packed = form == "PACKED_NHD"
    node.require(not packed or (len(node.inputs) == 4 and node.inputs[3] is not None), "packed without update lengths")

    def update(cache: Array, new: Array, first: Array, lengths: Array | None = None) -> Array:
        rows = np.arange(len(cache))
        if packed and lengths is not None:
            counts = np.diff(lengths)
            if len(counts) != len(rows) or lengths[0] != 0 or lengths[-1] != len(new) or counts.min(initial=0) < 0:
                raise ValueError(f"update lengths {lengths.tolist()} do not divide {len(new)} tokens among {len(rows)}")
            row = np.repeat(rows, counts)
            at = first[row] + np.arange(len(new)) - lengths[row]
            values = new
        else:
            row = np.repeat(rows, new.shape[2])
            at = (first[:, None] + np.arange(new.shape[2])).reshape(-1)
            values = new.swapaxes(1, 2).reshape(-1, new.shape[1], new.shape[3])
        if at.size and not 0 <= at.min() <= at.max() < cache.shape[2]:
            raise IndexError(f"positions {at.min()} .. {at.max()} are written, the cache has {cache.shape[2]}")
        result = cache.copy()
        result[row, :, at] = values
        return result

    return update


def _attention(node: Node) -> Operation:
    """q [B, heads, S, D], k and v [B, kv_heads, P, D]; optional mask and lengths follow. No scale is applied.

    The probabilities stay in float32 between the two products, as in a fused kernel.
    """
    attention = node.layer.attention
    node.require(attention.norm_op.name == "SOFTMAX", f"normalisation {attention.norm_op.name} is not computed")
    node.require(attention.normalization_quantize_scale is None, "quantised probabilities are not computed")
    forms = {attention.query_form.name, attention.key_value_form.name}
    node.require(forms == {"PADDED_BHND"}, f"forms {', '.join(sorted(forms))} are not computed")
    node.require(attention.num_ranks == 1, "several devices are not computed")
    kind = attention.causal_kind.name
    node.require(kind in ("NONE", "LOWER_RIGHT"), f"causal mask {kind} is not computed")
    causal, masked = kind != "NONE", attention.mask is not None
    lengthy = attention.key_value_lengths is not None

    def attend(q: Array, k: Array, v: Array, *extra: Array) -> Array:
        batch, heads, queries, width = q.shape
        groups, keys = k.shape[1], k.shape[2]
        rows = heads // groups * queries
        scores = np.matmul(q.reshape(batch, groups, rows, width), k.swapaxes(-1, -2))
        scores = scores.reshape(batch, heads, queries, keys)
        if masked:
            # Added, although TensorRT may select instead: a masked NaN must not be there to begin with.
            mask = extra[0]
            scores += np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == np.bool_ else mask
        if lengthy or causal:
            lengths = extra[-1].astype(np.int64) if lengthy else np.full(batch, keys)
            if lengths.size and not 0 < lengths.min() <= lengths.max() <= keys:
                raise IndexError(f"key-value lengths {lengths.tolist()} are not among {keys} positions")
            last = lengths[:, None, None] - (queries - np.arange(queries)[:, None] if causal else 1)
            scores += np.where(np.arange(keys) <= last, np.float32(0), np.float32(-np.inf))[:, None]
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        out: Array = np.matmul(scores.reshape(batch, groups, rows, keys), v)
        return out.reshape(q.shape)

    return attend


def _spread(node: Node, scale: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Scales of a quantised tensor, one per element or broadcastable: per tensor, per channel, or per block."""
    if scale.size == 1:
        return scale.reshape(())
    if scale.ndim == 1:
        node.require(scale.shape[0] == shape[axis], f"{scale.shape[0]} scales on an axis of {shape[axis]}")
        return scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    node.require(scale.ndim == len(shape), f"scales {scale.shape} for a tensor {shape}")
    for i, (size, blocks) in enumerate(zip(shape, scale.shape, strict=True)):
        node.require(blocks > 0 and size % blocks == 0, f"scales {scale.shape} for a tensor {shape}")
        scale = np.repeat(scale, size // blocks, axis=i)
    return scale


def _quantisation(node: Node) -> int:
    """The axis of a quantise or dequantise layer; refuses zero points."""
    node.require(len(node.inputs) == 2 or node.inputs[2] is None, "zero points are not computed")
    return int(node.layer.axis)


def _dequantize(node: Node) -> Operation:
    axis = _quantisation(node)
    return lambda x, scale: x.astype(np.float32) * _spread(node, scale, x.shape, axis)


def _quantize(node: Node) -> Operation:
    """Nearest, ties to even, saturating; the caller rounds fp8."""
    axis = _quantisation(node)
    target = node.gives[0]
    limits = {"int8": (-128.0, 127.0), "fp8": (-LARGEST_FP8, LARGEST_FP8), "int4": (-8.0, 7.0)}
    low, high = node.operation(limits, target)
    whole = target != "fp8"

    def quantize(x: Array, scale: Array) -> Any:
        y = np.clip(x / _spread(node, scale, x.shape, axis), np.float32(low), np.float32(high))
        return np.rint(y).astype(np.int8) if whole else y

    return quantize


# Layer type -> the bindings' class, and what makes the closure. CONSTANT and those without a closure: `interpreter`.
LAYERS: Mapping[str, tuple[str, Callable[[Node], Operation]]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", lambda _: lambda x: x),
    "CAST": ("ICastLayer", lambda _: lambda x: x),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "CUMULATIVE": ("ICumulativeLayer", _cumulative),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "GATHER": ("IGatherLayer", _gather),
    "IDENTITY": ("IIdentityLayer", lambda _: lambda x: x),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache_update),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "QUANTIZE": ("IQuantizeLayer", _quantize),
    "REDUCE": ("IReduceLayer", _reduce),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotary_embedding),
    "SELECT": ("ISelectLayer", lambda _: np.where),
    "SHAPE": ("IShapeLayer", lambda _: lambda x: np.array(x.shape, np.int64)),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "TOPK": ("ITopKLayer", _topk),
    "UNARY": ("IUnaryLayer", _unary),
}
# Layers that only move values: what was rounded stays rounded.
MOVES = frozenset(
    {
        "ATTENTION_OUTPUT",
        "CONCATENATION",
        "GATHER",
        "IDENTITY",
        "KV_CACHE_UPDATE",
        "SELECT",
        "SHAPE",
        "SHUFFLE",
        "SLICE",
        "TOPK",
    }
)
