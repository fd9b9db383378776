"""Seals what was written: chains the audit log, and signs checkpoints over the ends of all chains.

Any number of auth-services may do so; a lock lets one at a time. What it finds tampered with it never seals.
"""

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

import asyncpg

from helixflow import log
from helixflow.db.errors import DatabaseError
from helixflow.db.pool import Pool
from helixflow.ledger import audit_chain, seals
from helixflow.ledger.audit_chain import ChainError
from helixflow.ledger.chain import Head
from helixflow.ledger.seals import AnchorError, AnotherKeyError, Checkpoint, End, SealKeys
from helixflow.pki import files
from helixflow.pki.errors import PkiError

EVERY_S: Final = 10.0
"""Between two rounds (seconds): what is cut off a chain within this time leaves no trace."""
SETTLED_S: Final = 600.0
"""A transaction that writes an entry is over by then (seconds); the server ends idle ones after a tenth of that."""
LOCK: Final = 0x48656C6978_04
"""Key of the advisory lock: "Helix", then 04 for seals."""

_LOCK: Final = "SELECT pg_advisory_xact_lock($1)"
_CHECKPOINT: Final = """
SELECT m.installation::text, k.number, k.at, k.audit_sequence, k.audit_hash, k.signature
FROM helixflow.meta m LEFT JOIN helixflow.ledger_checkpoint k ON true
"""
_SEALED: Final = "SELECT day, sequence, hash FROM helixflow.ledger_sealed ORDER BY day"
_CHANGED: Final = """
SELECT d.day, d.sequence, d.hash, d.dropped_sequence, d.dropped_hash, d.lost_sequence, d.seal
FROM helixflow.ledger_days d
LEFT JOIN helixflow.ledger_sealed s ON s.day = d.day
WHERE s.day IS NULL OR s.sequence <> d.sequence ORDER BY d.day
"""
_GONE: Final = """
SELECT s.day FROM helixflow.ledger_sealed s
WHERE NOT EXISTS (SELECT FROM helixflow.ledger_days d WHERE d.day = s.day) ORDER BY s.day LIMIT 1
"""
_PUT_SEALED: Final = """
INSERT INTO helixflow.ledger_sealed (day, sequence, hash) SELECT * FROM unnest($1::date[], $2::bigint[], $3::bytea[])
ON CONFLICT (day) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash
"""
_PUT_CHECKPOINT: Final = """
INSERT INTO helixflow.ledger_checkpoint (number, at, audit_sequence, audit_hash, signature) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (singleton) DO UPDATE SET number = excluded.number, at = excluded.at,
    audit_sequence = excluded.audit_sequence, audit_hash = excluded.audit_hash, signature = excluded.signature
"""

logger = log.get("ledger")


async def load(connection: Any) -> Checkpoint:
    """The last checkpoint as the database has it; number 0: there is none yet. Its signature was not checked."""
    row = await connection.fetchrow(_CHECKPOINT)
    days = {day: End(sequence, digest) for day, sequence, digest in await connection.fetch(_SEALED)}
    if row["number"] is None:
        return Checkpoint(row["installation"], 0, datetime.fromtimestamp(0, UTC), days, End(0, b""))
    audit = End(row["audit_sequence"], row["audit_hash"])
    return Checkpoint(row["installation"], row["number"], row["at"], days, audit, row["signature"])


def sound(checkpoint: Checkpoint, keys: SealKeys) -> bool:
    """Whether nobody changed it: none is sound when nothing was ever sealed."""
    return checkpoint.holds(keys.public) if checkpoint.number else not checkpoint.days


async def seal(connection: Any, keys: SealKeys, after: int = 0) -> tuple[Checkpoint, int]:
    """Chains every committed entry with an id above `after`, and signs a checkpoint when anything is new.

    Returns the checkpoint and the largest id. `connection`: in no transaction. Raises ChainError when somebody has
    tampered with what was sealed before, and what the database raises.
    """
    found = audit_chain.CHUNK
    while found == audit_chain.CHUNK:
        async with connection.transaction():
            await connection.execute(_LOCK, LOCK)
            found, after = await audit_chain.extend(connection, keys.audit, after)
    return await seal_days(connection, keys), after


async def seal_days(connection: Any, keys: SealKeys) -> Checkpoint:
    """As `seal`, without new entries of the audit log."""
    async with connection.transaction():
        # Its own statement: one that waits for the lock would not see what was committed meanwhile.
        await connection.execute(_LOCK, LOCK)
        return await _checkpoint(connection, keys)


async def prune_audit(connection: Any, keys: SealKeys, before: datetime) -> int:
    """Removes the entries of the audit log from before a moment. Raises ChainError, and what the database raises."""
    async with connection.transaction():
        await connection.execute(_LOCK, LOCK)
        return await audit_chain.prune(connection, keys.audit, before)


