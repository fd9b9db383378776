"""Runs a TensorRT network definition in numpy: proves the wiring of a network where there is no GPU.

Works on an `INetworkDefinition` of either library. Every layer's result is rounded to the layer's type, so that fp16
and bf16 networks show their rounding; sums run in float32, as tensor cores accumulate.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from helixflow.engine.tensorrt.interpreter_layers import (
    INTEGERS,
    LAYERS,
    MOVES,
    Array,
    InterpreterError,
    Node,
    Operation,
)
from helixflow.engine.tensorrt.numeric import NUMPY, DType, trt_types, unpack_int4

__all__ = ["Interpreter", "InterpreterError", "round_bf16"]

# How values are held while a network runs: floats as float32, whatever they were rounded to.
HELD: Mapping[DType, np.dtype[Any]] = {
    **NUMPY,
    **dict.fromkeys(("fp16", "bf16", "fp8"), np.dtype(np.float32)),
    "int4": np.dtype(np.int8),
}
# What may lie in memory: fp8 and int4 never leave a network.
FED: frozenset[DType] = frozenset({"fp32", "fp16", "bf16", "int32", "int64", "bool"})


def round_bf16(x: Array) -> Array:
    """float32 rounded to the nearest bfloat16, ties to even; NaN stays NaN. Same shape, float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF)
    rounded += bits >> np.uint32(16) & np.uint32(1)
    rounded &= np.uint32(0xFFFF0000)
    result: Array = rounded.view(np.float32).reshape(x.shape)
    # A NaN whose mantissa is all ones would carry over into the sign.
    return np.where(np.isnan(x), np.float32(np.nan), result) if np.isnan(x).any() else result


