"""Who waits for whom: one organisation beside a flood of another, shares, weights, and prompts beside streams.

python -m perf.bench_fairness [--seconds S] [--out FILE]
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from helixflow.core_rs import PoolClient
from helixflow.engine.base import Capacity, Engine
from helixflow.engine.build import build_engine
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.scripted import ScriptedEngine, repeat
from helixflow.engine.spec import ModelSpec
from perf import lab
from perf.bench_latency import percentile
from perf.crowd import DEMO, Crowd, Seen, Tenant, checkpoint, serving
from perf.guessing import LENGTH, Guesser

SLOTS = 16
MAX_LEN = 1024
STEP_S = 0.025
SCRIPT = (104, 105)
"""Tokens of the scripted engine: any two that are text."""
DECODE_PRICE = 2
ROUNDS = 3
COST_ROUNDS = 5
GUESSES = 1000
CLIENTS = 44

VICTIM = Tenant(organisation=1, clients=4, prompt=64, answer=16)
FLOODS = {
    "alone": [],
    "beside 400 clients": [Tenant(organisation=2, clients=400, prompt=64, answer=64)],
    "beside 400 clients with long answers": [Tenant(organisation=2, clients=400, prompt=32, answer=400)],
    "beside 1 request of 64 prompts x 16 choices": [
        Tenant(organisation=2, clients=1, prompt=32, answer=64, prompts=64, choices=16)
    ],
}


class Bench:
    """Runs loads against one kind of engine."""

    def __init__(self, model: Path, make: Callable[[], Engine], seconds: float) -> None:
        self._model = model
        self._make = make
        self._seconds = seconds
        self.vocabulary = ModelSpec.load(model).vocab_size

    @contextlib.contextmanager
    def serve(self, **options: int) -> Iterator[PoolClient]:
        """A fresh pool."""
        with serving(self._model, self._make(), **options) as (_pool, client):
            yield client

    def run(self, tenants: Sequence[Tenant], **options: int) -> list[Seen]:
        """One load on a fresh pool."""
        with self.serve(**options) as client:
            return Crowd(client, tenants, self.vocabulary).run(self._seconds / 3, self._seconds)


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99, in milliseconds."""
    counts = {str(value * 1e3): values.count(value) for value in values}
    return percentile(counts, 0.5), percentile(counts, 0.99)


def service(seen: Seen) -> float:
    """Prompt tokens, and generated ones at their price."""
    return seen.prompt_tokens + DECODE_PRICE * seen.completion_tokens


def victim(bench: Bench) -> str:
    """First token of four clients, alone and beside floods."""
    rows, alone = [], 0.0
    for name, flood in FLOODS.items():
        seen = bench.run([VICTIM, *flood])[0]
        half, worst = quantiles(seen.first_token_s)
        alone = alone or worst
        rows.append(f"| {name} | {len(seen.first_token_s):,} | {half:.0f} | {worst:.0f} | {worst / alone:.2f} |")
    return "\n".join(
        ["| 4 clients | requests | p50 (ms) | p99 (ms) | p99 / alone |", "| --- | --- | --- | --- | --- |", *rows]
    )


def shares(bench: Bench) -> str:
    """Equal organisations with unequal requests, and two of which one weighs three times the other."""
    unequal = [(32, 100), (128, 8), (64, 32), (16, 200), (256, 16)]
    equal = bench.run([Tenant(organisation=n, clients=20, prompt=p, answer=a) for n, (p, a) in enumerate(unequal, 1)])
    got = [service(seen) for seen in equal]
    jain = sum(got) ** 2 / (len(got) * sum(share * share for share in got))
    three = bench.run(
        [Tenant(organisation=n, clients=40, prompt=64, answer=32, weight=w) for n, w in ((1, 3.0), (2, 1.0))]
    )
    ratio = service(three[0]) / service(three[1])
    return f"Jain's index of five equal organisations: {jain:.3f}. Weights 3 : 1 gave {ratio:.2f} : 1."


