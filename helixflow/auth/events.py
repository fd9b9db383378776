"""Changes on their way to the gateways: one LISTEN connection, fanned out to every Watch stream."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import asyncpg

from helixflow import log, traces
from helixflow.config import DatabaseConfig
from helixflow.db.errors import DatabaseError
from helixflow.db.pool import tls_of
from helixflow.db.target import Target, connect

CHANNEL = "helixflow_events"
RESYNC = "resync"
"""An event by itself: what came before may be incomplete, ask again for everything."""

QUEUE = 1024
"""Events a stream may be behind (about 50 kB); one further behind gets a resync instead."""

PING_S = 2.0
"""How often the connection is tried: a server that vanished without a word is noticed (seconds)."""

BACKOFF_S = (0.05, 2.0)
"""First and longest pause between attempts to connect (seconds)."""

KINDS = frozenset(("key", "user", "organisation", "session"))

logger = log.get("auth")


class Watcher:
    """The queue of one stream."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._events: deque[str] = deque([RESYNC])
        self._wake = asyncio.Event()
        self._wake.set()
        self._closed = False

    def put(self, event: str) -> None:
        """Adds an event, unless a resync that was not read yet says it all."""
        if self._events and self._events[0] == RESYNC:
            return
        if event == RESYNC or len(self._events) >= self._size:
            self._events.clear()
            event = RESYNC
        self._events.append(event)
        self._wake.set()

    def close(self) -> None:
        """Ends the stream after what is queued."""
        self._closed = True
        self._wake.set()

    async def next(self) -> str | None:
        """The next event; None at the end."""
        while not self._events:
            if self._closed:
                return None
            self._wake.clear()
            await self._wake.wait()
        return self._events.popleft()


class Events:
    """Listens to the database and tells the streams. `run` must be running."""

    def __init__(self, target: Target, options: DatabaseConfig, *, queue: int = QUEUE, ping_s: float = PING_S) -> None:
        self._target = target
        self._options = options
        self._queue = queue
        self._ping_s = ping_s
        self._watchers: set[Watcher] = set()
        self._closed = False
        self.listening = asyncio.Event()
        """Set while changes are heard."""

    async def run(self) -> None:
        """Listens, and connects again for ever; every new connection resyncs the streams. Never returns."""
        pause, told = BACKOFF_S[0], ""
        while True:
            try:
                await self._listen()
                pause, told, reason = BACKOFF_S[0], "", "the connection ended"
            except (DatabaseError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                reason = traces.message_of(error)
            if reason != told:
                logger.warning("changes of accounts cannot be heard; connecting again", reason=reason)
                told = reason
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_S[1])

    async def watch(self) -> AsyncGenerator[str, None]:
        """Events from now on, `resync` first: `kind:UUID`, `prices`, `resync`. Ends when the service stops."""
        watcher = Watcher(self._queue)
        self._watchers.add(watcher)
        if self._closed:
            watcher.close()
        try:
            while (event := await watcher.next()) is not None:
                yield event
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """Ends all streams, also those that begin after it."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()

    async def _listen(self) -> None:
        """One connection, until it ends."""
        ended = asyncio.Event()
        connection = await connect(
            self._target,
            tls=tls_of(self._options, self._target),
            timeout_s=self._options.connect_timeout_ms / 1000,
            application_name="auth-service events",
            search_path="helixflow",
        )
        try:
            connection.add_termination_listener(lambda _connection: ended.set())
            async with asyncio.timeout(self._options.connect_timeout_ms / 1000):
                await connection.add_listener(CHANNEL, self._heard)
            # Whatever happened before the LISTEN was not heard.
            self._tell(RESYNC)
            self.listening.set()
            logger.info("listening to changes of accounts")
            await self._until(ended, connection)
        finally:
            self.listening.clear()
            connection.terminate()

    async def _until(self, ended: asyncio.Event, connection: Any) -> None:
        """Returns when the connection has ended or does not answer any more."""
        while not ended.is_set():
            try:
                async with asyncio.timeout(self._ping_s):
                    await ended.wait()
            except TimeoutError:
                async with asyncio.timeout(self._ping_s):
                    await connection.execute("SELECT 1")

    def _heard(self, _connection: Any, _process: int, _channel: str, payload: object) -> None:
        event = str(payload)
        kind, _, value = event.partition(":")
        if event == "prices" or (kind in KINDS and value):
            self._tell(event)
        else:
            logger.warning("a change of unknown kind; everything is asked for again", payload=event[:100])
            self._tell(RESYNC)

    def _tell(self, event: str) -> None:
        for watcher in self._watchers:
            watcher.put(event)
