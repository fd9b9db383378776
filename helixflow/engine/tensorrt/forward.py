"""What the runner asks of the programs of a model: their needs, and then one launch after the other.

`fused` has one network for everything, `split_forward` one before, between and after the attention kernels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from helixflow import log
from helixflow.engine.tensorrt.device import DeviceError, Graph, TensorInfo


class StepShapes(NamedTuple):
    """Sizes of a launch, by the letters of the inputs' shapes (see `layout`): tokens, rows of the caches, pieces of
    prompts, tokens of the longest piece and positions that it may see (both padded), rows of logits."""

    T: int
    B: int
    P: int
    C: int
    W: int
    R: int


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where everything lies on the device; fixed for the engine's life.

    `weights`: by name in the checkpoint. `caches`: `k_cache_0`, `v_cache_0`, ..., each [slots + 1, kv_heads, positions,
    head_dim]. `rope`: `rope_cos` and `rope_sin`. `zeros`: `layout.ZEROS` bytes of zeros. Two sets of
    inputs and outputs take turns; which one, is the parity of the launch.
    """

    weights: Mapping[str, int]
    caches: Mapping[str, int]
    rope: Mapping[str, int]
    zeros: int
    steps: tuple[Mapping[str, int], Mapping[str, int]]
    outputs: tuple[Mapping[str, int], Mapping[str, int]]

    def step(self, parity: int) -> Mapping[str, int]:
        """Every input of `layout.INPUTS`."""
        return self.steps[parity]

    def output(self, parity: int) -> Mapping[str, int]:
        """`next_ids` and `undecided`, int32 [R], and `logits`, fp32 [R, vocab]."""
        return self.outputs[parity]


class Forward(Protocol):
    """Enqueues launches; the inputs lie where the addresses say, and are uploaded before. May raise DeviceError."""

    def decode(self, bucket: int, parity: int) -> None:
        """`bucket` tokens, each with its row of logits (T = R = bucket), over `bucket` + 1 rows of the caches; no piece
        of a prompt (P = C = W = 1, to be read from `zeros`)."""

    def mixed(self, shapes: StepShapes, parity: int) -> None:
        """A launch with pieces of prompts."""

    def close(self) -> None:
        """Frees contexts and memory of its own."""


class Programs(Protocol):
    """The loaded programs of a model, before anything is allocated for them."""

    @property
    def weights(self) -> Mapping[str, TensorInfo]:
        """Weights to be uploaded, by name in the checkpoint, in the type they are wanted in."""

    @property
    def nbytes(self) -> int:
        """Memory of the device that `forward` takes beside what the addresses name."""

    def forward(self, addresses: Addresses) -> Forward:
        """Contexts for these addresses. Raises DeviceError."""

    def close(self) -> None:
        """Frees the programs; call after `Forward.close`."""


class Recorded:
    """Work that is enqueued again and again: first as it is, then as a CUDA graph, if it can be one.

    In its first run TensorRT finishes its preparations for the shapes, which no graph may hold.
    """

    def __init__(self, run: Callable[[], None], capture: Callable[[], Graph]) -> None:
        self._run, self._capture = run, capture
        self._started = False
        self._graph: Graph | None = None

    def enqueue(self, recorder: "Recorder") -> None:
        """Raises DeviceError."""
        if self._started and self._graph is None and recorder.able:
            self._graph = recorder.record(self._capture)
        if self._graph is None:
            self._run()
            self._started = True
        else:
            self._graph.launch()


class Recorder:
    """Records graphs until one cannot be; `able`: whether it still does."""

    def __init__(self) -> None:
        self.able = True

    def record(self, capture: Callable[[], Graph]) -> Graph | None:
        """A graph, or None, then and from then on. Raises DeviceError when the device is lost."""
        try:
            return capture()
        except DeviceError as error:
            if error.kind == "lost":
                raise
            self.able = False
            log.get("engine").warning(
                "decode steps are not recorded as CUDA graphs; every step costs the time of its launches",
                reason=str(error),
            )
            return None
