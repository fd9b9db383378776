"""Each primitive of the engines on the device, beside the same network definition in numpy."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.engine.tensorrt.linear import Linears
from helixflow.engine.tensorrt.ops import Ops, Shape
from helixflow.engine.tensorrt.options import FP8_SM, GpuPrecision
from helixflow.engine.tensorrt.sampler import EXCLUDED, Sampler, candidates
from perf.gpu.bench import Array, Bench, Letters, Loaded, distance, fixed, open_bench, ranged
from perf.gpu.rows import Report, Task

# ‖out - reference‖ / ‖reference‖ against sums in float32. bf16 operands err by 1e-3 to 1e-2, fp16 ones by an eighth.
TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "fp16": 3e-3, "bf16": 2e-2}
GARBAGE = 1e4
WINDOW = 100
Outputs = dict[str, tuple[Any, Shape]]


def cache_updates(task: Task) -> None:
    """Packed and padded updates of a cache: every byte of it must be what it should be, written and unwritten."""
    with open_bench(task) as bench:
        for precision in ("fp16", "bf16"):
            for width in bench.sizes.widths:
                for how, check in (("packed", _packed), ("padded", _padded)):
                    what = f"{how}, {precision}, head_dim {width}"
                    _guarded(task.report, what, functools.partial(check, bench, precision, width))


def attention(task: Task) -> None:
    """Attention under a mask of positions, over caches whose unused part holds garbage."""
    with open_bench(task) as bench:
        for precision in ("fp16", "bf16"):
            for width in bench.sizes.widths:
                _attend(task.report, bench, precision, width, by_lengths=False)


def lengths(task: Task) -> None:
    """The same by lengths, which not every release of TensorRT heeds."""
    with open_bench(task) as bench:
        for precision in ("fp16", "bf16"):
            for width in bench.sizes.widths:
                _attend(task.report, bench, precision, width, by_lengths=True)


def rows(task: Task) -> None:
    """What a decoder does with rows of features."""
    with open_bench(task) as bench:
        for precision in ("fp32", "fp16", "bf16"):
            _rows(task.report, bench, precision)


def linear(task: Task) -> None:
    """Quantised linear layers, for one token and for many."""
    with open_bench(task) as bench:
        for precision in ("int8", "int4", "fp8"):
            sm = bench.device.info().sm
            if precision == "fp8" and sm < FP8_SM:
                task.report.row(f"{precision} weights", "", "SKIPPED", f"SM {sm} has no fp8 products, SM {FP8_SM} has")
                continue
            _quantised(task.report, bench, precision)


def sampler(task: Task) -> None:
    """The choice of tokens: never another one than numpy's, and no choice where a logit is no number."""
    with open_bench(task) as bench:
        for vocab in (bench.sizes.vocab, 300, 40):
            _sampled(task.report, bench, vocab)


def _guarded(report: Report, what: str, work: Callable[[], str]) -> None:
    """A check that returns what is wrong; a refusal of the library is one as well, and leaves the others to be made."""
    try:
        problem = work()
    except EngineError as error:
        refused(report, what, error)
        return
    report.check(what, "exact" if not problem else "", not problem, problem)


def refused(report: Report, what: str, error: EngineError) -> None:
    """A row for a refusal of the library; an error of the device is none, and is raised again."""
    if isinstance(error, DeviceError):
        raise error
    report.row(what, "", "REFUSED", str(error))


def _update(ops: Ops, cache: Any, new: Any, first: Any, counts: Any | None) -> Any:
    """`cache` with `new` in it; `counts`: tokens before each row, when they are packed."""
    layer = ops.definition.add_kv_cache_update(cache, new, first, ops.trt.KVCacheMode.LINEAR)
    if layer is None:
        raise ops.library.failure("a cache update cannot be added")
    if counts is not None:
        layer.update_form = ops.trt.AttentionIOForm.PACKED_NHD
        layer.update_lengths = counts
    return layer.get_output(0)


