"""The golden checkpoints through the GPU engine, cut in every way a scheduler may cut the work; without a GPU."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.engine.tensorrt.engine import RunOptions, TensorRtEngine
from helixflow.engine.tensorrt.fused import FusedPrograms
from helixflow.engine.tensorrt.options import AttentionForm, GpuPrecision
from tests.engine.support import GOLDEN_NAMES
from tests.engine.support import batch as plain
from tests.engine.tensorrt import rig
from tests.engine.tensorrt.host_device import HostDevice, Pace
from tests.engine.tensorrt.rig import COLD, SMALL, Ask, Golden, Way, ask, open_engine, spoil

TOLERANCE = 1e-4  # 1e-3 is asked for; 1e-5 is what comes out

golden = functools.cache(Golden)


@functools.cache
def shared(name: str) -> TensorRtEngine:
    return open_engine(golden(name).spec, golden(name).tensors)


@pytest.fixture(params=GOLDEN_NAMES)
def model(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture
def engine(model: Golden) -> TensorRtEngine:
    """Full of garbage, and no slot holds anything."""
    found = shared(model.directory.name)
    found._held[:] = [0] * len(found._held)
    spoil(found)
    return found


def step(engine: TensorRtEngine, *items: tuple[int, int, Sequence[int], int]) -> Float32:
    """Logits of one step without sampling."""
    candidates = engine.step(plain(*items))
    assert candidates.token_ids is None
    assert candidates.logits is not None
    return candidates.logits.copy()


def prefill(engine: TensorRtEngine, slot: int, ids: list[int], chunks: Sequence[int] = ()) -> Float32:
    rows, past = [], 0
    for size in (*chunks, len(ids)):
        piece = ids[past : past + size]
        if piece:
            rows.append(step(engine, (slot, past, piece, len(piece))))
            past += len(piece)
    return np.concatenate(rows)


@pytest.mark.parametrize("chunks", [(), (5, 11), (1, 2, 1, 7), (64,)], ids=str)
def test_prefill_logits(model: Golden, engine: TensorRtEngine, chunks: tuple[int, ...]) -> None:
    for slot, (case, expected) in enumerate(zip(model.cases, model.logits, strict=True)):
        assert np.abs(prefill(engine, slot, case["input_ids"], chunks) - expected).max() <= TOLERANCE


def decode(engine: TensorRtEngine, model: Golden, slots: Sequence[int], steps: int = 23) -> list[list[int]]:
    """Greedy tokens of every case, prompts one after the other, then all together."""
    tokens = []
    for slot, case in zip(slots, model.cases, strict=True):
        tokens.append(ask(engine, Ask(slot, 0, case["input_ids"])).tokens)
    for i in range(steps):
        answer = ask(
            engine,
            *(
                Ask(slot, len(case["input_ids"]) + i, sequence[-1:])
                for slot, case, sequence in zip(slots, model.cases, tokens, strict=True)
            ),
        )
        for sequence, token in zip(tokens, answer.tokens, strict=True):
            sequence.append(token)
    return tokens


def test_greedy_tokens_ragged_with_a_hole(model: Golden, engine: TensorRtEngine) -> None:
    slots = [0, 1, 3, 4, 5][: len(model.cases)]
    assert decode(engine, model, slots) == [case["greedy_24"] for case in model.cases]


@pytest.mark.parametrize("form", ["posmask", "key_value_lengths"])
@pytest.mark.parametrize("pace", ["lazy", "eager", "random"])
def test_every_form_and_pace(model: Golden, form: AttentionForm, pace: Pace) -> None:
    engine = open_engine(model.spec, model.tensors, replace(SMALL, attention=form), device=HostDevice("nan", pace))
    assert decode(engine, model, [4, 0, 3, 1, 2][: len(model.cases)], 7) == [
        case["greedy_24"][:8] for case in model.cases
    ]
    engine.close()


def test_mixed_steps_in_any_order(model: Golden, engine: TensorRtEngine) -> None:
    """Long prompts enter in chunks while others decode; the batch lists the slots out of order."""
    slots = [4, 0, 5, 2, 1][: len(model.cases)]
    done = [0] * len(slots)
    tokens: list[list[int]] = [[] for _ in slots]
    while any(len(sequence) < 24 for sequence in tokens):
        asks, wanting = [], []
        for i, case in enumerate(model.cases):
            ids = (case["input_ids"] + tokens[i])[done[i] :]
            if len(tokens[i]) < 24:
                chunk = ids[: 6 + i]
                final = len(chunk) == len(ids)
                asks.append(Ask(slots[i], done[i], chunk, int(final)))
                done[i] += len(chunk)
                if final:
                    wanting.append(i)
        for i, token in zip(wanting, ask(engine, *asks).tokens, strict=True):
            tokens[i].append(token)
    assert tokens == [case["greedy_24"] for case in model.cases]


def test_wanted_rows_none_one_some_all(model: Golden, engine: TensorRtEngine) -> None:
    ids, expected = model.cases[-1]["input_ids"][:20], model.logits[-1][:20]
    assert step(engine, (2, 0, ids[:8], 0)).shape == (0, model.spec.vocab_size)
    rows = step(engine, (2, 8, ids[8:15], 3), (0, 0, ids, 20), (5, 0, ids[:1], 0))
    assert np.abs(rows - np.concatenate([expected[12:15], expected])).max() <= TOLERANCE
    assert np.abs(step(engine, (2, 15, ids[15:], 1)) - expected[19]).max() <= TOLERANCE
    assert step(engine).shape == (0, model.spec.vocab_size)
    assert ask(engine).tokens == []


def test_prefix_copy(model: Golden, engine: TensorRtEngine) -> None:
    ids, expected = model.cases[-1]["input_ids"], model.logits[-1]
    step(engine, (5, 0, ids[:40], 0))
    engine.copy_prefix(5, 1, 30)
    rows = step(engine, (1, 30, ids[30:], len(ids) - 30), (5, 40, ids[40:41], 1))
    assert np.abs(rows - np.concatenate([expected[30:], expected[40:41]])).max() <= TOLERANCE
    engine.copy_prefix(1, 1, 20)
    engine.copy_prefix(1, 0, 0)
    assert np.abs(step(engine, (1, 20, ids[20:21], 1)) - expected[20]).max() <= TOLERANCE
    with pytest.raises(EngineError, match="1 tokens at 30; it holds 21"):
        step(engine, (1, 30, ids[30:31], 1))


def test_idle_slots_keep_what_they_hold(model: Golden, engine: TensorRtEngine) -> None:
    ids, expected = model.cases[-1]["input_ids"], model.logits[-1]
    for slot in (1, 2, 3):
        step(engine, (slot, 0, ids[: 10 * slot], 0))
    step(engine, (0, 0, ids[:3], 1), (4, 0, ids[:2], 1))
    for i in range(5):
        rows = step(engine, (4, 2 + i, [ids[2 + i]], 1), (0, 3 + i, [ids[3 + i]], 1))
        assert np.abs(rows - expected[[2 + i, 3 + i]]).max() <= TOLERANCE
    for slot in (1, 2, 3):
        past = 10 * slot
        assert np.abs(step(engine, (slot, past, ids[past : past + 1], 1)) - expected[past]).max() <= TOLERANCE


def test_rows_come_in_batch_order(model: Golden, engine: TensorRtEngine) -> None:
    ids, expected = model.cases[-1]["input_ids"], model.logits[-1]
    for slot in (0, 1, 2, 4, 5):
        step(engine, (slot, 0, ids[: 8 + slot], 1))
    items = [(slot, 8 + slot, [ids[8 + slot]], 0 if slot == 2 else 1) for slot in (1, 5, 2)]
    items += [(3, 0, ids[:7], 3)]
    items += [(slot, 8 + slot, [ids[8 + slot]], 1) for slot in (4, 0)]
    rows = step(engine, *items)
    assert np.abs(rows - expected[[9, 13, 4, 5, 6, 12, 8]]).max() <= TOLERANCE


def test_full_slots(model: Golden) -> None:
    """Slots end at max-len, which may be less than the engine was built for; what they hold stays."""
    ids, expected = model.cases[-1]["input_ids"][:12], model.logits[-1]
    engine = open_engine(model.spec, model.tensors, run=replace(COLD, slots=3, max_len=12))
    assert (engine.capacity().slots, engine.capacity().max_len) == (3, 12)
    ask(engine, *(Ask(slot, 0, ids if slot == 1 else ids[:11]) for slot in range(3)))
    answer = ask(engine, *(Ask(slot, 11, ids[11:]) for slot in (2, 0)))
    assert answer.tokens == [int(expected[11].argmax())] * 2
    with pytest.raises(EngineError, match="1 tokens at 12; it holds 12 of 12"):
        ask(engine, Ask(0, 12, [1]))
    with pytest.raises(EngineError, match="slot 3 is none of the 3"):
        ask(engine, Ask(3, 0, [1]))
    assert np.abs(step(engine, (1, 11, ids[11:], 1)) - expected[11]).max() <= TOLERANCE
    engine.close()


def test_rows_for_the_host_among_others(model: Golden, engine: TensorRtEngine) -> None:
    """Logits come for the rows that asked for them, and for those that 64 candidates are too few for."""
    ids, expected = model.cases[-1]["input_ids"], model.logits[-1]
    host, wide = Way(0.7, seed=4, on_host=True), Way(0.9, top_k=65, seed=5)
    answer = ask(
        engine,
        Ask(3, 0, ids[:9], 1),
        Ask(1, 0, ids[:20], 12, host),
        Ask(0, 0, ids[:1], 1, host),
        Ask(2, 0, ids[:7], 2, wide),
        Ask(5, 0, ids[:5], 5),
    )
    assert sorted(answer.logits) == [*range(1, 14), 14, 15]
    positions = [8, *range(8, 20), 0, 5, 6, *range(5)]
    for row, logits in answer.logits.items():
        assert np.abs(logits - expected[positions[row]]).max() <= TOLERANCE
    greedy = expected.argmax(-1)
    assert [answer.tokens[0], *answer.tokens[16:]] == [greedy[8], *greedy[:5]]


WAYS = (
    Way(0.8, top_p=0.9),
    Way(1.5, top_p=0.5),
    Way(1.0, top_k=20),
    Way(0.7, min_p=0.05),
    Way(1.3),
    Way(30.0),
    Way(0.01),
    Way(1.0, top_k=1),
)


def test_sampled_tokens_are_the_hosts(model: Golden, engine: TensorRtEngine) -> None:
    """Whoever chooses: the device where it can, the host where the device leaves a row open (flat distributions)."""
    ids = model.cases[-1]["input_ids"][:30]
    rows = prefill(engine, 0, ids)
    undecided = 0
    ways = [way._replace(seed=seed) for seed, way in enumerate(WAYS * 3)]
    for way in ways:
        answer = ask(engine, Ask(1, 0, ids, 30, way))
        assert answer.tokens == [way.draw(row, i + 1) for i, row in enumerate(rows)]
        undecided += len(answer.logits)
    assert 0 < undecided < 30 * len(ways) * 2 // 3


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.02), ("bf16", 0.2)])
def test_sixteen_bits(precision: GpuPrecision, tolerance: float) -> None:
    model = golden("qwen3-tiny")
    engine = open_engine(model.spec, model.tensors, replace(SMALL, precision=precision))
    for slot, (case, expected) in enumerate(zip(model.cases, model.logits, strict=True)):
        got = prefill(engine, slot, case["input_ids"], (7, 1))
        assert 1e-5 < np.abs(got - expected).max() <= tolerance
    engine.close()


def test_warm_and_cold_engines_agree(model: Golden) -> None:
    """Everything is run and recorded before the first step; nothing of it is left in the caches."""
    engine = open_engine(model.spec, model.tensors, run=RunOptions())
    calls = rig.device_of(engine).calls
    recorded = 2 * len(SMALL.decode_buckets)
    assert (calls["capture"], calls["launch"], calls["run"]) == (recorded, recorded, recorded + 4)
    assert decode(engine, model, range(len(model.cases)), 5) == [case["greedy_24"][:6] for case in model.cases]
    assert calls["capture"] == recorded
    engine.close()


def test_an_engine_that_cannot_be_recorded(model: Golden) -> None:
    """Decodes without CUDA graphs, and says so once."""
    device = HostDevice("nan")
    engine = open_engine(model.spec, model.tensors, device=device)
    device.fail_after(0, "out_of_memory", "capture")
    with structlog.testing.capture_logs() as logs:
        tokens = decode(engine, model, range(len(model.cases)), 5)
    assert tokens == [case["greedy_24"][:6] for case in model.cases]
    assert (device.calls["capture"], device.calls["launch"]) == (1, 0)
    assert [line["reason"] for line in logs if "not recorded" in line["event"]] == ["injected: out_of_memory"]
    engine.close()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_slot_is_healed(model: Golden, poison: float) -> None:
    """What one sequence has left, if it is beyond all numbers, must not reach the next one in its slot."""
    ids, expected = model.cases[-1]["input_ids"][:12], model.logits[-1]
    engine = open_engine(model.spec, model.tensors)
    memory, device = engine._memory, rig.device_of(engine)
    assert memory is not None
    ask(engine, *(Ask(slot, 0, ids[:10]) for slot in range(3)))
    device.synchronize()
    size = memory._row // 4
    for address in memory.addresses.caches.values():
        device.view(address + 2 * memory._row, np.float32, (size,))[:] = poison
    rows = step(engine, *((slot, 10, ids[10:11], 1) for slot in range(3)))
    assert np.abs(rows[[0, 2]] - expected[10]).max() <= TOLERANCE
    assert np.isnan(rows[1]).any()
    engine.copy_prefix(1, 3, 10)
    engine.copy_prefix(0, 1, 10)
    rows = step(engine, (1, 10, ids[10:], 2))
    assert np.abs(rows - expected[10:12]).max() <= TOLERANCE
    rows = step(engine, (3, 0, ids[:7], 1))
    assert np.abs(rows - expected[6]).max() <= TOLERANCE
    engine.close()


def test_bad_batches_are_refused(model: Golden, engine: TensorRtEngine) -> None:
    ids = model.cases[0]["input_ids"]
    bad: list[tuple[Any, str]] = [
        (plain((6, 0, [1], 1)), "slot 6 is none of the 6"),
        (plain((1, 0, [1], 1), (1, 0, [2], 1)), "appears twice"),
        (plain((0, 1, [1], 1)), "1 tokens at 1; it holds 0 of 160"),
        (plain((0, 0, [model.spec.vocab_size], 1)), "outside the vocabulary"),
        (replace(rig.batch([Ask(0, 0, ids)]), sampling=rig.batch([]).sampling), "not for its 1 rows"),
    ]
    for made, message in bad:
        with pytest.raises(EngineError, match=message):
            engine.step(made)
    negative = rig.batch([Ask(0, 0, ids)])
    negative.sampling.position[:] = -1
    with pytest.raises(EngineError, match="negative"):
        engine.step(negative)
    for arguments in ((0, 6, 1), (6, 0, 1), (0, 1, 1), (0, 1, -1)):
        with pytest.raises(EngineError, match="cannot copy"):
            engine.copy_prefix(*arguments)
    assert ask(engine, Ask(0, 0, ids)).tokens == model.cases[0]["greedy_24"][:1]


def test_memory_is_checked_before_it_is_taken() -> None:
    """Against the sum of what is then allocated."""
    model = golden("qwen2-tiny")
    engine = open_engine(model.spec, model.tensors)
    memory, taken = engine._memory, rig.device_of(engine).live_bytes
    assert memory is not None
    slot = 2 * model.spec.layers * memory._row
    engine.close()
    room = (128 << 20) + taken + 4096
    open_engine(model.spec, model.tensors, device=HostDevice("nan", total_bytes=room)).close()
    device = HostDevice("nan", total_bytes=room - 2 * slot)
    with pytest.raises(
        DeviceError, match=r"does not fit on host: weights [\d.]+ MiB, .*choose at most 4 slots, or"
    ) as caught:
        open_engine(model.spec, model.tensors, device=device)
    assert caught.value.kind == "out_of_memory"
    assert device.closed
    assert device.calls["allocate"] == 0
    with pytest.raises(DeviceError, match="choose a precision of fewer bits"):
        open_engine(model.spec, model.tensors, device=HostDevice(total_bytes=128 << 20))


def test_weights_that_do_not_fit_the_plan() -> None:
    model = golden("llama-tiny")
    name = "model.norm.weight"
    lacking = {key: value for key, value in model.tensors.items() if key != name}
    for tensors, message in (
        (lacking, f"lack {name}"),
        ({**model.tensors, name: np.ones(3, np.float32)}, rf"{name} is float32 \[3\], the plan wants fp32"),
    ):
        device = HostDevice()
        with pytest.raises(EngineError, match=message):
            open_engine(model.spec, tensors, device=device)
        assert device.closed


def test_weights_go_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixflow.engine.tensorrt.memory.STAGE", 1000)
    model = golden("llama-tiny")
    engine = open_engine(model.spec, model.tensors)
    memory, device = engine._memory, rig.device_of(engine)
    assert memory is not None
    for name, address in memory.addresses.weights.items():
        assert np.array_equal(device.view(address, np.float32, model.tensors[name].shape), model.tensors[name])
    engine.close()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (RunOptions(slots=7), r"slots 7 is more than the engine was built for \(6\)"),
        (RunOptions(max_len=161), r"max-len 161 is more"),
    ],
)
def test_more_than_was_built_for(run: RunOptions, message: str) -> None:
    model = golden("llama-tiny")
    with pytest.raises(EngineError, match=message):
        open_engine(model.spec, model.tensors, run=run)


def test_more_slots_than_positions() -> None:
    model = golden("llama-tiny")
    with pytest.raises(EngineError, match="12 slots are more than max-len"):
        open_engine(model.spec, model.tensors, replace(SMALL, slots=12, max_len=10, rows=12))


def test_a_closed_engine() -> None:
    model = golden("llama-tiny")
    engine = open_engine(model.spec, model.tensors)
    device = rig.device_of(engine)
    ask(engine, Ask(0, 0, [1, 2, 3]))
    engine.close()
    engine.close()
    assert device.closed
    assert device.live_bytes == 0
    for call in (lambda: ask(engine, Ask(0, 3, [1])), lambda: engine.copy_prefix(0, 1, 1)):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_everything_is_given_back() -> None:
    """Memory of the engine, not only by closing the device."""
    model = golden("llama-tiny")
    device = HostDevice("nan")
    programs = FusedPrograms(device, rig.plan(model.spec, SMALL), model.spec)
    engine = TensorRtEngine(device, model.spec, SMALL, programs, model.tensors, COLD)
    ask(engine, Ask(0, 0, [1, 2, 3]))
    allocated = device.calls["allocate"]
    engine.close()
    assert device.calls["free"] == allocated
