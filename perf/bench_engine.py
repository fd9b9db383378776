"""Decode speed of the CPU engine beside ONNX Runtime called directly on the same graph with the same bindings.

Part 2 of `make bench`. A Llama shape with random weights is made and built in every precision; then the two sides take
turns within one run, so that whatever else the machine does falls on both. At one sequence the speed is also given as
the share of the machine's memory bandwidth: every weight is read once per step.

    python perf/bench_engine.py [--out FILE] [--quick]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from helixflow.engine.base import PRECISIONS, Precision
from helixflow.engine.build import build_engine
from helixflow.engine.memory import cores
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.onnx_graph import padded_head
from helixflow.engine.rope import tables
from helixflow.engine.spec import ModelSpec

SIZES = (1, 4, 16, 32)
MAX_LEN = 512
PAST = 64
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class Batch:
    """See `helixflow.engine.base.Batch`."""

    token_ids: NDArray[np.int32]
    slots: NDArray[np.int32]
    past: NDArray[np.int32]
    counts: NDArray[np.int32]
    wanted: NDArray[np.int32]
    sampling: None = None


def decode_batch(sequences: int, past: int) -> Batch:
    """One token for each of the first `sequences` slots."""
    ones = np.ones(sequences, np.int32)
    return Batch(ones * 5, np.arange(sequences, dtype=np.int32), ones * past, ones, ones)


def write_checkpoint(directory: Path) -> None:
    """A checkpoint of `SHAPE` with random fp32 weights, in the safetensors format."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SHAPE))
    write_weights(directory)


def write_weights(directory: Path) -> None:
    """Random fp32 weights for the `config.json` of a folder."""
    shapes = ModelSpec.load(directory).tensors()
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    random = np.random.default_rng(7)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = random.standard_normal(shape, np.float32) * np.float32(0.02)
            file.write((values if len(shape) == 2 else np.ones(shape, np.float32)).tobytes())


def read_bandwidth() -> float:
    """Bytes per second that all cores together read from memory (numpy sums over 1 GiB, best of 5)."""
    parts = np.array_split(np.ones(1 << 28, np.float32), cores())
    best = 0.0
    with ThreadPoolExecutor(cores()) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(lambda part: part.sum(), parts))
            best = max(best, (1 << 30) / (time.perf_counter() - started))
    return best


def weight_bytes(spec: ModelSpec, precision: Precision) -> float:
    """Bytes of weights that a step reads: all matrices but the embedding."""
    matrices = {name: shape for name, shape in spec.tensors().items() if len(shape) == 2 and "embed" not in name}
    per_weight = {"fp32": 4.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}
    head = {"fp32": 4.0, "int8": 1 + 4 / 32, "int4": 1 + 4 / 32}
    return sum(
        float(np.prod(shape)) * (head if name.startswith("lm_head") else per_weight)[precision]
        for name, shape in matrices.items()
    )


class Direct:
    """ONNX Runtime on the graph of an engine: everything bound once, only lengths written between two runs.

    It shares the engine's session: two copies of the weights differ by up to 20 % in speed, by where their pages lie.
    """

    def __init__(self, session: Any, spec: ModelSpec, sequences: int) -> None:
        self.session = session
        width, positions = padded_head(spec.head_dim), MAX_LEN + 1
        shape = [sequences, spec.kv_heads, positions, width]
        self.cache = np.zeros((2 * spec.layers, *shape), np.float32)
        self.cos, self.sin = tables(spec.rope, spec.head_dim, MAX_LEN, positions)
        self.ids = np.full((sequences, 1), 5, np.int32)
        self.seqlens = np.zeros(sequences, np.int32)
        self.total = np.zeros((), np.int32)
        self.rows = np.arange(sequences, dtype=np.int32)
        self.logits = np.empty((sequences, spec.vocab_size), np.float32)
        self.io = self.session.io_binding()
        for name in ("ids", "seqlens", "total", "rows", "cos", "sin"):
            self._bind(self.io.bind_input, name, getattr(self, name))
        self._bind(self.io.bind_output, "logits", self.logits)
        for i, cache in enumerate(self.cache):
            self._bind(self.io.bind_input, f"past_{'kv'[i % 2]}_{i // 2}", cache)
            self._bind(self.io.bind_output, f"present_{'kv'[i % 2]}_{i // 2}", cache)

    @staticmethod
    def _bind(bind: Callable[..., None], name: str, array: NDArray[Any]) -> None:
        bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)

    def step(self, past: int) -> None:
        """One decode step of every sequence."""
        self.seqlens[:] = past
        self.total[()] = past + 1
        self.session.run_with_iobinding(self.io)


