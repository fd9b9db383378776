"""What the database has said of API keys, for the time when it is away: also a gateway that starts then knows them.
And which keys it does not know, so that what is invented costs one question.

Everything that changes is forgotten at once, and all of it after a gap in what is heard: a key that was revoked while
the database was there is never served from here.
"""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from helixflow.auth.events import RESYNC, Events
from helixflow.auth.principals import Principal

SIZE = 100_000
"""Keys that are remembered; the ones that were not asked for longest go first."""

REFUSED_SIZE = 10_000
REFUSED_S = 60.0
"""How many refused keys are remembered, apart from the others, and how long (seconds)."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A principal, and when the database confirmed it (monotonic seconds)."""

    principal: Principal
    confirmed: float


class Memory:
    """Keys by the digest that gateways send. Belongs to one event loop."""

    def __init__(self, grace_s: float, *, size: int = SIZE, clock: Callable[[], float] = time.monotonic) -> None:
        """`grace_s`: how long after its confirmation a key may be served (seconds)."""
        self._grace_s = grace_s
        self._size = size
        self._clock = clock
        self._found: OrderedDict[bytes, Remembered] = OrderedDict()
        self._holders: defaultdict[str, set[bytes]] = defaultdict(set)
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        self._generation = 0

    @property
    def generation(self) -> int:
        """Changes with everything that is heard. What was read before a change must not be kept after it."""
        return self._generation

    def keep(self, digest: bytes, principal: Principal, generation: int) -> None:
        """Remembers what the database said when `generation` was current."""
        if generation != self._generation:
            return
        self.forget(digest)
        self._refused.pop(digest, None)
        self._found[digest] = Remembered(principal, self._clock())
        for holder in _holders(principal):
            self._holders[holder].add(digest)
        if len(self._found) > self._size:
            self.forget(next(iter(self._found)))

    def find(self, digest: bytes) -> tuple[Principal, float] | None:
        """The principal and the seconds since it was confirmed; None when it is not known, or its time is over."""
        found = self._found.get(digest)
        if found is None:
            return None
        age = self._clock() - found.confirmed
        expired = found.principal.expires_at and time.time() >= found.principal.expires_at
        return None if expired or age > self._grace_s else (found.principal, age)

    def refuse(self, digest: bytes, generation: int) -> None:
        """Remembers that the database refused a key when `generation` was current."""
        self.forget(digest)
        if generation != self._generation:
            return
        self._refused[digest] = self._clock() + REFUSED_S
        self._refused.move_to_end(digest)
        if len(self._refused) > REFUSED_SIZE:
            self._refused.popitem(last=False)

    def refused(self, digest: bytes) -> bool:
        """Whether the database refused this key a moment ago, and nothing has changed since that could matter."""
        return self._clock() < self._refused.get(digest, 0.0)

    def forget(self, digest: bytes) -> None:
        """Lets go of one key."""
        found = self._found.pop(digest, None)
        if found is None:
            return
        for holder in _holders(found.principal):
            digests = self._holders[holder]
            digests.discard(digest)
            if not digests:
                del self._holders[holder]

    def hear(self, event: str) -> None:
        """An event of `Events.watch`."""
        self._generation += 1
        # A key that is made, or whose user or organisation may act again, was refused before.
        self._refused.clear()
        if event == RESYNC:
            self._found.clear()
            self._holders.clear()
        for digest in list(self._holders.get(event, ())):
            self.forget(digest)

    async def follow(self, events: Events) -> None:
        """Hears what changes, until the service stops."""
        async for event in events.watch():
            self.hear(event)


def _holders(principal: Principal) -> tuple[str, ...]:
    own = f"key:{principal.key_id}", f"user:{principal.user_id}", f"organisation:{principal.organisation_id}"
    return *own, *principal.depends_on
