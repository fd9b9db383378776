"""Whose password is hashed next: one client after another, however many each of them sends."""

import asyncio
import contextlib
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable

from helixflow.addresses import network
from helixflow.core_rs import QueueFull
from helixflow.refusals import refusal

LANE = 8
"""What one client may have waiting."""

WAITING = 64
"""What may wait for each place: about 6 s at 0.1 s a hash."""

WAIT_S = 8.0
"""Whoever waited this long is sent away (seconds): gateways give up after 10."""

SMOOTHING = 0.1
"""Weight of the newest duration in their mean."""


class Turns:
    """A bounded queue with a lane for each client, served in rotation. Belongs to one event loop."""

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`places`: turns at a time."""
        self._places = places
        self._clock = clock
        self._running = 0
        self._waiting = 0
        self._mean_s = 0.1
        self._lanes: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def turn(self, address: str) -> AsyncIterator[None]:
        """Waits for a turn of this client. Raises QueueFull, with the time to come back after."""
        if self._running < self._places:
            self._running += 1
        else:
            await self._queue(network(address))
        began = self._clock()
        try:
            yield
        finally:
            self._mean_s += (self._clock() - began - self._mean_s) * SMOOTHING
            self._next()

    async def _queue(self, client: str) -> None:
        self._make_room(client)
        mine = asyncio.get_running_loop().create_future()
        self._lanes.setdefault(client, deque()).append(mine)
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                await mine
        except BaseException as error:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self._next()  # it came too late for us
            else:
                self._remove(client, mine)
            if isinstance(error, TimeoutError):
                raise self._full() from None
            raise

    def _make_room(self, client: str) -> None:
        """Who has least waiting comes in at the cost of who has most. Raises QueueFull."""
        own = len(self._lanes.get(client, ()))
        if own >= LANE:
            raise self._full()
        if self._waiting < WAITING * self._places:
            return
        longest = max(self._lanes, key=lambda name: len(self._lanes[name]))
        if len(self._lanes[longest]) <= own + 1:
            raise self._full()
        last = self._lanes[longest][-1]
        self._remove(longest, last)
        last.set_exception(self._full())

    def _next(self) -> None:
        """Hands a turn that has ended to the client whose turn it is."""
        while self._lanes:
            client, lane = next(iter(self._lanes.items()))
            mine = lane[0]
            self._remove(client, mine)
            if not mine.done():  # else its client has just gone
                if client in self._lanes:
                    self._lanes.move_to_end(client)
                mine.set_result(None)
                return
        self._running -= 1

    def _remove(self, client: str, mine: "asyncio.Future[None]") -> None:
        lane = self._lanes.get(client)
        if lane is None or mine not in lane:
            return
        lane.remove(mine)
        self._waiting -= 1
        if not lane:
            del self._lanes[client]

    def _full(self) -> QueueFull:
        error = refusal(QueueFull, "too many logins at a time; try again in a few seconds")
        error.retry_after_s = max(1, math.ceil(self._waiting * self._mean_s / self._places))
        return error
