"""From a checkpoint, or a built engine, to a TensorRT engine that serves: self-test, build, checks, load."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helixflow import log
from helixflow.engine.base import Engine, EngineError
from helixflow.engine.build import Built, build, find, resolve
from helixflow.engine.kinds import AttentionChoice
from helixflow.engine.load import check_built
from helixflow.engine.manifest import MANIFEST, Manifest
from helixflow.engine.progress import Progress, silent
from helixflow.engine.recipe import Recipe
from helixflow.engine.tensorrt.artefact import (
    Toolkit,
    check_fits,
    check_precision,
    engine_options,
    form_of,
    kind_of,
    open_artefact,
)
from helixflow.engine.tensorrt.assemble import open_engine
from helixflow.engine.tensorrt.compile import check_devices
from helixflow.engine.tensorrt.device import DeviceInfo
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.options import ATTENTION_FORMS, AttentionForm, Compute, EngineOptions
from helixflow.engine.tensorrt.selftest import Result, first_passing, run_selftest


@dataclass(frozen=True, slots=True)
class Ground:
    """Where something is to run: `place` holds engines, `info` is the device. `report` hears of self-tests."""

    toolkit: Toolkit
    library: Library
    index: int
    info: DeviceInfo
    place: Path
    progress: Progress
    report: Callable[[Result], None]

    @classmethod
    def of(
        cls, wanted: Recipe, place: Path, toolkit: Toolkit | None, progress: Progress, report: Callable[[Result], None]
    ) -> "Ground":
        """Looks at the device. Raises EngineError when there is none, or no TensorRT."""
        toolkit = toolkit or Toolkit()
        library = toolkit.library(kind_of(wanted))
        device = toolkit.open_device(library, wanted.device)
        try:
            info = device.info()
        finally:
            device.close()
        return cls(toolkit, library, wanted.device, info, place, progress, report)


def start(
    path: Path, place: Path, wanted: Recipe, *, progress: Progress = silent, toolkit: Toolkit | None = None
) -> Engine:
    """Loads what `load_engine` describes. Raises EngineError."""
    ground = Ground.of(wanted, place, toolkit, progress, _logged)
    if (path / MANIFEST).is_file():
        directory, manifest = path, Manifest.read(path)
        _check_built_engine(directory, manifest, wanted, ground)
    else:
        built = _built(path, wanted, ground, replace_damaged=False)
        directory, manifest = built.directory, built.manifest
    manifest.verify(directory, progress)
    slots, max_len = _sizes(directory, manifest, wanted)
    artefact = open_artefact(directory, manifest, ground.library, ground.info)
    device = ground.toolkit.open_device(ground.library, ground.index)
    progress("loading the engine", 0, 1)
    engine = open_engine(device, artefact, slots, max_len)
    progress("loading the engine", 1, 1)
    return engine


def build_for_device(
    model_dir: Path,
    place: Path,
    wanted: Recipe,
    report: Callable[[Result], None],
    *,
    progress: Progress = silent,
    toolkit: Toolkit | None = None,
) -> Built:
    """Builds, or finds, an engine for the device of this machine, with a form of attention that passes the self-test,
    of which `report` hears. Raises EngineError."""
    ground = Ground.of(wanted, place, toolkit, progress, report)
    return _built(model_dir, wanted, ground, replace_damaged=True)


def _logged(result: Result) -> None:
    logger = log.get("engine")
    (logger.info if result.passed else logger.error)("self-test of the GPU", **result.to_json())


def _built(model_dir: Path, wanted: Recipe, ground: Ground, *, replace_damaged: bool) -> Built:
    """From a checkpoint."""
    recipe = resolve(model_dir, wanted)
    options = engine_options(dataclasses.replace(recipe, attention="posmask"))
    check_precision(options.precision, ground.info)
    if ground.library.rtx:
        recipe = dataclasses.replace(recipe, sms=recipe.sms or (ground.info.sm,))
        check_devices(ground.library, options.precision, recipe.sms)
    forms = _forms(options) if recipe.attention == "auto" else (recipe.attention,)
    form = first_passing(_results(ground, forms, options.compute), ground.report)
    recipe = dataclasses.replace(recipe, attention=form)
    found = find(model_dir, ground.place, recipe, ground.info.sm, ground.toolkit)
    if found is not None and not replace_damaged:
        return found
    return build(
        model_dir,
        ground.place,
        recipe,
        replace_damaged=replace_damaged,
        progress=ground.progress,
        toolkit=ground.toolkit,
    )


def _check_built_engine(directory: Path, manifest: Manifest, wanted: Recipe, ground: Ground) -> None:
    """Raises EngineError, with what to run, when a built engine is not what was asked for or fails the self-test."""
    check_built(directory, manifest, wanted)
    check_fits(directory, manifest, ground.library, ground.info)
    options, form = engine_options(manifest.recipe), form_of(manifest)
    check_precision(options.precision, ground.info)
    if wanted.attention not in ("auto", form):
        raise _rebuild(directory, manifest, wanted.attention, f"{wanted.attention} is wanted")
    others = [other for other in _forms(options) if other != form] if wanted.attention == "auto" else []
    passing = first_passing(_results(ground, (form, *others), options.compute), ground.report)
    if passing != form:
        raise _rebuild(directory, manifest, passing, f"which fails the self-test of this device; {passing} passes")


def _forms(options: EngineOptions) -> tuple[AttentionForm, ...]:
    """Forms that an engine may have, in the order in which they are tried."""
    # `split` needs weights that are inputs.
    return tuple(form for form in ATTENTION_FORMS if form != "split" or not options.quantised)


def _results(ground: Ground, forms: Sequence[AttentionForm], compute: Compute) -> Iterator[Result]:
    backend = kind_of(Recipe(ground.library.kind))
    return run_selftest(ground.toolkit, backend, ground.index, ground.place, compute, forms, ground.progress)


def _rebuild(directory: Path, manifest: Manifest, form: AttentionChoice, why: str) -> EngineError:
    recipe = dataclasses.replace(manifest.recipe, attention=form)
    return EngineError(
        f"{directory} was built with attention {form_of(manifest)}, {why}: "
        f"run `{recipe.command(manifest.checkpoint, directory.parent.parent)}`"
    )


def _sizes(directory: Path, manifest: Manifest, wanted: Recipe) -> tuple[int, int]:
    """Slots and positions to serve with. Raises EngineError, with what to run, for more than was built for."""
    slots, max_len = wanted.slots or manifest.slots, wanted.max_len or manifest.max_len
    if slots > manifest.slots or max_len > manifest.max_len:
        recipe = dataclasses.replace(
            manifest.recipe, slots=max(slots, manifest.slots), max_len=max(max_len, manifest.max_len)
        )
        raise EngineError(
            f"{directory} was built for {manifest.slots} slots of {manifest.max_len} positions, "
            f"{slots} of {max_len} are wanted: "
            f"run `{recipe.command(manifest.checkpoint, directory.parent.parent)}`"
        )
    return slots, max_len
