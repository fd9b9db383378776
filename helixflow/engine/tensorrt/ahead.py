"""A decode step that was computed before it was asked for."""

from collections.abc import Sequence

from helixflow.engine.items import Item
from helixflow.engine.tensorrt.draws import Draws
from helixflow.engine.tensorrt.runner import Flight

UNKNOWN = -1
"""A token, or the place of its source, that only the device knows, or only the host."""


class Part:
    """Rows of a launch that a step uses: row `rows[i]` is row `targets[i]` of the batch."""

    def __init__(self, flight: Flight, rows: list[int], targets: list[int]) -> None:
        self.flight, self.rows, self.targets = flight, rows, targets
        self.collected = False


class Ahead:
    """A launch of one token for each of some slots, and what it assumed.

    Its token of item i is row `sources[i]` of the launch `before`, or the item's own where that is UNKNOWN; what it
    gave was drawn as entry i of `draws` says.
    """

    def __init__(self, flight: Flight, draws: Draws, before: Flight | None, sources: Sequence[int]) -> None:
        self.flight, self.draws = flight, draws
        self._before, self._sources = before, sources
        self._items = {item.slot: i for i, item in enumerate(flight.launch.items)}

    def forget(self, slot: int) -> None:
        """What the slot holds is no longer what was assumed."""
        self._items.pop(slot, None)

    def serve(self, items: Sequence[Item], draws: Draws) -> tuple[Part, list[Item]]:
        """What of a step this launch is, and the items that are left."""
        asked: list[Item] = []
        found: list[int] = []
        for item in items:
            i = self._items.get(item.slot)
            if i is not None and item.wanted == 1 and self._assumed(i) == (item.past, item.tokens):
                asked.append(item)
                found.append(i)
        same = draws.same([item.offset for item in asked], self.draws, found).tolist()
        rows = [self.flight.launch.pads + i for i, equal in zip(found, same, strict=True) if equal]
        served = [item for item, equal in zip(asked, same, strict=True) if equal]
        slots = {item.slot for item in served}
        left = [item for item in items if item.slot not in slots]
        return Part(self.flight, rows, [item.offset for item in served]), left

    def _assumed(self, i: int) -> tuple[int, list[int]]:
        """Position and token of an item."""
        item, source = self.flight.launch.items[i], self._sources[i]
        if source == UNKNOWN:
            return item.past, item.tokens
        ids = None if self._before is None else self._before.ids
        return item.past, [UNKNOWN if ids is None else int(ids[source])]