def _packed(bench: Bench, precision: GpuPrecision, width: int) -> str:
    positions, heads = bench.sizes.positions, 2

    def make(ops: Ops) -> Outputs:
        cache = ops.input("cache", ("B", heads, positions, width), ops.compute)
        new = ops.input("new", ("T", heads, width), ops.compute)
        updated = _update(ops, cache, new, ops.input("first", ("B",)), ops.input("counts", ("B+1",)))
        return {"cache_out": (updated, ("B", heads, positions, width))}

    small = bench.network(precision, make)
    letters: Letters = {"B": 6, "T": 9}
    loaded = bench.loaded(small, ranged({"B": 1, "T": 1}, {"B": 8, "T": 32}, letters))
    problem = ""
    # Idle rows before, between and behind; the last position; then all rows idle but one, and other places.
    for counts, first in (
        ([0, 3, 1, 0, 5, 0], [0, positions - 3, 7, 0, 0, 3]),
        ([0, 0, 0, 0, 0, 9], [0, 0, 0, 0, 0, 1]),
        ([1, 1, 1, 1, 1, 4], [positions - 1, 0, 2, 3, 4, 5]),
    ):
        cumulative = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        feeds = {
            "cache": bench.normal((6, heads, positions, width), precision_type(precision)),
            "new": bench.normal((9, heads, width), precision_type(precision)),
            "first": np.array(first, np.int32),
            "counts": cumulative,
        }
        problem = problem or _same(loaded, letters, feeds, f"counts {counts}")
    return problem


def _padded(bench: Bench, precision: GpuPrecision, width: int) -> str:
    positions, heads = bench.sizes.positions, 2

    def make(ops: Ops) -> Outputs:
        cache = ops.input("cache", ("B", heads, positions, width), ops.compute)
        new = ops.input("new", ("B", heads, "N", width), ops.compute)
        return {
            "cache_out": (_update(ops, cache, new, ops.input("first", ("B",)), None), ("B", heads, positions, width))
        }

    small = bench.network(precision, make)
    loaded = bench.loaded(small, ranged({"B": 1, "N": 1}, {"B": 4, "N": 4}))
    problem = ""
    for letters, first in (({"B": 3, "N": 1}, [0, positions - 1, 5]), ({"B": 2, "N": 4}, [positions - 4, 1])):
        feeds = {
            "cache": bench.normal((letters["B"], heads, positions, width), precision_type(precision)),
            "new": bench.normal((letters["B"], heads, letters["N"], width), precision_type(precision)),
            "first": np.array(first, np.int32),
        }
        problem = problem or _same(loaded, letters, feeds, f"{letters['N']} a row")
    return problem


def _same(loaded: Loaded, letters: Letters, feeds: Mapping[str, Array], what: str) -> str:
    """What is wrong with an updated cache, bit by bit; empty when nothing is."""
    out, reference = loaded.compare(letters, feeds)
    wrong = (out["cache_out"].view(np.uint16) != reference["cache_out"].view(np.uint16)).any(axis=-1)
    if not wrong.any():
        return ""
    row, head, position = (int(index[0]) for index in np.nonzero(wrong))
    return f"{what}: {int(wrong.sum())} vectors differ, first row {row}, head {head}, position {position}"


def precision_type(precision: GpuPrecision) -> Any:
    """Type of activations of a precision that is one of them."""
    return precision


