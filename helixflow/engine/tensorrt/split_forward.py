"""Launches of a decoder that is cut at attention: a part, the kernels on a layer's caches, the next part, and so on.

Everything runs on one stream, so that the parts may share their memory: q, k, v, the result of attention, and two
residual streams that take turns, because a part must not write what it reads. A decode launch is one CUDA graph of all
of them. In it, one context of `between` is run for every layer, each time with other addresses: a graph keeps those of
the moment of recording (NVIDIA, TensorRT documentation, "CUDA Graphs").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.compile import DECODE, MIXED
from helixflow.engine.tensorrt.device import Context, Device, Program, TensorInfo
from helixflow.engine.tensorrt.forward import Addresses, Recorded, Recorder, StepShapes
from helixflow.engine.tensorrt.fused import stored_name
from helixflow.engine.tensorrt.kernels import (
    DECODE_SPREAD,
    ITEM_BYTES,
    PROMPT_SPREAD,
    Attention,
    AttentionShape,
    LayerCaches,
    Tokens,
    open_attention,
)
from helixflow.engine.tensorrt.layout import ALIGNMENT, INPUTS, aligned, input_shape
from helixflow.engine.tensorrt.options import WEIGHT_PREFIX, EngineOptions
from helixflow.engine.tensorrt.split import BETWEEN, FIRST, LAST, weight_of_layer

CROSSING = ("attn", "x")
"""Inputs that come from another part or the kernels; they have a row per token."""


class SplitPrograms:
    """See `forward.Programs`: a program for each part."""

    def __init__(
        self,
        device: Device,
        plans: Mapping[str, bytes],
        spec: ModelSpec,
        options: EngineOptions,
        cache: Path | None = None,
    ) -> None:
        """`plans`: by the name of the part (see `split`); `options`: what they were built for; `cache`: directory that
        keeps what is compiled for the device between starts. Raises EngineError."""
        self.device, self.spec, self.options = device, spec, options
        sm = device.info().sm
        self.attention = open_attention(device, AttentionShape.of(spec, options), cache)
        self.programs: dict[str, Program] = {}
        for part, plan in plans.items():
            self.programs[part] = device.load(plan, cache and cache / f"plan.{part}.{sm}.cache")
        self.tensors = {part: dict(program.tensors()) for part, program in self.programs.items()}
        self.sizes = _buffers(self.attention, spec, options)

    @property
    def weights(self) -> Mapping[str, TensorInfo]:
        """See `forward.Programs`."""
        found: dict[str, TensorInfo] = {}
        for part, tensors in self.tensors.items():
            for layer in range(self.spec.layers - 1 if part == BETWEEN else 1):
                found |= {stored: tensors[name] for name, stored in self.bound(part, layer).items()}
        return found

    @property
    def nbytes(self) -> int:
        """See `forward.Programs`."""
        return sum(self.sizes.values()) + max(program.scratch_bytes for program in self.programs.values())

    def bound(self, part: str, layer: int) -> dict[str, str]:
        """Inputs of a part that are weights -> the tensor of the checkpoint that each is bound to; `layer`: the one
        whose attention it follows (of no meaning but for `between`)."""
        spec, names = self.spec, [name for name in self.tensors[part] if name.startswith(WEIGHT_PREFIX)]
        return {name: stored_name(spec, weight_of_layer(part, layer, spec.layers, name)) for name in names}

    def forward(self, addresses: Addresses) -> "SplitForward":
        """See `forward.Programs`."""
        return SplitForward(self, addresses)

    def close(self) -> None:
        """See `forward.Programs`."""
        for program in self.programs.values():
            program.close()
        self.programs = {}


@dataclass(frozen=True, slots=True)
class _Work:
    """What a launch consists of: a context of each part, with shapes and addresses, and the tokens."""

    contexts: Mapping[str, Context]
    tokens: Tokens


class SplitForward:
    """See `forward.Forward`."""

    def __init__(self, programs: SplitPrograms, addresses: Addresses) -> None:
        self._programs, self._addresses = programs, addresses
        self._memory = programs.device.allocate(sum(programs.sizes.values()))
        self._buffers, offset = {}, 0
        for name, nbytes in programs.sizes.items():
            self._buffers[name] = self._memory + offset
            offset += nbytes
        self._streams = (self._buffers.pop("even"), self._buffers.pop("odd"))
        layers = programs.spec.layers
        self._caches = [
            LayerCaches(addresses.caches[f"k_cache_{layer}"], addresses.caches[f"v_cache_{layer}"])
            for layer in range(layers)
        ]
        self._weights = [self._bound(BETWEEN, layer) for layer in range(layers - 1)]
        self._recorder = Recorder()
        self._decodes: dict[tuple[int, int], Recorded] = {}
        self._mixed: dict[str, Context] = {}

    def decode(self, bucket: int, parity: int) -> None:
        """See `forward.Forward`."""
        recorded = self._decodes.get((bucket, parity))
        if recorded is None:
            work = self._prepared(self._contexts(DECODE), StepShapes(bucket, bucket + 1, 1, 1, 1, bucket), parity)
            device = self._programs.device
            recorded = Recorded(lambda: self._enqueue(work), lambda: device.capture(lambda: self._enqueue(work)))
            self._decodes[bucket, parity] = recorded
        recorded.enqueue(self._recorder)

    def mixed(self, shapes: StepShapes, parity: int) -> None:
        """See `forward.Forward`."""
        self._mixed = self._mixed or self._contexts(MIXED)
        self._enqueue(self._prepared(self._mixed, shapes, parity))

    def close(self) -> None:
        """See `forward.Forward`."""
        self._decodes.clear()
        self._mixed.clear()
        if self._memory:
            self._programs.device.free(self._memory)
            self._memory = 0

    def _bound(self, part: str, layer: int) -> list[tuple[str, int]]:
        """Inputs of a part that are weights, and their addresses."""
        weights = self._addresses.weights
        return [(name, weights[stored]) for name, stored in self._programs.bound(part, layer).items()]

    def _contexts(self, profile: int) -> dict[str, Context]:
        """A context of each part, with the addresses that never change."""
        contexts = {part: program.context(profile) for part, program in self._programs.programs.items()}
        fixed = {**self._addresses.rope, **self._buffers}
        for part, context in contexts.items():
            for name in self._programs.tensors[part].keys() & fixed.keys():
                context.set_address(name, fixed[name])
        contexts[FIRST].set_address("x_out", self._streams[0])
        for part in (FIRST, LAST):
            for name, address in self._bound(part, 0):
                contexts[part].set_address(name, address)
        return contexts

    def _prepared(self, contexts: Mapping[str, Context], shapes: StepShapes, parity: int) -> _Work:
        """Sets the shapes of a launch, and the addresses of a parity."""
        step = self._addresses.step(parity)
        own = {**step, **self._addresses.output(parity)}
        for part, context in contexts.items():
            for name, info in self._programs.tensors[part].items():
                if name in own:
                    context.set_address(name, own[name])
                if name in INPUTS:
                    context.set_shape(name, input_shape(name, {**shapes._asdict(), "K": info.shape[-1] - 1}))
                elif name in CROSSING:
                    context.set_shape(name, (shapes.T, info.shape[1]))
        spread = DECODE_SPREAD if self._programs.options.slots >= shapes.T else PROMPT_SPREAD
        return _Work(contexts, Tokens(shapes.T, shapes.B, step["cu_q"], step["position_ids"], spread))

    def _enqueue(self, work: _Work) -> None:
        """Enqueues a whole launch."""
        spec, attention, buffers, streams = self._programs.spec, self._programs.attention, self._buffers, self._streams
        work.contexts[FIRST].run()
        for layer, caches in enumerate(self._caches):
            attention.append(work.tokens, buffers["k"], buffers["v"], caches)
            window = spec.windows[layer]
            attention.attend(work.tokens, buffers["q"], caches, window, buffers["attn"], buffers["work"])
            part = BETWEEN if layer < spec.layers - 1 else LAST
            context = work.contexts[part]
            context.set_address("x", streams[layer % 2])
            if part == BETWEEN:
                context.set_address("x_out", streams[(layer + 1) % 2])
                for name, address in self._weights[layer]:
                    context.set_address(name, address)
            context.run()


def _buffers(attention: Attention, spec: ModelSpec, options: EngineOptions) -> dict[str, int]:
    """Bytes of each buffer for the largest launch."""
    tokens, item = options.step_tokens, ITEM_BYTES[options.compute]
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    widths = {"q": queries, "k": keys, "v": keys, "attn": queries, "even": spec.hidden_size, "odd": spec.hidden_size}
    work = max(
        attention.workspace_bytes(options.slots, DECODE_SPREAD),
        attention.workspace_bytes(tokens, PROMPT_SPREAD),
        ALIGNMENT,
    )
    return {**{name: aligned(tokens * width * item) for name, width in widths.items()}, "work": aligned(work)}
