"""What a decode attention costs: against the length of a slot (S_max), and against the positions in use."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError
from helixflow.engine.items import Item
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.attention import CachedAttention
from helixflow.engine.tensorrt.compile import profiles
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.engine.tensorrt.kernels import DECODE_SPREAD, AttentionShape, LayerCaches, Tokens, open_attention
from helixflow.engine.tensorrt.launches import Launch
from helixflow.engine.tensorrt.layout import Layout, input_shape
from helixflow.engine.tensorrt.ops import Ops, Shape
from helixflow.engine.tensorrt.options import ATTENTION_FORMS, EngineOptions
from perf.gpu.bench import Bench, Loaded, Small, open_bench
from perf.gpu.rows import Report, Task
from perf.gpu.sizes import cut

Timed = Callable[[int], float]
"""Seconds of one layer's attention when every slot holds so many positions."""


def check(task: Task) -> None:
    """Time of one layer's decode attention, every form, every capacity and every length that fits."""
    with open_bench(task) as bench:
        for form in ATTENTION_FORMS:
            times: dict[tuple[int, int], float] = {}
            for capacity in bench.sizes.capacities:
                task.report.need(8)
                options = EngineOptions("fp16", bench.sizes.rows, capacity - 1, form)
                with bench.released():
                    try:
                        timed = _split(bench, options) if form == "split" else _fused(bench, options)
                    except EngineError as error:
                        if isinstance(error, DeviceError) and error.kind != "out_of_memory":
                            raise
                        task.report.row(f"{form}, S_max {capacity}", "", "REFUSED", str(error))
                        continue
                    _row(task.report, bench, options, timed, times)
            _conclude(task.report, form, times)


def _row(
    report: Report, bench: Bench, options: EngineOptions, timed: Timed, times: dict[tuple[int, int], float]
) -> None:
    """One capacity: all lengths."""
    spec, parts = bench.sizes.large, []
    for length in bench.sizes.lengths:
        if length >= options.max_len:
            continue
        seconds = times[options.positions, length] = timed(length)
        nbytes = 2 * options.slots * spec.kv_heads * length * spec.head_dim * 2
        share = f" ({nbytes / seconds / report.facts['bandwidth']:.0%})" if "bandwidth" in report.facts else ""
        parts.append(f"{length}: {seconds * 1e6:.0f} µs{share}")
    what = f"{options.attention}, S_max {options.positions}, {options.slots} sequences"
    report.row(f"{what}: length: time (share of bandwidth)", "; ".join(parts))


def _conclude(report: Report, form: str, times: Mapping[tuple[int, int], float]) -> None:
    """Whether time follows the capacity: the shortest length in the smallest and in the largest of them."""
    if not times:
        return
    shortest = min(length for _, length in times)
    capacities = sorted(capacity for capacity, length in times if length == shortest)
    if len(capacities) < 2:
        return
    growth = times[capacities[-1], shortest] / times[capacities[0], shortest]
    report.row(
        f"{form}: time at length {shortest}, S_max {capacities[-1]} over {capacities[0]}", f"{growth:.1f}", value=growth
    )


def _launch(options: EngineOptions, length: int) -> Launch:
    """A decode launch of all slots, `length` positions each, the new one included."""
    return Launch([Item(slot, length - 1, [0], 1, slot) for slot in range(options.slots)], options)


def inputs_of(launch: Launch, options: EngineOptions, vocab: int) -> dict[str, NDArray[Any]]:
    """The index inputs of a launch, each in its shape."""
    layout = Layout(options, vocab)
    arrays = layout.arrays(np.zeros(layout.nbytes, np.uint8))
    launch.write(arrays)
    letters = {**launch.shapes._asdict(), "K": layout.columns - 1}
    inputs = {}
    for name, flat in arrays.items():
        shape = input_shape(name, letters)
        inputs[name] = flat.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    return inputs


def _fused(bench: Bench, options: EngineOptions) -> Timed:
    """The attention of one layer as it is inside an engine's network."""
    spec = cut(bench.sizes.large, 1)
    small = one_layer(bench, spec, options)
    loaded = bench.loaded(small, profiles(options)[0])
    launch = _launch(options, 1)
    loaded.shape(launch.shapes._asdict())
    loaded.randomise()

    def timed(length: int) -> float:
        feeds = inputs_of(_launch(options, length), options, spec.vocab_size)
        loaded.feed({name: values for name, values in feeds.items() if name in small.network.ops.symbols})
        loaded.poison()
        seconds = bench.median(loaded.run, inner=4)
        _written(bench, loaded)
        return seconds

    return timed


def one_layer(bench: Bench, spec: ModelSpec, options: EngineOptions) -> Small:
    """A network of nothing but one layer's attention: q, k and v come in, rotation and cache update included."""

    def make(ops: Ops) -> dict[str, tuple[Any, Shape]]:
        attention = CachedAttention(ops, spec, options)
        widths = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        q, k, v = (ops.input(name, ("T", heads * spec.head_dim), ops.compute) for name, heads in widths.items())
        out = attention.apply(0, q, k, v, None)
        cache: Shape = ("B", spec.kv_heads, options.positions, spec.head_dim)
        caches = {f"{name}_out": (tensor, cache) for (tensor, _), name in zip(attention.caches, CACHES, strict=True)}
        return {"out": (out, ("T", spec.heads * spec.head_dim)), **caches}

    return bench.network(options.precision, make)


CACHES = ("k_cache_0", "v_cache_0")


def _written(bench: Bench, loaded: Loaded) -> None:
    """Raises EngineError unless the output holds numbers."""
    out = loaded.results_of("out")
    if not np.isfinite(out.astype(np.float32)).all():
        raise EngineError(f"the attention left its output unwritten, or wrote what is no number (seed {bench.seed})")


def _split(bench: Bench, options: EngineOptions) -> Timed:
    """Our own kernels: append and attend."""
    spec = cut(bench.sizes.large, 1)
    shape = AttentionShape.of(spec, options)
    attention = open_attention(bench.device, shape)
    tokens, item = options.slots, 2
    row = spec.kv_heads * options.positions * spec.head_dim
    caches = LayerCaches(*(bench.random(options.cache_rows * row, "fp16") for _ in range(2)))
    q, k, v = (
        bench.random(tokens * heads * spec.head_dim, "fp16") for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
    )
    size = tokens * spec.heads * spec.head_dim
    out, work = bench.allocate(size * item), bench.allocate(attention.workspace_bytes(tokens, DECODE_SPREAD))

    def timed(length: int) -> float:
        feeds = inputs_of(_launch(options, length), options, spec.vocab_size)
        places = [bench.put(feeds[name]) for name in ("cu_q", "position_ids")]
        launch = Tokens(tokens, options.cache_rows, places[0], places[1], DECODE_SPREAD)
        bench.device.fill(out, 0xFF, size * item)

        def run() -> None:
            attention.append(launch, k, v, caches)
            attention.attend(launch, q, caches, None, out, work)

        seconds = bench.median(run, inner=4)
        if not np.isfinite(bench.read(out, (size,), "fp16").astype(np.float32)).all():
            raise EngineError(f"the kernels left their output unwritten (seed {bench.seed})")
        return seconds

    return timed
