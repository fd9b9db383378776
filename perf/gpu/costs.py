"""What the choices of the design cost or save, one at a time."""

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import EngineError
from helixflow.engine.items import Item
from helixflow.engine.rope import tables
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.engine import RunOptions
from helixflow.engine.tensorrt.forward import Forward
from helixflow.engine.tensorrt.fused import FusedForward
from helixflow.engine.tensorrt.launches import Launch
from helixflow.engine.tensorrt.memory import RESERVED, Memory
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.ops import Ops, Shape
from helixflow.engine.tensorrt.options import EngineOptions
from helixflow.engine.tensorrt.sampler import Sampler, candidates
from perf.gpu.attention_cost import inputs_of
from perf.gpu.bench import Bench, Loaded, Small, fixed, open_bench, ranged
from perf.gpu.drive import Part, prefill, random_tokens, step_seconds
from perf.gpu.model import SCALE, RandomModel
from perf.gpu.primitives import refused, sampling_feeds
from perf.gpu.rows import Report, Task
from perf.gpu.sizes import cut

SMALL_VOCABULARY = 32000
GIB = 2**30
LAUNCHES = 10


class Constants(Ops):
    """Ops whose weights are constants: random ones."""

    def weight(self, name: str, shape: tuple[int, ...], stored: str = "") -> Any:  # noqa: ARG002 - as the base has it
        """See `Ops.weight`."""
        block = np.random.default_rng(len(name)).standard_normal(1 << 20, np.float32) * np.float32(SCALE)
        return self.packed(np.resize(block.astype(NUMPY[self.compute]), shape), self.compute, shape)


def weights(task: Task) -> None:
    """The products of some layers, with weights as inputs of the network and as constants of it."""
    with open_bench(task) as bench:
        spec, counts = cut(bench.sizes.large, bench.sizes.layers), bench.sizes.tokens
        few, many = [n for n in counts if n <= 64], [n for n in counts if n > 64] or counts[-1:]
        wanted = [ranged(*({"T": n} for n in part)) for part in (few, many)]
        nbytes = sum(math.prod(s) for name, s in spec.tensors().items() if "_proj.weight" in name) * 2
        times: dict[str, dict[int, float]] = {}
        for name, kind in (("inputs", Ops), ("constants", Constants)):
            task.report.need(10)
            with bench.released():
                small = bench.network("fp16", lambda ops: _products(ops, spec), kind)
                started = time.perf_counter()
                plan = bench.compiled(small, *wanted)
                took = time.perf_counter() - started
                task.report.row(f"plan with {name}", f"{len(plan) / 2**20:.0f} MiB in {took:.1f} s")
                times[name] = _times(bench, small, plan, (few, many))
        bandwidth = task.report.facts.get("bandwidth")
        for count in times["inputs"]:
            ours, theirs = times["inputs"][count], times["constants"][count]
            share = f"; {nbytes / ours / bandwidth:.0%} of bandwidth" if bandwidth and count in few else ""
            figure = f"inputs {ours * 1e3:.3f} ms, constants {theirs * 1e3:.3f} ms, ratio {ours / theirs:.2f}{share}"
            task.report.row(f"{bench.sizes.layers} layers, {count} tokens", figure, value=ours / theirs)


def _products(ops: Ops, spec: ModelSpec) -> dict[str, tuple[Any, Shape]]:
    """Layers without attention: queries stand for its result; keys and values are outputs, so that they are made."""
    hidden, shapes = spec.hidden_size, spec.tensors()
    x = ops.input("x", ("T", hidden), ops.compute)
    outputs: dict[str, tuple[Any, Shape]] = {}

    def product(x: Any, name: str) -> Any:
        rows, columns = shapes[name + ".weight"]
        return ops.linear(x, name, (rows, columns), bias=False)

    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        normed = ops.rms_norm(x, ops.input(f"norm_{layer}", (hidden,), ops.compute), spec.eps)
        for name in ("k", "v"):
            width = spec.kv_heads * spec.head_dim
            outputs[f"{name}_{layer}"] = (product(normed, f"{prefix}self_attn.{name}_proj"), ("T", width))
        mixed = product(normed, f"{prefix}self_attn.q_proj")
        x = ops.add(x, product(mixed, f"{prefix}self_attn.o_proj"))
        gated = ops.swiglu(product(x, f"{prefix}mlp.gate_proj"), product(x, f"{prefix}mlp.up_proj"))
        x = ops.add(x, product(gated, f"{prefix}mlp.down_proj"))
    return {**outputs, "out": (x, ("T", hidden))}


