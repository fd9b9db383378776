"""From a directory to a running engine."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from helixflow.engine.base import Engine, EngineError
from helixflow.engine.kinds import (
    DEFAULT_SLOTS,
    AttentionChoice,
    PrecisionChoice,
    Provider,
)
from helixflow.engine.manifest import MANIFEST, Manifest
from helixflow.engine.memory import available_bytes
from helixflow.engine.progress import Progress, silent
from helixflow.engine.recipe import Recipe
from helixflow.engine.scripted import ScriptedEngine
from helixflow.engine.spec import ModelSpec

if TYPE_CHECKING:
    from helixflow.engine.tensorrt.artefact import Toolkit

Kind = Literal["onnx", "tensorrt", "tensorrt-rtx", "scripted"]
# Of the memory that the weights leave, the caches of an engine take at most this part when no length is asked for.
CACHE_SHARE = 0.5
LENGTH_STEP = 256


def load_engine(  # noqa: PLR0913 - every option is a keyword with a default
    path: Path,
    kind: Kind = "onnx",
    *,
    provider: Provider = "cpu",
    precision: PrecisionChoice = "auto",
    slots: int = 0,
    max_len: int = 0,
    threads: int = 0,
    attention: AttentionChoice = "auto",
    chunk_tokens: int = 0,
    device: int = 0,
    engines: Path | None = None,
    script_step_s: float = 0.0,
    script_tokens: int = 0,
    script_hang_step: int = 0,
    progress: Progress = silent,
    toolkit: "Toolkit | None" = None,
) -> Engine:
    """Loads an engine. `path`: a built engine (a directory with a manifest), or a checkpoint, built when needed.

    `slots`, `max_len` 0: as the engine was built; for onnx else 16 slots of the length the model was trained for (less
    when the caches would take more than half of the memory that the weights leave). `provider`, `threads` (0: one per
    core): of onnx. `attention`, `chunk_tokens`: of TensorRT. `device`: number of the GPU. `engines`: where engines are
    built (default: as configured). `toolkit`: parts of TensorRT, for proofs without a GPU. Every file of a built engine
    is verified, and a TensorRT engine serves only after the self-test of its device. Raises EngineError.
    """
    if kind == "scripted":
        return ScriptedEngine.from_model(
            path,
            slots=slots or DEFAULT_SLOTS,
            max_len=max_len,
            step_s=script_step_s,
            tokens=script_tokens,
            hang_at_step=script_hang_step - 1 if script_hang_step else None,
        )
    wanted = Recipe(kind, provider, precision, slots, max_len, attention, chunk_tokens, device=device)
    wanted.check()
    if engines is None:
        from helixflow.config import default_engines_dir  # noqa: PLC0415

        engines = default_engines_dir()
    if wanted.tensorrt:
        from helixflow.engine.tensorrt.start import start  # noqa: PLC0415 - nobody else needs it

        return start(path, engines, wanted, progress=progress, toolkit=toolkit)
    return _onnx(path, engines, wanted, threads, progress)


def _onnx(path: Path, engines: Path, wanted: Recipe, threads: int, progress: Progress) -> Engine:
    # onnx and onnxruntime take half a second to import; no other engine needs them.
    from helixflow.engine.build import build  # noqa: PLC0415
    from helixflow.engine.onnx_engine import OnnxEngine  # noqa: PLC0415
    from helixflow.engine.onnx_memory import gpu_available_bytes  # noqa: PLC0415
    from helixflow.engine.onnx_session import check_cuda  # noqa: PLC0415

    memory = 0
    if wanted.provider == "cuda":
        # Before a build that may take minutes.
        check_cuda()
        memory = gpu_available_bytes(wanted.device)
    if (path / MANIFEST).is_file():
        directory, manifest = path, Manifest.read(path)
        check_built(directory, manifest, wanted)
    else:
        recipe = dataclasses.replace(wanted, slots=0, max_len=0)
        built = build(path, engines, recipe, replace_damaged=False, progress=progress)
        directory, manifest = built.directory, built.manifest
    manifest.verify(directory, progress)
    spec = ModelSpec.load(directory)
    slots = wanted.slots or manifest.slots or DEFAULT_SLOTS
    max_len = wanted.max_len or manifest.max_len
    if not max_len:
        max_len = _default_length(directory, spec, manifest, slots, memory or available_bytes())
    return OnnxEngine(
        directory,
        spec,
        manifest.precision,
        slots=slots,
        max_len=max_len,
        threads=threads,
        provider=wanted.provider,
        device=wanted.device,
    )


def check_built(directory: Path, manifest: Manifest, wanted: Recipe) -> None:
    """Raises EngineError when a built engine is not what was asked for."""
    built = manifest.recipe
    if built.kind != wanted.kind:
        pool = f"HELIX_POOL_ENGINE={built.backend}"
        pool += f" HELIX_POOL_PROVIDER={built.provider}" if not built.tensorrt else ""
        other = dataclasses.replace(built, backend=wanted.backend, provider=wanted.provider, precision="auto", sms=())
        raise EngineError(
            f"{directory} is an engine of {built.kind}, not of {wanted.kind}: set {pool}, or run "
            f"`{other.command(manifest.checkpoint, directory.parent.parent)}`"
        )
    if wanted.precision not in ("auto", built.precision):
        other = dataclasses.replace(built, precision=wanted.precision)
        raise EngineError(
            f"{directory} was built with precision {built.precision}, {wanted.precision} is wanted: run "
            f"`{other.command(manifest.checkpoint, directory.parent.parent)}`"
        )


def _default_length(directory: Path, spec: ModelSpec, manifest: Manifest, slots: int, memory: int) -> int:
    """What the model was trained for, shortened to whole steps that fit into memory (bytes) beside the weights."""
    free = memory - sum((directory / name).stat().st_size for name in manifest.files)
    room = int(free * CACHE_SHARE) // (slots * manifest.shapes["cache_bytes_per_position"])
    if room >= spec.max_positions:
        return spec.max_positions
    if room < LENGTH_STEP:
        raise EngineError(
            f"{slots} slots do not fit into memory ({max(free, 0) / 2**30:.1f} GiB are available beside the weights): "
            "choose fewer slots, or set max-len"
        )
    return room // LENGTH_STEP * LENGTH_STEP
