"""Admission in a gateway: every request takes from what is in hand, or waits for one call to the store.

A request is charged to the windows in which it was admitted. What it reserved and did not use comes back to the token.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable

from helixflow.config import LimitsConfig
from helixflow.limits.counters import Counter, Part, Plan, Table
from helixflow.limits.exchange import MAX_SPENT, REFRESH_S, TICK_S, Exchange, Lease
from helixflow.limits.model import Metric, SubjectLimits
from helixflow.limits.refusals import exhausted, headers, impossible
from helixflow.limits.store import MAX_ITEMS

QUICK_S = 0.05
"""The store is not asked again within this time (seconds) for more than it had left."""

FORGET_EACH_S = 1.0
"""How often (seconds) a part of what is known is looked through for what nobody asks for any more."""

MAX_NEEDS = MAX_ITEMS - MAX_SPENT - 3 * len(Metric)
"""With more counters to ask for, those who came last wait for the next call. One request adds at most 21."""

Amounts = tuple[int, int, int, int]
"""What is taken: requests, tokens, cost (nano currency units), slots."""


class Reservation:
    """What one admitted request has taken. Exactly one `settle` or `cancel` counts; later ones do nothing."""

    __slots__ = ("_limiter", "_open", "_plan", "cost", "tokens")

    def __init__(self, limiter: "Limiter | None", plan: Plan, tokens: int, cost: int) -> None:
        self._limiter = limiter
        self._plan = plan
        self._open = limiter is not None
        self.tokens = tokens
        self.cost = cost

    @property
    def counts_tokens(self) -> bool:
        """Whether tokens or their cost are limited."""
        return self._plan.counts_tokens

    @property
    def tight(self) -> bool:
        """Whether a limit of tokens or cost is so near that `adjust` matters before the request ends.

        Elsewhere `settle` is early enough: what was guessed too low is charged then, and there is room for it.
        """
        return self._plan.counts_tokens and self._plan.tight((1, self.tokens, self.cost, 1))

    async def adjust(self, tokens: int, cost: int) -> None:
        """Reserves so much instead. Raises RateLimitExceeded or InsufficientQuota, and then changes nothing."""
        if self._limiter is not None and self._open:
            await self._limiter.adjust(self, self._plan, tokens, cost)

    def settle(self, tokens: int, cost: int) -> None:
        """The request has ended and used so much, be it less or more than it had reserved."""
        if self._limiter is not None and self._open:
            self._open = False
            self._limiter.close_account(self._plan.parts, (1, self.tokens, self.cost, 1), (1, tokens, cost, 0))

    def cancel(self) -> None:
        """The request did not happen: nothing of it counts, not even as a request."""
        if self._limiter is not None and self._open:
            self._open = False
            self._limiter.close_account(self._plan.parts, (1, self.tokens, self.cost, 1), (0, 0, 0, 0))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The x-ratelimit-* headers."""
        return [] if self._limiter is None else headers(self._plan, self._limiter.now())

    @property
    def since(self) -> float:
        """Start of the minute that the request is charged to (seconds since the epoch)."""
        return self._plan.since

    @property
    def open(self) -> bool:
        """Neither settled nor cancelled."""
        return self._open


UNLIMITED = Reservation(None, Plan((), (), 0.0), 0, 0)
"""Of every request without limits."""


class _Waiter:
    """A request that waits for the store, or one that runs and needs more."""

    __slots__ = ("amounts", "asked", "future", "plan", "reservation", "sizes")

    def __init__(self, plan: Plan, amounts: Amounts, sizes: tuple[int, int], reservation: Reservation | None) -> None:
        """`sizes`: the tokens and the cost that will be reserved then. `reservation`: of a request that runs."""
        self.plan = plan
        self.amounts = amounts
        self.sizes = sizes
        self.reservation = reservation
        self.asked = False
        """The last call has asked for what is missing."""
        self.future: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()


