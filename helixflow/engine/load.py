"""From a directory to a running engine."""

from pathlib import Path
from typing import Literal

from helixflow.engine.base import Engine, EngineError, Precision
from helixflow.engine.manifest import MANIFEST, Manifest
from helixflow.engine.memory import available_bytes
from helixflow.engine.progress import Progress, silent
from helixflow.engine.scripted import ScriptedEngine
from helixflow.engine.spec import ModelSpec

Kind = Literal["onnx", "scripted"]
DEFAULT_SLOTS = 16
# Of the memory that the weights leave, the caches of an engine take at most this part when no length is asked for.
CACHE_SHARE = 0.5
LENGTH_STEP = 256


def load_engine(  # noqa: PLR0913 - every option is a keyword with a default
    path: Path,
    kind: Kind = "onnx",
    *,
    precision: Precision = "fp32",
    slots: int = 0,
    max_len: int = 0,
    threads: int = 0,
    engines: Path | None = None,
    script_step_s: float = 0.0,
    script_tokens: int = 0,
    progress: Progress = silent,
) -> Engine:
    """Loads an engine. `path`: a built engine (a directory with a manifest), or a checkpoint, built when needed.

    `slots`, `max_len` 0: as the engine was built, else 16 slots of the length the model was trained for (less when the
    caches would take more than half of the memory that the weights leave). `threads` 0: one per core. `engines`: where
    engines are built (default: as configured). Every file of a built engine is verified. Raises EngineError.
    """
    if kind == "scripted":
        return ScriptedEngine.from_model(
            path, slots=slots or DEFAULT_SLOTS, max_len=max_len, step_s=script_step_s, tokens=script_tokens
        )
    if kind != "onnx":
        raise EngineError(f"engine kind {kind!r} is unknown: choose onnx or scripted")
    # onnx and onnxruntime take half a second to import; the scripted engine needs neither.
    from helixflow.engine.build import build_engine  # noqa: PLC0415
    from helixflow.engine.onnx_engine import OnnxEngine  # noqa: PLC0415

    if (path / MANIFEST).is_file():
        directory, manifest = path, Manifest.read(path)
    else:
        if engines is None:
            from helixflow.config import default_engines_dir  # noqa: PLC0415

            engines = default_engines_dir()
        built = build_engine(path, engines, precision, replace_damaged=False, progress=progress)
        directory, manifest = built.directory, built.manifest
    manifest.verify(directory, progress)
    spec = ModelSpec.load(directory)
    slots = slots or manifest.slots or DEFAULT_SLOTS
    max_len = max_len or manifest.max_len or _default_length(directory, spec, manifest, slots)
    return OnnxEngine(directory, spec, manifest.precision, slots=slots, max_len=max_len, threads=threads)


def _default_length(directory: Path, spec: ModelSpec, manifest: Manifest, slots: int) -> int:
    """What the model was trained for, shortened to whole steps that fit into memory beside the weights."""
    free = available_bytes() - sum((directory / name).stat().st_size for name in manifest.files)
    room = int(free * CACHE_SHARE) // (slots * manifest.shapes["cache_bytes_per_position"])
    if room >= spec.max_positions:
        return spec.max_positions
    if room < LENGTH_STEP:
        raise EngineError(
            f"{slots} slots do not fit into memory ({max(free, 0) / 2**30:.1f} GiB are available beside the weights): "
            "choose fewer slots, or set max-len"
        )
    return room // LENGTH_STEP * LENGTH_STEP