def cost(bench: Bench) -> str:
    """Like requests of 44 clients sent by one organisation, and by 2 and 11 of them, which takes the policy work."""
    splits = (1, 2, 11)
    rates: dict[int, list[int]] = {split: [] for split in splits}
    for _ in range(COST_ROUNDS):
        for split in splits:
            crowd = [Tenant(n, clients=CLIENTS // split, prompt=64, answer=100) for n in range(1, split + 1)]
            rates[split].append(sum(seen.pieces for seen in bench.run(crowd)))
    alone = [rate / statistics.median(rates[1]) for rate in rates[1]]
    shares = [
        f"{statistics.median(of / one for one, of in zip(rates[1], rates[split], strict=True)):.3f} with {split}"
        for split in splits[1:]
    ]
    return (
        f"Tokens for {CLIENTS} clients of several organisations, by those for as many of one: "
        f"{', '.join(shares)} (medians of {COST_ROUNDS}; those of one alone differ by {min(alone):.2f} to "
        f"{max(alone):.2f} from round to round)."
    )


def prompts_beside_streams(bench: Bench) -> str:
    """Gaps between tokens of streams while others' prompts come in, with and without a budget. In turn."""
    rows = []
    for clients, prompt, answer in ((32, 64, 64), (32, 512, 64)):
        tenants = [Tenant(organisation=1, clients=clients, prompt=prompt, answer=answer)]
        rounds = [(bench.run(tenants, step_budget_ms=0)[0], bench.run(tenants)[0]) for _ in range(ROUNDS)]
        for side, name in enumerate(("none", "100 ms")):
            gaps = [quantiles(pair[side].gaps_s) for pair in rounds]
            half, worst = (statistics.median(gap[at] for gap in gaps) for at in (0, 1))
            rate = statistics.median(pair[side].pieces / pair[0].pieces for pair in rounds)
            rows.append(
                f"| {clients} | {prompt} | {name} | {half:.0f} | {worst:.0f} | {worst / half:.1f} | {rate:.3f} |"
            )
    head = (
        "| streams | prompt (tokens) | budget | gap p50 (ms) | gap p99 (ms) | p99 / p50 | tokens, by those without |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def guesses(bench: Bench) -> str:
    """How well a clock tells right guesses from wrong ones."""
    with bench.serve() as client:
        guesser = Guesser(client, bench.vocabulary)
        within, across = guesser.auc(GUESSES, 1, 1), guesser.auc(GUESSES, 1, 2)
    return (
        f"{GUESSES:,} guesses at prompts of {LENGTH} tokens, half of them right. AUC of the time to the answer: "
        f"{across:.3f} from another organisation, {within:.3f} within the organisation, whose prefixes it may reuse."
    )


def told(section: str) -> str:
    """The same, shown at once: all of it takes a quarter of an hour."""
    print(section, file=sys.stderr, flush=True)
    return section


def report(seconds: float) -> str:
    """Measures everything."""
    with tempfile.TemporaryDirectory(prefix="helix-bench-") as folder:
        model = checkpoint(Path(folder) / "model")
        built = build_engine(model, Path(folder) / "engines", "int8")
        demo = build_engine(DEMO, Path(folder) / "engines", "fp32")

        def onnx(directory: Path, precision: str, slots: int = SLOTS) -> Engine:
            spec = ModelSpec.load(directory)
            return OnnxEngine(directory, spec, precision, slots=slots, max_len=MAX_LEN)  # type: ignore[arg-type]

        capacity = Capacity(SLOTS, MAX_LEN, ModelSpec.load(DEMO).vocab_size)
        scripted = Bench(DEMO, lambda: ScriptedEngine(capacity, repeat(SCRIPT), step_s=STEP_S), seconds)
        small = Bench(DEMO, lambda: onnx(demo.directory, "fp32"), seconds)
        large = Bench(model, lambda: onnx(built.directory, "int8"), seconds)
        wide = Bench(model, lambda: onnx(built.directory, "int8", 2 * SLOTS), seconds)
        load = os.getloadavg()[0]
        return f"""# Who waits for whom

{lab.machine()}
- method: `perf/bench_fairness.py`, release build; pool, engine and clients in one process, over gRPC, without a
  gateway; {SLOTS} slots; {seconds:g} s a load after a third of it to warm up; no two prompts are alike. Load of the
  machine before: {load:.1f}.
- engines: scripted ({STEP_S * 1e3:g} ms a step, whatever it holds); the demo model (fp32); an 88 M-parameter Llama
  shape (int8).

## First token beside a flood

Scripted engine:

{told(victim(scripted))}

Demo model:

{told(victim(small))}

88 M parameters:

{told(victim(large))}

Goal: p99 at most 1.5 times that of the same four clients alone.

## Shares

Scripted engine: {told(shares(scripted))} {told(cost(scripted))}

88 M parameters: {told(shares(large))} {told(cost(large))}

Goals: 0.95; 3 : 1 within 5 %; 0.97.

## Guessing another organisation's prompt by the clock, demo model

{told(guesses(small))}

Goal: at most 0.55.

## Prompts beside streams, 88 M parameters, {2 * SLOTS} slots

{told(prompts_beside_streams(wide))}

Goals: gap p99 under 3 times p50; 0.97 of the tokens.
"""


def main() -> None:
    """Measures and writes `perf/results/fairness.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="measured seconds of each load")
    options = parser.parse_args()
    lab.write("fairness.md", report(options.seconds))


if __name__ == "__main__":
    main()
