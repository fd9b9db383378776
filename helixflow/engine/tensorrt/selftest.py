"""Does this GPU compute the right tokens? A small model through the real runner, against dense numpy.

The model has what every supported model has: grouped queries, norms of q and k, biases, a layer with a window and one
without. The caches begin full of huge numbers; prompts come in pieces, alone and beside decoding slots; slots are
skipped, copied from and used again. Kernels that read what they must not, of which there were some (see `attention`),
are found by it, and their form of attention is not used.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from helixflow import __version__
from helixflow.engine.base import EngineError, Float32
from helixflow.engine.kinds import Backend
from helixflow.engine.manifest import Manifest, digest
from helixflow.engine.progress import Progress, silent
from helixflow.engine.recipe import Recipe
from helixflow.engine.rope import RopeSpec
from helixflow.engine.spec import ModelSpec
from helixflow.engine.store import SELFTEST, existing, locked, publish
from helixflow.engine.tensorrt.artefact import (
    Artefact,
    Toolkit,
    Weights,
    device_name,
    engine_options,
    kind_of,
    write_artefact,
)
from helixflow.engine.tensorrt.assemble import open_engine
from helixflow.engine.tensorrt.dense import dense_logits
from helixflow.engine.tensorrt.device import Device, DeviceInfo
from helixflow.engine.tensorrt.engine import TensorRtEngine
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import ATTENTION_FORMS, AttentionForm, Compute
from helixflow.engine.tensorrt.scenario import MAX_LEN, SEED, SLOTS, Scenario
from helixflow.engine.tensorrt.weightfile import read_weights

CHUNK = 32
WINDOW = 48
SPEC = ModelSpec(
    family="qwen3",
    vocab_size=256,
    hidden_size=128,
    intermediate_size=192,
    # Of three layers, `split` runs its middle engine twice in a recorded graph, at other addresses each time.
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=64,
    eps=1e-6,
    rope=RopeSpec("default", 10000.0, trained=MAX_LEN),
    tied=False,
    qk_norm=True,
    biases=frozenset({"q_proj", "k_proj", "v_proj"}),
    windows=(WINDOW, None, WINDOW),
    max_positions=MAX_LEN,
)
# Every byte of the caches: +-9088 in fp16, +-3e29 in bf16. Scores of such keys decide a softmax, and stay finite.
GARBAGE = (0x70, 0xF0)
TOLERANCE: dict[Compute, float] = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.25}
"""Largest difference of a logit from the reference. The logits have a standard deviation of about 1.5."""


@dataclass(frozen=True, slots=True)
class Result:
    """Of one form of attention. `error`: largest difference of a logit, of `rows` rows; `wrong`: chosen tokens that are
    not the reference's, of `tokens`; `ties`: those where the reference had two within the tolerance. `reason`: why it
    did not pass, "" when it did."""

    form: AttentionForm
    compute: Compute
    error: float = 0.0
    tolerance: float = 0.0
    rows: int = 0
    tokens: int = 0
    wrong: int = 0
    ties: int = 0
    seconds: float = 0.0
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the form may be served with."""
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        """A line of a table."""
        verdict = "passed" if self.passed else f"FAILED: {self.reason}"
        figures = f"logits within {self.error:.4f} of {self.tolerance:g}, {self.wrong} of {self.tokens} tokens wrong"
        return f"{self.form:<18} {self.compute:<5} {figures}, {self.seconds:.1f} s  {verdict}"


def run_selftest(
    toolkit: Toolkit,
    backend: Backend,
    device: int,
    place: Path,
    compute: Compute,
    forms: Sequence[AttentionForm] = ATTENTION_FORMS,
    progress: Progress = silent,
) -> Iterator[Result]:
    """Tests one form after the other, as they are asked for; `place`: where engines are, for the small ones.

    Raises EngineError when there is no device or no TensorRT; what goes wrong in a form is its result.
    """
    library = toolkit.library(kind_of(Recipe(backend)))
    for number, form in enumerate(forms):
        progress(f"self-test {compute}", number, len(forms))
        started = time.monotonic()
        opened = toolkit.open_device(library, device)
        try:
            result = _tested(toolkit, library, opened, place, form, compute)
        except EngineError as error:
            result = Result(form, compute, reason=str(error))
        finally:
            opened.close()
        progress(f"self-test {compute}", number + 1, len(forms))
        yield replace(result, seconds=time.monotonic() - started)


def first_passing(results: Iterable[Result], report: Callable[[Result], None]) -> AttentionForm:
    """The form of the first result that passed. Raises EngineError with all figures when none did."""
    failed = []
    for result in results:
        report(result)
        if result.passed:
            return result.form
        failed.append(str(result))
    raise EngineError("the self-test of the GPU failed, nothing is served from it:\n  " + "\n  ".join(failed))


