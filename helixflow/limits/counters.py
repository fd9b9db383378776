"""The counters a gateway works with, and which of them a request touches."""

import math
from collections import deque

from helixflow.limits.model import MINUTE_S, Metric, SubjectLimits, window_end, window_start

REQUEST, TOKENS, COST, SLOT = range(4)
"""What of a request a counter counts: the request, its tokens, its cost, or that it runs."""

FORGET_S = 120.0
"""A counter that nothing has asked for this long (seconds) is forgotten. Longer than any plan is valid."""

_KINDS = {
    Metric.REQUESTS_PER_MINUTE: REQUEST,
    Metric.TOKENS_PER_MINUTE: TOKENS,
    Metric.CONCURRENT_REQUESTS: SLOT,
    Metric.TOKENS_PER_DAY: TOKENS,
    Metric.TOKENS_PER_MONTH: TOKENS,
    Metric.COST_PER_DAY: COST,
    Metric.COST_PER_MONTH: COST,
}


class Counter:
    """One subject, metric and window, as this gateway sees it. Times are seconds since the epoch."""

    __slots__ = (
        "end",
        "hand",
        "limit",
        "metric",
        "planned_at",
        "reserved",
        "room",
        "room_at",
        "share",
        "spent",
        "subject",
        "told",
        "uncounted",
        "used_at",
        "waiting",
        "window",
    )

    def __init__(self, subject: str, metric: Metric, window: int, limit: int) -> None:
        self.subject = subject
        self.metric = metric
        self.window = window
        self.end = window_end(metric, window)
        self.limit = limit
        self.hand = 0
        """Granted and free."""
        self.reserved = 0
        """For requests that run."""
        self.spent = 0
        """Used for good, and in no batch yet."""
        self.told = 0
        """What the store believes that this gateway holds; -1: not known, after a call without an answer."""
        self.room = -1
        """What the store had left for everybody when it last said so; -1: it has not."""
        self.room_at = -math.inf
        self.share: int | None = None
        """What this gateway may still grant by itself while nobody counts; None: not worked out."""
        self.uncounted = False
        """The store could not count it."""
        self.waiting = 0
        """How many requests wait for it."""
        self.used_at = -math.inf
        self.planned_at = -math.inf

    @property
    def keep(self) -> int:
        """What may stay in hand for requests to come."""
        return self.limit >> 7

    @property
    def left(self) -> int:
        """What is left for everybody, as far as this gateway knows."""
        return min(self.limit, self.hand + (self.limit if self.room < 0 else self.room))

    @property
    def idle(self) -> bool:
        """Nothing of it is out."""
        return not (self.hand or self.reserved or self.spent or self.told or self.waiting)


Part = tuple[Counter, int]
"""A counter, and what of a request it counts."""


class Plan:
    """The counters that limits mean in one minute: no window begins or ends within it."""

    __slots__ = ("counts_tokens", "limits", "parts", "requests", "since", "tokens", "until")

    def __init__(self, limits: tuple[SubjectLimits, ...], parts: tuple[Part, ...], since: float) -> None:
        self.limits = limits
        self.parts = parts
        self.since = since
        self.until = since + MINUTE_S
        self.requests = tuple(counter for counter, _ in parts if counter.metric is Metric.REQUESTS_PER_MINUTE)
        self.tokens = tuple(counter for counter, _ in parts if counter.metric is Metric.TOKENS_PER_MINUTE)
        self.counts_tokens = any(kind in (TOKENS, COST) for _, kind in parts)

    def tight(self, amounts: tuple[int, int, int, int]) -> bool:
        """Whether a limit of tokens or cost is near for a request that has just taken `amounts`.

        Near is an eighth of the limit, or four times the request: a prompt is guessed at a token for four bytes, and
        has at most one for each.
        """
        return any(
            counter.left < max(counter.limit >> 3, 4 * amounts[kind])
            for counter, kind in self.parts
            if kind in (TOKENS, COST)
        )


class Table:
    """All counters and plans of a gateway. What nobody asks for any more is forgotten, a piece at a time."""

    def __init__(self) -> None:
        self.counters: dict[tuple[str, Metric, int], Counter] = {}
        self.plans: dict[int, Plan] = {}
        """By the identity of the limits, which a plan keeps alive."""
        self._ages: deque[tuple[str, Metric, int] | int] = deque()

    def plan(self, limits: tuple[SubjectLimits, ...], now: float) -> Plan:
        """The plan of the minute that `now` lies in."""
        known = self.plans.get(id(limits))
        if known is not None and known.limits is limits and known.since <= now < known.until:
            return known
        parts = tuple(
            (self._counter(each.subject, metric, limit, now), _KINDS[metric])
            for each in limits
            for metric, limit in each.limits
        )
        plan = Plan(limits, parts, now // MINUTE_S * MINUTE_S)
        if id(limits) not in self.plans:
            self._ages.append(id(limits))
        self.plans[id(limits)] = plan
        return plan

    def forget(self, now: float) -> list[Counter]:
        """Looks at the oldest part of what is known; returns the counters that are gone."""
        gone = []
        for _ in range(min(len(self._ages), max(500, len(self._ages) // 60))):
            key = self._ages.popleft()
            if isinstance(key, int):
                if self.plans[key].until + MINUTE_S < now:
                    del self.plans[key]
                    continue
            else:
                counter = self.counters[key]
                if counter.end <= now or (counter.idle and counter.planned_at + FORGET_S < now):
                    del self.counters[key]
                    gone.append(counter)
                    continue
            self._ages.append(key)
        return gone

    def _counter(self, subject: str, metric: Metric, limit: int, now: float) -> Counter:
        key = (subject, metric, window_start(metric, now))
        counter = self.counters.get(key)
        if counter is None:
            counter = self.counters[key] = Counter(*key, limit)
            self._ages.append(key)
        elif counter.limit != limit:
            if limit < counter.limit:
                counter.hand = 0  # the store decides anew
            if counter.room >= 0:
                counter.room = max(0, counter.room + limit - counter.limit)
            counter.limit = limit
            counter.share = None
        counter.planned_at = now
        return counter

    def __len__(self) -> int:
        return len(self._ages)


def narrowest(counters: tuple[Counter, ...]) -> Counter | None:
    """The counter with the least left."""
    return min(counters, key=lambda counter: counter.left, default=None)
