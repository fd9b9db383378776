"""A steady load on several gateways, from clients that know all their addresses, and what the ledger says of it."""

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .wire import CHAT, Line, chat, request

TRIES = 4
"""A request goes to its gateway, then to the next one, and so on; at most so often."""
PATIENCE_S = 8.0
"""A client waits this long for an answer (seconds)."""
BROKEN = (OSError, asyncio.IncompleteReadError, TimeoutError)
ENDED = b"the worker that answered ended"


@dataclass(slots=True)
class Try:
    """One request as one gateway got it, or not."""

    id: str
    status: int = 0
    """0: the connection broke, or the worker behind it ended: nobody can say whether it has answered."""
    code: str = ""
    completion_tokens: int = 0


@dataclass(slots=True)
class Sent:
    """One request of a client, with all its tries."""

    at_s: float
    """After the start of the load (seconds)."""
    latency_s: float = 0.0
    """From when it was due to the last answer."""
    tries: list[Try] = field(default_factory=list)

    @property
    def served(self) -> bool:
        """It has got its answer."""
        return self.tries[-1].status == 200


@dataclass(slots=True)
class Verdict:
    """The ledger beside what clients saw."""

    answered: int = 0
    lost: list[str] = field(default_factory=list)
    """Answered, and not in the ledger as answered."""
    duplicated: list[str] = field(default_factory=list)
    interrupted: int = 0
    strange: list[str] = field(default_factory=list)
    """In the ledger, and nobody has sent it, or recorded otherwise than answered."""


class Pressure:
    """Open loop: requests come when they are due, whatever became of those before."""

    def __init__(
        self,
        ports: Callable[[], Sequence[int]],
        tls: ssl.SSLContext,
        keys: Sequence[str],
        name: str,
        *,
        clients: int = 0,
    ) -> None:
        """`ports`: of the gateways, as they are now. `name`: begins the ids of all requests.

        `clients`: so many take turns, and each stays with the gateway that has answered it; 0: gateways take turns.
        """
        self.sent: list[Sent] = []
        self._ports = ports
        self._tls = tls
        self._keys = keys
        self._name = name
        self._idle: dict[int, list[Line]] = {}
        self._favourites = list(range(clients))

    async def run(self, rate: float, seconds: float, tokens: int = 2) -> None:
        """`rate`: requests/s. Returns when the last one is over."""
        start = time.perf_counter()
        body = chat(tokens)
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                due = start + number / rate
                if (early := due - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                sent = Sent(due - start)
                self.sent.append(sent)
                group.create_task(self._one(sent, len(self.sent), body, due))
        self.close()

    def close(self) -> None:
        """Hangs up all idle connections."""
        for lines in self._idle.values():
            for line in lines:
                line.close()
        self._idle.clear()

    async def _one(self, sent: Sent, number: int, body: Mapping[str, Any], due: float) -> None:
        for attempt in range(TRIES):
            ports = self._ports()
            clients = len(self._favourites)
            gateway = self._favourites[number % clients] if clients else number + attempt
            this = Try(f"{self._name}-{number}-{attempt}")
            sent.tries.append(this)
            key = self._keys[number % len(self._keys)]
            await self._try(this, ports[gateway % len(ports)], request(CHAT, body, key, this.id))
            if this.status not in (0, 503):
                break
            if clients and self._favourites[number % clients] == gateway:
                self._favourites[number % clients] += 1
        sent.latency_s = time.perf_counter() - due

    async def _try(self, this: Try, port: int, data: bytes) -> None:
        idle = self._idle.setdefault(port, [])
        line = idle.pop() if idle else Line(port, self._tls)
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await line.ask(data)
        except BROKEN:
            # What is idle is broken, too: the next request shall not find out by itself.
            for other in idle:
                other.close()
            idle.clear()
            return
        idle.append(line)
        if answer.status == 503 and ENDED in answer.body:
            return
        this.status, this.code = answer.status, answer.code
        if answer.status == 200:
            this.completion_tokens = answer.json()["usage"]["completion_tokens"]


def answered(sent: Iterable[Sent]) -> dict[str, Try]:
    """The tries that were answered: the ledger must have them."""
    return {each.id: each for one in sent for each in one.tries if each.status == 200}


def judge(sent: Sequence[Sent], rows: Iterable[Mapping[str, Any]]) -> Verdict:
    """`rows`: of the ledger, all that begin with the load's name."""
    tries = {each.id: each for one in sent for each in one.tries}
    verdict = Verdict(answered=sum(each.status == 200 for each in tries.values()))
    rows = list(rows)
    found = {row["request_id"]: row for row in rows}
    verdict.duplicated = [name for name, times in Counter(row["request_id"] for row in rows).items() if times > 1]
    verdict.interrupted = sum(row["finish"] == "interrupted" for row in rows)
    for name, each in tries.items():
        row = found.pop(name, None)
        if each.status == 200:
            if row is None or row["finish"] == "interrupted":
                verdict.lost.append(name)
            elif (row["status"], row["completion_tokens"]) != (200, each.completion_tokens):
                verdict.strange.append(name)
        elif row is not None and each.status and row["status"] != each.status:
            verdict.strange.append(name)
    verdict.strange += found
    return verdict
