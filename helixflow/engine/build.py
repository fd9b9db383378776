"""Builds engines into `<engines>/<model>/<key>/`; the key is a hash over all that the files depend on (see `store`)."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helixflow import __version__
from helixflow.engine.base import DamagedFileError, EngineError, Float32
from helixflow.engine.folder import TEXT_FILES, contained
from helixflow.engine.kinds import AnyPrecision, Provider
from helixflow.engine.manifest import Manifest, Source, digest, engine_key, file_sha256, tool_versions
from helixflow.engine.onnx_graph import NUMPY_TYPES, compute_type, padded_head, write_onnx
from helixflow.engine.progress import Progress, silent
from helixflow.engine.recipe import Recipe
from helixflow.engine.spec import CONFIG, ModelSpec
from helixflow.engine.store import (
    Built,
    engine_directories,
    existing,
    known_sources,
    locked,
    manifests,
    model_name,
    publish,
)
from helixflow.engine.weights import Checkpoint

if TYPE_CHECKING:
    from helixflow.engine.tensorrt.artefact import Toolkit

__all__ = ["Built", "build", "build_engine", "engine_directories", "find", "model_name", "read_checkpoint", "resolve"]


@dataclass(frozen=True, slots=True)
class Job:
    """A build: `recipe` is resolved; `device`: what binds the plan, "" when nothing does."""

    model_dir: Path
    spec: ModelSpec
    checkpoint: Checkpoint
    recipe: Recipe
    versions: dict[str, str]
    device: str
    write: Callable[["Job", Path, Manifest, Progress], Manifest]

    def manifest(self, known: dict[str, Source], progress: Progress) -> Manifest:
        """What is known before anything is written; `known`: hashes of files that need not be read again."""
        sources = _sources([self.model_dir / CONFIG, *self.checkpoint.files], known, progress)
        texts = [self.model_dir / name for name in TEXT_FILES if (self.model_dir / name).exists()]
        recipe = self.recipe
        return Manifest(
            model=self.model_dir.name,
            checkpoint=str(self.model_dir),
            key=engine_key(sources, recipe, self.versions, self.device),
            backend=recipe.backend,
            provider=recipe.provider,
            precision=recipe.chosen_precision,
            slots=recipe.slots,
            max_len=recipe.max_len,
            options={},
            device=self.device,
            versions=self.versions,
            shapes=_shapes(self.spec, recipe),
            sources=sources,
            texts=_sources([contained(path) for path in texts], known, silent),
            files={},
        )


def build_engine(
    model_dir: Path,
    root: Path,
    precision: AnyPrecision = "fp32",
    *,
    provider: Provider = "cpu",
    slots: int = 0,
    max_len: int = 0,
    replace_damaged: bool = True,
    progress: Progress = silent,
) -> Built:
    """Builds, or finds, the onnx engine of a checkpoint: see `build`."""
    recipe = Recipe("onnx", provider, precision, slots, max_len)
    return build(model_dir, root, recipe, replace_damaged=replace_damaged, progress=progress)


def build(
    model_dir: Path,
    root: Path,
    recipe: Recipe,
    *,
    replace_damaged: bool = True,
    progress: Progress = silent,
    toolkit: "Toolkit | None" = None,
) -> Built:
    """Builds, or finds, the engine of a checkpoint.

    `slots` and `max_len` of an onnx engine are recorded as defaults for loading (0: as before).
    `replace_damaged`: verify an engine that is there, and build it again when a file differs; otherwise it is returned
    unread. `toolkit`: of TensorRT. Two builders of one model wait for each other. Raises EngineError (ModelError for a
    refused checkpoint).
    """
    job = _job(model_dir, recipe, toolkit)
    home = root / model_name(job.model_dir)
    with locked(home):
        manifest = job.manifest(known_sources(home), progress)
        directory = home / manifest.key
        found = existing(directory, replace_damaged, progress)
        if found is None:
            manifest = publish(directory, lambda place: job.write(job, place, manifest, progress))
            return Built(directory, manifest, cached=False)
        return Built(directory, _merged(job, found, manifest, directory), cached=True)


def find(model_dir: Path, root: Path, recipe: Recipe, sm: int, toolkit: "Toolkit") -> Built | None:
    """A TensorRT engine that is there and serves `recipe` on a device of compute capability `sm`: built for as many
    slots or more, the same otherwise. Its files are not read. Raises EngineError."""
    job = _job(model_dir, recipe, toolkit)
    home = root / model_name(job.model_dir)
    with locked(home):
        wanted = job.manifest(known_sources(home), silent)
    fitting = []
    for directory, manifest in manifests(home):
        known = manifest.recipe
        as_wanted = dataclasses.replace(known, slots=job.recipe.slots, sms=job.recipe.sms)
        if (
            engine_key(manifest.sources, as_wanted, manifest.versions, manifest.device) == wanted.key
            and known.slots >= job.recipe.slots
            and (known.backend == "tensorrt" or known.runs_on(sm))
        ):
            fitting.append((known.slots, Built(directory, manifest, cached=True)))
    return min(fitting, key=lambda entry: entry[0])[1] if fitting else None


def resolve(model_dir: Path, recipe: Recipe) -> Recipe:
    """A recipe with everything chosen that the checkpoint decides. Raises EngineError."""
    recipe.check()
    checkpoint, spec = _read(model_dir.resolve())
    return recipe.resolved(spec, (checkpoint.entries[name].dtype for name in spec.tensors()))


def read_checkpoint(model_dir: Path) -> tuple[Checkpoint, ModelSpec]:
    """Opens and checks a checkpoint: config, names, shapes, dtypes, file sizes. Raises ModelError."""
    # The config first: it is the file that says which family this is.
    ModelSpec.load(model_dir)
    checkpoint = Checkpoint(model_dir)
    spec = ModelSpec.load(model_dir, checkpoint.entries)
    checkpoint.check(spec.tensors(), frozenset({"lm_head.weight"} if spec.tied else ()))
    return checkpoint, spec


def _read(model_dir: Path) -> tuple[Checkpoint, ModelSpec]:
    if not model_dir.is_dir():
        raise EngineError(
            f"{model_dir} is not a directory: name the directory of a checkpoint (config.json, *.safetensors)"
        )
    return read_checkpoint(model_dir)


def _job(model_dir: Path, recipe: Recipe, toolkit: "Toolkit | None") -> Job:
    recipe.check()
    model_dir = model_dir.resolve()
    checkpoint, spec = _read(model_dir)
    recipe = recipe.resolved(spec, (checkpoint.entries[name].dtype for name in spec.tensors()))
    if not recipe.tensorrt:
        return Job(model_dir, spec, checkpoint, recipe, tool_versions(), "", _write_onnx)
    from helixflow.engine.tensorrt import artefact  # noqa: PLC0415 - nobody else needs it

    toolkit = toolkit or artefact.Toolkit()
    library = toolkit.library(artefact.kind_of(recipe))
    device = "" if library.rtx else artefact.bound_device(library, recipe, toolkit)

    def write(job: Job, place: Path, manifest: Manifest, progress: Progress) -> Manifest:
        weights = _weights(job, manifest, place.parent.parent)
        files, options = artefact.write_artefact(
            place, library, job.spec, job.recipe, weights, toolkit.compile, progress
        )
        return dataclasses.replace(manifest, options=options, files={**files, **_copy_small(job, place, manifest)})

    versions = {"helixflow": __version__, library.kind: library.version}
    return Job(model_dir, spec, checkpoint, recipe, versions, device, write)


def _weights(job: Job, manifest: Manifest, home: Path) -> Any:
    """Where the weights of an artefact come from (`artefact.Weights`)."""
    from helixflow.engine.tensorrt import artefact, weightfile  # noqa: PLC0415 - nobody else needs them

    compute = artefact.engine_options(job.recipe).compute
    return artefact.Weights(
        pieces=weightfile.checkpoint_pieces(job.checkpoint, compute),
        read=lambda name: _finite(job.checkpoint, name),
        sequences=lambda: artefact.checkpoint_sequences(job.model_dir, job.spec),
        identity=digest({name: source.sha256 for name, source in manifest.sources.items()}),
        siblings=manifests(home),
    )


def _write_onnx(job: Job, place: Path, manifest: Manifest, progress: Progress) -> Manifest:
    total, done = 4 * job.spec.parameters(), 0

    def read(name: str) -> Float32:
        nonlocal done
        tensor = _finite(job.checkpoint, name)
        done += tensor.nbytes
        progress(f"building {manifest.model} {manifest.precision}", min(done, total), total)
        return tensor

    files = write_onnx(job.spec, manifest.precision, read, place, job.recipe.provider)
    return dataclasses.replace(manifest, files={**files, **_copy_small(job, place, manifest)})


def _finite(checkpoint: Checkpoint, name: str) -> Float32:
    """A tensor of a checkpoint. Raises DamagedFileError for values that are none."""
    tensor = checkpoint.tensor(name)
    if not np.isfinite(tensor).all():
        raise DamagedFileError(checkpoint.entries[name].file, name, "holds a value that is not a finite number")
    return tensor


def _copy_small(job: Job, place: Path, manifest: Manifest) -> dict[str, str]:
    """Copies config.json and the texts, last: they must still be what was read. Returns their hashes by name."""
    return {
        name: _copy(job.model_dir / name, place / name, source)
        for name, source in {CONFIG: manifest.sources[CONFIG], **manifest.texts}.items()
    }


def _copy(origin: Path, place: Path, source: Source) -> str:
    """Replaces `place` by a copy of `origin` in one step; returns its hash. Raises EngineError."""
    temporary = place.with_name(f".{place.name}.new")
    shutil.copyfile(origin, temporary)
    found = file_sha256(temporary)
    if found != source.sha256:
        temporary.unlink()
        raise EngineError(f"{origin} changed while the engine was built: build again")
    temporary.replace(place)
    return found


def _merged(job: Job, found: Manifest, wanted: Manifest, directory: Path) -> Manifest:
    """Of an engine that was there already: its defaults for loading, where its checkpoint is now, and its texts."""
    kept = {name: value for name, value in found.files.items() if name not in TEXT_FILES or name in wanted.texts}
    merged = dataclasses.replace(
        found,
        slots=wanted.slots or found.slots,
        max_len=wanted.max_len or found.max_len,
        checkpoint=wanted.checkpoint,
        sources=wanted.sources,
        texts=wanted.texts,
        files={**kept, **{name: source.sha256 for name, source in wanted.texts.items()}},
    )
    if merged != found:
        try:
            for name, source in wanted.texts.items():
                if found.files.get(name) != source.sha256:
                    _copy(job.model_dir / name, directory / name, source)
            merged.write(directory)
            for name in found.files.keys() - merged.files.keys():
                (directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise EngineError(f"{directory}: cannot be written: {error.strerror or error}") from error
    return merged


def _sources(paths: Sequence[Path], known: dict[str, Source], progress: Progress) -> dict[str, Source]:
    """Hashes of files by name; one with the recorded size and time is not read again."""
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


def _shapes(spec: ModelSpec, recipe: Recipe) -> dict[str, int]:
    if recipe.tensorrt:
        width, item = spec.head_dim, 2
    else:
        compute = compute_type(recipe.chosen_precision, recipe.provider)
        width, item = padded_head(spec.head_dim), NUMPY_TYPES[compute].itemsize
    return {
        "parameters": spec.parameters(),
        "vocab_size": spec.vocab_size,
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_positions": spec.max_positions,
        "cache_bytes_per_position": 2 * item * spec.layers * spec.kv_heads * width,
    }
