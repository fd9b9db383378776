"""The decoder cut at attention: three small engines, between which kernels of ours attend over the caches.

`first`: embedding, and q, k and v of layer 0. `between`: from the attention of a layer to q, k and v of the next one;
one engine serves all layers, since weights are inputs and layers have equal shapes. `last`: from the attention of the
last layer to the chosen tokens. A model of one layer has no `between`.

Inputs, next to the weights: input_ids, position_ids int32 [T], rope_cos, rope_sin [S, D / 2], last_idx int32 [R], those
of `Sampler`; attn [T, heads * D], the result of attention, and x [T, hidden], the residual stream. Outputs: q [T, heads
* D] and k, v [T, kv_heads * D], rotated, not scaled; x_out [T, hidden]; at the end next_ids, undecided and logits.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from helixflow.engine.base import EngineError
from helixflow.engine.decoder import write_decoder
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.linear import Linears
from helixflow.engine.tensorrt.network import Network, TensorRtBuilder
from helixflow.engine.tensorrt.options import EngineOptions

FIRST, BETWEEN, LAST = "first", "between", "last"
PARTS = (FIRST, BETWEEN, LAST)
# Two layers contain every cut there is.
LAYERS_DESCRIBED = 2
LAYER = re.compile(r"(?<=model\.layers\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Handle:
    """A tensor of one of the networks."""

    part: int
    tensor: Any


class SplitBuilder:
    """The `Builder` (see `decoder`) that begins a new network at every attention."""

    def __init__(self, library: Library, spec: ModelSpec, options: EngineOptions) -> None:
        self.library, self.spec, self.options = library, spec, options
        self.networks: list[Network] = []
        self._residual: Handle | None = None
        self._begin()

    def embed(self, weight: str) -> Handle:  # noqa: D102 - documented by the protocol
        return self._own(self._build.embed(weight))

    def rms_norm(self, x: Handle, weight: str, eps: float, groups: int = 1) -> Handle:  # noqa: D102
        return self._own(self._build.rms_norm(self._here(x), weight, eps, groups))

    def linear(self, x: Handle, name: str, bias: bool) -> Handle:  # noqa: D102
        return self._own(self._build.linear(self._here(x), name, bias))

    def attention(self, layer: int, q: Handle, k: Handle, v: Handle, window: int | None) -> Handle:  # noqa: D102
        # The inner builder asks `apply`, which begins the next network: the result belongs to that one.
        return self._own(self._build.attention(layer, self._here(q), self._here(k), self._here(v), window))

    def swiglu(self, gate: Handle, up: Handle) -> Handle:  # noqa: D102
        return self._own(self._build.swiglu(self._here(gate), self._here(up)))

    def add(self, a: Handle, b: Handle) -> Handle:  # noqa: D102
        return self._own(self._build.add(self._here(a), self._here(b)))

    def wanted(self, x: Handle) -> Handle:  # noqa: D102
        return self._own(self._build.wanted(self._here(x)))

    def lm_head(self, x: Handle, weight: str) -> None:  # noqa: D102
        self._build.lm_head(self._here(x), weight)

    def apply(self, layer: int, q: Any, k: Any, v: Any, window: int | None) -> Any:  # noqa: ARG002 - the kernels' part
        """See `network.LayerAttention`: q, k and v leave the network; what comes of them enters the next one."""
        ops, spec, width = self.networks[-1].ops, self.spec, self.spec.head_dim
        positions = ops.reshape(ops.input("position_ids", ("T",)), (-1, 1))
        angles = (self.options.positions, width // 2)
        cos, sin = (ops.input(name, angles, ops.compute) for name in ("rope_cos", "rope_sin"))
        for name, x, heads in (("q", q, spec.heads), ("k", k, spec.kv_heads)):
            rotated = ops.rotate(ops.heads(x, heads, width), cos, sin, positions)
            ops.output(ops.reshape(rotated, (-1, heads * width)), name)
        ops.output(v, "v")
        self._begin()
        ops = self.networks[-1].ops
        return ops.input("attn", ("T", spec.heads * width), ops.compute)

    def _begin(self) -> None:
        network = Network(self.library, self.options)
        self.networks.append(network)
        self._residual = None
        linears = Linears(network.ops, self.options.precision, None, None)
        self._build = TensorRtBuilder(network, self.spec, self.options, linears, self)

    def _own(self, tensor: Any) -> Handle:
        return Handle(len(self.networks) - 1, tensor)

    def _here(self, handle: Handle) -> Any:
        """The tensor; one of the network before is handed over. Only the residual stream lives across attention."""
        here = len(self.networks) - 1
        if handle.part == here:
            return handle.tensor
        if handle.part != here - 1 or self._residual not in (None, handle):
            raise EngineError("attention 'split' cannot cut this decoder: more than one tensor crosses an attention")
        if self._residual is None:
            self.networks[handle.part].ops.output(handle.tensor, "x_out")
            self._residual = handle
        ops = self.networks[here].ops
        return ops.input("x", ("T", self.spec.hidden_size), ops.compute)


def build_split(library: Library, spec: ModelSpec, options: EngineOptions) -> dict[str, Network]:
    """The networks of `PARTS` by name. Raises EngineError."""
    if options.attention != "split":
        raise EngineError(f"attention {options.attention!r} is one network, not a split one")
    if options.quantised:
        raise EngineError(
            f"attention 'split' needs weights as inputs, which {options.precision} ones are not: choose fp16 or bf16, "
            "or another attention"
        )
    library.log.take()
    described = min(spec.layers, LAYERS_DESCRIBED)
    builder = SplitBuilder(library, spec, options)
    write_decoder(replace(spec, layers=described, windows=spec.windows[:described]), builder)
    return dict(zip(parts(spec), builder.networks, strict=True))


def parts(spec: ModelSpec) -> tuple[str, ...]:
    """The parts that a model has."""
    return PARTS if spec.layers > 1 else (FIRST, LAST)


def weight_of_layer(part: str, layer: int, layers: int, name: str) -> str:
    """The weight of a model of `layers` layers that a weight of a part stands for (an input's name, or a tensor's).

    `layer`: for `between`, the one whose attention it follows. The parts describe two layers (a single one if that is
    all there is): `between` leads from layer 0 to 1, and layer 1 is the last.
    """
    shift = {FIRST: 0, BETWEEN: layer, LAST: layers - min(layers, LAYERS_DESCRIBED)}[part]
    return LAYER.sub(lambda number: str(int(number[0]) + shift), name)
