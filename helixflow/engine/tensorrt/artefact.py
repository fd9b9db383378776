"""A built TensorRT engine on disk: plans, weights that are inputs, and what they may be run with.

`plan.bin` (attention split: one file per network) is what TensorRT compiled; `weights.bin` with `weights.json` holds
the weights that are inputs (see `weightfile`). Engines with equal weights are links to one file of them.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow import core_rs
from helixflow.engine.base import EngineError
from helixflow.engine.kinds import RTX_OLDEST_SM
from helixflow.engine.manifest import Manifest, digest, file_sha256
from helixflow.engine.progress import Progress, silent
from helixflow.engine.recipe import Recipe
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.calibrate import TEXTS, activation_scales, calibration_sequences
from helixflow.engine.tensorrt.compile import OLDEST_SM, Profile, check_devices, compile_plan, profiles
from helixflow.engine.tensorrt.device import Device, DeviceInfo
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.library import load as load_library
from helixflow.engine.tensorrt.linear import Read
from helixflow.engine.tensorrt.network import Network, build_network
from helixflow.engine.tensorrt.options import KINDS, AttentionForm, EngineOptions, GpuPrecision, Kind
from helixflow.engine.tensorrt.split import build_split
from helixflow.engine.tensorrt.weightfile import INDEX, WEIGHTS, Pieces, read_weights, write_weights

PLAN = "plan.bin"
TOKENISER = "tokenizer.json"
Compile = Callable[[Library, Network, GpuPrecision, Sequence[Profile], Sequence[int], Progress], "memoryview | bytes"]


def _open_cuda(library: Library, index: int) -> Device:
    from helixflow.engine.tensorrt.cuda import open_device  # noqa: PLC0415 - needs cuda-python

    return open_device(library, index)


@dataclass(frozen=True, slots=True)
class Toolkit:
    """What engines are compiled and run with; proofs without a GPU put other parts in."""

    library: Callable[[Kind], Library] = load_library
    compile: Compile = compile_plan
    open_device: Callable[[Library, int], Device] = _open_cuda


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights of an artefact come from. `pieces`: in the type of the activations; `read`: float32.

    `sequences`: token ids to calibrate fp8 with. `identity`: equal for equal weights; `siblings`: engines whose file of
    weights may be taken when it was made from the same ones.
    """

    pieces: Pieces
    read: Read
    sequences: Callable[[], tuple[str, Sequence[Sequence[int]]]]
    identity: str = ""
    siblings: Sequence[tuple[Path, Manifest]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Artefact:
    """An engine that may be run. `weights`: by name in the checkpoint, mapped, in the type of the activations."""

    directory: Path
    manifest: Manifest
    spec: ModelSpec
    options: EngineOptions
    weights: Mapping[str, NDArray[Any]]

    def plan(self, name: str = PLAN) -> bytes:
        """One of its plans. Raises EngineError."""
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise EngineError(f"{self.directory / name}: cannot be read: {error.strerror or error}") from error


def engine_options(recipe: Recipe) -> EngineOptions:
    """The options of a resolved recipe. Raises EngineError."""
    precision, attention = recipe.chosen_precision, recipe.attention
    if precision == "fp32" or attention == "auto":
        raise EngineError(f"{recipe.backend} builds no engine of precision {precision} and attention {attention}")
    return EngineOptions(precision, recipe.slots, recipe.max_len, attention, recipe.chunk_tokens)


def kind_of(recipe: Recipe) -> Kind:
    """The TensorRT of a recipe."""
    for kind in KINDS:
        if kind == recipe.backend:
            return kind
    raise EngineError(f"{recipe.backend} is no TensorRT")


def device_name(info: DeviceInfo) -> str:
    """How a manifest names the device that a plan of enterprise TensorRT is bound to."""
    return f"{info.name} (SM {info.sm})"


def check_precision(precision: GpuPrecision, info: DeviceInfo) -> None:
    """Raises EngineError when the device has no arithmetic for a precision."""
    oldest, family = OLDEST_SM.get(precision, (0, ""))
    if info.sm < oldest:
        raise EngineError(
            f"{precision} needs SM {oldest} ({family}) or newer, this device is {device_name(info)}: "
            "choose another precision"
        )


def write_artefact(
    directory: Path,
    library: Library,
    spec: ModelSpec,
    recipe: Recipe,
    weights: Weights,
    compiler: Compile = compile_plan,
    progress: Progress = silent,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Writes plans and weights; returns the SHA-256 of each file, and what a manifest says about the options.

    Raises EngineError, OSError.
    """
    options = engine_options(recipe)
    check_devices(library, options.precision, recipe.sms)
    scales, calibration = None, ""
    if options.precision == "fp8":
        calibration, sequences = weights.sequences()
        scales = activation_scales(spec, weights.read, sequences, progress)
    read = _counted(weights.read, spec, progress) if options.quantised else None
    networks = _networks(library, spec, options, read, scales)
    shapes = _inputs(spec, options, networks)
    unquantised = {name for network in networks.values() for name in network.unquantised}
    files = {}
    for name in list(networks):
        plan = compiler(library, networks.pop(name), options.precision, profiles(options), recipe.sms, progress)
        (directory / name).write_bytes(plan)
        files[name] = hashlib.sha256(plan).hexdigest()
        del plan
    key = digest({"weights": weights.identity, "type": options.compute, "shapes": shapes}) if weights.identity else ""
    shared = _shared(directory, key, weights.siblings)
    files |= shared or write_weights(directory, shapes, weights.pieces, options.compute, _written(shapes, progress))
    described = {
        **{name: getattr(options, name) for name in ("attention", "chunk_tokens", "chunks", "step_tokens", "rows")},
        "sms": list(recipe.sms),
        "unquantised": sorted(unquantised),
        "calibration": calibration,
        "weights": key,
    }
    return files, described


def _networks(
    library: Library,
    spec: ModelSpec,
    options: EngineOptions,
    constants: Read | None,
    scales: Mapping[str, float] | None,
) -> dict[str, Network]:
    """The network of each plan, by file name."""
    if options.attention != "split":
        return {PLAN: build_network(library, spec, options, constants, scales)}
    return {split_plan(part): network for part, network in build_split(library, spec, options).items()}


def split_plan(part: str) -> str:
    """File name of the plan of a part of `split.PARTS`."""
    return f"plan.{part}"


def _inputs(spec: ModelSpec, options: EngineOptions, networks: Mapping[str, Network]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that are inputs, by name in the checkpoint."""
    names = {stored for network in networks.values() for stored in network.weight_inputs.values()}
    # The networks of a split engine are used by every layer in turn.
    every = options.attention == "split"
    return {name: shape for name, shape in spec.tensors().items() if every or name in names}


def _counted(read: Read, spec: ModelSpec, progress: Progress) -> Read:
    """Reports what is read for constants."""
    total, done = sum(int(np.prod(shape)) for name, shape in spec.tensors().items() if "_proj.weight" in name), 0

    def counted(name: str) -> NDArray[np.float32]:
        nonlocal done
        tensor = read(name)
        done = min(done + tensor.size, total)
        progress("quantising the weights", done, total)
        return tensor

    return counted


def _written(shapes: Mapping[str, tuple[int, ...]], progress: Progress) -> Callable[[int], None]:
    total, done = sum(int(np.prod(shape)) for shape in shapes.values()), 0

    def wrote(values: int) -> None:
        nonlocal done
        done += values
        progress("writing the weights", done, total)

    return wrote


def _shared(directory: Path, key: str, siblings: Sequence[tuple[Path, Manifest]]) -> dict[str, str] | None:
    """Links the weights of another engine that were made from the same ones, if it has them undamaged."""
    for other, manifest in siblings:
        if not key or manifest.options.get("weights") != key:
            continue
        with contextlib.suppress(OSError, EngineError):
            for name in (WEIGHTS, INDEX):
                os.link(other / name, directory / name)
            if all(file_sha256(directory / name) == manifest.files[name] for name in (WEIGHTS, INDEX)):
                return {name: manifest.files[name] for name in (WEIGHTS, INDEX)}
        for name in (WEIGHTS, INDEX):
            (directory / name).unlink(missing_ok=True)
    return None


def checkpoint_sequences(model_dir: Path, spec: ModelSpec) -> tuple[str, list[list[int]]]:
    """What fp8 is calibrated with, and its name for the manifest: text, or where the checkpoint has no tokeniser, ids
    spread over the vocabulary. Raises EngineError for a tokeniser that cannot be used."""
    if not (model_dir / TOKENISER).is_file():
        return "ids", calibration_sequences(spec)
    try:
        encoded = core_rs.encode(model_dir, list(TEXTS))
    except core_rs.CoreError as error:
        raise EngineError(f"fp8 cannot be calibrated: {error}") from error
    return "text", calibration_sequences(spec, dict(zip(TEXTS, encoded, strict=True)).__getitem__)


def open_artefact(directory: Path, manifest: Manifest, library: Library, info: DeviceInfo) -> Artefact:
    """An engine whose files have been verified. Raises EngineError with what to run, when it is for another version of
    TensorRT or another device; nothing of it is loaded then."""
    check_fits(directory, manifest, library, info)
    weights = read_weights(directory)
    recipe = manifest.recipe
    sizes = {name: manifest.options[name] for name in ("chunks", "step_tokens", "rows")}
    options = dataclasses.replace(engine_options(recipe), **sizes)
    # Biases are inputs in every precision; config.json need not announce those that a checkpoint holds.
    spec = ModelSpec.load(directory, weights)
    return Artefact(directory, manifest, spec, options, weights)


def check_fits(directory: Path, manifest: Manifest, library: Library, info: DeviceInfo) -> None:
    """Raises EngineError when an engine is for another TensorRT or another device."""
    recipe, built = manifest.recipe, manifest.versions.get(library.kind, "nothing")
    place = directory.parent.parent
    if manifest.backend != library.kind:
        raise EngineError(
            f"{directory} is an engine of {manifest.backend}: set HELIX_POOL_ENGINE={manifest.backend}, or run "
            f"`{dataclasses.replace(recipe, backend=library.kind, sms=()).command(manifest.checkpoint, place)}`"
        )
    if built != library.version:
        raise EngineError(
            f"{directory} was built with {library.kind} {built}, {library.version} is installed: "
            f"run `{recipe.command(manifest.checkpoint, place)}`"
        )
    if manifest.device and manifest.device != device_name(info):
        raise EngineError(
            f"{directory} was built on {manifest.device}, this device is {device_name(info)}: "
            f"run `{recipe.command(manifest.checkpoint, place)}`"
        )
    if library.rtx and not recipe.runs_on(info.sm):
        built_for = ", ".join(str(sm) for sm in recipe.sms) or f"{RTX_OLDEST_SM} and newer"
        wider = dataclasses.replace(recipe, sms=(*recipe.sms, info.sm))
        raise EngineError(
            f"{directory} was built for SM {built_for}, this device is {device_name(info)}: "
            f"run `{wider.command(manifest.checkpoint, place)}`"
        )


def form_of(manifest: Manifest) -> AttentionForm:
    """The attention form of a built engine."""
    form: AttentionForm = manifest.options["attention"]
    return form


def bound_device(library: Library, recipe: Recipe, toolkit: Toolkit) -> str:
    """The device of this machine that enterprise TensorRT builds for, as a manifest names it. Raises EngineError when
    there is none, or when it has no arithmetic for the precision."""
    device = toolkit.open_device(library, recipe.device)
    try:
        info = device.info()
    finally:
        device.close()
    check_precision(engine_options(recipe).precision, info)
    return device_name(info)
