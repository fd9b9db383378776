"""This checkout beside another one, in turn: what a change costs, on a machine that is never twice the same.

python -m perf.beside OTHER [--rounds N] [--seconds S]

OTHER is a checkout of another release that was built as this one (`make build`). Both serve all the time; loads of a
moment go to one and to the other, and what counts is the median of the ratios of neighbours.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perf import lab
from perf.bench_gateway import WITHOUT_ACCOUNTS, chat

OPTIONS = {
    "HELIX_POOL_ENGINE": "scripted",
    "HELIX_POOL_SLOTS": "256",
    "HELIX_POOL_MAX_LEN": "4096",
    "HELIX_POOL_SCRIPT_STEP_MS": "0",
    **WITHOUT_ACCOUNTS,
}
# Runs in the other checkout, with that one's `perf.lab`.
STAND = """
import json, sys
from perf import lab
with lab.helixflow(json.loads(sys.argv[1])) as running:
    print(json.dumps({"url": running.url, "ca": str(running.ca)}), flush=True)
    sys.stdin.read()
"""
LOADS: dict[str, tuple[str, int, str]] = {
    "requests/s, 32 connections, 1 token": ("requests", 32, chat(1)),
    "requests/s, 32 connections, 16 tokens": ("requests", 32, chat(16)),
    "streamed tokens/s, 100 streams of 200 tokens": ("stream", 100, chat(200, stream=True)),
    "one connection, 1 token": ("requests", 1, chat(1)),
}
"""Mode of the load generator, connections, body."""


@contextlib.contextmanager
def standing(checkout: Path) -> Iterator[dict[str, str]]:
    """Serves from a checkout until the block ends: `url` and `ca`."""
    process = subprocess.Popen(
        [str(checkout / ".venv/bin/python"), "-c", STAND, json.dumps(OPTIONS)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait()


def measure(where: dict[str, str], load: tuple[str, int, str], seconds: float) -> dict[str, float]:
    """Figures of one load, by name; more is better for rates, less for times."""
    mode, connections, body = load
    report: dict[str, Any] = lab.load(
        mode, "--url", where["url"] + "/v1/chat/completions", "--ca", where["ca"], "--connections", str(connections),
        "--body", body, "--header", "Authorization: Bearer demo-key", "--header", "Content-Type: application/json",
        "--duration", str(seconds), "--warmup", "0.3",
    )  # fmt: skip
    if report["errors"]:
        raise RuntimeError(f"the load met errors: {report['errors']}")
    if mode == "stream":
        return {"": report["tokens_per_s"], ": first token p99 (ms)": report["first_token_ms"]["p99"]}
    if connections == 1:
        return {f": {part} (ms)": report["latency_ms"][part] for part in ("p50", "p99")}
    return {"": report["requests_per_s"]}


def compare(other: Path, rounds: int, seconds: float) -> str:
    """The table."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    with standing(lab.ROOT) as mine, standing(other) as theirs:
        sides = [mine, theirs]
        for number in range(rounds):
            for name, load in LOADS.items():
                figures: list[dict[str, float]] = [{}, {}]
                # Who comes first changes from round to round.
                for side in (0, 1) if number % 2 else (1, 0):
                    figures[side] = measure(sides[side], load, seconds)
                for part, figure in figures[0].items():
                    lists = found.setdefault(name + part, ([], []))
                    lists[0].append(figure)
                    lists[1].append(figures[1][part])
    rows = []
    for name, (ours, others) in found.items():
        ratios = [one / two for one, two in zip(ours, others, strict=True)]
        digits = 2 if "(ms)" in name else 0
        rows.append(
            f"| {name} | {lab.spread(ours, digits)} | {lab.spread(others, digits)} | {statistics.median(ratios):.3f} |"
        )
    head = "| | this | other | ratio |\n| --- | --- | --- | --- |"
    return "\n".join([head, *rows])


def revision(checkout: Path) -> str:
    """Short name of the commit, with a plus for changes."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measures and writes `perf/results/beside.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout, built")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of each load")
    parser.add_argument("--seconds", type=float, default=1.5, help="measured seconds of each load")
    options = parser.parse_args()
    table = compare(options.other.resolve(), options.rounds, options.seconds)
    text = f"""# Beside the release before

{lab.machine()}
- method: `perf/beside.py`, release builds; this is {revision(lab.ROOT)}, the other {revision(options.other)}; scripted
  engine, no accounts; {options.rounds} pairs of {options.seconds:g} s in turn, medians of the ratios of pairs. Both
  serve all the time; load generator, gateways and pools share the cores.

{table}
"""
    lab.write("beside.md", text)


if __name__ == "__main__":
    main()
