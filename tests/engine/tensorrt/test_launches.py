"""From batches to launches: nothing is lost, nothing is done twice, and every index points at what it should."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from helixflow.engine.items import Item
from helixflow.engine.tensorrt.compile import DECODE, MIXED, profiles
from helixflow.engine.tensorrt.launches import NOBODY, Launch, plan, runs
from helixflow.engine.tensorrt.layout import ALIGNMENT, INPUTS, NOISE, Layout, input_shape
from helixflow.engine.tensorrt.options import EngineOptions

GARBAGE = 0xA5
VOCAB = 101
Arrays = dict[str, NDArray[Any]]
Cell = tuple[int, int]
"""Slot and position."""


@st.composite
def engines(draw: st.DrawFn) -> EngineOptions:
    slots = draw(st.integers(1, 40))
    chunk = draw(st.sampled_from([1, 2, 5, 16, 40, 64]))
    return EngineOptions(
        "fp16",
        slots,
        draw(st.integers(max(slots - 1, 1), 300)),
        chunk_tokens=chunk,
        chunks=draw(st.integers(1, 8)),
        step_tokens=slots + draw(st.integers(1, 90)),
        rows=slots + draw(st.integers(0, 20)),
    )


@st.composite
def batches(draw: st.DrawFn, options: EngineOptions) -> list[Item]:
    items, offset = [], 0
    for slot in draw(st.permutations(range(options.slots)))[: draw(st.integers(1, min(8, options.slots)))]:
        count = draw(st.one_of(st.just(1), st.integers(1, options.max_len)))
        past = draw(st.integers(0, options.max_len - count))
        wanted = draw(st.sampled_from([0, 1, count, draw(st.integers(0, count))]))
        items.append(Item(slot, past, [(slot * 31 + past + i) % VOCAB for i in range(count)], wanted, offset))
        offset += wanted
    return items


def written(launch: Launch, options: EngineOptions) -> Arrays:
    """Inputs of a launch in their shapes, over memory that was used before."""
    layout = Layout(options, VOCAB)
    block = np.full(layout.nbytes, GARBAGE, np.uint8)
    arrays = layout.arrays(block)
    launch.write(arrays)
    used = layout.used(launch.shapes.R, prompts=not launch.decode)
    assert (block[used:] == GARBAGE).all()
    sizes = {**launch.shapes._asdict(), "K": layout.columns - 1}
    shaped: Arrays = {}
    for name in INPUTS:
        shape = input_shape(name, sizes)
        shaped[name] = arrays[name].reshape(-1)[: int(np.prod(shape))].reshape(shape)
    return shaped


def cells(launch: Launch, arrays: Arrays) -> list[Cell]:
    """Where the update of the cache puts each token; slot -1: the spare row."""
    found: list[Cell] = []
    counts = np.diff(arrays["cu_q"])
    assert arrays["cu_q"][0] == 0
    assert (counts >= 0).all()
    for row, count in enumerate(counts.tolist()):
        first = int(arrays["write_idx"][row]) if count else 0
        found += [(row - 1, first + i) for i in range(count)]
    assert len(found) == launch.shapes.T
    return found


def check_attention(launch: Launch, arrays: Arrays, at: Sequence[Cell], options: EngineOptions) -> None:
    """Each token is queried at its own position, in its own row of the cache, seeing all that it must."""
    shapes = launch.shapes
    assert np.array_equal(arrays["kv_len"], arrays["dec_pos"] + 1)
    assert 0 <= arrays["dec_idx"].min() <= arrays["dec_idx"].max() < shapes.T
    for token, (slot, position) in enumerate(at):
        assert position == arrays["position_ids"][token] < options.positions
        back = int(arrays["back_idx"][token])
        assert 0 <= back < shapes.B + shapes.P * shapes.C
        if slot < 0:
            continue
        if back < shapes.B:
            assert (back, token, position) == (slot + 1, arrays["dec_idx"][back], arrays["dec_pos"][back])
        else:
            assert not launch.decode
            piece, place = divmod(back - shapes.B, shapes.C)
            assert arrays["pre_slot"][piece] == slot + 1
            assert (arrays["pre_idx"][piece, place], arrays["pre_pos"][piece, place]) == (token, position)
            assert position < shapes.W
    if not launch.decode:
        assert 0 <= arrays["pre_idx"].min() <= arrays["pre_idx"].max() < shapes.T
        assert 0 <= arrays["pre_pos"].min() <= arrays["pre_pos"].max() < shapes.W
        assert 0 <= arrays["pre_slot"].min() <= arrays["pre_slot"].max() < shapes.B


def check_limits(launch: Launch, options: EngineOptions) -> None:
    limits = profiles(options)[DECODE if launch.decode else MIXED]
    for letter, size in launch.shapes._asdict().items():
        low, _, high = limits[letter]
        assert low <= size <= high, letter


@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    options = data.draw(engines())
    items = data.draw(batches(options))
    wanted = {
        (item.slot, item.past + len(item.tokens) - item.wanted + i): item.offset + i
        for item in items
        for i in range(item.wanted)
    }
    tokens = {(item.slot, item.past + i): token for item in items for i, token in enumerate(item.tokens)}
    computed: list[Cell] = []
    answered: list[int] = []
    for launch in plan(items, options):
        check_limits(launch, options)
        arrays = written(launch, options)
        at = cells(launch, arrays)
        check_attention(launch, arrays, at, options)
        real = [(cell, int(arrays["input_ids"][i])) for i, cell in enumerate(at) if cell[0] >= 0]
        assert all(tokens[cell] == token for cell, token in real)
        # A position comes after all before it, in the same launch or an earlier one.
        for slot in {cell[0] for cell, _ in real}:
            own = [position for (other, position), _ in real if other == slot]
            earlier = [position for other, position in computed if other == slot]
            assert own == list(range(own[0], own[0] + len(own)))
            assert not earlier or own[0] == earlier[-1] + 1
        computed += [cell for cell, _ in real]
        assert len(launch.rows) == launch.shapes.R == len(arrays["last_idx"])
        assert 0 <= arrays["last_idx"].min() <= arrays["last_idx"].max() < launch.shapes.T
        for row, target in enumerate(launch.rows):
            if target != NOBODY:
                assert wanted[at[arrays["last_idx"][row]]] == target
                answered.append(target)
    assert sorted(computed) == sorted(tokens)
    assert sorted(answered) == list(range(len(wanted)))


@pytest.mark.parametrize(
    ("slots", "bucket", "pads"),
    [([0], 1, 0), ([1], 2, 1), ([0, 1], 2, 0), ([2, 0], 4, 2), ([8], 16, 15), ([16], 24, 23), ([0, 39], 40, 38)],
)
def test_decode_buckets(slots: list[int], bucket: int, pads: int) -> None:
    options = EngineOptions("fp16", 40, 100)
    (launch,) = plan([Item(slot, 7, [3], 1, i) for i, slot in enumerate(slots)], options)
    assert launch.decode
    assert launch.shapes == (bucket, bucket + 1, 1, 1, 1, bucket)
    assert launch.pads == pads
    assert launch.rows == [NOBODY] * pads + [slots.index(slot) for slot in sorted(slots)]


def test_decodes_and_pieces_share_the_first_launch() -> None:
    options = EngineOptions("fp16", 4, 200, chunk_tokens=32, chunks=2, step_tokens=64, rows=8)
    items = [Item(2, 9, [1], 1, 0), Item(0, 0, [2] * 100, 1, 1), Item(3, 5, [3], 1, 2)]
    launches = plan(items, options)
    assert [[(item.slot, len(item.tokens), item.wanted) for item in launch.items] for launch in launches] == [
        [(0, 62, 0), (2, 1, 1), (3, 1, 1)],
        [(0, 38, 1)],
    ]
    assert [launch.shapes for launch in launches] == [(64, 5, 2, 32, 128, 2), (48, 2, 2, 32, 128, 1)]


def test_more_rows_than_a_launch_has() -> None:
    options = EngineOptions("fp16", 2, 200, chunk_tokens=64, rows=64)
    launches = plan([Item(0, 0, list(range(100)), 90, 0), Item(1, 3, [5], 1, 90)], options)
    assert [sum(row != NOBODY for row in launch.rows) for launch in launches] == [64, 27]
    assert [len(launch.items[0].tokens) for launch in launches] == [73, 27]


def test_a_lone_last_token_needs_no_piece() -> None:
    options = EngineOptions("fp16", 2, 200, chunk_tokens=32, step_tokens=33)
    launches = plan([Item(0, 0, [1] * 34, 1, 0)], options)
    assert [launch.decode for launch in launches] == [False, True]
    assert launches[1].items == [Item(0, 33, [1], 1, 0)]


def test_padding_fits_into_the_spare_row() -> None:
    options = EngineOptions("fp16", 1, 3, step_tokens=40)
    (launch,) = plan([Item(0, 0, [1, 2], 1, 0)], options)
    assert (launch.shapes.T, launch.pads) == (6, 4)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12))))
def test_runs(pairs: list[Cell]) -> None:
    found = runs(pairs)
    assert [(a + i, b + i) for a, b, count in found for i in range(count)] == pairs
    for (a, b, count), (c, d, _) in itertools.pairwise(found):
        assert (a + count, b + count) != (c, d)


@given(engines())
def test_layout(options: EngineOptions) -> None:
    layout = Layout(options, VOCAB)
    ends = [layout.offsets[name] + size * 4 for name, size in layout.sizes.items()]
    starts = [*list(layout.offsets.values())[1:], layout.nbytes]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert all(address % ALIGNMENT == 0 for address in layout.addresses(4096).values())
    assert layout.arrays(np.zeros(layout.nbytes, np.uint8))[NOISE].shape == (options.rows, 65)
