"""The golden checkpoints through a real engine: logits of every position, and tokens, chosen by the device.

In half precision a continuation may part from the reference where two tokens are nearly equal; what counts is that it
does so nowhere else, which the dense decoder in numpy decides.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helixflow.engine.base import Engine, EngineError, Float32
from helixflow.engine.decoder import write_decoder
from helixflow.engine.progress import silent
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.calibrate import activation_scales, calibration_sequences
from helixflow.engine.tensorrt.compile import profiles
from helixflow.engine.tensorrt.dense import NumpyBuilder, dense_logits
from helixflow.engine.tensorrt.engine import TensorRtEngine
from helixflow.engine.tensorrt.forward import Programs
from helixflow.engine.tensorrt.fused import FusedPrograms
from helixflow.engine.tensorrt.linear import quantise_fp8, quantise_int4, quantise_int8
from helixflow.engine.tensorrt.network import Network, build_network
from helixflow.engine.tensorrt.numeric import LARGEST_FP8, NUMPY, unpack_int4
from helixflow.engine.tensorrt.options import (
    FP8_SM,
    GPU_PRECISIONS,
    INT4_BLOCK,
    AttentionForm,
    EngineOptions,
    GpuPrecision,
)
from helixflow.engine.tensorrt.split import build_split
from helixflow.engine.tensorrt.split_forward import SplitPrograms
from helixflow.engine.weights import Checkpoint
from perf.gpu.bench import Bench, Tools, capabilities, open_bench
from perf.gpu.drive import Part, logits_of, tokens_of
from perf.gpu.primitives import refused
from perf.gpu.rows import Report, SkippedError, Task

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "golden"
TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 8e-2, "int8": 2e-2, "int4": 2e-2, "fp8": 2.5e-1}
"""Largest difference of a logit from the reference, over the largest logit. The reference of a quantised engine has its
weights quantised as well; inputs of fp8 products are rounded besides."""
PIECES = (5, 11)
# A hole between the slots, which idle launches pass over.
SLOTS = (0, 1, 3, 4, 5)
MAX_LEN = 160
NEW_TOKENS = 24


Dense = Callable[[Sequence[int]], Float32]
"""Logits of every position of a sequence, float32 [tokens, vocab]."""


@dataclass(frozen=True, slots=True)
class Golden:
    """A checkpoint with what it computes: `prompts`, their `logits` [tokens, vocab] and `continuations`."""

    name: str
    spec: ModelSpec
    read: Callable[[str], Float32]
    prompts: list[list[int]]
    logits: list[Float32]
    continuations: list[list[int]]

    def dense(self, ids: Sequence[int]) -> Float32:
        """The reference itself, in numpy."""
        return dense_logits(self.spec, self.read, ids, MAX_LEN)


def load(name: str) -> Golden:
    """Reads one of them. Raises SkippedError when it is not here."""
    directory = GOLDEN / name
    if not directory.is_dir():
        raise SkippedError(f"{directory} is not here")
    checkpoint = Checkpoint(directory)
    spec = ModelSpec.load(directory, checkpoint.entries)
    cases: list[dict[str, Any]] = json.loads((directory / "golden.json").read_text(encoding="utf-8"))["cases"]
    with np.load(directory / "golden_logits.npz") as stored:
        logits = [stored[f"logits_{i}"] for i in range(len(cases))]
    prompts, continuations = [case["input_ids"] for case in cases], [case["greedy_24"] for case in cases]
    return Golden(name, spec, checkpoint.tensor, prompts, logits, continuations)


@dataclass(frozen=True, slots=True)
class Found:
    """What an engine made of a checkpoint: worst relative `error` of a logit; how many of `total` continuations were
    `equal`, and what is wrong with another one (`wrong`: "" when it parts at a near tie)."""

    error: float
    equal: int
    total: int
    wrong: str


def examine(engine: Engine, golden: Golden, tolerance: float, reference: Dense | None = None) -> Found:
    """Prompts in pieces, decoding in ragged batches, then prompts that come while others decode. `reference`: what the
    engine should compute, if that is not what the checkpoint does. Raises EngineError."""
    dense = reference or golden.dense
    expected = golden.logits if reference is None else [reference(ids) for ids in golden.prompts]
    peak = max(float(np.abs(rows).max()) for rows in expected)
    errors = []
    for slot, ids, rows in zip(SLOTS, golden.prompts, expected, strict=False):
        difference = float(np.abs(_prefilled(engine, slot, ids) - rows).max()) / peak
        errors.append(math.inf if math.isnan(difference) else difference)
    runs = [*_ragged(engine, golden), *_mixed(engine, golden)]
    equal, wrong = 0, ""
    for ids, tokens, continuation in zip(golden.prompts * 2, runs, golden.continuations * 2, strict=True):
        if reference is None and tokens == continuation:
            equal += 1
            continue
        # What the reference thinks of each token, given those before it.
        rows = dense([*ids, *tokens[:-1]])[len(ids) - 1 :]
        gaps = rows.max(axis=-1) - rows[np.arange(len(tokens)), tokens]
        equal += not gaps.any()
        if gaps.max() > 2 * tolerance * peak:
            at = int(gaps.argmax())
            wrong = f"token {at} of a continuation is not the reference's, which is sure by {gaps[at]:.3g}"
    return Found(max(errors), equal, len(runs), wrong)


def _prefilled(engine: Engine, slot: int, ids: Sequence[int]) -> Float32:
    """Logits of every position of a prompt that comes in pieces."""
    rows, past = [], 0
    for size in (*PIECES, len(ids)):
        piece = ids[past : past + size]
        if piece:
            rows.append(logits_of(engine, [Part(slot, past, piece, len(piece))]))
            past += len(piece)
    return np.concatenate(rows)


def _ragged(engine: Engine, golden: Golden) -> list[list[int]]:
    """Continuations, all sequences in step, from what `_prefilled` left in the slots."""
    runs = []
    for slot, ids in zip(SLOTS, golden.prompts, strict=False):
        runs.append(tokens_of(engine, [Part(slot, len(ids) - 1, ids[-1:])]))
    for i in range(NEW_TOKENS - 1):
        parts = [
            Part(slot, len(ids) + i, tokens[-1:])
            for slot, ids, tokens in zip(SLOTS, golden.prompts, runs, strict=False)
        ]
        for tokens, token in zip(runs, tokens_of(engine, parts), strict=True):
            tokens.append(token)
    return runs


def _mixed(engine: Engine, golden: Golden) -> list[list[int]]:
    """Continuations of prompts that come in pieces of different lengths while others decode; slots out of order."""
    slots = [4, 0, 5, 2, 1][: len(golden.prompts)]
    done, runs = [0] * len(slots), [[] for _ in slots]  # type: tuple[list[int], list[list[int]]]
    while any(len(tokens) < NEW_TOKENS for tokens in runs):
        parts, waiting = [], []
        for i, (slot, prompt) in enumerate(zip(slots, golden.prompts, strict=True)):
            ids = (prompt + runs[i])[done[i] :]
            if len(runs[i]) < NEW_TOKENS:
                piece = ids[: 6 + i]
                final = len(piece) == len(ids)
                parts.append(Part(slot, done[i], piece, int(final)))
                done[i] += len(piece)
                waiting += [i] if final else []
        for i, token in zip(waiting, tokens_of(engine, parts), strict=True):
            runs[i].append(token)
    return runs


def row(report: Report, what: str, found: Found, tolerance: float) -> None:
    """The verdict on one checkpoint."""
    figure = f"logits within {found.error:.1e}, {found.equal} of {found.total} continuations equal"
    problem = found.wrong or f"logits differ by more than {tolerance:g}"
    report.check(what, figure, found.error <= tolerance and not found.wrong, problem)


def check_tensorrt(task: Task) -> None:
    """One precision: all checkpoints with masked attention, then with our own kernels where they go with it."""
    precision = next(name for name in ("fp32", *GPU_PRECISIONS) if name == task.option)
    sizes = (task.tools or Tools()).sizes
    forms: tuple[AttentionForm, ...] = ("posmask", "split") if precision in ("fp16", "bf16") else ("posmask",)
    for form in [form for form in forms if form in sizes.forms]:
        for name in sizes.golden:
            if task.report.left < 12:
                task.report.row(f"{form}, {name}", "", "SKIPPED", "time is up")
                continue
            # An engine closes its device: each has one of its own.
            with open_bench(task) as bench:
                sm = bench.device.info().sm
                if precision == "fp8" and sm < FP8_SM:
                    raise SkippedError(f"SM {sm} has no fp8 products, SM {FP8_SM} has")
                golden = load(name)
                _one(task.report, bench, golden, precision, form)


def _one(report: Report, bench: Bench, golden: Golden, precision: GpuPrecision, form: AttentionForm) -> None:
    options = EngineOptions(precision, slots=6, max_len=MAX_LEN, attention=form, chunk_tokens=32, chunks=4)
    what, scales = f"{form}, {golden.name}", {}  # type: tuple[str, dict[str, float]]
    if precision == "fp8":
        scales = activation_scales(golden.spec, golden.read, [*calibration_sequences(golden.spec), *golden.prompts])
    try:
        engine = _engine(bench, golden, options, scales)
    except EngineError as error:
        refused(report, what, error)
        return
    try:
        reference = _narrow(golden, precision, scales) if options.quantised else None
        row(report, what, examine(engine, golden, TOLERANCE[precision], reference), TOLERANCE[precision])
    finally:
        engine.close()


def _engine(bench: Bench, golden: Golden, options: EngineOptions, scales: Mapping[str, float]) -> TensorRtEngine:
    """Built and loaded with the checkpoint's weights."""
    library, device, spec, name = bench.library, bench.device, golden.spec, "plan"
    networks: dict[str, Network]
    if options.attention == "split":
        networks = build_split(library, spec, options)
    else:
        networks = {name: build_network(library, spec, options, golden.read, scales)}
    sms, ranges = capabilities(library, device.info().sm), profiles(options)
    compiler = bench.tools.toolkit.compile
    plans = {
        part: bytes(compiler(library, network, options.precision, ranges, sms, silent))
        for part, network in networks.items()
    }
    programs: Programs
    if options.attention == "split":
        programs = SplitPrograms(device, plans, spec, options)
    else:
        programs = FusedPrograms(device, plans[name], spec)
    weights = {stored: golden.read(stored).astype(NUMPY[options.compute]) for stored in programs.weights}
    return TensorRtEngine(device, spec, options, programs, weights)


