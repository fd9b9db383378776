"""The forward pass of an engine that is one network with two profiles (see `network`).

Decode launches are recorded: a CUDA graph per bucket and parity, each with a context of its own, because a graph is
valid only while the context it was recorded from is left alone (NVIDIA, TensorRT documentation, "CUDA Graphs").
"""

from collections.abc import Mapping
from pathlib import Path

from helixflow.engine.base import EngineError
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.compile import DECODE, MIXED
from helixflow.engine.tensorrt.device import Context, Device, Program, TensorInfo
from helixflow.engine.tensorrt.forward import Addresses, Forward, Recorded, Recorder, StepShapes
from helixflow.engine.tensorrt.layout import INPUTS, PROMPT_INPUTS, input_shape
from helixflow.engine.tensorrt.options import WEIGHT_PREFIX

TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class FusedPrograms:
    """See `forward.Programs`: one program."""

    def __init__(self, device: Device, plan: bytes, spec: ModelSpec, cache: Path | None = None) -> None:
        """`cache`: see `Device.load`. Raises EngineError."""
        self.spec = spec
        self.program = device.load(plan, cache)
        self._weights: dict[str, TensorInfo] = {}
        for name, info in self.program.tensors().items():
            if info.is_input and name.startswith(WEIGHT_PREFIX):
                self._weights[stored_name(spec, name)] = info

    @property
    def weights(self) -> Mapping[str, TensorInfo]:
        """See `forward.Programs`."""
        return self._weights

    @property
    def nbytes(self) -> int:
        """See `forward.Programs`."""
        return self.program.scratch_bytes

    def forward(self, addresses: Addresses) -> Forward:
        """See `forward.Programs`."""
        return FusedForward(self.program, self.spec, addresses)

    def close(self) -> None:
        """See `forward.Programs`."""
        self.program.close()


def stored_name(spec: ModelSpec, name: str) -> str:
    """The tensor of the checkpoint that an input `w....` is bound to; a tied head is the embedding once more."""
    stored = name.removeprefix(WEIGHT_PREFIX)
    return EMBEDDING if spec.tied and stored == TIED_HEAD else stored


class FusedForward:
    """See `forward.Forward`."""

    def __init__(self, program: Program, spec: ModelSpec, addresses: Addresses) -> None:
        self._program, self._spec, self._addresses = program, spec, addresses
        self._tensors = program.tensors()
        self._free = {name: info for name, info in self._tensors.items() if info.is_input and -1 in info.shape}
        self._recorder = Recorder()
        self._decodes: dict[tuple[int, int], Recorded] = {}
        self._mixed: list[tuple[Context, dict[str, tuple[int, ...]]] | None] = [None, None]

    def decode(self, bucket: int, parity: int) -> None:
        """See `forward.Forward`."""
        work = self._decodes.get((bucket, parity))
        if work is None:
            context = self._context(DECODE, parity)
            self._set_shapes(context, {}, StepShapes(bucket, bucket + 1, 1, 1, 1, bucket))
            work = self._decodes[bucket, parity] = Recorded(context.run, context.capture)
        work.enqueue(self._recorder)

    def mixed(self, shapes: StepShapes, parity: int) -> None:
        """See `forward.Forward`."""
        found = self._mixed[parity]
        if found is None:
            found = self._mixed[parity] = (self._context(MIXED, parity), {})
        context, known = found
        self._set_shapes(context, known, shapes)
        context.run()

    def close(self) -> None:
        """See `forward.Forward`."""
        self._decodes.clear()
        self._mixed = [None, None]

    def _context(self, profile: int, parity: int) -> Context:
        context = self._program.context(profile)
        for name, info in self._tensors.items():
            context.set_address(name, self._address(name, info, profile, parity))
        return context

    def _address(self, name: str, info: TensorInfo, profile: int, parity: int) -> int:
        addresses = self._addresses
        if not info.is_input:
            found = addresses.output(parity).get(name, addresses.caches.get(name.removesuffix("_out")))
        elif name.startswith(WEIGHT_PREFIX):
            found = addresses.weights.get(stored_name(self._spec, name))
        elif profile == DECODE and name in PROMPT_INPUTS:
            found = addresses.zeros
        else:
            found = next(
                (m[name] for m in (addresses.step(parity), addresses.caches, addresses.rope) if name in m), None
            )
        if found is None:
            raise EngineError(f"the plan has a tensor {name} that this version does not know: build the engine again")
        return found

    def _set_shapes(self, context: Context, known: dict[str, tuple[int, ...]], sizes: StepShapes) -> None:
        """Sets the shapes that differ from the `known` ones: each costs TensorRT some microseconds."""
        letters = sizes._asdict()
        for name, info in self._free.items():
            if name in INPUTS:
                shape = input_shape(name, {**letters, "K": info.shape[-1] - 1})
            else:
                shape = (sizes.B, *info.shape[1:])
            if known.get(name) != shape:
                context.set_shape(name, shape)
                known[name] = shape
