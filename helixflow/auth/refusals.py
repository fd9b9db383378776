"""Refused logins and acts in the audit log: the first of each kind at once, what follows within the minute as one row.

Whoever floods the login fills a bounded memory and a bounded number of rows, not the log.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from helixflow import log
from helixflow.addresses import network
from helixflow.auth import audit
from helixflow.auth.actors import anonymous
from helixflow.auth.errors import database_errors
from helixflow.core_rs import CoreError
from helixflow.db.pool import Pool

EVERY_S = 60.0
"""Repetitions are summed up this long (seconds)."""

EACH = 10
"""Accounts that one address may have rows of its own for, in that time; further ones share a row."""

ALL = 200
"""Rows of all addresses; further ones share a row."""

SEVERAL = "(several)"

logger = log.get("auth")


@dataclass(slots=True)
class Kind:
    """Refusals that share a row."""

    address: str
    organisation_id: UUID | None
    further: int = 0


Name = tuple[str, str, str]
"""Action, client, account."""


@dataclass(slots=True)
class Refusals:
    """Writes them down. Belongs to one event loop; `run` must be running."""

    pool: Pool
    clock: Callable[[], float] = time.monotonic
    _kinds: dict[Name, Kind] = field(default_factory=dict)
    _clients: dict[str, int] = field(default_factory=dict)
    _until: float = 0.0

    async def note(self, action: str, email: str, address: str, organisation_id: UUID | None) -> None:
        """One refusal. Raises the database's errors when its row cannot be written."""
        if self.clock() >= self._until:
            await self.flush()
        name, new = self._kind(action, email, address, organisation_id)
        if not new:
            self._kinds[name].further += 1
            return
        try:
            await self._write([(name, self._kinds[name], {})])
        except BaseException:
            self._kinds[name].further += 1  # the row that sums up tells of it
            raise

    async def flush(self) -> None:
        """Writes what was summed up, and begins anew. Raises the database's errors: then all of it is kept."""
        kinds, clients = self._kinds, self._clients
        self._kinds, self._clients, self._until = {}, {}, self.clock() + EVERY_S
        try:
            await self._write([(name, kind, {"further": kind.further}) for name, kind in kinds.items() if kind.further])
        except BaseException:
            for name, kind in kinds.items():
                self._kinds.setdefault(name, Kind(kind.address, kind.organisation_id)).further += kind.further
            self._clients = clients
            raise

    async def run(self) -> None:
        """Sums up for ever, and once more at the end."""
        try:
            while True:
                await asyncio.sleep(EVERY_S)
                await self._try_flush()
        finally:
            await self._try_flush()

    async def _try_flush(self) -> None:
        try:
            with database_errors():
                await self.flush()
        except CoreError:
            logger.warning("refused logins are not in the audit log yet", kinds=len(self._kinds))

    def _kind(self, action: str, email: str, address: str, organisation_id: UUID | None) -> tuple[Name, bool]:
        """Which row a refusal belongs to, and whether it is the first one there."""
        client = network(address)
        name = action, client, email
        if name not in self._kinds and self._clients.get(client, 0) >= EACH:
            name, organisation_id = (action, client, SEVERAL), None
        if name not in self._kinds and len(self._kinds) >= ALL:
            name, address, organisation_id = (action, SEVERAL, SEVERAL), SEVERAL, None
        if name in self._kinds:
            return name, False
        self._kinds[name] = Kind(address, organisation_id)
        self._clients[client] = self._clients.get(client, 0) + 1
        return name, True

    async def _write(self, rows: list[tuple[Name, Kind, dict[str, int]]]) -> None:
        if not rows:
            return
        async with self.pool.acquire() as connection, connection.transaction():
            for (action, _, account), kind, detail in rows:
                actor = anonymous(account, kind.address)
                await audit.record(connection, actor, action, account, kind.organisation_id, detail)
