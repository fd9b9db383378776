"""Which slots share a decode call."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Prices in units of one decode call over no rows at all.

    `rows_per_call`: rows that cost as much as one call; `position`: attention over one cached position.
    """

    rows_per_call: float
    position: float


@dataclass(frozen=True, slots=True)
class Run:
    """Slots `low` .. `high` - 1 in one call, for the decoding slots at `first` .. `last` - 1 of the sorted list."""

    low: int
    high: int
    first: int
    last: int


def plan_runs(slots: Sequence[int], lengths: Sequence[int], costs: Costs) -> list[Run]:
    """Groups `slots` (ascending) into runs; `lengths[s]`: positions that slot s holds.

    A gap is bridged by dummy rows while they cost less than a further call, which reads every weight again; gaps are
    independent of each other, so deciding each by itself is optimal.
    """
    if slots[-1] - slots[0] == len(slots) - 1:
        return [Run(slots[0], slots[-1] + 1, 0, len(slots))]
    runs = []
    first = 0
    for i in range(1, len(slots) + 1):
        if i < len(slots):
            gap = slots[i] - slots[i - 1] - 1
            positions = sum(lengths[slots[i - 1] + 1 : slots[i]]) + gap
            if gap / costs.rows_per_call + positions * costs.position <= 1:
                continue
        runs.append(Run(slots[first], slots[i - 1] + 1, first, i))
        first = i
    return runs