def _times(bench: Bench, small: Small, plan: bytes, parts: tuple[Any, Any]) -> dict[int, float]:
    """Seconds per number of tokens; the profile follows the part."""
    program, times = bench.device.load(plan), {}
    shared: dict[str, int] = {}
    for profile, counts in enumerate(parts):
        loaded = Loaded(bench, small, program, profile)
        for name, address in shared.items():
            loaded.at(name, address)
        for count in counts:
            loaded.shape({"T": count})
            loaded.addresses.pop("x", None)
            loaded.randomise(SCALE)
            loaded.poison()
            times[count] = bench.median(loaded.run)
            if not np.isfinite(loaded.results_of("out").astype(np.float32)).all():
                raise EngineError(f"{count} tokens: the result is not written, or no number (seed {bench.seed})")
        shared = {name: place for name, place in loaded.addresses.items() if name.startswith(("w.", "norm_"))}
    return times


def mixed(task: Task) -> None:
    """A piece of a prompt beside decoding sequences, in one launch, and in two calls."""
    with open_bench(task) as bench:
        sizes = bench.sizes
        spec = replace(cut(sizes.large, sizes.layers), vocab_size=min(sizes.large.vocab_size, SMALL_VOCABULARY))
        slots = max(sizes.slots // 2, 1)
        options = EngineOptions("fp16", slots + 1, sizes.max_len, chunk_tokens=sizes.chunk)
        model = RandomModel(bench, spec, options)
        engine = model.engine(RunOptions(ahead=False))
        tokens = random_tokens(bench.rng, sizes.past, spec.vocab_size)
        prefill(engine, 0, tokens)
        for slot in range(1, slots):
            engine.copy_prefix(0, slot, len(tokens))
        decoding = [Part(slot, len(tokens), [1]) for slot in range(slots)]
        piece = [Part(slots, 0, random_tokens(bench.rng, sizes.chunk, spec.vocab_size))]
        calls = {"decode": decoding, "prompt": piece, "both": [*decoding, *piece]}
        times = {name: step_seconds(engine, parts, sizes.rounds) for name, parts in calls.items()}
        apart = times["decode"] + times["prompt"]
        figure = (
            f"one launch {times['both'] * 1e3:.2f} ms, apart {apart * 1e3:.2f} ms "
            f"({times['decode'] * 1e3:.2f} + {times['prompt'] * 1e3:.2f})"
        )
        what = f"{spec.layers} layers: {slots} decoding sequences and a piece of {sizes.chunk} tokens"
        task.report.row(what, figure, value=times["both"] / apart)
        engine.close()


def sampling(task: Task) -> None:
    """The head of a model alone, with the largest logit, and with the whole sampler behind it."""
    with open_bench(task) as bench:
        for vocab in bench.sizes.vocabularies:
            times = {}
            for tail in ("logits", "largest", "sampler"):
                task.report.need(5)
                with bench.released():
                    times[tail] = _head(bench, vocab, tail)
            extra = times["sampler"] - times["logits"]
            figure = (
                f"head {times['logits'] * 1e6:.0f} µs, with the largest logit {times['largest'] * 1e6:.0f} µs, "
                f"with the sampler {times['sampler'] * 1e6:.0f} µs"
            )
            task.report.row(f"vocabulary of {vocab}, {bench.sizes.sampled} rows", figure, value=extra)


def _head(bench: Bench, vocab: int, tail: str) -> float:
    """Seconds of a head and what is behind it."""
    rows, hidden = bench.sizes.sampled, bench.sizes.large.hidden_size

    def make(ops: Ops) -> dict[str, tuple[Any, Shape]]:
        x = ops.input("x", ("R", hidden), ops.compute)
        logits = ops.cast(ops.linear(x, "head", (vocab, hidden), bias=False), "fp32")
        if tail == "sampler":
            Sampler(ops, logits, vocab)
        outputs: dict[str, tuple[Any, Shape]] = {"logits": (logits, ("R", vocab))}
        if tail == "largest":
            outputs["best"] = (ops.top(logits, 1)[1], ("R", 1))
        return outputs

    small = bench.network("fp16", make)
    if tail == "sampler":
        small.outputs.update(next_ids=("R",), undecided=("R",))
    loaded = bench.loaded(small, fixed({"R": rows}))
    loaded.shape({"R": rows})
    if tail == "sampler":
        feeds = sampling_feeds(bench, rows, vocab, candidates(vocab))
        loaded.feed({name: values for name, values in feeds.items() if name != "logits"})
    loaded.randomise(hidden**-0.25)
    loaded.poison()
    return bench.median(loaded.run)


def graph(task: Task) -> None:
    """A decode launch of a model with many short layers: enqueued as it is, and as a CUDA graph."""
    with open_bench(task) as bench:
        sizes = bench.sizes
        options = EngineOptions("fp16", max(sizes.slots // 2, 1), sizes.max_len, chunk_tokens=sizes.chunk)
        model = RandomModel(bench, sizes.narrow, options)
        memory = _memory(bench, model)
        addresses = replace(memory.addresses, weights=model.weights)
        forwards = {name: model.programs.forward(addresses) for name in ("enqueued", "graph")}
        plain = forwards["enqueued"]
        if isinstance(plain, FusedForward):
            # Nothing but a device that cannot record makes it launch everything each time.
            plain._recorder.able = False
        for bucket in (options.decode_buckets[0], options.decode_buckets[-1]):
            launch = Launch([Item(slot, sizes.past, [1], 1, slot) for slot in range(bucket)], options)
            for name, values in inputs_of(launch, options, model.spec.vocab_size).items():
                bench.write(memory.addresses.step(0)[name], values)
            parts = []
            for name, forward in forwards.items():
                busy, whole = _launch_seconds(bench, forward, bucket)
                recorded = name != "graph" or not isinstance(forward, FusedForward) or forward._recorder.able
                how = name if recorded else "enqueued again, for it cannot be recorded"
                parts.append(f"{how}: {busy * 1e6:.0f} µs of the host, {whole * 1e3:.2f} ms in all")
            task.report.row(f"{model.spec.layers} layers, {bucket} sequences", "; ".join(parts))
        for forward in forwards.values():
            forward.close()
        memory.free()


def _memory(bench: Bench, model: RandomModel) -> Memory:
    """What an engine keeps on the device, without the weights."""
    spec, options = model.spec, model.options
    memory = Memory(bench.device, spec, options, {}, model.programs.nbytes)
    rope: list[NDArray[Any]] = [
        table.astype(NUMPY[options.compute])
        for table in tables(spec.rope, spec.head_dim, options.max_len, options.positions)
    ]
    memory.upload({}, {}, (rope[0], rope[1]))
    return memory


def _launch_seconds(bench: Bench, forward: Forward, bucket: int) -> tuple[float, float]:
    """Median seconds of the host for enqueuing a launch, and until it is done."""
    for _ in range(3):
        forward.decode(bucket, 0)
    bench.device.synchronize()
    busy, whole = [], []
    for _ in range(LAUNCHES):
        started = time.perf_counter()
        forward.decode(bucket, 0)
        busy.append(time.perf_counter() - started)
        bench.device.synchronize()
        whole.append(time.perf_counter() - started)
    return float(np.median(busy)), float(np.median(whole))


def memory(task: Task) -> None:
    """Plans, scratch memory, and what an engine takes of the device against what it says it will."""
    with open_bench(task) as bench:
        sizes = bench.sizes
        for form in ("posmask", "split"):
            task.report.need(10)
            options = EngineOptions("fp16", sizes.slots, sizes.max_len, form, chunk_tokens=sizes.chunk)
            before = bench.device.info().free_bytes
            try:
                model = RandomModel(bench, sizes.narrow, options)
            except EngineError as error:
                refused(task.report, form, error)
                continue
            loaded = bench.device.info().free_bytes
            engine = model.engine(RunOptions())
            taken = loaded - bench.device.info().free_bytes
            _memory_row(task.report, model, before - loaded, taken)
            engine.close()


def _memory_row(report: Report, model: RandomModel, programs: int, taken: int) -> None:
    options, spec = model.options, model.spec
    caches = options.cache_rows * options.positions * model.cache_bytes
    logits = 2 * options.rows * spec.vocab_size * 4
    predicted = caches + logits + model.programs.nbytes
    figure = (
        f"plans {model.plan_bytes / 2**20:.0f} MiB, programs and weights {programs / GIB:.2f} GiB, scratch "
        f"{model.programs.nbytes / 2**20:.0f} MiB; engine {taken / GIB:.2f} GiB, predicted {predicted / GIB:.2f} GiB"
    )
    over = taken - predicted
    report.check(
        f"{options.attention}, {options.slots} slots of {options.max_len} positions",
        figure,
        over <= RESERVED,
        f"{over / 2**20:.0f} MiB more than predicted, {RESERVED / 2**20:.0f} MiB are kept for that",
    )
