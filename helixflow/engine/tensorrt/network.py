"""The whole decoder as one TensorRT network with two uses: decode steps, and steps with pieces of prompts in them.

Inputs are those of `CachedAttention` and `Sampler`, input_ids int32 [T], last_idx int32 [R] (tokens whose logits are
wanted), and the weights, `w.` + name in the checkpoint, in the type of the activations. A tied head is an input of its
own, `w.lm_head.weight`, for the runner to bind to the embedding. Outputs: next_ids, undecided int32 [R]; logits fp32
[R, vocab]; the caches.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from helixflow.engine.base import EngineError
from helixflow.engine.decoder import write_decoder
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.attention import CachedAttention
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.linear import Linears, Read
from helixflow.engine.tensorrt.ops import Ops
from helixflow.engine.tensorrt.options import EngineOptions
from helixflow.engine.tensorrt.sampler import Sampler


class Network:
    """A network definition and what it needs to stay alive. `definition`: the INetworkDefinition; `ops`: its layers."""

    def __init__(self, library: Library, options: EngineOptions) -> None:
        self.library = library
        self.builder = library.trt.Builder(library.log)
        self.definition: Any = self.builder.create_network(0)
        self.ops = Ops(library, self.definition, options.compute)
        self.unquantised: tuple[str, ...] = ()

    @property
    def inputs(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each input, -1 for free dimensions."""
        return self.ops.inputs

    @property
    def weight_inputs(self) -> Mapping[str, str]:
        """Inputs that are weights -> the tensor of the checkpoint to bind."""
        return self.ops.weight_inputs


class LayerAttention(Protocol):
    """The attention of every layer of a network."""

    def apply(self, layer: int, q: Any, k: Any, v: Any, window: int | None) -> Any:
        """See `decoder.Builder.attention`: q [T, heads * D], k and v [T, kv_heads * D] -> [T, heads * D]."""


class TensorRtBuilder:
    """The `Builder` (see `decoder`) whose handles are tensors of a TensorRT network, [T, features]."""

    def __init__(
        self, network: Network, spec: ModelSpec, options: EngineOptions, linears: Linears, attention: LayerAttention
    ) -> None:
        self.ops, self.spec, self.options = network.ops, spec, options
        self.linears, self.cached = linears, attention
        self.shapes = spec.tensors()

    def embed(self, weight: str) -> Any:  # noqa: D102 - documented by the protocol
        table = self.ops.weight(weight, self.shapes[weight])
        return self.ops.gather(table, self.ops.input("input_ids", ("T",)))

    def rms_norm(self, x: Any, weight: str, eps: float, groups: int = 1) -> Any:  # noqa: D102
        scale = self.ops.weight(weight, self.shapes[weight])
        if groups == 1:
            return self.ops.rms_norm(x, scale, eps)
        width = self.spec.head_dim
        parts = self.ops.rms_norm(self.ops.reshape(x, (-1, groups, width)), scale, eps)
        return self.ops.reshape(parts, (-1, groups * width))

    def linear(self, x: Any, name: str, bias: bool) -> Any:  # noqa: D102
        rows, columns = self.shapes[name + ".weight"]
        return self.linears.apply(x, name, (rows, columns), bias)

    def attention(self, layer: int, q: Any, k: Any, v: Any, window: int | None) -> Any:  # noqa: D102
        return self.cached.apply(layer, q, k, v, window)

    def swiglu(self, gate: Any, up: Any) -> Any:  # noqa: D102
        return self.ops.swiglu(gate, up)

    def add(self, a: Any, b: Any) -> Any:  # noqa: D102
        return self.ops.add(a, b)

    def wanted(self, x: Any) -> Any:  # noqa: D102
        return self.ops.gather(x, self.ops.input("last_idx", ("R",)))

    def lm_head(self, x: Any, weight: str) -> None:  # noqa: D102
        # In the type of the activations in every precision: the head decides between near equals.
        head = self.ops.weight("lm_head.weight", self.shapes[weight], stored=weight)
        logits = self.ops.cast(self.ops.matmul(x, head, "lm_head"), "fp32")
        Sampler(self.ops, logits, self.spec.vocab_size)
        self.ops.output(logits, "logits")


def build_network(
    library: Library,
    spec: ModelSpec,
    options: EngineOptions,
    constants: Read | None = None,
    scales: Mapping[str, float] | None = None,
) -> Network:
    """Lowers a decoder to one network. `constants(name)`: a tensor of the checkpoint, fp32, asked for one at a time by
    quantised precisions; `scales`: of the inputs of each linear layer, for fp8. Raises EngineError.
    """
    if options.attention == "split":
        raise EngineError("attention 'split' is not one network: it is built by its own module")
    network = Network(library, options)
    library.log.take()
    linears = Linears(network.ops, options.precision, constants, scales)
    attention = CachedAttention(network.ops, spec, options)
    write_decoder(spec, TensorRtBuilder(network, spec, options, linears, attention))
    attention.finish()
    network.unquantised = tuple(linears.unquantised)
    return network
