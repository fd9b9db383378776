"""What is to be built: one value from the command line and the configuration to the manifest, and back to a command."""

import dataclasses
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from helixflow.engine.base import EngineError
from helixflow.engine.kinds import (
    ATTENTION_CHOICES,
    BACKENDS,
    DEFAULT_CHUNK_TOKENS,
    DEFAULT_SLOTS,
    PROVIDERS,
    RTX_OLDEST_SM,
    TENSORRT_MAX_LEN,
    AnyPrecision,
    AttentionChoice,
    Backend,
    PrecisionChoice,
    Provider,
    precisions,
)

if TYPE_CHECKING:
    from helixflow.config import PoolConfig
    from helixflow.engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an engine is built. `provider`: of onnx; the rest from `attention` on: of TensorRT.

    `slots`, `max_len`, `chunk_tokens` 0: not chosen. For onnx the first two are defaults for loading, for TensorRT the
    largest that can be loaded. `sms`: compute capabilities times ten, for tensorrt-rtx; none: all it builds for.
    `device`: number of the GPU that `tensorrt`, or attention auto, is built on.
    """

    backend: Backend = "onnx"
    provider: Provider = "cpu"
    precision: PrecisionChoice = "auto"
    slots: int = 0
    max_len: int = 0
    attention: AttentionChoice = "posmask"
    chunk_tokens: int = 0
    sms: tuple[int, ...] = ()
    device: int = 0

    @property
    def tensorrt(self) -> bool:
        """Whether this is one of the two TensorRTs."""
        return self.backend != "onnx"

    @property
    def kind(self) -> str:
        """The back end in a word, the provider included."""
        return "onnx-cuda" if self.provider == "cuda" else self.backend

    @property
    def chosen_precision(self) -> AnyPrecision:
        """The precision of a resolved recipe."""
        if self.precision == "auto":
            raise EngineError("the precision of an engine is not chosen yet")
        return self.precision

    def check(self) -> None:
        """Raises EngineError for options that do not exist or do not go together."""
        _one_of("backend", self.backend, BACKENDS)
        _one_of("provider", self.provider, PROVIDERS)
        _one_of("attention", self.attention, ATTENTION_CHOICES)
        if self.tensorrt and self.provider != "cpu":
            raise EngineError(f"provider {self.provider} is an option of onnx: {self.backend} always runs on a GPU")
        _one_of(f"precision of {self.kind}", self.precision, ("auto", *precisions(self.backend, self.provider)))
        if min(self.slots, self.max_len, self.chunk_tokens, self.device, *self.sms, 0) < 0:
            raise EngineError("slots, max-len, chunk-tokens, sm and device cannot be negative")
        if self.sms and self.backend != "tensorrt-rtx":
            raise EngineError(f"sm is an option of tensorrt-rtx: {self.backend} does not build for other devices")
        if not self.tensorrt and self.chunk_tokens:
            raise EngineError("chunk-tokens is an option of tensorrt and tensorrt-rtx")

    def resolved(self, spec: "ModelSpec", dtypes: Iterable[str]) -> "Recipe":
        """Everything chosen that the files depend on; `dtypes`: of the checkpoint's tensors. Raises EngineError."""
        self.check()
        longest = spec.longest
        if self.max_len > longest:
            raise EngineError(f"max-len {self.max_len} is more than the {longest} positions this model was made for")
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if "BF16" in set(dtypes) else "fp16"
            if not self.tensorrt and self.provider == "cpu":
                precision = "fp32"
        if not self.tensorrt:
            return dataclasses.replace(self, precision=precision)
        max_len = self.max_len or min(spec.max_positions, TENSORRT_MAX_LEN)
        return dataclasses.replace(
            self,
            precision=precision,
            slots=self.slots or DEFAULT_SLOTS,
            max_len=max_len,
            chunk_tokens=min(self.chunk_tokens or DEFAULT_CHUNK_TOKENS, max_len),
            sms=tuple(sorted(set(self.sms))),
        )

    def content(self) -> dict[str, Any]:
        """What built files depend on, besides the checkpoint, the versions and (`tensorrt`) the device."""
        content: dict[str, Any] = {"backend": self.backend, "precision": self.precision}
        if not self.tensorrt:
            return {**content, "provider": self.provider}
        sizes = {"slots": self.slots, "max_len": self.max_len, "chunk_tokens": self.chunk_tokens}
        return {**content, **sizes, "attention": self.attention, "sms": list(self.sms)}

    def runs_on(self, sm: int) -> bool:
        """Whether a plan of tensorrt-rtx runs on a compute capability. (Without a list TensorRT-RTX builds for 8.0 and
        newer: its documentation, "CPU-Only AOT and TensorRT-RTX Engines".)"""
        return sm in self.sms if self.sms else sm >= RTX_OLDEST_SM

    def arguments(self) -> list[str]:
        """Options of `helixflow engine build` that mean this recipe."""
        options: list[tuple[str, object]] = []
        if self.tensorrt:
            options.append(("--backend", self.backend))
        elif self.provider != "cpu":
            options.append(("--provider", self.provider))
        options.append(("--precision", self.precision))
        options += [("--slots", self.slots)] if self.slots else []
        options += [("--max-len", self.max_len)] if self.max_len else []
        if self.tensorrt:
            options.append(("--attention", self.attention))
            options += [("--chunk-tokens", self.chunk_tokens)] if self.chunk_tokens else []
            options += [("--sm", sm) for sm in self.sms]
            options += [("--device", self.device)] if self.device else []
        return [str(part) for option in options for part in option]

    def command(self, model_dir: Path | str, engines: Path | None = None) -> str:
        """The command line that builds it; `engines`: where, unless it is the usual place."""
        from helixflow.config import default_engines_dir  # noqa: PLC0415 - only messages need it

        elsewhere = [] if engines is None or engines == default_engines_dir() else ["--engines", str(engines)]
        return shlex.join(["helixflow", "engine", "build", str(model_dir), *self.arguments(), *elsewhere])


def pool_recipe(options: "PoolConfig") -> Recipe:
    """The recipe of what a pool serves; not for the scripted engine. For onnx, sizes are left to loading."""
    provider, precision = cast("Provider", options.provider), cast("PrecisionChoice", options.precision)
    if options.engine == "onnx":
        return Recipe("onnx", provider, precision, device=options.device)
    return Recipe(
        cast("Backend", options.engine),
        precision=precision,
        slots=options.slots,
        max_len=options.max_len,
        attention=cast("AttentionChoice", options.attention),
        chunk_tokens=options.chunk_tokens,
        device=options.device,
    )


def _one_of(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise EngineError(f"{what}: {value!r} is unknown: choose one of {', '.join(known)}")
