"""The steps of the GPU check, in the order in which they are run, and what each needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Backend = Literal["", "tensorrt-rtx", "tensorrt", "onnx"]
"""Empty: the step is about the device or about all of them."""
TENSORRT: tuple[Backend, ...] = ("tensorrt-rtx", "tensorrt")
BACKENDS: tuple[Backend, ...] = (*TENSORRT, "onnx")
SHARED: tuple[Backend, ...] = ("",)
BEST = "end-to-end"
"""The step that is run with the fastest of the back ends that passed."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step. `title`: one line for the report; `call`: `module:function` under `perf.gpu`, given `option`; `limit_s`:
    after which it is killed; `needs`: steps that must have passed; `uses`: steps that are run first if they can be."""

    name: str
    title: str
    call: str
    backends: tuple[Backend, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    option: str = ""

    def chosen(self, names: Sequence[str]) -> bool:
        """Whether `--only` names mean this step: its name, or the part before a dot; none mean all."""
        return not names or any(self.name == name or self.name.startswith(name + ".") for name in names)


def _tensorrt(name: str, title: str, call: str, limit_s: float, *uses: str, option: str = "") -> Step:
    return Step(name, title, call, TENSORRT, limit_s, ("accept",), uses, option)


def _golden(precision: str) -> Step:
    title = f"golden checkpoints, {precision}: 24 greedy tokens of each prompt, logits of each position"
    return _tensorrt(f"golden.{precision}", title, "golden:check_tensorrt", 150, option=precision)


def _onnx(name: str, title: str, call: str, limit_s: float, *uses: str, option: str = "") -> Step:
    return Step(name, title, call, ("onnx",), limit_s, ("accept-cuda",), uses, option)


SELFTEST = "start-up self-test of every form of attention, "
LARGE = "8B shape, random bf16 weights made on the device, through the engine's own step"

STEPS: tuple[Step, ...] = (
    Step("copy", "device-to-device copy, bytes read and written", "basics:copy", SHARED, 60),
    Step("accept", "a small network built, loaded and run on this device", "basics:accept", TENSORRT, 90),
    _tensorrt("rate", "large matrix product through the library", "basics:rate", 90),
    _tensorrt("primitives.cache", "cache updates against numpy", "primitives:cache_updates", 60),
    _tensorrt("primitives.attention", "masked attention against numpy", "primitives:attention", 90),
    _tensorrt("primitives.lengths", "attention over lengths against numpy", "primitives:lengths", 60),
    _tensorrt("primitives.rows", "norm, rotation, gated unit, product against numpy", "primitives:rows", 60),
    _tensorrt("primitives.linear", "quantised linear layers against numpy", "primitives:linear", 60),
    _tensorrt("primitives.sampler", "choice of tokens against numpy", "primitives:sampler", 60),
    _tensorrt("selftest.fp16", SELFTEST + "fp16", "selfcheck:check", 120, option="fp16"),
    _tensorrt("selftest.bf16", SELFTEST + "bf16", "selfcheck:check", 120, option="bf16"),
    _golden("fp16"),
    _golden("bf16"),
    _tensorrt("large.posmask", LARGE, "large:check", 240, "copy", "rate", option="posmask"),
    _tensorrt("large.split", LARGE, "large:check", 200, "copy", "rate", option="split"),
    Step("accept-cuda", "a small product through ONNX Runtime on this device", "onnx_cuda:accept", ("onnx",), 60),
    _onnx("golden-cuda.fp16", "golden checkpoints on CUDA, fp16", "onnx_cuda:golden", 60, option="fp16"),
    _onnx("golden-cuda.bf16", "golden checkpoints on CUDA, bf16", "onnx_cuda:golden", 60, option="bf16"),
    _onnx("rate-cuda", "large matrix product through ONNX Runtime", "onnx_cuda:rate", 60),
    _onnx("large-cuda", "8B shape on CUDA, random weights", "onnx_cuda:large", 120, "copy", "rate-cuda"),
    _tensorrt("length", "decode attention against S_max and length", "attention_cost:check", 120, "copy"),
    _tensorrt("weights", "weights as inputs against constants", "costs:weights", 90, "copy"),
    _tensorrt("mixed", "mixed step against separate calls", "costs:mixed", 90),
    _tensorrt("sampling", "cost of sampling in the engine", "costs:sampling", 60),
    _tensorrt("graph", "graph replay against enqueueing", "costs:graph", 60),
    _tensorrt("memory", "memory against its prediction", "costs:memory", 60),
    _golden("int8"),
    _golden("int4"),
    _golden("fp8"),
    _golden("fp32"),
    _onnx("golden-cuda.int8", "golden checkpoints on CUDA, int8", "onnx_cuda:golden", 60, option="int8"),
    _onnx("golden-cuda.int4", "golden checkpoints on CUDA, int4", "onnx_cuda:golden", 60, option="int4"),
    Step(BEST, "gateway and pool around the engine", "end_to_end:check", SHARED, 200),
)


def find(name: str) -> Step:
    """A step by name. Raises KeyError."""
    return {step.name: step for step in STEPS}[name]
