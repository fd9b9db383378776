"""What a TensorRT engine is built for: precision, slots, lengths, and the limits of one launch."""

from dataclasses import dataclass
from typing import Literal, get_args

from helixflow.engine.base import EngineError

AttentionForm = Literal["posmask", "key_value_lengths", "split"]
Kind = Literal["tensorrt", "tensorrt-rtx"]
GpuPrecision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
Compute = Literal["fp32", "fp16", "bf16"]

KINDS: tuple[Kind, ...] = get_args(Kind)
ATTENTION_FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)
GPU_PRECISIONS: tuple[GpuPrecision, ...] = ("fp16", "bf16", "int8", "int4", "fp8")
"""What users choose from; fp32 exists besides, to prove the network in numpy."""
QUANTISED: frozenset[GpuPrecision] = frozenset({"int8", "int4", "fp8"})
"""Precisions whose linear layers are constants of the plan."""
CANDIDATES = 64
"""Tokens of a row that get noise of their own, as in `core_rs`."""
INT4_BLOCK = 128
"""Inputs that share one scale in int4; a linear layer whose width is no multiple of it is not quantised."""
FP8_SM = 89
"""The oldest compute capability (8.9, Ada) with fp8 matrix products."""
COMPUTE: dict[GpuPrecision, Compute] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "fp16",
    "int4": "fp16",
    "fp8": "fp16",
}
"""Type of activations and caches. Quantised precisions compute in fp16, which has the finer steps."""
WEIGHT_PREFIX = "w."
"""Network inputs that are weights: this, and the tensor's name in the checkpoint."""
# Tokens of a step beyond one whole chunk and a token of every slot: short prompts, and padding to a bucket.
STEP_SLACK = 64
FIRST_BUCKETS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Sizes of an engine. Zero `step_tokens` and `rows` are replaced by their defaults, too large ones are cut.

    `slots` sequences of `max_len` positions. `chunk_tokens`: longest piece of a prompt in a launch (never more than
    `max_len`); `chunks`: most pieces in a launch (never more than `slots`); `step_tokens`: most tokens in a launch
    (0: chunk_tokens + slots + 64); `rows`: most rows of logits in a launch (0: the greater of slots and 64).
    Raises EngineError for values that no engine has.
    """

    precision: GpuPrecision
    slots: int
    max_len: int
    attention: AttentionForm = "posmask"
    chunk_tokens: int = 512
    chunks: int = 8
    step_tokens: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        """Checks, and fills in what was left at 0."""
        if self.precision not in get_args(GpuPrecision):
            raise EngineError(f"precision {self.precision!r} is unknown: choose one of {', '.join(GPU_PRECISIONS)}")
        if self.attention not in ATTENTION_FORMS:
            raise EngineError(f"attention {self.attention!r} is unknown: choose one of {', '.join(ATTENTION_FORMS)}")
        for name in ("slots", "max_len", "chunk_tokens", "chunks"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name.replace('_', '-')} is {getattr(self, name)}, must be at least 1")
        replace = object.__setattr__
        replace(self, "chunk_tokens", min(self.chunk_tokens, self.max_len))
        replace(self, "chunks", min(self.chunks, self.slots))
        replace(self, "step_tokens", self.step_tokens or self.chunk_tokens + self.slots + STEP_SLACK)
        replace(self, "rows", self.rows or max(self.slots, CANDIDATES))
        if self.step_tokens <= self.slots:
            raise EngineError(f"step-tokens is {self.step_tokens}, must be more than the {self.slots} slots")
        if self.rows < self.slots:
            raise EngineError(f"rows is {self.rows}, must be at least the {self.slots} slots")

    @property
    def positions(self) -> int:
        """Positions of a row of the cache: `max_len`, and a spare one that takes the tokens nobody reads."""
        return self.max_len + 1

    @property
    def cache_rows(self) -> int:
        """Rows of every cache: row 0 is the spare row, slot s lives in row s + 1."""
        return self.slots + 1

    @property
    def compute(self) -> Compute:
        """Type of activations and caches."""
        return COMPUTE[self.precision]

    @property
    def quantised(self) -> bool:
        """Whether the linear layers are constants of the plan."""
        return self.precision in QUANTISED

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        """Numbers of slots that decode steps are padded to, ascending; the last is `slots`.

        Powers of two, and from 16 on one more between each two: above 16, padding is a third of a step at most.
        """
        buckets = [bucket for bucket in FIRST_BUCKETS if bucket < self.slots]
        power = 16
        while power < self.slots:
            buckets += [bucket for bucket in (power, power * 3 // 2) if bucket < self.slots]
            power *= 2
        return (*buckets, self.slots)
