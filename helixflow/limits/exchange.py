"""A gateway's side of the account: what it tells the store, what it got, and what it does without an answer."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain

from helixflow import log, traces
from helixflow.core_rs import CoreError
from helixflow.limits.counters import Counter
from helixflow.limits.model import Metric
from helixflow.limits.store import MAX_ITEMS, Call, Granted, Item

TICK_S = 0.05
"""While something is in hand, it is looked at this often (seconds)."""

IDLE_S = 0.2
"""What lay in hand unused this long (seconds) goes back."""

REFRESH_S = 3.0
"""Everything held and spent is told at least this often (seconds); also the sign of life of a gateway."""

RETRY_S = 1.0
"""A store that did not answer is asked again after this time (seconds)."""

STEP_S = 1.0
"""A clock that differs less (seconds) from the store's is good enough."""

MAX_SPENT = MAX_ITEMS // 2
"""Most items of a batch: what needs an answer must fit into the same call."""

logger = log.get("limits")

Lease = Callable[[Call], Awaitable[Granted]]
"""Sends a call. Raises CoreError."""

Needs = Mapping[Counter, tuple[int, int]]
"""What requests wait for: all that is missing, and the least that helps one of them."""


class Exchange:
    """Belongs to one event loop. One call at a time is on its way."""

    def __init__(self, gateway: str, lease: Lease, timeout_s: float, clock: Callable[[], float], gateways: int) -> None:
        self.gateways = gateways
        """That are alive, as far as is known."""
        self.calls = 0
        self.fallbacks = 0
        """How often the store was given up since the start."""
        self.away = False
        """The store gave no answer: this gateway counts by itself."""
        self.due: set[Counter] = set()
        """To be told with the next call."""
        self.wake = asyncio.Event()
        self._gateway = gateway
        self._lease = lease
        self._timeout_s = timeout_s
        self._clock = clock
        self._offset = 0.0
        self._dirty: set[Counter] = set()
        self._held: set[Counter] = set()
        self._frozen: dict[Counter, int] = {}
        self._sequence = 0
        self._batch = 0
        self._closing = False
        self._refresh_at = -math.inf
        self._retry_at = -math.inf

    def now(self) -> float:
        """Seconds since the epoch, by the store's clock."""
        return self._clock() + self._offset

    @property
    def offset(self) -> float:
        """What the store's clock is ahead of this machine's (seconds)."""
        return self._offset

    @property
    def quiet(self) -> bool:
        """Nothing is in hand."""
        return not self._dirty

    def touch(self, counter: Counter) -> None:
        """The counter changed: the next tick looks at it."""
        if not self._dirty:
            self.wake.set()
        self._dirty.add(counter)

    def tick(self, now: float) -> bool:
        """Takes back from hands what is too much or idle; whether a call should be made now.

        Times that lie ahead, after a clock was set back, count as over.
        """
        if self.away and self._retry_at - RETRY_S <= now < self._retry_at:
            return False
        for counter in list(self._dirty):
            if counter.end <= now:
                self._dirty.discard(counter)
            elif not counter.waiting and self._examine(counter, now):
                self.due.add(counter)
        refresh = not self._refresh_at - REFRESH_S <= now < self._refresh_at
        if refresh:
            self._refresh_at = now + REFRESH_S
            self._held = {counter for counter in self._held if counter.end > now}
            self.due |= self._held | self._dirty
        return refresh or self.away or bool(self.due)

    def _examine(self, counter: Counter, now: float) -> bool:
        """Whether the store must hear about it soon."""
        if self.away or counter.uncounted:
            return self.away and counter.told < 0
        keep = counter.keep
        used = 0 <= now - counter.used_at < IDLE_S
        hand = min(counter.hand, keep if used else 0)
        if hand < counter.hand:
            counter.hand = hand
            counter.room_at = -math.inf  # there is more room now than the store told: nobody is refused because of it
        if counter.told != counter.hand + counter.reserved + counter.spent:
            return True
        if used and counter.hand * 2 < keep and counter.room >= 16:
            return True
        if not counter.hand and not counter.spent:
            self._dirty.discard(counter)
        return False

    def give_back(self) -> None:
        """Empties all hands into the next call, and takes nothing ahead any more."""
        self._closing = True
        for counter in self._dirty:
            counter.hand = 0
        self.due |= self._held | self._dirty

    def forget(self, counters: list[Counter]) -> None:
        """Drops what the table has dropped."""
        self._dirty.difference_update(counters)
        self._held.difference_update(counters)
        self.due.difference_update(counters)

    def local(self, counter: Counter, missing: int) -> bool:
        """Grants `missing` from this gateway's share of what is left, as long as nobody counts."""
        if counter.share is None:
            base = counter.limit if counter.room < 0 else counter.room
            counter.share = -(-base // max(1, self.gateways))
        if missing > counter.share:
            return False
        counter.share -= missing
        counter.hand += missing
        self.touch(counter)
        return True

    async def call(self, needs: Needs) -> None:
        """One call, and what follows from its answer or from there being none."""
        counters, items = self._items(needs)
        self._sequence += 1
        self.calls += 1
        began = self._clock()
        try:
            async with asyncio.timeout(self._timeout_s):
                granted = await self._lease(Call(self._gateway, self._sequence, self._batch, items))
        except Exception as error:  # noqa: BLE001 - whatever it is, requests wait for an outcome
            self._failed(counters, error)
        except asyncio.CancelledError:
            self._failed(counters, TimeoutError("the gateway stops"))
            raise
        else:
            self._correct(granted.now_ms / 1000, began, self._clock())
            self._answered(counters, items, granted)

    def _items(self, needs: Needs) -> tuple[list[Counter], tuple[Item, ...]]:
        """What to say. A batch that may have been counted goes first, and unchanged."""
        now = self.now()
        fresh = not self._frozen
        if fresh:
            self._batch += 1
        chosen: dict[tuple[str, Metric, int], Counter] = {}
        for counter in chain(self._frozen, needs, self.due):
            if len(chosen) == MAX_ITEMS:
                break
            # After a clock was set back there may be two of a kind, of which one is on its way out.
            chosen.setdefault((counter.subject, counter.metric, counter.window), counter)
        counters = list(chosen.values())
        self.due.difference_update(counters)
        items = []
        for counter in counters:
            if fresh and counter.spent and len(self._frozen) < MAX_SPENT:
                self._frozen[counter] = counter.spent
                counter.spent = 0
            need, floor = needs.get(counter, (0, 0))
            want = need
            if not self._closing and counter.end > now and (need or 0 <= now - counter.used_at < IDLE_S):
                want += max(0, counter.keep - (0 if need else counter.hand))
            items.append(
                Item(
                    counter.subject,
                    counter.metric,
                    counter.window,
                    counter.limit,
                    floor,
                    need,
                    want,
                    counter.hand + counter.reserved + counter.spent,
                    self._frozen.get(counter, 0),
                )
            )
        return counters, tuple(items)

    def _answered(self, counters: list[Counter], items: tuple[Item, ...], granted: Granted) -> None:
        now = self.now()
        self.gateways = max(1, granted.gateways)
        for counter, item, grant in zip(counters, items, granted.grants, strict=True):
            self.touch(counter)
            counter.uncounted = grant.uncounted
            if grant.uncounted:
                counter.told = -1
                continue
            self._frozen.pop(counter, None)
            counter.told = item.held + grant.granted
            counter.hand += grant.granted
            counter.room = grant.room
            counter.room_at = now
            counter.share = None
            if counter.told:
                self._held.add(counter)
            else:
                self._held.discard(counter)
        if self.away:
            self.away = False
            self.due |= self._held | self._dirty
            logger.info("limits are counted for all gateways again")

    def _failed(self, counters: list[Counter], error: BaseException) -> None:
        self._retry_at = self.now() + RETRY_S
        for counter in counters:
            counter.told = -1
            self.touch(counter)
        if not self.away:
            self.away = True
            self.fallbacks += 1
            reason = traces.message_of(error) or type(error).__name__
            level = logger.warning if isinstance(error, (CoreError, TimeoutError, OSError)) else logger.error
            level("limits are counted by this gateway alone", error=reason, gateways=self.gateways)

    def _correct(self, theirs: float, began: float, ended: float) -> None:
        """Follows the store's clock, which was read between `began` and `ended`, when this machine's is wrong."""
        offset = theirs - (began + ended) / 2
        if abs(offset - self._offset) > STEP_S + (ended - began) / 2:
            self._offset = offset
            logger.warning("this machine's clock differs from the auth-service's", seconds=round(offset, 1))
