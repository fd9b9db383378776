"""From a batch to launches: which tokens go together, in which shapes, and what the index inputs say.

Tokens lie in the order of the rows of the cache: first padding, which belongs to the spare row 0, then the tokens of
each slot s, in row s + 1. A slot with one token is a decode row; a longer part of a sequence is one or more pieces.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.items import Item
from helixflow.engine.tensorrt.forward import StepShapes
from helixflow.engine.tensorrt.options import EngineOptions

Arrays = Mapping[str, NDArray[Any]]
"""Inputs by name, as `layout.Layout.arrays` makes them."""

# Smallest sizes of launches with pieces of prompts; below, padding costs nothing that could be measured.
LEAST_TOKENS = 16
LEAST_VIEW = 128
NOBODY = -1
"""Row of the batch that a row of logits without a reader belongs to."""


class Launch:
    """Tokens that are computed together. `items`: by slot, each slot once; `decode`: no item has more than one token.

    `shapes`: sizes; `pads`: tokens of the spare row; `rows` [R]: row of the batch that each row of logits is for.
    """

    def __init__(self, items: Iterable[Item], options: EngineOptions) -> None:
        """`options`: with as many slots as the caches have. Needs at least one item, within its limits."""
        self.items = sorted(items)
        tokens = sum(len(item.tokens) for item in self.items)
        self.decode = tokens == len(self.items)
        bucket = next(size for size in options.decode_buckets if size > self.items[-1].slot)
        if self.decode:
            self.shapes = StepShapes(bucket, bucket + 1, 1, 1, 1, bucket)
            self.pads = bucket - tokens
            rows = [item.offset if item.wanted else NOBODY for item in self.items]
            self.rows = [NOBODY] * self.pads + rows
            return
        rows = [item.offset + i for item in self.items for i in range(item.wanted)]
        self.pieces = [piece for item in self.items for piece in _pieces(item, options.chunk_tokens)]
        self.shapes = StepShapes(
            T=min(_token_bucket(tokens), options.step_tokens, tokens + options.positions),
            B=bucket + 1,
            P=_power_of_two(len(self.pieces), 1, options.chunks),
            C=_power_of_two(max(len(piece.tokens) for piece in self.pieces), LEAST_TOKENS, options.chunk_tokens),
            W=_power_of_two(
                max(piece.past + len(piece.tokens) for piece in self.pieces), LEAST_VIEW, options.positions
            ),
            R=_power_of_two(len(rows), 1, options.rows),
        )
        self.pads = self.shapes.T - tokens
        self.rows = rows + [NOBODY] * (self.shapes.R - len(rows))

    def write(self, arrays: Arrays) -> None:
        """Writes the index inputs; tokens and rows beyond the launch's sizes keep what they hold."""
        if self.decode:
            self._write_decode(arrays)
        else:
            self._write_mixed(arrays)

    def _write_decode(self, arrays: Arrays) -> None:
        size, pads = self.shapes.T, self.pads
        slots = np.array([item.slot for item in self.items], np.int32)
        past = np.array([item.past for item in self.items], np.int32)
        rows = slots + 1
        counts = np.zeros(size + 1, np.int32)
        counts[0] = pads
        counts[rows] = 1
        arrays["cu_q"][0] = 0
        np.cumsum(counts, out=arrays["cu_q"][1 : size + 2])
        for name in ("write_idx", "dec_idx", "dec_pos"):
            arrays[name][: size + 1] = 0
        arrays["write_idx"][rows] = past
        arrays["dec_idx"][rows] = np.arange(pads, size)
        arrays["dec_pos"][rows] = past
        np.add(arrays["dec_pos"][: size + 1], 1, out=arrays["kv_len"][: size + 1])
        arrays["input_ids"][:pads] = 0
        arrays["input_ids"][pads:size] = [item.tokens[0] for item in self.items]
        arrays["position_ids"][:pads] = np.arange(pads)
        arrays["position_ids"][pads:size] = past
        arrays["back_idx"][:pads] = 0
        arrays["back_idx"][pads:size] = rows
        arrays["last_idx"][:size] = np.arange(size)

    def _write_mixed(self, arrays: Arrays) -> None:
        size, rows = self.shapes.T, self.shapes.B
        for name in ("write_idx", "dec_idx", "dec_pos"):
            arrays[name][:rows] = 0
        counts = np.zeros(rows, np.int32)
        counts[0] = self.pads
        for name in ("input_ids", "back_idx"):
            arrays[name][: self.pads] = 0
        arrays["position_ids"][: self.pads] = np.arange(self.pads)
        wanted: list[int] = []
        starts = {}
        start = self.pads
        for item in self.items:
            row, end = item.slot + 1, start + len(item.tokens)
            counts[row] = end - start
            arrays["write_idx"][row] = item.past
            arrays["input_ids"][start:end] = item.tokens
            arrays["position_ids"][start:end] = np.arange(item.past, item.past + end - start)
            wanted += range(end - item.wanted, end)
            if end - start == 1:
                arrays["dec_idx"][row] = start
                arrays["dec_pos"][row] = item.past
                arrays["back_idx"][start] = row
            starts[item.slot] = start - item.past
            start = end
        arrays["cu_q"][0] = 0
        np.cumsum(counts, out=arrays["cu_q"][1 : rows + 1])
        np.add(arrays["dec_pos"][:rows], 1, out=arrays["kv_len"][:rows])
        arrays["last_idx"][: len(wanted)] = wanted
        arrays["last_idx"][len(wanted) : self.shapes.R] = size - 1
        self._write_pieces(arrays, starts)

    def _write_pieces(self, arrays: Arrays, starts: Mapping[int, int]) -> None:
        """`starts`: what to add to a position of a slot for its place among the tokens."""
        rows, count, longest = self.shapes.B, self.shapes.P, self.shapes.C
        places = arrays["pre_idx"][: count * longest].reshape(count, longest)
        positions = arrays["pre_pos"][: count * longest].reshape(count, longest)
        for i, piece in enumerate(self.pieces):
            row = np.minimum(np.arange(longest), len(piece.tokens) - 1)
            positions[i] = row + piece.past
            places[i] = positions[i] + starts[piece.slot]
            first = places[i, 0]
            arrays["back_idx"][first : first + len(piece.tokens)] = rows + i * longest + np.arange(len(piece.tokens))
            arrays["pre_slot"][i] = piece.slot + 1
        unused = len(self.pieces)
        places[unused:] = 0
        positions[unused:] = 0
        arrays["pre_slot"][unused:count] = 0