def _narrow(golden: Golden, precision: GpuPrecision, scales: Mapping[str, float]) -> Dense:
    """The reference with weights, and inputs of fp8 products, as a quantised engine has them."""

    def dense(ids: Sequence[int]) -> Float32:
        builder = _Narrowed(golden.spec, quantised(golden, precision), [ids], MAX_LEN)
        builder.scales = scales
        write_decoder(golden.spec, builder)
        return builder.logits

    return dense


class _Narrowed(NumpyBuilder):
    """Rounds the inputs of linear layers that have a scale to fp8."""

    scales: Mapping[str, float]

    def linear(self, x: Float32, name: str, bias: bool) -> Float32:
        """See `decoder.Builder`."""
        if name in self.scales:
            step = np.float32(np.float16(self.scales[name]))
            codes = np.clip(x / step, -LARGEST_FP8, LARGEST_FP8).astype(NUMPY["fp8"])
            x = codes.astype(np.float32) * step
        return super().linear(x, name, bias)


def quantised(golden: Golden, precision: GpuPrecision) -> Callable[[str], Float32]:
    """The checkpoint's weights as a quantised engine has them."""

    def read(name: str) -> Float32:
        weight = golden.read(name)
        if not name.endswith("_proj.weight") or (precision == "int4" and weight.shape[1] % INT4_BLOCK):
            return weight.astype(np.float16).astype(np.float32)
        wide: Float32
        if precision == "int8":
            codes, steps = quantise_int8(weight, "fp16")
            wide = codes.astype(np.float32) * steps.astype(np.float32)[:, None]
        elif precision == "int4":
            packed, steps = quantise_int4(weight, "fp16")
            wide = unpack_int4(packed).astype(np.float32) * np.repeat(steps.astype(np.float32), INT4_BLOCK, axis=1)
        else:
            codes, steps = quantise_fp8(weight, "fp16")
            wide = codes.astype(np.float32) * steps.astype(np.float32)
        return wide

    return read