def _round_fp16(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def _round_fp8(x: Array) -> Array:
    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


ROUNDINGS: Mapping[DType, Callable[[Array], Array]] = {"fp16": _round_fp16, "bf16": round_bf16, "fp8": _round_fp8}


class _Weights(ctypes.Structure):
    """`nvinfer1::Weights`."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


@dataclass(frozen=True, slots=True)
class _Step:
    """A layer, ready to run: value numbers of its arguments and results, and of the values nobody reads afterwards."""

    node: Node
    operation: Operation
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    finish: tuple[Callable[[Any], Array] | None, ...]
    dead: tuple[int, ...]


class Interpreter:
    """A network, prepared once: layers in order, constants read (and whatever follows from them alone computed)."""

    def __init__(self, trt: Any, definition: Any, *, reverse_ties: bool = False) -> None:
        """`trt`: the library's module. The definition is not needed afterwards. Raises InterpreterError.

        `reverse_ties`: TopK gives the later of equal elements first. TensorRT promises neither order.
        """
        types = {kind: name for name, kind in trt_types(trt).items()}
        fed = [definition.get_input(i) for i in range(definition.num_inputs)]
        marked = [definition.get_output(i) for i in range(definition.num_outputs)]
        self.inputs = {t.name: (_type(types, t), tuple(t.shape)) for t in fed}
        """Type and shape (-1: free) of each input."""
        self.outputs = {t.name: (_type(types, t), tuple(t.shape)) for t in marked}
        """Type and shape (-1: free) of each output."""
        self.aliases: dict[str, str] = {}
        """Outputs that are written over an input, the update of a cache: they must lie at its address."""
        self._numbers = {name: i for i, name in enumerate(self.inputs)}
        # Constants by number; every run begins with a copy of this list.
        self._values: list[Any] = [None] * len(self.inputs)
        self._accept = [_accept(name, *self.inputs[name]) for name in self.inputs]
        layers = [definition.get_layer(i) for i in range(definition.num_layers)]
        nodes = [_node(trt, types, layer, reverse_ties) for layer in layers]
        self._steps = self._prepare(_in_order(nodes, set(self.inputs)))
        self._store = [(name, self._numbers[name], NUMPY[kind]) for name, (kind, _) in self.outputs.items()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the network. `feeds`: every input, in its own type (or float32, or any integers, which are converted).

        Returns every output in its own type (numpy's float16, ml_dtypes' bfloat16); a cache's output is a new array.
        Raises InterpreterError: names or shapes that do not fit, or values that reach out of bounds, with the layer.
        """
        if feeds.keys() != self.inputs.keys():
            missing, unknown = self.inputs.keys() - feeds.keys(), feeds.keys() - self.inputs.keys()
            raise InterpreterError(f"inputs do not fit: missing {sorted(missing)}, unknown {sorted(unknown)}")
        values = list(self._values)
        with np.errstate(all="ignore"):
            for i, name in enumerate(self.inputs):
                values[i] = self._accept[i](np.asarray(feeds[name]))
            for step in self._steps:
                _execute(step, values)
        return {name: values[number].astype(stored, copy=False) for name, number, stored in self._store}

    def _prepare(self, nodes: list[Node]) -> tuple[_Step, ...]:
        """Makes the steps, and runs those at once that depend on constants only."""
        steps: list[_Step] = []
        for node in nodes:
            results = tuple(self._number(tensor) for tensor in node.outputs)
            if node.kind == "KV_CACHE_UPDATE":
                node.require(node.inputs[0].name in self.inputs, "its cache is no input of the network")
                node.require(node.outputs[0].name in self.outputs, "its result is no output of the network")
                self.aliases[node.outputs[0].name] = node.inputs[0].name
            if node.kind == "CONSTANT":
                self._values[results[0]] = _constant(node)
                continue
            step = _Step(
                node,
                LAYERS[node.kind][1](node),
                tuple(self._numbers[tensor.name] for tensor in _arguments(node)),
                results,
                tuple(_finisher(node, kind) for kind in node.gives),
                (),
            )
            if step.arguments and all(self._values[i] is not None for i in step.arguments):
                with np.errstate(all="ignore"):
                    _execute(step, self._values)
            else:
                steps.append(step)
        return self._without_dead_values(steps)

    def _without_dead_values(self, steps: list[_Step]) -> tuple[_Step, ...]:
        """Notes after which step a value may go; constants that no step reads go now."""
        seen = {self._numbers[name] for name in self.outputs}
        result: list[_Step] = []
        for step in reversed(steps):
            touched = {*step.arguments, *step.results}
            dead = tuple(i for i in sorted(touched - seen) if self._values[i] is None)
            seen |= touched
            result.append(_Step(step.node, step.operation, step.arguments, step.results, step.finish, dead))
        for i in range(len(self._values)):
            if i not in seen:
                self._values[i] = None
        return tuple(reversed(result))

    def _number(self, tensor: Any) -> int:
        if tensor.name in self._numbers:
            raise InterpreterError(f"two tensors of the network are called {tensor.name!r}")
        self._numbers[tensor.name] = len(self._values)
        self._values.append(None)
        return self._numbers[tensor.name]


def _execute(step: _Step, values: list[Any]) -> None:
    try:
        out = step.operation(*[values[i] for i in step.arguments])
        if len(step.results) == 1:
            finish = step.finish[0]
            values[step.results[0]] = out if finish is None else finish(out)
        else:
            for number, value, finish in zip(step.results, out, step.finish, strict=True):
                values[number] = value if finish is None else finish(value)
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:
        shapes = [values[i].shape for i in step.arguments]
        raise step.node.refuse(f"{error} (arguments {shapes})") from error
    for i in step.dead:
        values[i] = None


def _type(types: Mapping[Any, DType], tensor: Any) -> DType:
    if tensor.dtype not in types:
        raise InterpreterError(f"tensor {tensor.name!r} is of type {tensor.dtype.name}, which is not computed")
    return types[tensor.dtype]


def _node(trt: Any, types: Mapping[Any, DType], layer: Any, reverse_ties: bool) -> Node:
    """A layer in its own class: the bindings give out the base class. Some classes call something else `type`."""
    kind = trt.ILayer.type.fget(layer).name
    inputs = tuple(layer.get_input(i) for i in range(layer.num_inputs))
    outputs = tuple(layer.get_output(i) for i in range(layer.num_outputs))
    takes = tuple(_type(types, tensor) for tensor in inputs if tensor is not None)
    gives = tuple(_type(types, tensor) for tensor in outputs)
    node = Node(layer, kind, layer.name, inputs, outputs, takes, gives, reverse_ties)
    if kind == "CONSTANT":
        layer.__class__ = trt.IConstantLayer
    else:
        node.require(kind in LAYERS, "this type of layer is not computed")
        layer.__class__ = getattr(trt, LAYERS[kind][0])
    return node


def _arguments(node: Node) -> list[Any]:
    """The tensors a layer reads. Those of an attention that are its properties come last: mask, then lengths."""
    if node.kind != "ATTENTION_INPUT":
        if node.kind == "SLICE":
            return [tensor for tensor in node.inputs if tensor is not None]
        node.require(None not in node.inputs, "an input is missing")
        return list(node.inputs)
    attention = node.layer.attention
    extra = [t for t in (attention.mask, attention.key_value_lengths) if t is not None]
    known = {tensor.name for tensor in extra}
    for tensor in node.inputs[3:]:
        node.require(tensor is None or tensor.name in known, "an input beyond mask and lengths is not computed")
    return [*node.inputs[:3], *extra]


def _in_order(nodes: list[Node], ready: set[str]) -> list[Node]:
    """Nodes sorted so that each comes behind those it reads."""
    makers = {tensor.name: node for node in nodes for tensor in node.outputs}
    order: list[Node] = []
    done: set[int] = set()
    for root in nodes:
        pending = [root]
        path: set[int] = set()
        while pending:
            node = pending[-1]
            if id(node) in done:
                pending.pop()
                continue
            needed = [tensor.name for tensor in _arguments(node) if tensor.name not in ready]
            if not needed:
                pending.pop()
                done.add(id(node))
                order.append(node)
                ready.update(tensor.name for tensor in node.outputs)
                continue
            for name in needed:
                node.require(name in makers, f"nothing makes its input {name!r}")
            node.require(id(node) not in path, "it depends on its own output")
            path.add(id(node))
            pending += [makers[name] for name in needed]
    return order


def _finisher(node: Node, kind: DType) -> Callable[[Any], Array] | None:
    """Brings a result into the type that its tensor has; None when it is so already."""
    held, rounding = HELD[kind], ROUNDINGS.get(kind)
    if node.kind in MOVES and rounding is not None:
        return None

    def finish(value: Any) -> Array:
        array: Array = value if type(value) is np.ndarray and value.dtype == held else np.asarray(value, held)
        return array if rounding is None else rounding(array)

    return finish


def _accept(name: str, kind: DType, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """Takes a feed: checks the shape, converts and rounds."""
    if kind not in FED:
        raise InterpreterError(f"input {name!r}: type {kind} is not taken")
    stored, held, rounding = NUMPY[kind], HELD[kind], ROUNDINGS.get(kind)
    whole = kind in INTEGERS
    limits = np.iinfo(stored if whole else np.int64)
    fixed = tuple((i, size) for i, size in enumerate(shape) if size >= 0)

    def accept(feed: Array) -> Array:
        if feed.ndim != len(shape) or any(feed.shape[i] != size for i, size in fixed):
            raise InterpreterError(f"input {name!r} has shape {list(feed.shape)}, expected {list(shape)}")
        if feed.dtype == stored:
            return feed if stored == held else feed.astype(held)
        if feed.dtype.kind not in ("iu" if whole else "f") or kind == "bool":
            raise InterpreterError(f"input {name!r} is of type {feed.dtype}, expected {stored}")
        if whole and feed.size and not (limits.min <= feed.min() <= feed.max() <= limits.max):
            raise InterpreterError(f"input {name!r} holds numbers that {stored} has not")
        value = feed.astype(held)
        return value if rounding is None else rounding(value)

    return accept


def _constant(node: Node) -> Array:
    """The values of a constant layer, copied, as they are held."""
    kind, shape = node.gives[0], tuple(node.layer.shape)
    weights = node.layer.weights
    if isinstance(weights, np.ndarray):
        return np.array(weights, HELD[kind]).reshape(shape)
    raw = _raw_bytes(node, weights)
    if kind == "int4":
        return unpack_int4(raw)[: weights.size].reshape(shape)
    node.require(kind in ("bf16", "fp8"), f"constants of type {kind} are not computed")
    return raw.view(NUMPY[kind]).astype(np.float32).reshape(shape)


def _raw_bytes(node: Node, weights: Any) -> NDArray[np.uint8]:
    """The bytes behind a `Weights` object of a type that numpy has not, and for which the bindings offer no access.

    Behind its Python header, a pybind11 object holds the pointer to the C++ one; type and count are compared with what
    the bindings say before the address is used.
    """
    pointer = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    found = _Weights.from_address(pointer or 0)
    node.require(
        bool(pointer) and found.type == int(weights.dtype) and found.count == weights.size and bool(found.values),
        "its values cannot be reached in this version of the bindings",
    )
    count = (weights.size + 1) // 2 if node.gives[0] == "int4" else weights.nbytes
    return np.frombuffer(ctypes.string_at(found.values, count), np.uint8)
