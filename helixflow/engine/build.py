"""Builds engines into `<engines>/<model>/<key>/`: found again by key, written beside and moved into place at once."""

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from helixflow.engine.base import PRECISIONS, DamagedFileError, EngineError, Float32, Precision
from helixflow.engine.manifest import MANIFEST, Manifest, Source, engine_key, file_sha256, tool_versions
from helixflow.engine.onnx_graph import padded_head, write_onnx
from helixflow.engine.progress import Progress, silent
from helixflow.engine.spec import CONFIG, ModelSpec
from helixflow.engine.weights import Checkpoint

SETTLED_NS = 1_000_000_000
WORK = ".build"


@dataclass(frozen=True, slots=True)
class Built:
    """An engine directory; `cached`: it was there already."""

    directory: Path
    manifest: Manifest
    cached: bool


def build_engine(
    model_dir: Path,
    root: Path,
    precision: Precision = "fp32",
    *,
    slots: int = 0,
    max_len: int = 0,
    replace_damaged: bool = True,
    progress: Progress = silent,
) -> Built:
    """Builds, or finds, the engine of a checkpoint. `slots`, `max_len`: recorded as defaults for loading; 0: as before.

    `replace_damaged`: verify an engine that is there, and build it again when a file differs; otherwise it is returned
    unread. Two builders of one model wait for each other. Raises EngineError (ModelError for a refused checkpoint).
    """
    if precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    model_dir = model_dir.resolve()
    if not model_dir.is_dir():
        raise EngineError(
            f"{model_dir} is not a directory: name the directory of a checkpoint (config.json, *.safetensors)"
        )
    checkpoint, spec = read_checkpoint(model_dir)
    if max_len > spec.longest:
        raise EngineError(f"max-len {max_len} is more than the {spec.longest} positions this model was made for")
    home = root / model_name(model_dir)
    with _locked(home):
        sources = _sources(model_dir, checkpoint, _known(home), progress)
        versions = tool_versions()
        key = engine_key(sources, precision, versions)
        directory = home / key
        found = _existing(directory, replace_damaged, progress)
        manifest = Manifest(model_dir.name, key, precision, slots, max_len, versions, _shapes(spec), sources, {})
        if found is None:
            files = _write(model_dir, directory, spec, checkpoint, manifest, progress)
            return Built(directory, dataclasses.replace(manifest, files=files), cached=False)
        merged = dataclasses.replace(
            found, slots=slots or found.slots, max_len=max_len or found.max_len, sources=sources
        )
        if merged != found:
            try:
                merged.write(directory)
            except OSError as error:
                raise EngineError(f"{directory}: cannot be written: {error.strerror or error}") from error
        return Built(directory, merged, cached=True)


def read_checkpoint(model_dir: Path) -> tuple[Checkpoint, ModelSpec]:
    """Opens and checks a checkpoint: config, names, shapes, dtypes, file sizes. Raises ModelError."""
    # The config first: it is the file that says which family this is.
    ModelSpec.load(model_dir)
    checkpoint = Checkpoint(model_dir)
    spec = ModelSpec.load(model_dir, checkpoint.entries)
    checkpoint.check(spec.tensors(), frozenset({"lm_head.weight"} if spec.tied else ()))
    return checkpoint, spec


def model_name(model_dir: Path) -> str:
    """Directory name of a model's engines: the last part of its path, in characters every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model_dir.name).strip(".-") or "model"


def engine_directories(root: Path) -> list[Path]:
    """Every built engine under `root`, by model and key."""
    return sorted(path.parent for path in root.glob(f"*/*/{MANIFEST}"))


def _write(
    model_dir: Path, directory: Path, spec: ModelSpec, checkpoint: Checkpoint, manifest: Manifest, progress: Progress
) -> dict[str, str]:
    """Writes all files of an engine beside its place, then moves them there."""
    work = directory.parent / WORK
    # Under the lock nobody else builds here: what lies here was left by builds that were killed.
    for left in work.glob("*/"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = work / directory.name
    total = 4 * spec.parameters()
    done = 0

    def read(name: str) -> Float32:
        nonlocal done
        tensor = checkpoint.tensor(name)
        if not np.isfinite(tensor).all():
            raise DamagedFileError(checkpoint.entries[name].file, name, "holds a value that is not a finite number")
        done += tensor.nbytes
        progress(f"building {manifest.model} {manifest.precision}", min(done, total), total)
        return tensor

    try:
        temporary.mkdir()
        files = write_onnx(spec, manifest.precision, read, temporary)
        shutil.copyfile(model_dir / CONFIG, temporary / CONFIG)
        files[CONFIG] = file_sha256(temporary / CONFIG)
        if files[CONFIG] != manifest.sources[CONFIG].sha256:
            raise EngineError(f"{model_dir / CONFIG} changed while the engine was built: build again")
        dataclasses.replace(manifest, files=files).write(temporary)
        for name in (*files, MANIFEST):
            _sync(temporary / name)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
        _sync(directory.parent)
    except OSError as error:
        raise EngineError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(directory: Path, verify: bool, progress: Progress) -> Manifest | None:
    if not directory.exists():
        return None
    try:
        manifest = Manifest.read(directory)
        if verify:
            manifest.verify(directory, progress)
    except DamagedFileError:
        if verify:
            return None
        raise
    return manifest


def _known(home: Path) -> dict[str, Source]:
    """Hashes that earlier builds of this model recorded. A file that changed just before its build is not trusted:
    a second change within the clock's grain would leave no trace."""
    known: dict[str, Source] = {}
    for path in sorted(home.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns):
        written = path.stat().st_mtime_ns
        with contextlib.suppress(DamagedFileError):
            sources = Manifest.read(path.parent).sources
            known |= {name: source for name, source in sources.items() if written - source.changed_ns > SETTLED_NS}
    return known


def _sources(
    model_dir: Path, checkpoint: Checkpoint, known: dict[str, Source], progress: Progress
) -> dict[str, Source]:
    """Hashes of config.json and the weight files; a file with the recorded size and time is not read again."""
    paths = [model_dir / CONFIG, *checkpoint.files]
    total, done = sum(path.stat().st_size for path in paths), 0
    sources = {}
    for path in paths:
        state, old = path.stat(), known.get(path.name)
        if old is None or (old.size, old.changed_ns) != (state.st_size, state.st_ctime_ns):
            old = Source(file_sha256(path), state.st_size, state.st_ctime_ns)
            progress("reading the checkpoint", done + state.st_size, total)
        done += state.st_size
        sources[path.name] = old
    return sources


def _shapes(spec: ModelSpec) -> dict[str, int]:
    width = padded_head(spec.head_dim)
    return {
        "parameters": spec.parameters(),
        "vocab_size": spec.vocab_size,
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_positions": spec.max_positions,
        "cache_bytes_per_position": 2 * 4 * spec.layers * spec.kv_heads * width,
    }


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Holds the build lock of a model; freed by the system when the process dies."""
    try:
        (home / WORK).mkdir(parents=True, exist_ok=True)
        lock = (home / WORK / "lock").open("w")
    except OSError as error:
        raise EngineError(
            f"{home}: cannot be written: {error.strerror}; choose another place with HELIX_ENGINES"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
