"""Network addresses of clients, and what each of them may ask in vain."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

LONGEST = 100
"""Characters of an address that are looked at."""

PREFIX = 64
"""Bits of an IPv6 address that tell clients apart: whoever has one address there has all of them (RFC 6177)."""

SIZE = 10_000
"""Addresses whose debts are remembered; who was heard of longest ago is forgotten first."""


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """What stands for one client: an IPv4 address, the /64 of an IPv6 address, else the text as it is."""
    try:
        parsed = ipaddress.ip_address(address[:LONGEST].partition("%")[0])
    except ValueError:
        return address[:LONGEST]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((int(parsed) >> PREFIX << PREFIX, PREFIX)))
        parsed = parsed.ipv4_mapped
    return str(parsed)


class Budget:
    """A token bucket for each client: bounded memory, no task of its own. Belongs to one event loop."""

    def __init__(
        self, burst: float, per_s: float, *, size: int = SIZE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`burst`: what a client may take at once; `per_s`: what comes back each second."""
        self._burst = burst
        self._per_s = per_s
        self._size = size
        self._clock = clock
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> float:
        """Takes one; returns 0, or the seconds until there is one again, when nothing was taken."""
        client, now = network(address), self._clock()
        spent = self._owed(client, now)
        if spent + 1 > self._burst:
            return max((spent + 1 - self._burst) / self._per_s, 0.001)
        self._note(client, spent + 1, now)
        return 0.0

    def give_back(self, address: str) -> None:
        """Undoes one `take`: it was not in vain."""
        client, now = network(address), self._clock()
        self._note(client, self._owed(client, now) - 1, now)

    def _owed(self, client: str, now: float) -> float:
        spent, at = self._spent.get(client, (0.0, now))
        return max(0.0, spent - (now - at) * self._per_s)

    def _note(self, client: str, spent: float, now: float) -> None:
        self._spent.pop(client, None)
        if spent <= 0:
            return
        self._spent[client] = (spent, now)
        if len(self._spent) > self._size:
            self._spent.popitem(last=False)