class Limiter:
    """The limits of one gateway worker. Belongs to one event loop; `run` must run beside it."""

    def __init__(
        self,
        gateway: str,
        lease: Lease,
        options: LimitsConfig,
        clock: Callable[[], float] = time.time,
        *,
        gateways: int = 1,
    ) -> None:
        """`gateway`: a UUID of its own for every process. `gateways`: how many there are until the store tells."""
        self._exchange = Exchange(gateway, lease, options.lease_timeout_ms / 1000, clock, gateways)
        self._table = Table()
        self._plans = self._table.plans
        self._waiters: deque[_Waiter] = deque()
        self._calling: asyncio.Task[None] | None = None
        self._clock = clock
        self._forget_at = -math.inf

    @property
    def fallbacks(self) -> int:
        """How often the store was given up since the start."""
        return self._exchange.fallbacks

    @property
    def gateways(self) -> int:
        """That are alive, as far as is known."""
        return self._exchange.gateways

    @property
    def calls(self) -> int:
        """To the store since the start."""
        return self._exchange.calls

    @property
    def away(self) -> bool:
        """Whether this gateway counts by itself, because the store gives no answer."""
        return self._exchange.away

    @property
    def known(self) -> int:
        """Counters and plans in memory."""
        return len(self._table)

    def now(self) -> float:
        """Seconds since the epoch, by the store's clock."""
        return self._exchange.now()

    def try_reserve(self, limits: tuple[SubjectLimits, ...], tokens: int, cost: int) -> Reservation | None:
        """Takes what is needed when all of it is in hand; None: `reserve` must ask."""
        if not limits:
            return UNLIMITED
        now = self._clock() + self._exchange.offset
        plan = self._plans.get(id(limits))
        if plan is None or plan.limits is not limits or not plan.since <= now < plan.until:
            plan = self._table.plan(limits, now)
        amounts = (1, tokens, cost, 1)
        for counter, kind in plan.parts:
            if counter.hand < amounts[kind] or counter.waiting:
                return None
        for counter, kind in plan.parts:
            amount = amounts[kind]
            counter.hand -= amount
            counter.reserved += amount
            counter.used_at = now
        return Reservation(self, plan, tokens, cost)

    async def reserve(self, limits: tuple[SubjectLimits, ...], tokens: int, cost: int) -> Reservation:
        """Takes `tokens` and `cost` (nano currency units) of every limit, the store's help included.

        Raises RateLimitExceeded (minutes, concurrent requests) or InsufficientQuota (days, months, or a request that
        can never be admitted), with `retry_after_s`.
        """
        reservation = self.try_reserve(limits, tokens, cost)
        if reservation is not None:
            return reservation
        plan = self._table.plan(limits, self.now())
        amounts = (1, tokens, cost, 1)
        for counter, kind in plan.parts:
            if amounts[kind] > counter.limit:
                raise impossible(counter, amounts[kind])
        return await self._wait(_Waiter(plan, amounts, (tokens, cost), None))

    def headers(self, limits: tuple[SubjectLimits, ...]) -> list[tuple[bytes, bytes]]:
        """The x-ratelimit-* headers of a refusal."""
        now = self.now()
        return headers(self._table.plan(limits, now), now) if limits else []

    async def run(self) -> None:
        """Returns what is not needed and tells the store what is held, for ever."""
        while True:
            if self._exchange.quiet:
                self._exchange.wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REFRESH_S):
                        await self._exchange.wake.wait()
            else:
                await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """One round of `run`."""
        now = self.now()
        if self._exchange.tick(now):
            self._call()
        if not self._forget_at - FORGET_EACH_S <= now < self._forget_at:
            self._forget_at = now + FORGET_EACH_S
            self._exchange.forget(self._table.forget(now))

    async def close(self) -> None:
        """Returns everything that no request holds; waits for calls under way. `run` must have ended."""
        if not self._exchange.away:
            self._exchange.give_back()
            self._call()
        if self._calling is not None:
            await asyncio.wait({self._calling})

    async def settled(self) -> None:
        """Waits until no call is under way."""
        while self._calling is not None:
            await asyncio.wait({self._calling})

    async def adjust(self, reservation: Reservation, plan: Plan, tokens: int, cost: int) -> None:
        """See `Reservation.adjust`."""
        totals = (1, tokens, cost, 1)
        amounts = (0, tokens - reservation.tokens, cost - reservation.cost, 0)
        now = self.now()
        for counter, kind in plan.parts:
            if amounts[kind] > 0 and totals[kind] > counter.limit and counter.end > now:
                raise impossible(counter, totals[kind])
        waiter = _Waiter(plan, amounts, (tokens, cost), reservation)
        if max(amounts) > 0:
            await self._wait(waiter)
        else:
            self._take(waiter, now)

    def close_account(self, parts: tuple[Part, ...], reserved: Amounts, used: Amounts) -> None:
        """Ends a reservation: what was used is spent, the rest is free again."""
        now = self._clock() + self._exchange.offset
        touch = self._exchange.touch
        for counter, kind in parts:
            counter.reserved -= reserved[kind]
            counter.spent += used[kind]
            counter.hand = max(0, counter.hand + reserved[kind] - used[kind])
            counter.used_at = now
            touch(counter)

    async def _wait(self, waiter: _Waiter) -> Reservation:
        if not any(counter.waiting for counter, _ in waiter.plan.parts) and self._decide(waiter, self.now(), set()):
            return waiter.future.result()
        self._mark(waiter, 1)
        self._waiters.append(waiter)
        self._call()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            future = waiter.future
            granted = not future.cancelled() and future.exception() is None
            if granted and waiter.reservation is None:
                future.result().cancel()  # in the same moment
            raise

    def _decide(self, waiter: _Waiter, now: float, blocked: set[Counter]) -> bool:
        """Grants or refuses, if that can be said now. `blocked`: what others wait for who came earlier."""
        exchange = self._exchange
        for counter, kind in waiter.plan.parts:
            missing = waiter.amounts[kind] - counter.hand
            if waiter.amounts[kind] <= 0 or (waiter.reservation is not None and counter.end <= now):
                continue
            if counter in blocked:
                return False
            if missing <= 0:
                continue
            if exchange.away or counter.uncounted:
                if exchange.local(counter, missing):
                    continue
            elif missing <= counter.room or not (waiter.asked or 0 <= now - counter.room_at < QUICK_S):
                return False
            waiter.future.set_exception(exhausted(counter, waiter.amounts[kind], now))
            return True
        self._take(waiter, now)
        return True

    def _take(self, waiter: _Waiter, now: float) -> None:
        reservation = waiter.reservation
        if reservation is None:
            reservation = Reservation(self, waiter.plan, *waiter.sizes)
        elif not reservation.open:
            waiter.future.set_result(reservation)
            return
        else:
            reservation.tokens, reservation.cost = waiter.sizes
        for counter, kind in waiter.plan.parts:
            counter.hand -= waiter.amounts[kind]
            counter.reserved += waiter.amounts[kind]
            counter.used_at = now
            self._exchange.touch(counter)
        waiter.future.set_result(reservation)

    def _call(self) -> None:
        """Starts calling unless that goes on already."""
        if self._calling is None:
            self._calling = asyncio.get_running_loop().create_task(self._calls())

    async def _calls(self) -> None:
        """Calls as long as somebody waits or something is to be told."""
        try:
            while True:
                await self._exchange.call(self._needs())
                self._serve()
                if self._exchange.away or not (self._waiters or self._exchange.due):
                    break
        finally:
            self._calling = None

    def _needs(self) -> dict[Counter, tuple[int, int]]:
        """What all who wait are missing, in their order, and the least that helps one of them."""
        now = self.now()
        left: dict[Counter, int] = {}
        needs: dict[Counter, tuple[int, int]] = {}
        for waiter in self._waiters:
            if len(needs) > MAX_NEEDS:
                break
            waiter.asked = True
            for counter, kind in waiter.plan.parts:
                amount = waiter.amounts[kind]
                if amount <= 0 or counter.end <= now:
                    continue
                have = left.get(counter, counter.hand)
                left[counter] = have - amount
                if have < amount:
                    missing = amount - max(have, 0)
                    floor = min(needs[counter][1], missing) if counter in needs else missing
                    needs[counter] = (amount - have, floor)
        return needs

    def _serve(self) -> None:
        """After a call: everybody in the order of arrival."""
        now = self.now()
        waiters, self._waiters = self._waiters, deque()
        blocked: set[Counter] = set()
        for waiter in waiters:
            self._mark(waiter, -1)
            if waiter.future.done():
                continue
            self._renew(waiter, now)
            if waiter.future.done() or self._decide(waiter, now, blocked):
                continue
            self._mark(waiter, 1)
            self._waiters.append(waiter)
            blocked.update(counter for counter, _ in waiter.plan.parts)

    def _renew(self, waiter: _Waiter, now: float) -> None:
        """A request that waits into the next minute is charged to that one, and asks again."""
        plan = waiter.plan
        if waiter.reservation is None and not plan.since <= now < plan.until:
            waiter.plan = self._table.plan(plan.limits, now)
            waiter.asked = False

    @staticmethod
    def _mark(waiter: _Waiter, by: int) -> None:
        for counter, _ in waiter.plan.parts:
            counter.waiting += by