async def _checkpoint(connection: Any, keys: SealKeys) -> Checkpoint:
    last = await load(connection)
    if not sound(last, keys):
        raise ChainError("the last checkpoint was altered")
    if gone := await connection.fetchval(_GONE):
        raise ChainError(f"the day {gone} was removed")
    changed = [_end(keys, last.days, row) for row in await connection.fetch(_CHANGED)]
    head, _ = await audit_chain.load(connection, keys.audit)
    audit = End(head.sequence, head.hash)
    if not changed and (audit.sequence == last.audit.sequence):
        return last
    days = {**last.days, **dict(changed)}
    fresh = replace(last, number=last.number + 1, at=datetime.now(UTC), days=days, audit=audit).signed(keys)
    columns = [(day, end.sequence, end.hash) for day, end in changed]
    if columns:
        await connection.execute(_PUT_SEALED, *(list(column) for column in zip(*columns, strict=True)))
    await connection.execute(
        _PUT_CHECKPOINT, fresh.number, fresh.at, fresh.audit.sequence, fresh.audit.hash, fresh.signature
    )
    return fresh


def _end(keys: SealKeys, known: Mapping[date, End], row: Any) -> tuple[date, End]:
    """The end of a day that has changed. Raises ChainError when it went back, or its seal is wrong."""
    *fields, sealed = row
    head = Head(*fields)
    if not hmac.compare_digest(head.seal(keys.chain), sealed):
        raise ChainError(f"the head of the day {head.day} was altered")
    if head.day in known and head.sequence < known[head.day].sequence:
        raise ChainError(f"rows were removed from the end of the day {head.day}")
    return head.day, End(head.sequence, head.hash)


class Sealer:
    """Seals every few seconds, and keeps an anchor on this machine: a database that is put back contradicts it."""

    def __init__(self, pool: Pool, chain_key: bytes, folder: Path | None = None) -> None:
        """`folder`: where the anchor lies, beside the pepper; None: no anchor is kept."""
        self.keys = SealKeys.of(chain_key)
        self._pool = pool
        self._folder = folder
        self._after = 0
        self._mark = (time.monotonic(), 0)
        self._told = ""
        self._kept: Checkpoint | None = None

    async def run(self) -> None:
        """A round now and then; never returns. What goes wrong is told once, and tried again."""
        while True:
            try:
                await self.round()
                self._told = ""
            except (ChainError, AnchorError) as error:
                self._tell("the ledger was tampered with: nothing is sealed before that is settled", error)
            except (DatabaseError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, PkiError) as error:
                self._tell("the ledger could not be sealed; it is tried again", error)
            await asyncio.sleep(EVERY_S)

    def _tell(self, what: str, error: Exception) -> None:
        if str(error) != self._told:
            self._told = str(error)
            logger.error(what, error=str(error), hint="helixflow audit verify")

    async def round(self, *, whole: bool = False) -> Checkpoint:
        """Seals what is new. `whole`: looks at every entry, not only at those of the last minutes.

        Raises ChainError or AnchorError when something was tampered with, PkiError when the anchor cannot be kept.
        """
        async with self._pool.acquire() as connection:
            await asyncio.to_thread(self._compare, await load(connection))
            checkpoint, last = await seal(connection, self.keys, 0 if whole else self._after)
        began, mark = self._mark
        if time.monotonic() - began > SETTLED_S:
            self._after, self._mark = mark, (time.monotonic(), last)
        elif not mark:
            self._mark = (began, last)
        await asyncio.to_thread(self._keep, checkpoint)
        return checkpoint

    def path(self, installation: str) -> Path | None:
        """Where the anchor of this machine lies."""
        return self._folder and self._folder / f"anchor-{installation}.json"

    def own(self, installation: str) -> Checkpoint | None:
        """The anchor of this machine; one from before the pepper was given up is set aside. Raises AnchorError."""
        path = self.path(installation)
        if path is None or not path.exists():
            return None
        try:
            return seals.parse(path.read_bytes(), self.keys, installation)
        except AnotherKeyError:
            # The database knows this pepper, and nobody who has only the database can write here.
            aside = path.with_suffix(f".{int(path.stat().st_mtime)}.json")
            path.replace(aside)
            logger.warning("the anchor of this machine was signed with a pepper that is lost", set_aside=str(aside))
            return None

    def _compare(self, last: Checkpoint) -> None:
        """Before anything is sealed on top of it: raises AnchorError when the database went back."""
        if self._kept is None:
            self._kept = self.own(last.installation)
        kept = self._kept
        if kept is None or kept.number < last.number:
            return
        if (kept.number, kept.signature) != (last.number, last.signature):
            raise AnchorError(
                f"the database has checkpoint {last.number}, {self.path(last.installation)} another one of number "
                f"{kept.number}: an older state was put back. If you restored a backup, remove that file and restart"
            )

    def _keep(self, checkpoint: Checkpoint) -> None:
        """Replaces the anchor of this machine. Raises PkiError."""
        path = self.path(checkpoint.installation)
        if path is None or not checkpoint.number or (self._kept and self._kept.number >= checkpoint.number):
            return
        with files.locked(path.parent):
            files.write(path, seals.dump(checkpoint, self.keys), private=True, replace=True)
        self._kept = checkpoint
