"""Builds the ONNX graph of a decoder. Weights go to one file beside it, written as they are met.

Graph inputs: `ids` int32 [B, T]; `seqlens` int32 [B] (tokens before this step + T - 1, per row); `total` int32 [] (the
largest of them + 1); `rows` int32 [R] (rows of the flattened [B * T] whose logits are wanted); `cos`, `sin` [P, D / 2];
`past_k_i`, `past_v_i` [B, kv_heads, P, D] per layer. Outputs: `logits` float32 [R, vocab]; `present_k_i`,
`present_v_i`, to be bound to the memory of their `past`, which makes the update happen in place. B, T, R and P
(positions of a slot) are free; D is head_dim rounded up to 16 (what GroupQueryAttention takes with rotary).

Activations, caches and rotary tables have one type, see `compute_type`. Every node has a CUDA kernel of each 16-bit
type, so that nothing of a graph for the GPU runs on the CPU: `tests/engine/test_onnx_cuda.py` holds the table.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.decoder import write_decoder
from helixflow.engine.kinds import AnyPrecision, Provider
from helixflow.engine.quantize import BLOCK, quantize
from helixflow.engine.spec import ModelSpec

GRAPH_FILE = "graph.onnx"
WEIGHTS_FILE = "weights.bin"
OPSET = 24
IR_VERSION = 11
INLINE_BYTES = 1024
ALIGNMENT = 4096
HEAD_ALIGNMENT = 16
# int8 activations, quantised per row and block: the fast kernels, and rows stay independent of each other.
ACCURACY_LEVEL = 4
LINEAR_BITS: Mapping[AnyPrecision, int | None] = {"fp32": None, "fp16": None, "bf16": None, "int8": 8, "int4": 4}
# The vocabulary product keeps 8 bits in int4 engines. Measured on the demo model, divergence (KL) of the next token
# from fp32: 0.082 with 8 bits, as with an fp32 head; 0.088 with 4 bits. An int8 engine: 0.0009.
HEAD_BITS: Mapping[AnyPrecision, int | None] = {**LINEAR_BITS, "int4": 8}

Compute = Literal["fp32", "fp16", "bf16"]
NUMPY_TYPES: Mapping[Compute, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
ONNX_TYPES: Mapping[Compute, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
# On CUDA, GroupQueryAttention has no fp32 kernel. Quantised engines compute in fp16: its steps are finer than bf16's.
COMPUTE_TYPES: Mapping[Provider, Mapping[AnyPrecision, Compute]] = {
    "cpu": {"fp32": "fp32", "fp16": "fp16", "int8": "fp32", "int4": "fp32"},
    "cuda": {"fp16": "fp16", "bf16": "bf16", "int8": "fp16", "int4": "fp16"},
}


def compute_type(precision: AnyPrecision, provider: Provider = "cpu") -> Compute:
    """Type of activations and caches of an engine. fp16 on the CPU is right but slow: the proof of the graph for CUDA.

    Raises EngineError when the provider lacks kernels for the precision.
    """
    known = COMPUTE_TYPES[provider]
    if precision not in known:
        raise EngineError(
            f"precision {precision} cannot be computed by ONNX Runtime on {provider}: choose one of {', '.join(known)}"
        )
    return known[precision]


def padded_head(head_dim: int) -> int:
    """Width of a head inside the cache."""
    return -(-head_dim // HEAD_ALIGNMENT) * HEAD_ALIGNMENT


class WeightFile:
    """Appends tensors to a file, each at a page boundary, and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def append(self, array: NDArray[Any]) -> tuple[int, int]:
        """Returns (offset, bytes)."""
        self._write(memoryview(bytes(-self.size % ALIGNMENT)))
        offset = self.size
        self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return offset, self.size - offset

    def _write(self, data: memoryview) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


