"""Decoding one step ahead: used where the caller asks for just that, harmless everywhere else."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.device import DeviceError, Failure
from helixflow.engine.tensorrt.engine import RunOptions, TensorRtEngine
from helixflow.engine.tensorrt.options import EngineOptions
from tests.engine.support import Reference, Tensors, random_tensors, tiny_config
from tests.engine.tensorrt.host_device import HostDevice, Pace
from tests.engine.tensorrt.rig import COLD, Answer, Ask, Way, ask, batch, launches, open_engine, spoil

SLOTS, MAX_LEN, VOCAB, WINDOW = 5, 24, 101, 11
OPTIONS = EngineOptions("fp32", SLOTS, MAX_LEN, chunk_tokens=8, chunks=2, step_tokens=20, rows=6)
CONFIG = tiny_config("mistral", sliding_window=WINDOW)
SPEC = ModelSpec.parse(Path("config.json"), CONFIG)
TOLERANCE = 1e-4
# Error of a logit that a near tie between two tokens may turn on.
WOBBLE = 2e-4
WAYS = (Way(), Way(0.9, seed=1), Way(1.2, top_p=0.7, seed=2), Way(0.8, top_k=12, seed=3), Way(1.0, min_p=0.1, seed=4))


@functools.cache
def tensors() -> Tensors:
    return random_tensors(CONFIG)


@functools.cache
def reference() -> Reference:
    return Reference(CONFIG, tensors(), windows=[WINDOW, WINDOW])


@functools.cache
def expected(tokens: tuple[int, ...]) -> Float32:
    """Logits behind these tokens."""
    row: Float32 = reference().logits(list(tokens))[-1].astype(np.float32)
    return row


def new_engine(pace: Pace = "lazy", run: RunOptions = COLD) -> TensorRtEngine:
    engine = open_engine(SPEC, tensors(), OPTIONS, run, HostDevice("nan", pace))
    spoil(engine)
    return engine


class Sequence:
    """What a slot holds, and whether what comes is right."""

    def __init__(self, slot: int, tokens: list[int], way: Way = WAYS[0]) -> None:
        self.slot, self.tokens, self.way, self.past = slot, list(tokens), way, 0

    def ask(self, count: int = 0) -> Ask:
        """The next `count` tokens (0: all)."""
        end = self.past + count if count else len(self.tokens)
        return Ask(self.slot, self.past, self.tokens[self.past : end], int(end == len(self.tokens)), self.way)

    def take(self, asked: Ask, token: int | None) -> None:
        """Checks an answer, and goes on with it."""
        self.past = asked.past + len(asked.tokens)
        if token is not None:
            check(self.tokens[: self.past], self.way, token)
            self.tokens.append(token)


def check(tokens: list[int], way: Way, token: int) -> None:
    """The token is what the host draws, within the errors of logits in fp32."""
    row = expected(tuple(tokens))
    if way.temperature == 0:
        assert row[token] >= row.max() - WOBBLE
        return
    random = np.random.default_rng(0)
    near = (row, *(row + random.uniform(-WOBBLE, WOBBLE, VOCAB).astype(np.float32) for _ in range(3)))
    assert token in {way.draw(one, len(tokens)) for one in near}


def step(engine: TensorRtEngine, *sequences: Sequence) -> Answer:
    asks = [sequence.ask() for sequence in sequences]
    answer = ask(engine, *asks)
    for sequence, asked, token in zip(sequences, asks, answer.tokens, strict=True):
        sequence.take(asked, token)
    return answer


def started(engine: TensorRtEngine, *slots: int, way: Way = WAYS[0], steps: int = 3) -> list[Sequence]:
    """Sequences that have decoded some tokens together, one step ahead."""
    sequences = [Sequence(slot, [slot + 7, 3, slot], way) for slot in slots]
    for _ in range(steps):
        step(engine, *sequences)
    return sequences


def cost(engine: TensorRtEngine, call: Callable[[], object]) -> int:
    """Launches that are made for a call."""
    before = launches(engine)
    call()
    return launches(engine) - before


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_steady_step_is_one_launch(way: Way) -> None:
    """Every step finds its launch made, and makes the next one. What the host decided has to be computed again."""
    engine = new_engine()
    sequences = started(engine, 0, 1, 3, way=way)
    decided = False
    for _ in range(12):
        before = launches(engine)
        answer = step(engine, *sequences)
        assert launches(engine) - before == 1 or decided
        decided = bool(answer.logits)
    assert decided in ({False} if way.temperature == 0 else {False, True})
    engine.close()


def test_without_looking_ahead() -> None:
    engine = new_engine(run=replace(COLD, ahead=False))
    sequences = [Sequence(slot, [slot + 7, 3, slot]) for slot in (0, 1, 3)]
    step(engine, *sequences)
    for _ in range(4):
        assert cost(engine, lambda: step(engine, *sequences)) == 1
    engine.close()


def test_one_finishes() -> None:
    """The others go on without a launch of their own, and the one after next knows."""
    engine = new_engine()
    first, second, third = started(engine, 0, 1, 3)
    for sequences in ((first, third), (first, third), (third,), (third,)):
        assert cost(engine, functools.partial(step, engine, *sequences)) == 1
    assert cost(engine, lambda: step(engine, second, third)) == 2  # it was only parked: computed beside the other
    assert cost(engine, lambda: step(engine, second, third)) == 1
    engine.close()


def test_a_new_prompt_comes_in() -> None:
    """What was computed ahead is used: only the prompt needs a launch. While it has no token, nobody looks ahead."""
    engine = new_engine()
    sequences = started(engine, 0, 4)
    new = Sequence(2, list(range(11)))
    for count, launched in ((4, 1), (3, 1), (0, 2)):
        asks = [*(sequence.ask() for sequence in sequences), new.ask(count)]
        before = launches(engine)
        tokens: list[int | None] = [*ask(engine, *asks).tokens]
        assert launches(engine) - before == launched
        for sequence, asked, token in zip([*sequences, new], asks, [*tokens, None], strict=False):
            sequence.take(asked, token)
    for _ in range(3):
        assert cost(engine, lambda: step(engine, *sequences, new)) == 1
    engine.close()


OTHER_WAYS = (
    WAYS[1]._replace(temperature=1.9),
    WAYS[1]._replace(seed=9),
    WAYS[1]._replace(top_p=0.6),
    WAYS[1]._replace(top_k=5),
    WAYS[1]._replace(min_p=0.3),
    WAYS[1]._replace(on_host=True),
)


@pytest.mark.parametrize("other", OTHER_WAYS, ids=str)
def test_sampling_changes(other: Way) -> None:
    engine = new_engine()
    sequences = started(engine, 0, 1, 2, way=WAYS[1])
    sequences[1].way = other
    # Computed again; a row for the host ends the looking ahead.
    assert cost(engine, lambda: step(engine, *sequences)) == (1 if other.on_host else 2)
    for _ in range(3):
        step(engine, *sequences)
    engine.close()


def test_another_position_is_another_draw() -> None:
    """The same token at the same place of the slot, but the noise of another position."""
    engine = new_engine()
    (sequence,) = started(engine, 0, way=WAYS[1])
    made = batch([sequence.ask()])
    made.sampling.position[:] += 3
    candidates = engine.step(made)
    assert candidates.token_ids is not None
    row = expected(tuple(sequence.tokens))
    drawn = int(candidates.token_ids[0])
    assert drawn in (-1, WAYS[1].draw(row, len(sequence.tokens) + 3))
    engine.close()


def test_another_token_than_the_device_chose() -> None:
    """A stop sequence may make the caller replace a token; the others are served as they are."""
    engine = new_engine()
    sequences = started(engine, 0, 1, 2)
    sequences[1].tokens[-1] = (sequences[1].tokens[-1] + 1) % VOCAB
    assert cost(engine, lambda: step(engine, *sequences)) == 2
    for _ in range(2):
        assert cost(engine, lambda: step(engine, *sequences)) == 1
    engine.close()


def test_a_slot_gets_another_sequence() -> None:
    """One that begins like the old one, one that is new, and a copy that ends where the old one would have gone on."""
    engine = new_engine()
    old, other = started(engine, 0, 1)
    shorter = Sequence(0, [*old.tokens[:4], old.tokens[-1]])
    shorter.past = 4
    step(engine, shorter, other)
    fresh = Sequence(0, [5, 6])
    step(engine, fresh, other)
    while fresh.past < other.past:
        step(engine, fresh)
    engine.copy_prefix(1, 0, fresh.past)
    copied = Sequence(0, [*other.tokens[: fresh.past], fresh.tokens[-1]])
    copied.past = fresh.past
    step(engine, copied)
    step(engine, copied, other)
    engine.close()


def test_a_token_whose_row_nobody_wants() -> None:
    """It is in the launch, but the rows of the answer are others."""
    engine = new_engine()
    first, second, third = started(engine, 0, 1, 2)
    asks = [first.ask(), third.ask(), second.ask()._replace(wanted=0)]
    tokens = ask(engine, *asks).tokens
    first.take(asks[0], tokens[0])
    third.take(asks[1], tokens[1])
    engine.close()


def test_slots_fill_up_together() -> None:
    """The last step looks no further for those that are at the end, and nothing lands in their last position."""
    engine = new_engine()
    sequences = [Sequence(slot, list(range(MAX_LEN - 3 - slot % 2))) for slot in range(SLOTS)]
    while sequences:
        step(engine, *sequences)
        sequences = [sequence for sequence in sequences if sequence.past < MAX_LEN]
    check_last = Sequence(1, list(range(MAX_LEN - 4)))
    check_last.past = MAX_LEN - 5
    step(engine, check_last)
    engine.close()


def test_a_host_row_ends_the_looking_ahead() -> None:
    engine = new_engine()
    first, second = started(engine, 0, 1)
    second.way = second.way._replace(on_host=True)
    assert cost(engine, lambda: step(engine, first, second)) == 1
    assert cost(engine, lambda: step(engine, first, second)) == 1
    second.way = second.way._replace(on_host=False)
    assert cost(engine, lambda: step(engine, first, second)) == 2
    assert cost(engine, lambda: step(engine, first, second)) == 1
    engine.close()


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_schedule(data: st.DataObject) -> None:
    """Any mixture of what a scheduler does; every token that comes is the one that the dense decoder leads to."""
    engine = shared(data.draw(st.sampled_from(["lazy", "random"]), label="pace"))
    engine._held[:] = [0] * SLOTS
    engine._ahead = None
    held: list[list[int]] = [[] for _ in range(SLOTS)]
    live: dict[int, Sequence] = {}
    for _ in range(data.draw(st.integers(2, 9), label="steps")):
        if data.draw(st.integers(0, 5), label="copy") == 0:
            src, dst = data.draw(st.integers(0, SLOTS - 1)), data.draw(st.integers(0, SLOTS - 1))
            length = data.draw(st.integers(0, len(held[src])))
            engine.copy_prefix(src, dst, length)
            held[dst] = held[src][:length]
            live.pop(dst, None)
        steady = data.draw(st.integers(0, 3), label="steady") > 0 and live
        chosen = (
            sorted(live) if steady else data.draw(st.permutations(range(SLOTS)))[: data.draw(st.integers(1, SLOTS))]
        )
        asks = [one for slot in chosen if (one := draw_ask(data, slot, live, held[slot], bool(steady)))]
        answer = ask(engine, *asks)
        row = 0
        for one in asks:
            sequence = live[one.slot]
            held[one.slot] = [*held[one.slot][: one.past], *one.tokens]
            for i in range(one.wanted):
                check_row(answer, row, held[one.slot][: one.past + len(one.tokens) - one.wanted + 1 + i], one.way)
                row += 1
            sequence.past = one.past + len(one.tokens)
            if one.wanted:
                sequence.tokens = [*held[one.slot], answer.tokens[row - 1]]
            if sequence.past == MAX_LEN:
                del live[one.slot]


def draw_ask(data: st.DataObject, slot: int, live: dict[int, Sequence], held: list[int], steady: bool) -> Ask | None:
    """What comes next for a slot: the token it was given, as a rule; else a prompt that may begin as it does."""
    sequence = live.get(slot)
    if sequence is not None and len(sequence.tokens) == sequence.past + 1 and (steady or data.draw(st.booleans())):
        if not steady and data.draw(st.integers(0, 3)) == 0:
            sequence.way = data.draw(st.sampled_from(WAYS))
        return sequence.ask()
    keep = len(held) if data.draw(st.booleans()) else data.draw(st.integers(0, len(held)))
    count = min(MAX_LEN - keep, data.draw(st.sampled_from([1, 2, 5, 13, 20])))
    if count == 0:
        return None
    tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=count, max_size=count))
    way = data.draw(st.sampled_from(WAYS))
    if data.draw(st.integers(0, 5)) == 0:
        way = way._replace(on_host=True)
    live[slot] = Sequence(slot, [*held[:keep], *tokens], way)
    wanted = data.draw(st.sampled_from([0, 1, 1, 1, count]))
    return Ask(slot, keep, tokens, wanted, way)


def check_row(answer: Answer, row: int, tokens: list[int], way: Way) -> None:
    if row in answer.logits:
        assert np.abs(answer.logits[row] - expected(tuple(tokens))).max() < TOLERANCE
    else:
        check(tokens, way, answer.tokens[row])


@functools.cache
def shared(pace: Pace) -> TensorRtEngine:
    return new_engine(pace)


@given(
    after=st.integers(0, 260),
    kind=st.sampled_from(["lost", "failed", "out_of_memory"]),
    warm=st.booleans(),
    pace=st.sampled_from(["lazy", "random"]),
)
@settings(max_examples=60, deadline=None)
def test_the_device_fails_at_any_point(after: int, kind: Failure, warm: bool, pace: Pace) -> None:
    """An engine that cannot be made closes its device; one that fails says the same thing ever after."""
    device = HostDevice("nan", pace)
    device.fail_after(after, kind)
    engine, raised = None, None
    try:
        engine = open_engine(SPEC, tensors(), OPTIONS, RunOptions(warm=warm), device)
        sequences = started(engine, 0, 1, 3)
        engine.copy_prefix(0, 2, 3)
        for _ in range(3):
            step(engine, *sequences)
    except DeviceError as error:
        raised = error
    assert raised is None or str(raised) == f"injected: {kind}"
    if engine is None:
        assert device.closed
        return
    if raised is not None:
        for call in (lambda: step(engine, Sequence(4, [1])), lambda: engine.copy_prefix(0, 1, 0)):
            with pytest.raises(DeviceError) as again:
                call()
            assert again.value is raised
    engine.close()
    assert device.closed
    with pytest.raises(EngineError):
        step(engine, Sequence(4, [1]))