def plan(items: Sequence[Item], options: EngineOptions) -> list[Launch]:
    """Cuts a batch into launches: the first one takes every sequence of one token, and as much of the others as fits.

    An item of a launch says which of the item's rows it has (`wanted`, `offset`).
    """
    chosen = [item for item in items if len(item.tokens) == 1]
    waiting = [item for item in items if len(item.tokens) > 1]
    launches = []
    while chosen or waiting:
        tokens, pieces = options.step_tokens - len(chosen), options.chunks
        rows = options.rows - sum(item.wanted for item in chosen)
        left = []
        for item in waiting:
            count = min(tokens, pieces * options.chunk_tokens, len(item.tokens) - item.wanted + rows)
            head, tail = _cut(item, count)
            if head is not None:
                chosen.append(head)
                tokens -= len(head.tokens)
                pieces -= -(-len(head.tokens) // options.chunk_tokens)
                rows -= head.wanted
            if tail is not None:
                left.append(tail)
        launches.append(Launch(chosen, options))
        chosen, waiting = [], left
    return launches


def runs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours among (source, target) pairs, in the order given, as (source, target, length)."""
    found: list[tuple[int, int, int]] = []
    for _, group in itertools.groupby(enumerate(pairs), lambda x: (x[1][0] - x[0], x[1][1] - x[0])):
        members = list(group)
        found.append((*members[0][1], len(members)))
    return found


def _cut(item: Item, count: int) -> tuple[Item | None, Item | None]:
    """The first `count` tokens of an item, and the others, each with its own rows of logits."""
    if count <= 0:
        return None, item
    if count >= len(item.tokens):
        return item, None
    rows = max(0, item.wanted - (len(item.tokens) - count))
    head = Item(item.slot, item.past, item.tokens[:count], rows, item.offset)
    tail = Item(item.slot, item.past + count, item.tokens[count:], item.wanted - rows, item.offset + rows)
    return head, tail


def _pieces(item: Item, longest: int) -> list[Item]:
    """The pieces of an item, without their rows; none when it is a decode row."""
    if len(item.tokens) == 1:
        return []
    return [
        Item(item.slot, item.past + start, item.tokens[start : start + longest], 0, 0)
        for start in range(0, len(item.tokens), longest)
    ]


def _power_of_two(count: int, least: int, most: int) -> int:
    """The power of two that `count` is padded to, at least `least`, and never more than `most`."""
    return min(max(least, 1 << max(0, count - 1).bit_length()), most)


def _token_bucket(count: int) -> int:
    """Four sizes to each doubling, so that padding is a quarter at most, and shapes are few."""
    step = max(LEAST_TOKENS, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step
