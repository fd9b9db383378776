"""Engines on disk: `<root>/<model>/<key>/`, written beside their place and moved there at once, under a lock."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from helixflow.engine.base import DamagedFileError, EngineError
from helixflow.engine.manifest import MANIFEST, Manifest, Source
from helixflow.engine.progress import Progress, silent

WORK = ".build"
SELFTEST = ".selftest"
"""Beside the models: engines that the self-test is made with."""
SETTLED_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Built:
    """An engine directory; `cached`: it was there already."""

    directory: Path
    manifest: Manifest
    cached: bool


def model_name(model_dir: Path) -> str:
    """Directory name of a model's engines: the last part of its path, in characters every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model_dir.name).strip(".-") or "model"


def engine_directories(root: Path) -> list[Path]:
    """Every built engine under `root`, by model and key."""
    found = (path.parent for path in root.glob(f"*/*/{MANIFEST}"))
    return sorted(path for path in found if not path.parent.name.startswith("."))


def manifests(home: Path) -> list[tuple[Path, Manifest]]:
    """The sound manifests of a model's engines, oldest first."""
    found = []
    for path in sorted(home.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(DamagedFileError):
            found.append((path.parent, Manifest.read(path.parent)))
    return found


def known_sources(home: Path) -> dict[str, Source]:
    """Hashes that earlier builds of this model recorded. A file that changed just before its build is not trusted:
    a second change within the clock's grain would leave no trace."""
    known: dict[str, Source] = {}
    for directory, manifest in manifests(home):
        written = (directory / MANIFEST).stat().st_mtime_ns
        sources = {**manifest.sources, **manifest.texts}
        known |= {name: source for name, source in sources.items() if written - source.changed_ns > SETTLED_NS}
    return known


def existing(directory: Path, verify: bool, progress: Progress = silent) -> Manifest | None:
    """The manifest of an engine; None when there is none. `verify`: read all files, and take a damaged engine for none;
    otherwise the files are not looked at, and a damaged manifest raises DamagedFileError."""
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


def publish(directory: Path, write: Callable[[Path], Manifest]) -> Manifest:
    """Writes an engine; call it under the lock. `write` fills a directory and returns the manifest of what is in it.

    Returns the manifest as written. Raises EngineError; then nothing is left.
    """
    work = directory.parent / WORK
    # Under the lock nobody else builds here: what lies here was left by builds that were killed.
    for left in work.glob("*/"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = work / directory.name
    try:
        # Weights are a secret of some, and what is in them is executed: nobody else reads or writes them.
        temporary.mkdir(mode=0o700)
        manifest = write(temporary)
        manifest.write(temporary)
        for name in (*manifest.files, MANIFEST):
            _sync(temporary / name)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
        _sync(directory.parent)
    except OSError as error:
        raise EngineError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Holds the build lock of a model; freed by the system when the process dies."""
    try:
        (home / WORK).mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (home / WORK / "lock").open("w")
    except OSError as error:
        raise EngineError(
            f"{home}: cannot be written: {error.strerror}; choose another place with HELIX_ENGINES"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