def _tested(
    toolkit: Toolkit, library: Library, device: Device, place: Path, form: AttentionForm, compute: Compute
) -> Result:
    artefact = _artefact(toolkit, library, device.info(), place, form, compute)
    engine = open_engine(device, artefact, SLOTS, MAX_LEN)
    try:
        spoil(device, engine, compute)
        scenario = Scenario(engine, SPEC.vocab_size)
        scenario.run()
    finally:
        engine.close()
    return judge(scenario, artefact, TOLERANCE[compute])


def spoil(device: Device, engine: TensorRtEngine, compute: Compute) -> None:
    """Fills the caches with garbage."""
    nbytes = (SLOTS + 1) * SPEC.kv_heads * (MAX_LEN + 1) * SPEC.head_dim * NUMPY[compute].itemsize
    for number, address in enumerate(engine.caches.values()):
        device.fill(address, GARBAGE[number % 2], nbytes)
    device.synchronize()


def judge(scenario: Scenario, artefact: Artefact, tolerance: float) -> Result:
    """Compares what the engine answered with the reference."""

    def read(name: str) -> Float32:
        return artefact.weights[name].astype(np.float32)

    error, rows, tokens, wrong, ties = 0.0, 0, 0, 0, 0
    for sequence in scenario.ended:
        expected = dense_logits(artefact.spec, read, sequence.tokens[: sequence.past], MAX_LEN)
        for position, row in sequence.logits.items():
            difference = float(np.abs(row - expected[position]).max())
            # NaN compares as smaller than anything.
            error = max(error, math.inf if math.isnan(difference) else difference)
            rows += 1
        for position, token in sequence.chosen.items():
            gap = float(expected[position].max() - expected[position, token])
            tokens += 1
            # Either of the two may have been off by the tolerance.
            ties += 0 < gap <= 2 * tolerance
            wrong += gap > 2 * tolerance
    reasons = []
    if not error <= tolerance:
        reasons.append("logits differ from the reference")
    if wrong:
        reasons.append("tokens differ from the reference")
    if scenario.differing:
        reasons.append(f"{scenario.differing} of {scenario.drawn} drawn tokens differ from the host's")
    form, compute = artefact.options.attention, artefact.options.compute
    return Result(form, compute, error, tolerance, rows, tokens, wrong, ties, reason="; ".join(reasons))


def _artefact(
    toolkit: Toolkit, library: Library, info: DeviceInfo, place: Path, form: AttentionForm, compute: Compute
) -> Artefact:
    """The small engine of a form, built or found."""
    target = f"sm{info.sm}" if library.rtx else re.sub(r"[^A-Za-z0-9]+", "-", device_name(info)).strip("-").lower()
    home = place / SELFTEST
    directory = home / f"{library.kind}-{library.version}-{target}-{compute}-{form}"
    sms = (info.sm,) if library.rtx else ()
    recipe = Recipe(library.kind, "cpu", compute, SLOTS, MAX_LEN, form, CHUNK, sms)
    manifest = Manifest(
        model="self-test",
        checkpoint="",
        key=digest({"spec": repr(SPEC), "seed": SEED, "recipe": recipe.content(), "version": __version__}),
        backend=recipe.backend,
        provider=recipe.provider,
        precision=compute,
        slots=SLOTS,
        max_len=MAX_LEN,
        options={},
        device="" if library.rtx else device_name(info),
        versions={library.kind: library.version},
        shapes={},
        sources={},
        texts={},
        files={},
    )

    def write(work: Path) -> Manifest:
        random = np.random.default_rng(SEED)
        tensors = {name: _values(random, name, shape) for name, shape in SPEC.tensors().items()}
        weights = Weights(
            pieces=lambda name: iter([tensors[name].astype(NUMPY[compute])]),
            read=tensors.__getitem__,
            sequences=lambda: ("", ()),
        )
        files, options = write_artefact(work, library, SPEC, recipe, weights, toolkit.compile)
        return replace(manifest, files=files, options=options)

    with locked(home):
        found = existing(directory, verify=True)
        if found is None or found.key != manifest.key:
            found = publish(directory, write)
    return Artefact(directory, found, SPEC, engine_options(recipe), read_weights(directory))


def _values(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Float32:
    """Weights with which every part of the model matters: attention is neither flat nor all on one position."""
    values = random.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return 1 + values * np.float32(0.2)
    if name.endswith(".bias"):
        return values * np.float32(0.5)
    return values * np.float32(1.0 if "embed" in name else 1.5 / math.sqrt(shape[1]))
