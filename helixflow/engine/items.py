"""Batches taken apart, and refused before they reach a runtime: to it, slots and positions are raw memory."""

from collections.abc import Sequence
from typing import NamedTuple

from helixflow.engine.base import Batch, Capacity, EngineError


class Item(NamedTuple):
    """A sequence in a step: `tokens` for positions `past` ... of `slot`; its `wanted` rows begin at row `offset`."""

    slot: int
    past: int
    tokens: list[int]
    wanted: int
    offset: int


def unpack(batch: Batch, limit: Capacity, held: Sequence[int]) -> list[Item]:
    """The sequences of a batch; `held`: positions that each slot holds. Raises EngineError when one reaches outside.

    Plain lists, because after a step has streamed all weights through the caches, every numpy call costs 5 us.
    """
    tokens = batch.token_ids.tolist()
    slots, pasts, counts, wanted = (a.tolist() for a in (batch.slots, batch.past, batch.counts, batch.wanted))
    if sum(counts) != len(tokens) or len({len(slots), len(pasts), len(counts), len(wanted)}) != 1:
        raise EngineError("the arrays of the batch do not match")
    if len(set(slots)) != len(slots):
        raise EngineError(f"a slot appears twice among {slots}")
    if tokens and not 0 <= min(tokens) <= max(tokens) < limit.vocab_size:
        raise EngineError(f"a token id is outside the vocabulary of {limit.vocab_size}")
    items = []
    start = offset = 0
    for slot, past, count, rows in zip(slots, pasts, counts, wanted, strict=True):
        if not 0 <= slot < limit.slots:
            raise EngineError(f"slot {slot} is none of the {limit.slots}")
        if count < 1 or not 0 <= rows <= count:
            raise EngineError(f"slot {slot}: {rows} rows of {count} tokens cannot be had")
        if not 0 <= past <= held[slot] or past + count > limit.max_len:
            raise EngineError(
                f"slot {slot}: {count} tokens at {past}; it holds {held[slot]} of {limit.max_len} positions"
            )
        items.append(Item(slot, past, tokens[start : start + count], rows, offset))
        start += count
        offset += rows
    return items


def check_copy(src: int, dst: int, length: int, limit: Capacity, held: Sequence[int]) -> None:
    """Refuses a copy of `length` positions from slot `src` to `dst` that cannot be. Raises EngineError."""
    if not (0 <= src < limit.slots and 0 <= dst < limit.slots):
        raise EngineError(f"cannot copy slot {src} to {dst}: there are {limit.slots} slots")
    if not 0 <= length <= held[src]:
        raise EngineError(f"cannot copy {length} positions of slot {src}: it holds {held[src]}")