class _Attention:
    """The inputs of one attention: `group` query heads per kv head, `queries` per row; see `_attend`."""

    def __init__(self, bench: Bench, width: int, group: int, queries: int, window: int | None, rows: int = 4) -> None:
        self.width, self.group, self.queries, self.window, self.rows = width, group, queries, window, rows
        self.positions, self.groups = bench.sizes.positions, 2
        self.name = f"g{group}q{queries}" + ("w" if window else "")

    def __str__(self) -> str:
        words = f"{self.queries} queries, {self.group} heads a group"
        return words + (f", window {self.window}" if self.window else "")

    def add(self, ops: Ops, by_lengths: bool) -> tuple[Any, Shape]:
        """Adds it to a network."""
        name, kinds = self.name, ops.trt.CausalMaskKind
        q = ops.input(f"{name}.q", ("B", self.groups * self.group, self.queries, self.width), ops.compute)
        k, v = (
            ops.input(f"{name}.{part}", ("B", self.groups, self.positions, self.width), ops.compute) for part in "kv"
        )
        kind = kinds.LOWER_RIGHT if by_lengths else kinds.NONE
        layer = ops.definition.add_attention_v2(q, k, v, ops.trt.AttentionNormalizationOp.SOFTMAX, kind)
        if layer is None:
            raise ops.library.failure(f"attention of {self} cannot be added")
        layer.name, layer.decomposable = name, True
        if by_lengths:
            layer.key_value_lengths = ops.input(f"{name}.length", ("B",))
        else:
            layer.mask = self._mask(ops)
        return layer.get_output(0), ("B", self.groups * self.group, self.queries, self.width)

    def _mask(self, ops: Ops) -> Any:
        positions = ops.reshape(ops.input(f"{self.name}.position", ("B", self.queries)), (0, 1, -1, 1))
        places = ops.reshape(ops.constant(np.arange(self.positions), "int32"), (1, 1, 1, -1))
        mask = ops.negate(ops.less(positions, places))
        if self.window is None:
            return mask
        oldest = ops.subtract(positions, ops.constant(self.window, "int32", (1, 1, 1, 1)))
        return ops.both(mask, ops.less(oldest, places))

    def feeds(self, bench: Bench, precision: GpuPrecision, by_lengths: bool, tail: float) -> dict[str, Array]:
        """Rows of all lengths; what lies behind each is `tail`."""
        kind, name = precision_type(precision), self.name
        ends = np.array([self.queries, self.positions // 3, self.positions // 2 + 1, self.positions], np.int32)
        k, v = (bench.normal((self.rows, self.groups, self.positions, self.width), kind) for _ in range(2))
        for row, end in enumerate(ends):
            k[row, :, end:], v[row, :, end:] = tail, tail
        # Scores of a few units, so that some positions count more than others.
        q = bench.normal((self.rows, self.groups * self.group, self.queries, self.width), kind, 2 / self.width**0.5)
        feeds = {f"{name}.q": q, f"{name}.k": k, f"{name}.v": v}
        if by_lengths:
            return {**feeds, f"{name}.length": ends}
        positions = ends[:, None] - self.queries + np.arange(self.queries, dtype=np.int32)
        return {**feeds, f"{name}.position": positions.astype(np.int32)}


def _attend(report: Report, bench: Bench, precision: GpuPrecision, width: int, by_lengths: bool) -> None:
    """All shapes of one type and width in one network, which costs one build; alone when that is refused."""
    chunk = min(64, bench.sizes.positions // 4)
    window = min(WINDOW, bench.sizes.positions // 4)
    wanted = [
        _Attention(bench, width, group, queries, None)
        for group in bench.sizes.groups
        for queries in ((1,) if by_lengths else (1, chunk))
    ]
    if not by_lengths:
        wanted += [_Attention(bench, width, bench.sizes.groups[-1], queries, window) for queries in (1, chunk)]
    try:
        _attend_all(report, bench, precision, wanted, by_lengths)
    except EngineError as error:
        title = f"{precision}, head_dim {width}"
        refused(report, f"{title}: all shapes in one network", error)
        for one in wanted:
            try:
                _attend_all(report, bench, precision, [one], by_lengths)
            except EngineError as refusal:
                refused(report, f"{title}: {one}", refusal)


def _attend_all(
    report: Report, bench: Bench, precision: GpuPrecision, wanted: list[_Attention], by_lengths: bool
) -> None:
    small = bench.network(precision, lambda ops: {f"{one.name}.out": one.add(ops, by_lengths) for one in wanted})
    letters: Letters = {"B": 4}
    loaded = bench.loaded(small, fixed(letters))
    title = f"{precision}, head_dim {wanted[0].width}"
    with bench.released():
        feeds = _all_feeds(bench, precision, wanted, by_lengths, GARBAGE)
        out, reference = loaded.compare(letters, feeds)
        for one in wanted:
            error = distance(out[f"{one.name}.out"], reference[f"{one.name}.out"])
            note = f"garbage behind each row, seed {bench.seed}"
            report.check(f"{title}: {one}", f"{error:.1e}", error <= TOLERANCE[precision], note)
    with bench.released():
        # The engine's caches never hold NaN; whether one would spoil a row says how the kernel masks.
        for name, values in feeds.items():
            if name.endswith((".k", ".v")):
                values[values.astype(np.float32) == np.float32(np.array(GARBAGE, values.dtype))] = np.nan
        loaded.shape(letters)
        loaded.feed(feeds)
        loaded.poison()
        loaded.run()
        clean = [one for one in wanted if np.isfinite(loaded.results()[f"{one.name}.out"].astype(np.float32)).all()]
        report.row(f"{title}: NaN behind each row", f"{len(clean)} of {len(wanted)} shapes stay clean")


def _all_feeds(
    bench: Bench, precision: GpuPrecision, wanted: list[_Attention], by_lengths: bool, tail: float
) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for one in wanted:
        feeds |= one.feeds(bench, precision, by_lengths, tail)
    return feeds


def _rows(report: Report, bench: Bench, precision: GpuPrecision) -> None:
    """Norm, rotation, gated unit and product of one type, as outputs of one network."""
    features, width, heads, positions = bench.sizes.features, bench.sizes.widths[-1], 2, 64

    def make(ops: Ops) -> Outputs:
        x = ops.input("x", ("T", features), ops.compute)
        normed = ops.rms_norm(x, ops.weight("norm", (features,)), 1e-5)
        cos, sin = (ops.input(name, (positions, width // 2), ops.compute) for name in ("cos", "sin"))
        places = ops.reshape(ops.input("position", ("T",)), (-1, 1))
        turned = ops.rotate(ops.input("heads", ("T", heads, 1, width), ops.compute), cos, sin, places)
        product = ops.linear(x, "linear", (features // 2, features), bias=True)
        gated = ops.swiglu(ops.input("gate", ("T", features), ops.compute), x)
        return {
            "normed": (normed, ("T", features)),
            "rotated": (turned, ("T", heads, 1, width)),
            "product": (product, ("T", features // 2)),
            "gated": (gated, ("T", features)),
            "scaled": (ops.scaled(x, 0.1), ("T", features)),
        }

    small = bench.network(precision, make)
    angles = np.outer(np.arange(positions), 10000.0 ** -(np.arange(0, width, 2) / width))
    kind = precision_type(precision)
    try:
        loaded = bench.loaded(small, ranged({"T": 1}, {"T": 64}))
    except EngineError as error:
        refused(report, precision, error)
        return
    worst: dict[str, float] = {}
    for tokens in (1, 37):
        feeds = {name: bench.normal(shape, kind) for name, shape in _shapes(small.network.ops, tokens)}
        feeds["w.linear.weight"] = bench.normal((features // 2, features), kind, features**-0.5)
        feeds["cos"], feeds["sin"] = (f(angles).astype(feeds["x"].dtype) for f in (np.cos, np.sin))
        feeds["position"] = bench.rng.integers(0, positions, tokens, dtype=np.int32)
        out, reference = loaded.compare({"T": tokens}, feeds)
        for name in small.outputs:
            worst[name] = max(worst.get(name, 0.0), distance(out[name], reference[name]))
    for name, off in worst.items():
        report.check(f"{precision}: {name}", f"{off:.1e}", off <= TOLERANCE[precision], f"seed {bench.seed}")


def _shapes(ops: Ops, tokens: int) -> list[tuple[str, tuple[int, ...]]]:
    """Shapes of the inputs of a network whose only free size is T."""
    return [
        (name, tuple(tokens if isinstance(size, str) else size for size in shape))
        for name, shape in ops.symbols.items()
    ]


def _quantised(report: Report, bench: Bench, precision: GpuPrecision) -> None:
    features, out = bench.sizes.features, bench.sizes.features // 2
    weight = (bench.rng.standard_normal((out, features), np.float32) * features**-0.5).astype(np.float32)

    def make(ops: Ops) -> Outputs:
        linears = Linears(ops, precision, lambda _: weight, {"linear": 4 / 448})
        x = ops.input("x", ("T", features), ops.compute)
        return {"y": (linears.apply(x, "linear", (out, features), bias=False), ("T", out))}

    try:
        loaded = bench.loaded(bench.network(precision, make), ranged({"T": 1}, {"T": 64}))
        for tokens in (1, 37):
            x = bench.normal((tokens, features), "fp16")
            got, reference = loaded.compare({"T": tokens}, {"x": x})
            error, plain = distance(got["y"], reference["y"]), distance(got["y"], x.astype(np.float32) @ weight.T)
            # fp8 inputs fall between two codes here and there: what rounds up in one and down in the other differs.
            tolerance = 10 * TOLERANCE["fp16"] if precision == "fp8" else TOLERANCE["fp16"]
            figure = f"{error:.1e}; {plain:.1e} from unquantised"
            report.check(f"{precision} weights, {tokens} tokens", figure, error <= tolerance, f"seed {bench.seed}")
    except EngineError as error:
        refused(report, f"{precision} weights", error)


def _sampled(report: Report, bench: Bench, vocab: int) -> None:
    rows_, count = 16, candidates(vocab)

    def make(ops: Ops) -> Outputs:
        logits = ops.input("logits", ("R", vocab), "fp32")
        Sampler(ops, logits, vocab)
        return {}

    what = f"vocabulary of {vocab}"
    small = bench.network("fp16", make)
    small.outputs.update(next_ids=("R",), undecided=("R",))
    letters: Letters = {"R": rows_}
    try:
        loaded = bench.loaded(small, fixed(letters))
    except EngineError as error:
        refused(report, what, error)
        return
    differ = undecided = expected = ordinary = 0
    problem = ""
    for round_ in range(3):
        feeds = sampling_feeds(bench, rows_, vocab, count)
        spoiled = {0: np.nan, 1: np.inf} if round_ == 2 else {}
        for row, value in spoiled.items():
            feeds["logits"][row, bench.rng.integers(vocab)] = value
        out, reference = loaded.compare(letters, feeds)
        ids, open_ = out["next_ids"], out["undecided"] != 0
        if not ((ids >= 0) & (ids < vocab)).all():
            problem = f"chose {ids.tolist()}, which are no tokens"
        if not all(open_[row] for row in spoiled):
            problem = "decided a row with a logit that is no finite number"
        ours = reference["undecided"] != 0
        both = ~open_ & ~ours
        differ += int((ids[both] != reference["next_ids"][both]).sum())
        undecided, expected = undecided + int(open_.sum()), expected + int(ours.sum())
        ordinary += rows_ - len(spoiled)
    if differ:
        problem = f"{differ} tokens differ from numpy's, seed {bench.seed}"
    if undecided > expected + max(2, ordinary // 10):
        problem = problem or f"leaves {undecided} of {ordinary} rows to the host, numpy {expected}"
    report.check(what, f"{differ} of {ordinary} differ, {undecided} left to the host", not problem, problem)


def sampling_feeds(bench: Bench, rows_: int, vocab: int, count: int) -> dict[str, Array]:
    """Rows of all kinds: greedy, and every mixture of temperature, top_p, top_k and min_p."""
    rng = bench.rng
    uniform = rng.random((rows_, count + 1)) * (1 - 2**-24) + 2**-25
    gumbel = -np.log(-np.log(uniform))
    top_k = rng.choice([0, 1, 5, count], rows_)
    greedy = np.arange(rows_) % 4 == 0
    gumbel[greedy], top_k[greedy] = 0, 1
    temperature = np.where(greedy, 1, rng.choice([0.5, 1, 1.5], rows_))
    columns = {
        "inv_temp": 1 / temperature,
        "top_p": np.where(greedy, 1, rng.choice([0.3, 0.9, 1], rows_)),
        "min_z": np.where(greedy, EXCLUDED, rng.choice([np.log(0.05), EXCLUDED], rows_)),
    }
    return {
        "logits": (rng.standard_normal((rows_, vocab), np.float32) * np.float32(3)).astype(np.float32),
        "gumbel": gumbel.astype(np.float32),
        "top_k": top_k.astype(np.int32)[:, None],
        **{name: values.astype(np.float32)[:, None] for name, values in columns.items()},
    }