class OnnxBuilder:
    """The `Builder` (see `decoder`) whose handles are names of ONNX values."""

    def __init__(
        self,
        spec: ModelSpec,
        precision: AnyPrecision,
        compute: Compute,
        read: Callable[[str], Float32],
        file: WeightFile,
    ) -> None:
        self.spec = spec
        self.compute = compute
        self.dtype = NUMPY_TYPES[compute]
        self.read = read
        self.file = file
        self.bits = LINEAR_BITS[precision]
        self.head_bits = HEAD_BITS[precision]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.width = padded_head(spec.head_dim)

    def embed(self, weight: str) -> str:  # noqa: D102 - documented by the protocol
        return self._node("Gather", [self._weight(weight), "ids"])

    def rms_norm(self, x: str, weight: str, eps: float, groups: int = 1) -> str:  # noqa: D102
        scale = self._weight(weight)
        if groups == 1:
            return self._node("RMSNormalization", [x, scale], epsilon=eps)
        parts = self._reshape(x, 0, 0, groups, self.spec.head_dim)
        normed = self._node("RMSNormalization", [parts, scale], epsilon=eps)
        return self._reshape(normed, 0, 0, groups * self.spec.head_dim)

    def linear(self, x: str, name: str, bias: bool) -> str:  # noqa: D102
        out = self._product(x, name + ".weight", self.bits)
        if not bias:
            return out
        return self._node("Add", [out, self._weight(name + ".bias")])

    def attention(self, layer: int, q: str, k: str, v: str, window: int | None) -> str:  # noqa: D102
        spec = self.spec
        if self.width != spec.head_dim:
            q, k = self._pad_pairs(q, spec.heads), self._pad_pairs(k, spec.kv_heads)
            v = self._pad(v, spec.kv_heads, 1)
        out = f"attention_{layer}"
        past = [f"past_k_{layer}", f"past_v_{layer}"]
        present = [f"present_k_{layer}", f"present_v_{layer}"]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, *past, "seqlens", "total", "cos", "sin"],
                [out, *present],
                domain="com.microsoft",
                num_heads=spec.heads,
                kv_num_heads=spec.kv_heads,
                do_rotary=1,
                scale=float(spec.head_dim**-0.5),
                local_window_size=-1 if window is None else window,
            )
        )
        if self.width == spec.head_dim:
            return out
        heads = self._reshape(out, 0, 0, spec.heads, self.width)
        bounds = [self._integers(0), self._integers(spec.head_dim), self._integers(3)]
        return self._reshape(self._node("Slice", [heads, *bounds]), 0, 0, spec.heads * spec.head_dim)

    def swiglu(self, gate: str, up: str) -> str:  # noqa: D102
        silu = self._node("Mul", [gate, self._node("Sigmoid", [gate])])
        return self._node("Mul", [silu, up])

    def add(self, a: str, b: str) -> str:  # noqa: D102
        return self._node("Add", [a, b])

    def wanted(self, x: str) -> str:  # noqa: D102
        return self._node("Gather", [self._node("Flatten", [x], axis=2), "rows"])

    def lm_head(self, x: str, weight: str) -> None:  # noqa: D102
        output = "logits" if self.compute == "fp32" else "logits_as_computed"
        if self.head_bits is not None:
            self._product(x, weight, self.head_bits, output)
        else:
            # Gemm takes the matrix as it is on disk, so a tied embedding is stored once.
            self._node("Gemm", [x, self._weight(weight)], output, transB=1)
        if output != "logits":
            self._node("Cast", [output], "logits", to=TensorProto.FLOAT)

    def model(self) -> onnx.ModelProto:
        """The graph; call after `write_decoder`."""
        spec = self.spec
        cache: list[str | int | None] = ["B", spec.kv_heads, "P", self.width]
        caches = [f"{kind}_{layer}" for layer in range(spec.layers) for kind in ("k", "v")]
        value, element = helper.make_tensor_value_info, ONNX_TYPES[self.compute]
        inputs = [
            value("ids", TensorProto.INT32, ["B", "T"]),
            value("seqlens", TensorProto.INT32, ["B"]),
            value("total", TensorProto.INT32, []),
            value("rows", TensorProto.INT32, ["R"]),
            value("cos", element, ["P", self.width // 2]),
            value("sin", element, ["P", self.width // 2]),
            *(value(f"past_{name}", element, cache) for name in caches),
        ]
        outputs = [
            value("logits", TensorProto.FLOAT, ["R", spec.vocab_size]),
            *(value(f"present_{name}", element, cache) for name in caches),
        ]
        graph = helper.make_graph(self.nodes, spec.family, inputs, outputs, list(self.initializers.values()))
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="helixflow")

    def _product(self, x: str, weight: str, bits: int | None, output: str = "") -> str:
        matrix = self.read(weight)
        if bits is None:
            return self._node("MatMul", [x, self._tensor(weight + ".T", self._typed(weight, matrix).T)], output)
        packed, scales = quantize(matrix, bits, self.dtype)
        scales = self._typed(weight, scales).reshape(-1)
        sources = [self._tensor(f"{weight}.q{bits}", packed), self._tensor(f"{weight}.scale", scales)]
        return self._node(
            "MatMulNBits",
            [x, *sources],
            output,
            domain="com.microsoft",
            K=matrix.shape[1],
            N=matrix.shape[0],
            bits=bits,
            block_size=BLOCK,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _pad_pairs(self, x: str, heads: int) -> str:
        """Pads each half of every head: rotary pairs are (i, i + D / 2), and zeros stay zero when rotated."""
        return self._pad(x, heads, 2)

    def _pad(self, x: str, heads: int, parts: int) -> str:
        split = self._reshape(x, 0, 0, heads * parts, self.spec.head_dim // parts)
        extra = (self.width - self.spec.head_dim) // parts
        # CUDA has no Pad of bfloat16; fp32 holds its values as they are.
        if self.compute == "bf16":
            split = self._node("Cast", [split], to=TensorProto.FLOAT)
        padded = self._node("Pad", [split, self._integers(0, 0, 0, 0, 0, 0, 0, extra)])
        if self.compute == "bf16":
            padded = self._node("Cast", [padded], to=TensorProto.BFLOAT16)
        return self._reshape(padded, 0, 0, heads * self.width)

    def _reshape(self, x: str, *shape: int) -> str:
        return self._node("Reshape", [x, self._integers(*shape)])

    def _integers(self, *values: int) -> str:
        name = "const_" + "_".join(str(value) for value in values)
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def _weight(self, name: str) -> str:
        """A tensor of the checkpoint, as it is there but for its type."""
        return self._tensor(name, self._typed(name, self.read(name)))

    def _typed(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Weights in the type of the activations."""
        with np.errstate(over="ignore"):
            typed = array.astype(self.dtype, copy=False)
        if self.compute == "fp16" and not np.isfinite(typed).all():
            raise EngineError(f"{name} holds values that fp16 cannot: choose bf16, or build for the CPU")
        return typed

    def _tensor(self, name: str, array: NDArray[Any]) -> str:
        if name in self.initializers:
            return name
        if array.nbytes < INLINE_BYTES:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
            return name
        offset, length = self.file.append(array)
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        return name

    def _node(self, kind: str, inputs: list[str], output: str = "", domain: str = "", **attributes: Any) -> str:
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output


def write_onnx(
    spec: ModelSpec,
    precision: AnyPrecision,
    read: Callable[[str], Float32],
    directory: Path,
    provider: Provider = "cpu",
) -> dict[str, str]:
    """Writes graph and weights into `directory`. `read(name)`: a tensor of the checkpoint, float32, shape as on disk.

    Returns the SHA-256 of each file, in hexadecimal. Raises OSError, EngineError for a precision that the provider
    lacks or weights that it cannot hold, and whatever `read` raises.
    """
    compute = compute_type(precision, provider)
    with (directory / WEIGHTS_FILE).open("wb") as file:
        weights = WeightFile(file)
        builder = OnnxBuilder(spec, precision, compute, read, weights)
        write_decoder(spec, builder)
    graph = builder.model().SerializeToString(deterministic=True)
    (directory / GRAPH_FILE).write_bytes(graph)
    return {GRAPH_FILE: hashlib.sha256(graph).hexdigest(), WEIGHTS_FILE: weights.sha256.hexdigest()}
