"""The two ceilings of the device, and whether a library takes it at all."""

from collections.abc import Callable
from typing import Any

import numpy as np

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.engine.tensorrt.library import Library
from helixflow.engine.tensorrt.numeric import DType
from helixflow.engine.tensorrt.ops import Ops, Shape
from helixflow.engine.tensorrt.options import GpuPrecision
from perf.gpu.bench import CHECKED, Bench, Loaded, Tools, distance, fixed, open_bench, ranged
from perf.gpu.primitives import refused
from perf.gpu.rows import RefusedError, Report, Task

# Of the memory that is free, a copy takes at most this part twice.
COPY_SHARE = 4
SIDE = 64


def copy(task: Task) -> None:
    """Bandwidth of a large device-to-device copy: what memory-bound work is held against."""
    tools = task.tools or Tools()
    device = tools.bare()
    try:
        _copy(task.report, Bench(device, None, tools))
    finally:
        device.close()


def _copy(report: Report, bench: Bench) -> None:
    nbytes = min(bench.sizes.copy, bench.device.info().free_bytes // COPY_SHARE) // 4096 * 4096
    source, target = bench.random(nbytes // 2, "fp16"), bench.allocate(nbytes)
    bench.device.fill(target, 0xFF, nbytes)
    seconds = bench.median(lambda: bench.device.copy(target, source, nbytes))
    tail = nbytes - min(nbytes, 1 << 16)
    ends = [bench.read(place + tail, (nbytes - tail,), "int8") for place in (source, target)]
    bandwidth = 2 * nbytes / seconds
    report.fact("bandwidth", bandwidth)
    figure = f"{bandwidth / 1e12:.2f} TB/s"
    same = np.array_equal(ends[0], ends[1]) and len(np.unique(ends[0])) > 1
    report.check(f"copy of {nbytes / 2**30:.2f} GiB", figure, same, "the end of the copy differs from its source")


def accept(task: Task) -> None:
    """A small network, built, loaded and run: the cheapest way to hear a refusal."""
    with open_bench(task) as bench:
        library, info = bench.library, bench.device.info()
        task.report.row("library", f"{library.kind} {library.version} on SM {info.sm}")
        weight = bench.normal((SIDE, SIDE), "fp16", SIDE**-0.5)
        refusals = []
        for how, build in _builds(bench):
            try:
                plan = build()
                if library.rtx:
                    task.report.row(f"{how}: validity", _validity(library, plan))
                error = _product_error(bench, plan, weight)
            except (EngineError, RuntimeError, AttributeError) as refusal:
                # A device that is lost or full has not refused anything.
                if isinstance(refusal, DeviceError) and refusal.kind != "failed":
                    raise
                refusals.append(f"{how}: {' '.join(str(refusal).split())}")
                task.report.row(how, "", "REFUSED", refusals[-1])
                continue
            task.report.check(f"{how}: product", f"{error:.1e}", error < 3e-3)
            if how == "as engines are built":
                return
        raise RefusedError(" / ".join(refusals) or "engines as they are built do not run here")


def _builds(bench: Bench) -> list[tuple[str, Callable[[], bytes]]]:
    """Ways to build for this device, the engines' own first."""

    def ours() -> bytes:
        small = bench.network("fp16", lambda ops: _product(ops, SIDE))
        return bench.compiled(small, ranged({"T": 1}, {"T": SIDE}))

    builds: list[tuple[str, Callable[[], bytes]]] = [("as engines are built", ours)]
    if bench.library.rtx:
        builds.append(("capability CURRENT", lambda: _build_current(bench)))
    return builds


def _build_current(bench: Bench) -> bytes:
    """RTX, told to build for the device that is here and nothing else."""
    library, small = bench.library, bench.network("fp16", lambda ops: _product(ops, SIDE))
    trt, builder = library.trt, small.network.builder
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    library.log.take()
    if not config.set_compute_capability(trt.ComputeCapability.CURRENT, 0):
        raise library.failure("the capability of this device is refused")
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, SIDE), (SIDE, SIDE), (SIDE, SIDE))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(small.network.definition, config)
    if plan is None:
        raise library.failure("the engine cannot be built")
    return bytes(memoryview(plan))


def _validity(library: Library, plan: bytes) -> str:
    """What RTX says of a plan before it loads it."""
    try:
        runtime = library.trt.Runtime(library.log)
        return str(runtime.get_engine_validity(plan[: runtime.engine_header_size]))
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"cannot be asked: {error}"


def _product(ops: Ops, side: int) -> dict[str, tuple[Any, Shape]]:
    """y = x @ w.T, with `side` features on both sides."""
    return {"y": (ops.linear(ops.input("x", ("T", side), ops.compute), "linear", (side, side), False), ("T", side))}


def _product_error(bench: Bench, plan: bytes, weight: Any) -> float:
    """Distance of a product on the device from numpy's."""
    small = bench.network("fp16", lambda ops: _product(ops, SIDE))
    loaded = Loaded(bench, small, bench.device.load(plan))
    loaded.shape({"T": 8})
    x = bench.normal((8, SIDE), "fp16")
    loaded.feed({"x": x, "w.linear.weight": weight})
    loaded.poison()
    loaded.run()
    return distance(loaded.results()["y"], x.astype(np.float32) @ weight.astype(np.float32).T)


def rate(task: Task) -> None:
    """Rate of a large product of matrices, through the library under test."""
    with open_bench(task) as bench:
        kinds: tuple[GpuPrecision, ...] = ("fp16", "bf16")
        for kind in kinds:
            with bench.released():
                try:
                    _rate(task, bench, kind)
                except EngineError as error:
                    refused(task.report, kind, error)


def _rate(task: Task, bench: Bench, kind: GpuPrecision) -> None:
    side = bench.sizes.matrix
    small = bench.network(kind, lambda ops: _product(ops, side))
    loaded = bench.loaded(small, fixed({"T": side}))
    loaded.shape({"T": side})
    dtype: DType = "bf16" if kind == "bf16" else "fp16"
    for name in ("x", "w.linear.weight"):
        loaded.at(name, bench.random(side * side, dtype))
    loaded.poison()
    seconds = bench.median(loaded.run)
    flops = 2 * side**3 / seconds
    error = _sampled_error(bench, loaded, side, dtype)
    task.report.fact(f"rate.{task.backend}.{kind}", flops)
    figure = f"{flops / 1e12:.0f} TFLOP/s, error {error:.1e}"
    task.report.check(f"{kind}, {side} x {side} x {side}", figure, error < 2e-2)


def _sampled_error(bench: Bench, loaded: Loaded, side: int, dtype: DType) -> float:
    """Distance of some rows and columns from numpy's."""
    item, count = 2, min(CHECKED, side)
    rows, columns = (np.sort(bench.rng.choice(side, count, replace=False)) for _ in range(2))

    def lines(name: str, wanted: Any) -> Any:
        parts = [bench.read(loaded.addresses[name] + int(i) * side * item, (side,), dtype) for i in wanted]
        return np.stack(parts).astype(np.float32)

    reference = lines("x", rows) @ lines("w.linear.weight", columns).T
    return distance(lines("y", rows)[:, columns], reference)
