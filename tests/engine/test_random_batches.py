"""Random schedules against the dense decoder: chunks, decodes, idle and full slots, copies, restarts, any order."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.engine.onnx_engine import OnnxEngine
from tests.engine.support import Reference, open_engine, random_tensors, step, tiny_config, write_checkpoint

SLOTS, MAX_LEN, VOCAB = 5, 24, 101


@pytest.fixture(scope="module")
def model() -> tuple[OnnxEngine, Reference]:
    config = tiny_config("mistral", sliding_window=11, num_hidden_layers=2)
    tensors = random_tensors(config)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        engine = open_engine(
            write_checkpoint(root / "model", config, tensors), root / "engines", slots=SLOTS, max_len=MAX_LEN
        )
        return engine, Reference(config, tensors, windows=[11, 11])


@given(data=st.data())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_schedule(model: tuple[OnnxEngine, Reference], data: st.DataObject) -> None:
    engine, reference = model
    held: list[list[int]] = [[] for _ in range(SLOTS)]
    engine._lengths[:] = [0] * len(engine._lengths)
    for _ in range(data.draw(st.integers(1, 6), label="steps")):
        if data.draw(st.booleans(), label="copy"):
            src, dst = data.draw(st.integers(0, SLOTS - 1)), data.draw(st.integers(0, SLOTS - 1))
            length = data.draw(st.integers(0, len(held[src])))
            engine.copy_prefix(src, dst, length)
            held[dst] = held[src][:length]
        items, expected = [], []
        for slot in data.draw(st.permutations(range(SLOTS)), label="slots")[: data.draw(st.integers(1, SLOTS))]:
            # A sequence may take over only the beginning of what its slot holds.
            keep = len(held[slot]) if data.draw(st.booleans()) else data.draw(st.integers(0, len(held[slot])))
            room = MAX_LEN - keep
            if room == 0:
                continue
            count = min(room, data.draw(st.sampled_from([1, 1, 1, 2, 5, 13])))
            tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=count, max_size=count))
            wanted = data.draw(st.integers(0, count))
            held[slot] = held[slot][:keep] + tokens
            items.append((slot, keep, tokens, wanted))
            if wanted:
                expected.append(reference.logits(held[slot])[-wanted:])
        if items:
            rows = step(engine, *items)
            want = np.concatenate(expected) if expected else np.zeros((0, VOCAB))
            assert rows.shape == want.shape
            assert np.allclose(rows, want, atol=2e-3)
