"""Where gateways take parts of limits from: one account of every counter, over all gateways.

A counter is a subject, a metric and a window. Its store knows how much of it was used for good, and how much each
gateway holds: in hand, or reserved for requests that run. Both together never pass the limit through a grant.

What a gateway holds is told in absolute numbers with each call, so an answer that is lost heals with the next one. It
lapses `HOLD_S` after it was last told: what a dead gateway held comes back. What was used is told in numbered batches,
each counted once however often it is sent.
"""

from dataclasses import dataclass
from typing import Protocol

from helixflow.core_rs import Conflict, InvalidRequest
from helixflow.limits.model import MAX_LIMIT, Metric, window_end, window_start
from helixflow.refusals import refusal

HOLD_S = 15
"""What a gateway holds lapses this long (seconds) after it was last told."""

SKEW_S = 5
"""A gateway's clock may differ this much (seconds). Nothing is granted of windows that are further away."""

KEEP_S = 60
"""A counter is kept this long (seconds) after its window: late calls may still name it."""

MAX_ITEMS = 1000
"""Most items of one call."""

_LAST_WINDOW = 1 << 33
"""No window begins later (seconds since the epoch, in the year 2242)."""


@dataclass(frozen=True, slots=True)
class Item:
    """One counter in a call. See helixflow.v1.LeaseItem."""

    subject: str
    metric: Metric
    window: int
    limit: int
    floor: int
    need: int
    want: int
    held: int
    spent: int


@dataclass(frozen=True, slots=True)
class Call:
    """What one gateway asks and tells. See helixflow.v1.LeaseRequest."""

    gateway: str
    sequence: int
    batch: int
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to one item."""

    granted: int
    room: int
    """What is left for everybody afterwards."""
    uncounted: bool = False
    """The counter cannot be reached: nothing was done, the gateway counts by itself."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The answer to a call."""

    grants: tuple[Grant, ...]
    gateways: int
    """That have called within `HOLD_S`."""
    now_ms: int
    """The clock that windows go by (milliseconds since the epoch)."""


class LimitStore(Protocol):
    """A backend. For each item, at once: `spent` is counted, `held` replaces what the gateway held, and then
    room = limit - used - all holds; granted is `max(need, min(want, room // 16))` when room >= need, all of the room
    when room >= floor > 0, else nothing.
    """

    async def lease(self, call: Call) -> Granted:
        """Raises Conflict for a call that a later one has overtaken, InvalidRequest, or Unavailable."""

    async def ping(self) -> None:
        """Raises Unavailable when the backend does not answer."""

    async def close(self) -> None:
        """Disconnects."""


def check(call: Call) -> None:
    """Refuses what no gateway sends. Raises InvalidRequest."""
    if len(call.items) > MAX_ITEMS:
        raise refusal(InvalidRequest, f"a call has at most {MAX_ITEMS} items", "items")
    if len({(item.subject, item.metric, item.window) for item in call.items}) != len(call.items):
        raise refusal(InvalidRequest, "a counter stands twice in a call", "items")
    if max(call.sequence, call.batch) > MAX_LIMIT:
        raise refusal(InvalidRequest, f"no gateway has made {MAX_LIMIT} calls", "sequence")
    for item in call.items:
        if max(item.limit, item.floor, item.need, item.want, item.held, item.spent) > MAX_LIMIT:
            raise refusal(InvalidRequest, f"an amount of {item.subject} is above {MAX_LIMIT}", "items")
        if item.window > _LAST_WINDOW or window_start(item.metric, item.window) != item.window:
            raise refusal(InvalidRequest, f"{item.window} is no window of {item.metric.name.lower()}", "items")


def open_at(item: Item, now: float) -> bool:
    """Whether the item's window is the current one, give or take the skew that clocks may have."""
    return item.window - SKEW_S <= now < window_end(item.metric, item.window) + SKEW_S


def lapses_ms(item: Item, now_ms: int) -> int:
    """When the counter may be forgotten (milliseconds since the epoch)."""
    if item.metric is Metric.CONCURRENT_REQUESTS:
        return now_ms + KEEP_S * 1000
    return max(int(window_end(item.metric, item.window)) * 1000, now_ms) + KEEP_S * 1000


def overtaken(call: Call) -> Conflict:
    """The refusal of a call that comes after a later one."""
    return refusal(Conflict, f"call {call.sequence} of gateway {call.gateway} comes after a later one")
