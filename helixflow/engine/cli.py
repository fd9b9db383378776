"""`helixflow engine build | list | show | verify | selftest`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixflow.engine.kinds import (
    ANY_PRECISIONS,
    ATTENTION_CHOICES,
    BACKENDS,
    DEFAULT_CHUNK_TOKENS,
    DEFAULT_SLOTS,
    PROVIDERS,
    TENSORRT_MAX_LEN,
)
from helixflow.errors import HelixError
from helixflow.terminal import say

if TYPE_CHECKING:
    from helixflow.engine.manifest import Manifest
    from helixflow.engine.recipe import Recipe
    from helixflow.engine.tensorrt.options import Compute
    from helixflow.engine.tensorrt.selftest import Result


SELFTESTED: "tuple[Compute, ...]" = ("fp16", "bf16")


def add_parser(subparsers: Any) -> None:
    """Adds the `engine` command; its namespace goes to `run`."""
    parser = subparsers.add_parser("engine", help="build, list and verify engines", description="Built engines.")
    commands = parser.add_subparsers(dest="engine_command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build the engine of a checkpoint, or find it built")
    _build_options(build)
    listing = commands.add_parser("list", help="engines that are built")
    show = commands.add_parser("show", help="the manifest of an engine")
    verify = commands.add_parser("verify", help="compare every file of an engine (default: of all) with its manifest")
    show.add_argument("engine", metavar="ENGINE", help="directory, key, or the name of a model with one engine")
    verify.add_argument("engine", metavar="ENGINE", nargs="?", help="directory, key, or the name of a model")
    selftest = commands.add_parser("selftest", help="compute with a small model on a GPU, and compare")
    selftest.add_argument("--backend", choices=BACKENDS[1:], default="tensorrt-rtx", help="default: tensorrt-rtx")
    selftest.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU (default: 0)")
    for command in (build, listing, show, verify, selftest):
        command.add_argument("--engines", type=Path, metavar="DIR", help="where engines are (default: HELIX_ENGINES)")
        command.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def _build_options(build: argparse.ArgumentParser) -> None:
    add = build.add_argument
    add("model", type=Path, metavar="MODEL_DIR", help="checkpoint in the Hugging Face layout")
    add("--backend", choices=BACKENDS, default="onnx", help="what computes (default: onnx)")
    add("--provider", choices=PROVIDERS, default="cpu", help="onnx: where (default: cpu)")
    text = "of the weights (default: fp32 on a CPU; on a GPU bf16 when the checkpoint is stored so, else fp16)"
    add("--precision", choices=("auto", *ANY_PRECISIONS), default="auto", help=text)
    text = f"sequences at once; onnx: unless chosen at load; TensorRT: at most (default: {DEFAULT_SLOTS})"
    add("--slots", type=int, default=0, metavar="N", help=text)
    text = f"positions of a slot; onnx: unless chosen at load; TensorRT: at most (default: {TENSORRT_MAX_LEN} or less)"
    add("--max-len", type=int, default=0, metavar="N", help=text)
    text = "tensorrt-rtx: compute capability to build for, 89 for 8.9; may be repeated (default: 8.0 and newer)"
    add("--sm", action="append", default=[], metavar="N[,N]", help=text)
    text = "TensorRT: form of attention; auto asks the self-test of the GPU (default: posmask)"
    add("--attention", choices=ATTENTION_CHOICES, default="posmask", help=text)
    text = f"TensorRT: longest piece of a prompt in one launch (default: {DEFAULT_CHUNK_TOKENS})"
    add("--chunk-tokens", type=int, default=0, metavar="N", help=text)
    text = "number of the GPU for tensorrt and --attention auto (default: 0)"
    add("--device", type=int, default=0, metavar="N", help=text)
    add("--quiet", action="store_true", help="no progress")


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
    if args.engine_command == "selftest":
        return _selftest(args, root)
    return _verify(args, root)


def _build(args: argparse.Namespace, root: Path) -> int:
    from helixflow.engine.build import build
    from helixflow.engine.progress import Bar, silent

    recipe = recipe_of(args)
    progress = silent if args.quiet or args.json else Bar()
    if recipe.tensorrt and recipe.attention == "auto":
        from helixflow.engine.tensorrt.start import build_for_device

        built = build_for_device(args.model, root, recipe, _complain, progress=progress)
    else:
        built = build(args.model, root, recipe, progress=progress)
    if args.json:
        _print_json({"directory": str(built.directory), "cached": built.cached, **built.manifest.to_json()})
    else:
        say(f"{built.directory} ({'was there already' if built.cached else 'built'})")
    return 0


def recipe_of(args: argparse.Namespace) -> "Recipe":
    """What a parsed `build` asks for. Raises HelixError."""
    from helixflow.engine.recipe import Recipe

    return Recipe(
        args.backend,
        args.provider,
        args.precision,
        args.slots,
        args.max_len,
        args.attention,
        args.chunk_tokens,
        _sms(args.sm),
        args.device,
    )


def _sms(values: list[str]) -> tuple[int, ...]:
    parts = [part.strip() for value in values for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise HelixError(f"--sm takes whole numbers, 89 for compute capability 8.9, not {', '.join(values)}")
    return tuple(int(part) for part in parts)


def _selftest(args: argparse.Namespace, root: Path) -> int:
    from helixflow.engine.tensorrt.artefact import Toolkit
    from helixflow.engine.tensorrt.selftest import run_selftest

    results = []
    for compute in SELFTESTED:
        for result in run_selftest(Toolkit(), args.backend, args.device, root, compute):
            results.append(result)
            if not args.json:
                say(result, flush=True)
    if args.json:
        _print_json([result.to_json() for result in results])
    return 0 if any(result.passed for result in results) else 1


def _complain(result: "Result") -> None:
    if not result.passed:
        say(result, file=sys.stderr)


def _list(args: argparse.Namespace, root: Path) -> int:
    engines, damaged = _read_all(root)
    if args.json:
        _print_json([_summary(directory, manifest) for directory, manifest in engines])
        return 0
    for directory, manifest in engines:
        size = _size(directory, manifest) / 2**20
        parameters = manifest.shapes["parameters"] / 1e6
        say(f"{manifest.model}  {manifest.key}  {parameters:.1f} M parameters  {size:.1f} MiB  {directory}")
    for problem in damaged:
        say(f"damaged: {problem}")
    if not engines and not damaged:
        say(f"no engines in {root}: build one with `helixflow engine build MODEL_DIR`")
    return 0


def _show(args: argparse.Namespace, root: Path) -> int:
    from helixflow.engine.manifest import Manifest

    directory = _one(args.engine, root)
    manifest = Manifest.read(directory)
    if args.json:
        _print_json({"directory": str(directory), **manifest.to_json()})
        return 0
    say(f"{directory}\nmodel      {manifest.model}\nengine     {manifest.recipe.kind}")
    say(f"precision  {manifest.precision}\ndevice     {manifest.device or 'not bound to one'}")
    say(f"slots      {manifest.slots or 'chosen at load'}\nmax-len    {manifest.max_len or 'chosen at load'}")
    say(f"build      {manifest.command(directory)}")
    for title in ("options", "versions", "shapes", "files"):
        values: dict[str, Any] = getattr(manifest, title)
        if values:
            say(title)
        for name, value in values.items():
            say(f"  {name:<26}{value}")
    say("sources")
    for name, source in manifest.sources.items():
        say(f"  {name:<26}{source.sha256}  {source.size} bytes")
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
            say(f"ok       {result['directory']}" if result["ok"] else f"DAMAGED  {result['error']}")
        if not results:
            say(f"no engines in {root}")
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
        "backend": manifest.backend,
        "provider": manifest.provider,
        "precision": manifest.precision,
        "parameters": manifest.shapes["parameters"],
        "bytes": _size(directory, manifest),
    }


def _size(directory: Path, manifest: "Manifest") -> int:
    return sum((directory / name).stat().st_size for name in manifest.files if (directory / name).is_file())


def _print_json(value: Any) -> None:
    say(json.dumps(value, indent=2))
