"""The manifest of a built engine: what it was made from, with what, and what its files hash to."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helixflow import __version__
from helixflow.engine.base import PRECISIONS, DamagedFileError, Precision
from helixflow.engine.progress import Progress, silent
from helixflow.engine.reader import read_json

MANIFEST = "manifest.json"
FORMAT = 2
CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint file. By `size` and `changed_ns` (ctime) an unchanged file is known without being read again."""

    sha256: str
    size: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """`slots` and `max_len` are defaults for loading (0: not chosen); the built files do not depend on them.

    `shapes`: sizes of the decoder and of one slot's cache. `sources`, `files`: by file name. On disk it carries a hash
    of itself, because everything else is trusted by what it says.
    """

    model: str
    key: str
    precision: Precision
    slots: int
    max_len: int
    versions: Mapping[str, str]
    shapes: Mapping[str, int]
    sources: Mapping[str, Source]
    files: Mapping[str, str]
    format: int = FORMAT

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
        data = read_json(path)
        if data.get("format") != FORMAT:
            raise DamagedFileError(path, "format", f"is {data.get('format')!r}, this version reads {FORMAT}")
        if data.pop("sha256", None) != digest(data):
            raise DamagedFileError(path, "sha256", f"differs from the content, which was changed; {REBUILD}")
        try:
            sources = {name: Source(**source) for name, source in data.pop("sources").items()}
            manifest = cls(**data, sources=sources)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(path, "", f"is not a manifest: {error}") from error
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        if self.precision not in PRECISIONS:
            raise DamagedFileError(path, "precision", f"{self.precision!r} is unknown")
        for key, names in (("files", self.files), ("sources", self.sources)):
            if not isinstance(names, dict) or any(Path(name).name != name for name in names):
                raise DamagedFileError(path, key, "must map file names to hashes")
        for key in ("slots", "max_len"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 0:
                raise DamagedFileError(path, key, "must be a whole number")

    def verify(self, directory: Path, progress: Progress = silent) -> None:
        """Reads every file and compares its hash. Raises DamagedFileError for the first that differs."""
        sizes = {}
        for name in self.files:
            if not (directory / name).is_file():
                raise DamagedFileError(directory / name, "", f"is missing; {REBUILD}")
            sizes[name] = (directory / name).stat().st_size
        total, done = sum(sizes.values()), 0
        for name, expected in self.files.items():
            if file_sha256(directory / name) != expected:
                raise DamagedFileError(
                    directory / name, f"files.{name}", f"differs from what {MANIFEST} recorded; {REBUILD}"
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
    """Versions of everything that has a part in the built files."""
    return {"helixflow": __version__, "onnx": version("onnx"), "onnxruntime": version("onnxruntime")}


def engine_key(sources: Mapping[str, Source], precision: Precision, versions: Mapping[str, str]) -> str:
    """Name of an engine: a hash over everything that its files depend on."""
    content = {
        "format": FORMAT,
        "sources": {name: source.sha256 for name, source in sorted(sources.items())},
        "precision": precision,
        "versions": dict(sorted(versions.items())),
    }
    return f"{precision}-{digest(content)[:16]}"


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
