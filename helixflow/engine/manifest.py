"""The manifest of a built engine: what it was made from, with what, and what its files hash to."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from helixflow import __version__
from helixflow.engine.base import DamagedFileError, EngineError
from helixflow.engine.kinds import AnyPrecision, Backend, Provider
from helixflow.engine.progress import Progress, silent
from helixflow.engine.reader import read_json
from helixflow.engine.recipe import Recipe

MANIFEST = "manifest.json"
FORMAT = 4
LARGEST_MANIFEST = 32 << 20
"""Bytes: it names every file of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint file. By `size` and `changed_ns` (ctime) an unchanged file is known without being read again."""

    sha256: str
    size: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Of an onnx engine, `slots` and `max_len` are defaults for loading (0: not chosen); of a TensorRT engine, limits.

    `checkpoint`: where the checkpoint was. `options`: of TensorRT engines, what they were built with. `device`: the GPU
    that a plan was built on, when it runs on no other. `shapes`: sizes of the decoder and of one slot's cache.
    `sources`, `texts`, `files`: by file name; `texts`: tokeniser and chat template, which no file of the engine depends
    on. On disk it carries a hash of itself, because everything else is trusted by what it says.
    """

    model: str
    checkpoint: str
    key: str
    backend: Backend
    provider: Provider
    precision: AnyPrecision
    slots: int
    max_len: int
    options: Mapping[str, Any]
    device: str
    versions: Mapping[str, str]
    shapes: Mapping[str, int]
    sources: Mapping[str, Source]
    texts: Mapping[str, Source]
    files: Mapping[str, str]
    format: int = FORMAT

    @property
    def recipe(self) -> Recipe:
        """What it was built with."""
        plain = Recipe(self.backend, self.provider, self.precision, self.slots, self.max_len)
        if self.backend == "onnx":
            return plain
        sizes = {name: self.options[name] for name in ("attention", "chunk_tokens")}
        return dataclasses.replace(plain, **sizes, sms=tuple(self.options["sms"]))

    def command(self, directory: Path) -> str:
        """The command line that builds it again where it lies."""
        return self.recipe.command(self.checkpoint, directory.parent.parent)

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return dataclasses.asdict(self)

    def write(self, directory: Path) -> None:
        """Replaces the manifest in one step."""
        temporary = directory / f".{MANIFEST}.new"
        content = self.to_json()
        content["sha256"] = digest(content)
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(directory / MANIFEST)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Raises DamagedFileError."""
        path = directory / MANIFEST
        data = read_json(path, LARGEST_MANIFEST)
        if data.get("format") != FORMAT:
            found = data.get("format")
            raise DamagedFileError(path, "format", f"is {found!r}, this version reads {FORMAT}; {REBUILD}")
        if data.pop("sha256", None) != digest(data):
            raise DamagedFileError(path, "sha256", f"differs from the content, which was changed; {REBUILD}")
        try:
            sources, texts = (
                {name: Source(**source) for name, source in data.pop(kind).items()} for kind in ("sources", "texts")
            )
            manifest = cls(**data, sources=sources, texts=texts)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(path, "", f"is not a manifest: {error}") from error
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        for key, names in (("files", self.files), ("sources", self.sources), ("texts", self.texts)):
            if not isinstance(names, dict) or any(Path(name).name != name for name in names):
                raise DamagedFileError(path, key, "must map file names to hashes")
        for key in ("slots", "max_len"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 0:
                raise DamagedFileError(path, key, "must be a whole number")
        try:
            self.recipe.check()
        except (EngineError, KeyError, TypeError) as error:
            raise DamagedFileError(path, "", f"describes no engine of this version: {error}") from error

    def verify(self, directory: Path, progress: Progress = silent) -> None:
        """Reads every file and compares its hash. Raises DamagedFileError for the first that differs."""
        rebuild = f"run `{self.command(directory)}` again, which replaces a damaged engine"
        sizes = {}
        for name in self.files:
            if not (directory / name).is_file():
                raise DamagedFileError(directory / name, "", f"is missing; {rebuild}")
            sizes[name] = (directory / name).stat().st_size
        total, done = sum(sizes.values()), 0
        for name, expected in self.files.items():
            if file_sha256(directory / name) != expected:
                raise DamagedFileError(
                    directory / name, f"files.{name}", f"differs from what {MANIFEST} recorded; {rebuild}"
                )
            done += sizes[name]
            progress("verifying the engine", done, total)


REBUILD = "run `helixflow engine build MODEL_DIR` again, which replaces a damaged engine"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises DamagedFileError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedFileError(path, "", f"cannot be read: {error.strerror or error}") from error


def tool_versions() -> dict[str, str]:
    """Versions of everything that has a part in the files of an onnx engine."""
    try:
        runtime = version("onnxruntime")
    except PackageNotFoundError:
        runtime = version("onnxruntime-gpu")
    return {"helixflow": __version__, "onnx": version("onnx"), "onnxruntime": runtime}


def engine_key(sources: Mapping[str, Source], recipe: Recipe, versions: Mapping[str, str], device: str = "") -> str:
    """Name of an engine: a hash over everything that its files depend on."""
    content = {
        "format": FORMAT,
        "sources": {name: source.sha256 for name, source in sorted(sources.items())},
        "recipe": recipe.content(),
        "versions": dict(sorted(versions.items())),
        "device": device,
    }
    kind = "" if recipe.kind == "onnx" else f"{recipe.kind}-"
    return f"{kind}{recipe.precision}-{digest(content)[:16]}"


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
