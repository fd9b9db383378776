"""Threads of ONNX Runtime that spin: what the engine gains, and what the gateway beside it loses.

python -m perf.bench_spinning [--rounds N] [--seconds S]

An engine decodes beside a gateway with a scripted pool, all on the same cores, with threads that never spin, that spin
inside a run only (as HelixFlow has it), and that spin always (ONNX Runtime's default). It decodes without a pause, and
with pauses as long as its steps, in which threads that spin always take the cores from everybody.
"""

import argparse
import contextlib
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helixflow.engine import onnx_engine, onnx_session
from helixflow.engine.base import Precision
from helixflow.engine.build import build_engine
from helixflow.engine.memory import cores
from helixflow.engine.spec import ModelSpec
from perf import lab
from perf.bench_engine import MAX_LEN, PAST, decode_batch, prefilled, write_checkpoint
from perf.bench_gateway import chat, common
from perf.beside import OPTIONS

SEQUENCES = 16
PRECISION: Precision = "int8"
MODES: dict[str, dict[str, str]] = {
    "never": {"session.intra_op.allow_spinning": "0"},
    "inside a run": {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"},
    "always": {"session.intra_op.allow_spinning": "1"},
}
PAUSES = {"no pause": 0.0, "pauses as long as steps": 1.0}
"""By the time of a step."""


def decode(folder: Path, mode: str, pause: float) -> None:
    """The engine's process: decodes until a line comes in, then prints steps/s of the time between two lines."""

    def session(graph: Path, threads: int = 0) -> Any:
        options = onnx_session._options(threads or cores())
        for name, value in MODES[mode].items():
            options.add_session_config_entry(name, value)
        return onnx_session._open(graph, options, [onnx_session.CPU])

    setattr(onnx_engine, "cpu_session", session)  # noqa: B010 - not exported
    spec = ModelSpec.load(folder)
    engine = onnx_engine.OnnxEngine(folder, spec, PRECISION, slots=SEQUENCES, max_len=MAX_LEN)
    prefilled(engine, SEQUENCES)
    batches = [decode_batch(SEQUENCES, PAST + number) for number in range(64)]
    steps, began = 0, time.perf_counter()
    print("ready", flush=True)
    while True:
        started = time.perf_counter()
        engine.step(batches[steps % len(batches)])
        steps += 1
        if pause:
            time.sleep(pause * (time.perf_counter() - started))
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            now = time.perf_counter()
            print(steps / (now - began), flush=True)
            steps, began = 0, now


@contextlib.contextmanager
def decoding(folder: Path, mode: str, pause: float) -> Iterator["subprocess.Popen[str]"]:
    """An engine's process; `tick` asks it."""
    command = [sys.executable, "-m", "perf.bench_spinning", "--engine", str(folder), mode, str(pause)]
    process = subprocess.Popen(command, cwd=lab.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.stdin.close()
        process.wait()


def tick(process: "subprocess.Popen[str]") -> float:
    """Steps/s since the last tick."""
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(folder: Path, rounds: int, seconds: float) -> str:
    """Requests/s and steps/s of every mode, in turn."""
    rows = []
    with lab.helixflow(OPTIONS) as running:
        load = ["--connections", "32", "--body", chat(1), *common(running, seconds)]
        for name, pause in PAUSES.items():
            found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
            for number in range(rounds):
                order = list(MODES)
                for mode in order[number % 3 :] + order[: number % 3]:
                    with decoding(folder, mode, pause) as engine:
                        tick(engine)
                        report = lab.load("requests", "--url", running.url + "/v1/chat/completions", *load)
                        found[mode].append((report["requests_per_s"], tick(engine)))
            for mode, pairs in found.items():
                beside = [pair[0] for pair in pairs]
                steps = [pair[1] for pair in pairs]
                ratios = [
                    statistics.median(
                        pair[part] / other[part] for pair, other in zip(pairs, found["never"], strict=True)
                    )
                    for part in (0, 1)
                ]
                cells = [name, mode, lab.spread(beside), f"{ratios[0]:.2f}", lab.spread(steps, 1), f"{ratios[1]:.2f}"]
                rows.append(f"| {' | '.join(cells)} |")
    head = (
        "| engine | threads spin | gateway, requests/s | by never | engine, steps/s | by never |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def main() -> None:
    """Measures and writes `perf/results/spinning.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="loads of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured seconds of each load")
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        folder, mode, pause = options.engine
        decode(Path(folder), mode, float(pause))
        return
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place) / "model")
        built = build_engine(Path(place) / "model", Path(place) / "engines", PRECISION)
        table = compare(built.directory, options.rounds, options.seconds)
    text = f"""# Threads that spin

{lab.machine()}
- method: `perf/bench_spinning.py`, release build; a Llama shape of 88 M parameters in {PRECISION} decodes {SEQUENCES}
  sequences beside a gateway with a scripted pool (32 connections, 1 token an answer), {options.rounds} loads of
  {options.seconds:g} s of each kind in turn; medians, and medians of the ratios within a round.

{table}
"""
    lab.write("spinning.md", text)


if __name__ == "__main__":
    main()
