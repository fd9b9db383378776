"""`helixflow engine build | list | show | verify`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixflow.errors import HelixError

if TYPE_CHECKING:
    from helixflow.engine.manifest import Manifest


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the `engine` command; its namespace goes to `run`."""
    parser = subparsers.add_parser("engine", help="build, list and verify engines", description="Built engines.")
    commands = parser.add_subparsers(dest="engine_command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build the engine of a checkpoint, or find it built")
    build.add_argument("model", type=Path, metavar="MODEL_DIR", help="checkpoint in the Hugging Face layout")
    build.add_argument("--precision", choices=("fp32", "int8", "int4"), default="fp32", help="weights (default: fp32)")
    build.add_argument("--max-len", type=int, default=0, metavar="N", help="positions of a slot, unless chosen at load")
    build.add_argument("--slots", type=int, default=0, metavar="N", help="sequences at once, unless chosen at load")
    build.add_argument("--quiet", action="store_true", help="no progress")
    listing = commands.add_parser("list", help="engines that are built")
    show = commands.add_parser("show", help="the manifest of an engine")
    verify = commands.add_parser("verify", help="compare every file of an engine (default: of all) with its manifest")
    show.add_argument("engine", metavar="ENGINE", help="directory, key, or the name of a model with one engine")
    verify.add_argument("engine", metavar="ENGINE", nargs="?", help="directory, key, or the name of a model")
    for command in (build, listing, show, verify):
        command.add_argument("--engines", type=Path, metavar="DIR", help="where engines are (default: HELIX_ENGINES)")
        command.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs a parsed command; returns the exit status. Raises HelixError."""
    from helixflow.config import default_engines_dir

    root: Path = args.engines or default_engines_dir()
    if args.engine_command == "build":
        return _build(args, root)
    if args.engine_command == "list":
        return _list(args, root)
    if args.engine_command == "show":
        return _show(args, root)
    return _verify(args, root)


def _build(args: argparse.Namespace, root: Path) -> int:
    from helixflow.engine.build import build_engine
    from helixflow.engine.progress import Bar, silent

    if args.slots < 0 or args.max_len < 0:
        raise HelixError("--slots and --max-len must be at least 1")
    progress = silent if args.quiet or args.json else Bar()
    built = build_engine(args.model, root, args.precision, slots=args.slots, max_len=args.max_len, progress=progress)
    if args.json:
        _print_json({"directory": str(built.directory), "cached": built.cached, **built.manifest.to_json()})
    else:
        print(f"{built.directory} ({'was there already' if built.cached else 'built'})")
    return 0


def _list(args: argparse.Namespace, root: Path) -> int:
    engines, damaged = _read_all(root)
    if args.json:
        _print_json([_summary(directory, manifest) for directory, manifest in engines])
        return 0
    for directory, manifest in engines:
        size = _size(directory, manifest) / 2**20
        parameters = manifest.shapes["parameters"] / 1e6
        print(f"{manifest.model}  {manifest.key}  {parameters:.1f} M parameters  {size:.1f} MiB  {directory}")
    for problem in damaged:
        print(f"damaged: {problem}")
    if not engines and not damaged:
        print(f"no engines in {root}: build one with `helixflow engine build MODEL_DIR`")
    return 0


def _show(args: argparse.Namespace, root: Path) -> int:
    from helixflow.engine.manifest import Manifest

    directory = _one(args.engine, root)
    manifest = Manifest.read(directory)
    if args.json:
        _print_json({"directory": str(directory), **manifest.to_json()})
        return 0
    print(f"{directory}\nmodel      {manifest.model}\nprecision  {manifest.precision}")
    print(f"slots      {manifest.slots or 'chosen at load'}\nmax-len    {manifest.max_len or 'chosen at load'}")
    for title, values in (("versions", manifest.versions), ("shapes", manifest.shapes), ("files", manifest.files)):
        print(title)
        for name, value in values.items():
            print(f"  {name:<26}{value}")
    print("sources")
    for name, source in manifest.sources.items():
        print(f"  {name:<26}{source.sha256}  {source.size} bytes")
    return 0


def _verify(args: argparse.Namespace, root: Path) -> int:
    from helixflow.engine.base import DamagedFileError
    from helixflow.engine.manifest import Manifest

    results: list[dict[str, Any]] = []
    for directory in _chosen(args.engine, root):
        try:
            Manifest.read(directory).verify(directory)
            results.append({"directory": str(directory), "ok": True})
        except DamagedFileError as error:
            results.append({"directory": str(directory), "ok": False, "error": str(error)})
    if args.json:
        _print_json(results)
    else:
        for result in results:
            print(f"ok       {result['directory']}" if result["ok"] else f"DAMAGED  {result['error']}")
        if not results:
            print(f"no engines in {root}")
    return 0 if all(result["ok"] for result in results) else 1


def _chosen(name: str | None, root: Path) -> list[Path]:
    """Engine directories that `name` means; all of them for None."""
    from helixflow.engine.build import engine_directories
    from helixflow.engine.manifest import MANIFEST

    everything = engine_directories(root)
    if name is None:
        return everything
    path = Path(name)
    if (path / MANIFEST).is_file():
        return [path]
    found = [directory for directory in everything if name in (directory.name, directory.parent.name)]
    if not found:
        raise HelixError(f"no engine {name!r} in {root}: see `helixflow engine list`")
    return found


def _one(name: str, root: Path) -> Path:
    found = _chosen(name, root)
    if len(found) > 1:
        keys = ", ".join(directory.name for directory in found)
        raise HelixError(f"{name!r} has {len(found)} engines: name one of {keys}")
    return found[0]


def _read_all(root: Path) -> tuple[list[tuple[Path, "Manifest"]], list[str]]:
    from helixflow.engine.base import DamagedFileError
    from helixflow.engine.build import engine_directories
    from helixflow.engine.manifest import Manifest

    engines, damaged = [], []
    for directory in engine_directories(root):
        try:
            engines.append((directory, Manifest.read(directory)))
        except DamagedFileError as error:
            damaged.append(str(error))
    return engines, damaged


def _summary(directory: Path, manifest: "Manifest") -> dict[str, Any]:
    return {
        "directory": str(directory),
        "model": manifest.model,
        "key": manifest.key,
        "precision": manifest.precision,
        "parameters": manifest.shapes["parameters"],
        "bytes": _size(directory, manifest),
    }


def _size(directory: Path, manifest: "Manifest") -> int:
    return sum((directory / name).stat().st_size for name in manifest.files if (directory / name).is_file())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