def prefilled(engine: OnnxEngine, sequences: int) -> None:
    """Fills the first `sequences` slots up to `PAST`."""
    one = np.ones(1, np.int32)
    for slot in range(sequences):
        engine.step(Batch(np.full(PAST, 5, np.int32), one * slot, one * 0, one * PAST, one))


def compare(engine: OnnxEngine, direct: Direct, sequences: int, rounds: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step: (engine, direct). The sides take turns, `steps` at a time."""
    prefilled(engine, sequences)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        first = PAST + turn * steps
        batches = [decode_batch(sequences, first + i) for i in range(steps)]
        for side in (0, 1) if turn % 2 else (1, 0):
            for i, batch in enumerate(batches):
                started = time.perf_counter()
                if side == 0:
                    engine.step(batch)
                else:
                    direct.step(first + i)
                if turn:  # the first turn warms up
                    times[side].append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def measure(root: Path, rounds: int, steps: int) -> list[str]:
    """The lines of the report below its heading."""
    checkpoint = root / "llama-80m"
    write_checkpoint(checkpoint)
    bandwidth = 0.0
    results = []
    for precision in PRECISIONS:
        built = build_engine(checkpoint, root / "engines", precision)
        spec = ModelSpec.load(built.directory)
        engine = OnnxEngine(built.directory, spec, precision, slots=max(SIZES), max_len=MAX_LEN)
        for sequences in SIZES:
            # Measured all along, and the best taken: other work on the machine can only make it look smaller.
            bandwidth = max(bandwidth, read_bandwidth())
            ours, theirs = compare(engine, Direct(engine.session, spec, sequences), sequences, rounds, steps)
            results.append((precision, sequences, ours, theirs))
            print(f"{precision} {sequences}: ratio {theirs / ours:.2f}", flush=True)
        engine.close()
    lines = [
        (
            f"Llama shape, {spec.parameters() / 1e6:.0f} M parameters, random weights, "
            f"{PAST} positions in the cache at first."
        ),
        f"Memory: {bandwidth / 1e9:.1f} GB/s read by {cores()} threads (numpy sum, best of the run).",
        "",
        "| precision | sequences | engine tokens/s | ONNX Runtime directly | ratio | share of bandwidth |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for precision, sequences, ours, theirs in results:
        share = f"{weight_bytes(spec, precision) / ours / bandwidth:.0%}" if sequences == 1 else ""
        row = (precision, sequences, f"{sequences / ours:,.0f}", f"{sequences / theirs:,.0f}", f"{theirs / ours:.2f}")
        lines.append(f"| {' | '.join(str(cell) for cell in row)} | {share} |")
    return lines


def main() -> None:
    """Runs the benchmark and prints (or writes) a markdown report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the report here as well")
    parser.add_argument("--quick", action="store_true", help="few steps: proves that it works")
    options = parser.parse_args()
    rounds, steps = (8, 4) if options.quick else (60, 4)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        lines = measure(Path(directory), rounds, steps)
    method = (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {cores()} cores, ONNX Runtime {ort.__version__}, "
        f"load before the run {load:.1f}. Median of {rounds * steps} steps a side, {steps} at a time in turn."
    )
    report = "\n".join(
        [
            "## CPU engine: decode",
            "",
            method,
            "",
            *lines,
            "",
        ]
    )
    print(report)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
