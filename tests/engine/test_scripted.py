"""The scripted engine."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helixflow.engine.base import Capacity, EngineError
from helixflow.engine.load import load_engine
from helixflow.engine.scripted import Gate, ScriptedEngine, repeat
from tests.engine.support import GOLDEN, batch

CAPACITY = Capacity(4, 64, 100)


def tokens(engine: ScriptedEngine, *items: Any) -> list[int]:
    candidates = engine.step(batch(*items))
    assert candidates.logits is None
    assert candidates.token_ids is not None
    assert candidates.token_ids.dtype == np.int32
    return [int(token) for token in candidates.token_ids]


def generate(engine: ScriptedEngine, slot: int, prompt: list[int], count: int) -> list[int]:
    result = tokens(engine, (slot, 0, prompt, 1))
    while len(result) < count:
        result += tokens(engine, (slot, len(prompt) + len(result) - 1, [result[-1]], 1))
    return result


def test_repeats_and_ends() -> None:
    engine = ScriptedEngine(CAPACITY, repeat([5, 6, 7], end_after=7, eos=2))
    assert generate(engine, 1, [9, 9], 9) == [5, 6, 7, 5, 6, 7, 5, 2, 2]
    assert generate(engine, 1, [9], 2) == [5, 6]
    assert engine.capacity() == CAPACITY


def test_chunks_mixed_with_decode() -> None:
    engine = ScriptedEngine(CAPACITY, repeat([5, 6, 7]))
    assert tokens(engine, (0, 0, [1, 2], 1), (3, 0, [1, 2], 0)) == [5]
    assert tokens(engine, (3, 2, [1], 0), (0, 2, [5], 1)) == [6]
    assert tokens(engine, (0, 3, [6], 1), (3, 3, [8], 1)) == [7, 5]
    assert tokens(engine, (3, 4, [5], 1), (1, 0, [1, 2, 3], 3)) == [6, 5, 5, 5]
    engine.copy_prefix(0, 2, 3)
    assert tokens(engine, (2, 3, [7], 1)) == [5]


def test_batch_mates_do_not_matter() -> None:
    alone = generate(ScriptedEngine(CAPACITY, repeat([5, 6, 7, 8])), 2, [1, 2, 3], 6)
    engine = ScriptedEngine(CAPACITY, repeat([5, 6, 7, 8]))
    result = tokens(engine, (2, 0, [1, 2, 3], 1), (0, 0, [4], 0))[:1]
    for i in range(5):
        result += tokens(engine, (0, i + 1, [4], 0), (2, 3 + i, [result[-1]], 1))
    assert result == alone


def test_fails_at_its_step() -> None:
    engine = ScriptedEngine(CAPACITY, repeat([5]), fail_at_step=1)
    assert tokens(engine, (0, 0, [1], 1)) == [5]
    with pytest.raises(EngineError, match="step 1 fails"):
        tokens(engine, (0, 1, [5], 1))
    assert tokens(engine, (0, 1, [5], 1)) == [5]


def test_gate() -> None:
    gate = Gate()
    engine = ScriptedEngine(CAPACITY, repeat([5, 6, 7]), gate=gate)
    result: list[int] = []
    worker = threading.Thread(target=lambda: result.extend(generate(engine, 0, [1], 4)))
    worker.start()
    for step in range(2):
        assert gate.arrived(timeout=10)
        assert engine.steps == step + 1
        gate.allow()
    assert gate.arrived(timeout=10)
    gate.open()
    worker.join(timeout=10)
    assert result == [5, 6, 7, 5]


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("helixflow.engine.scripted.time.sleep", pauses.append)
    engine = ScriptedEngine(CAPACITY, repeat([5]), step_s=30.0)
    generate(engine, 0, [1], 3)
    assert len(pauses) == 3
    assert all(29 < pause <= 30 for pause in pauses)


def test_refusals() -> None:
    engine = ScriptedEngine(CAPACITY, repeat([5]))
    with pytest.raises(EngineError, match="does not fit"):
        engine.step(batch((4, 0, [1], 1)))
    with pytest.raises(EngineError, match="does not fit"):
        engine.step(batch((0, 60, [1] * 5, 1)))
    with pytest.raises(EngineError, match="cannot copy"):
        engine.copy_prefix(0, 4, 1)
    with pytest.raises(EngineError, match="at least one token"):
        repeat([])
    engine.close()


@pytest.mark.parametrize("name", ["llama-tiny", "mistral-tiny"])
def test_from_a_model(name: str) -> None:
    engine = load_engine(GOLDEN / name, "scripted", slots=3, max_len=50, script_tokens=5)
    assert isinstance(engine, ScriptedEngine)
    assert engine.capacity() == Capacity(3, 50, {"llama-tiny": 640, "mistral-tiny": 900}[name])
    result = generate(engine, 0, [1, 2, 3], 6)
    assert result[-1] == 2
    assert all(2 < token < engine.capacity().vocab_size for token in result[:-1])


def test_from_a_model_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "eos_token_id": [1]}')
    engine = ScriptedEngine.from_model(tmp_path, slots=1, tokens=2)
    assert generate(engine, 0, [0], 3) == [0, 2, 1]
    assert engine.capacity().max_len == 4096
