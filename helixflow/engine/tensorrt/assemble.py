"""From files to an engine that computes."""

from pathlib import Path

from helixflow.engine.tensorrt.artefact import PLAN, Artefact, split_plan
from helixflow.engine.tensorrt.device import Device
from helixflow.engine.tensorrt.engine import RunOptions, TensorRtEngine
from helixflow.engine.tensorrt.forward import Programs
from helixflow.engine.tensorrt.fused import FusedPrograms
from helixflow.engine.tensorrt.split import PARTS
from helixflow.engine.tensorrt.split_forward import SplitPrograms

CACHE = "cache"
"""Directory beside a plan: what was compiled for the device at its first start, to be found at the next."""


def open_engine(device: Device, artefact: Artefact, slots: int, max_len: int) -> TensorRtEngine:
    """Loads an engine, which takes the device over; it is closed when that fails. Raises EngineError."""
    try:
        programs = _programs(device, artefact)
    except BaseException:
        device.close()
        raise
    run = RunOptions(slots, max_len)
    return TensorRtEngine(device, artefact.spec, artefact.options, programs, artefact.weights, run)


def _programs(device: Device, artefact: Artefact) -> Programs:
    cache = _cache(artefact.directory)
    if artefact.options.attention == "split":
        plans = {part: artefact.plan(split_plan(part)) for part in PARTS if split_plan(part) in artefact.manifest.files}
        return SplitPrograms(device, plans, artefact.spec, artefact.options, cache)
    kept = cache and cache / f"plan.{device.info().sm}.cache"
    return FusedPrograms(device, artefact.plan(PLAN), artefact.spec, kept)


def _cache(directory: Path) -> Path | None:
    """The directory for it; None where nothing can be written: then every start compiles again."""
    try:
        (directory / CACHE).mkdir(exist_ok=True)
    except OSError:
        return None
    return directory / CACHE
