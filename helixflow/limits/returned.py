"""What a dead gateway's requests held at a time goes back at once, instead of when it lapses (`store.HOLD_S`)."""

import uuid
from collections import defaultdict
from collections.abc import Iterable

from helixflow.ledger.record import Begin
from helixflow.limits.exchange import Lease
from helixflow.limits.model import MAX_LIMIT, Metric
from helixflow.limits.store import MAX_ITEMS, Call, Item


async def give_back(lease: Lease, requests: Iterable[Begin]) -> None:
    """Says in the names of gateways that have died that they hold no requests any more.

    `requests`: all that they had begun and not ended. Nothing of these gateways may come after it: their last call is
    made here. Raises CoreError.
    """
    subjects: defaultdict[bytes, set[str]] = defaultdict(set)
    for begin in requests:
        for kind, number in (("organisation", begin.organisation), ("user", begin.user), ("key", begin.key)):
            if number is not None:
                subjects[begin.gateway].add(f"{kind}:{uuid.UUID(bytes=number)}")
    for gateway, names in subjects.items():
        items = [_nothing(name) for name in sorted(names)]
        for start in range(0, len(items), MAX_ITEMS):
            # Above all calls that the gateway can have made, and growing to the last one.
            sequence = MAX_LIMIT - (len(items) - 1 - start) // MAX_ITEMS
            await lease(Call(str(uuid.UUID(bytes=gateway)), sequence, 0, tuple(items[start : start + MAX_ITEMS])))


def _nothing(subject: str) -> Item:
    return Item(subject, Metric.CONCURRENT_REQUESTS, 0, limit=0, floor=0, need=0, want=0, held=0, spent=0)
