"""Batches that must not reach the runtime, the plan of decode calls, and the small helpers."""

import io
import itertools
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.engine.base import EngineError
from helixflow.engine.memory import available_bytes, cores, lazy_zeros
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.plan import Costs, plan_runs
from helixflow.engine.progress import Bar
from tests.engine.support import Batch, batch, open_engine, random_tensors, step, tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    root = tmp_path_factory.mktemp("limits")
    config = tiny_config()
    return open_engine(write_checkpoint(root / "model", config, random_tensors(config)), root, slots=3, max_len=16)


def packed(*columns: list[int]) -> Batch:
    token_ids, slots, past, counts, wanted = (np.array(column, np.int32) for column in columns)
    return Batch(token_ids, slots, past, counts, wanted)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (batch((3, 0, [1], 1)), "slot 3 is none of the 3"),
        (batch((-1, 0, [1], 1)), "slot -1 is none"),
        (batch((1, 0, [1], 1), (1, 0, [2], 1)), "appears twice"),
        (batch((0, 0, [1] * 17, 1)), "17 tokens at 0; it holds"),
        (batch((0, -1, [1], 1)), "1 tokens at -1"),
        (batch((0, 0, [1], 2)), "2 rows of 1 tokens"),
        (batch((0, 0, [1], -1)), "-1 rows of 1 tokens"),
        (batch((0, 0, [101], 1)), "outside the vocabulary of 101"),
        (batch((0, 0, [-1], 1)), "outside the vocabulary"),
        (batch((2, 9, [1], 1)), "1 tokens at 9; it holds 0 of 16"),
        (packed([1, 2], [0], [0], [3], [1]), "do not match"),
        (packed([], [0], [0], [0], [0]), "0 rows of 0 tokens"),
        (packed([1], [0], [0, 0], [1], [1]), "do not match"),
    ],
    ids=str,
)
def test_bad_batches_are_refused(engine: OnnxEngine, bad: Batch, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.step(bad)


def test_the_memory_of_many_rows_is_given_back(engine: OnnxEngine) -> None:
    calls = engine._calls
    assert calls is not None
    few = calls._logits
    seen = []
    for slot, rows in enumerate((8, 12, 16)):
        assert len(step(engine, (slot, 0, [1] * rows, rows))) == rows
        seen.append(weakref.ref(calls._logits))
    step(engine, (0, 0, [1], 1))
    assert calls._logits is few
    assert [array() for array in seen] == [None, None, None], "a binding keeps an array alive"


def test_empty_batch(engine: OnnxEngine) -> None:
    assert step(engine).shape == (0, 101)


@pytest.mark.parametrize("arguments", [(0, 3, 1), (3, 0, 1), (-1, 0, 1), (0, 1, 99), (0, 1, -1)])
def test_bad_copies_are_refused(engine: OnnxEngine, arguments: tuple[int, int, int]) -> None:
    with pytest.raises(EngineError, match="cannot copy"):
        engine.copy_prefix(*arguments)


def test_more_rows_than_slots(engine: OnnxEngine) -> None:
    """The buffer of logits grows, and smaller steps stay right afterwards."""
    whole = step(engine, (0, 0, list(range(16)), 16))
    assert whole.shape == (16, 101)
    step(engine, (1, 0, list(range(8)), 1))
    assert np.allclose(step(engine, (1, 8, [8], 1)), whole[8], atol=1e-4)


def test_bindings_are_bounded(engine: OnnxEngine) -> None:
    assert engine._calls is not None
    step(engine, *((slot, 0, [1, 2], 1) for slot in range(3)))
    engine._calls._kept = 2
    for chosen in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)):
        step(engine, *((slot, 2, [3], 1) for slot in chosen))
        step(engine, *((slot, 0, [1, 2], 1) for slot in chosen))
    assert len(engine._calls._bindings) == 2


@given(
    slots=st.sets(st.integers(0, 40), min_size=1).map(sorted),
    lengths=st.lists(st.integers(0, 500), min_size=41, max_size=41),
    rows=st.floats(0.5, 20),
    position=st.floats(0, 0.01),
)
def test_runs_cover_every_slot_once(slots: list[int], lengths: list[int], rows: float, position: float) -> None:
    runs = plan_runs(slots, lengths, Costs(rows, position))
    assert [slot for run in runs for slot in slots[run.first : run.last]] == slots
    for run in runs:
        assert (run.low, run.high) == (slots[run.first], slots[run.last - 1] + 1)
    for before, after in itertools.pairwise(runs):
        gap = range(before.high, after.low)
        assert len(gap) / rows + sum(lengths[slot] + 1 for slot in gap) * position > 1


def test_gaps_cost_rows_and_cached_positions() -> None:
    slots, empty, long = [0, 4], [0] * 5, [400] * 5
    assert len(plan_runs(slots, empty, Costs(10, 0.001))) == 1
    assert len(plan_runs(slots, empty, Costs(2, 0.001))) == 2
    assert len(plan_runs(slots, long, Costs(10, 0.001))) == 2


def test_memory_is_the_smaller_of_machine_and_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:  500 kB\n")
    assert available_bytes(meminfo, tmp_path) == 500 * 1024
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("100000\n")
    (tmp_path / "memory.stat").write_text("anon 40000\nfile 60000\nactive_file 20000\ninactive_file 30000\n")
    assert available_bytes(meminfo, tmp_path) == 250_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 500 * 1024
    assert cores() >= 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_lazy_zeros_take_only_the_memory_that_is_written() -> None:
    before = resident_bytes()
    zeros = lazy_zeros((1 << 8, 1 << 20))
    zeros[::16, 5] = 1
    assert zeros[:, :10].sum() == 16
    assert resident_bytes() - before < 64 << 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar() -> None:
    now = 0.0
    for stream, expected in ((Terminal(), "\r\x1b[Kx [#######"), (io.StringIO(), "x 25%\n")):
        bar = Bar(stream, lambda: now)
        bar("x", 1, 4)
        assert stream.getvalue().startswith(expected)
        bar("x", 2, 4)
        assert "50%" not in stream.getvalue()
        bar("x", 4, 4)
        bar("x", 4, 4)
        assert stream.getvalue().count("100%") == 1
        assert stream.getvalue().endswith("\n")


def test_the_command_line_does_not_import_the_runtime() -> None:
    code = (
        "import argparse, sys, helixflow.engine.cli as c, helixflow.engine.load;"
        "c.add_parser(argparse.ArgumentParser().add_subparsers());"
        "sys.exit(bool({'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
