"""The chain of the audit log: entry n holds HMAC-SHA256(key, hash of n-1 | n | its id | the entry).

Acts run side by side, and waiting for each other at a head would make them one queue. So an entry carries an HMAC of
its own from the moment it is written, and joins the chain a few seconds later, once its transaction is committed.
"""

import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec

from helixflow.ledger.faults import AUDIT, LedgerFault, Report
from helixflow.ledger.seals import End, Witness

CHUNK: Final = 1000
"""Entries that are read at a time."""
LATE: Final = timedelta(minutes=5)
"""An entry that has no place in the chain after this time was never meant to have one."""
KEEP_MIN_DAYS: Final = 30
"""Younger entries are never removed: the database refuses it as well."""
NONCE_BYTES: Final = 16
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_US: Final = timedelta(microseconds=1)

_COLUMNS: Final = """a.id, a.at, a.actor, uuid_send(a.actor_user_id), uuid_send(a.actor_key_id), a.action, a.target,
    uuid_send(a.organisation_id), a.address, a.request_id, a.detail::text, a.mac"""
_UNCHAINED: Final = f"""
SELECT {_COLUMNS} FROM helixflow.audit_log a
WHERE a.id > $1 AND NOT EXISTS (SELECT FROM helixflow.audit_chain c WHERE c.id = a.id) ORDER BY a.id LIMIT $2
"""  # noqa: S608 - constants
_CHAINED: Final = f"""
SELECT c.sequence, c.hash, c.id, {_COLUMNS} FROM helixflow.audit_chain c LEFT JOIN helixflow.audit_log a ON a.id = c.id
ORDER BY c.sequence
"""  # noqa: S608 - constants
_STRAYS: Final = f"""
SELECT {_COLUMNS} FROM helixflow.audit_log a
WHERE NOT EXISTS (SELECT FROM helixflow.audit_chain c WHERE c.id = a.id) ORDER BY a.id
"""  # noqa: S608 - constants
_TWINS: Final = """
SELECT min(id), max(id) FROM helixflow.audit_log WHERE mac IS NOT NULL
GROUP BY mac HAVING count(*) > 1 ORDER BY 1 LIMIT 1
"""
_HEAD: Final = """
SELECT h.sequence, h.hash, h.dropped_sequence, h.dropped_hash, h.lost_sequence, m.audit_legacy, h.seal
FROM helixflow.meta m LEFT JOIN helixflow.audit_head h ON true
"""
# What the last checkpoint says of the chain, and what stands there.
_WITNESS: Final = """
SELECT k.audit_sequence, k.audit_hash, c.hash FROM helixflow.ledger_checkpoint k
LEFT JOIN helixflow.audit_chain c ON c.sequence = k.audit_sequence WHERE k.audit_sequence > 0
"""
_PUT: Final = """
INSERT INTO helixflow.audit_chain (sequence, id, hash) SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bytea[])
"""
_SET_HEAD: Final = """
INSERT INTO helixflow.audit_head (sequence, hash, dropped_sequence, dropped_hash, lost_sequence, seal)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (singleton) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash,
    dropped_sequence = excluded.dropped_sequence, dropped_hash = excluded.dropped_hash,
    lost_sequence = excluded.lost_sequence, seal = excluded.seal
"""
# The last entry before the first one that is kept: the chain is cut in one place.
_CUT: Final = """
SELECT coalesce(
    (SELECT min(c.sequence) FROM helixflow.audit_log a JOIN helixflow.audit_chain c ON c.id = a.id WHERE a.at >= $1),
    (SELECT max(sequence) + 1 FROM helixflow.audit_chain)
) - 1
"""


class ChainError(Exception):
    """The chain cannot be continued: somebody was at it. `audit verify` says more."""


@dataclass(slots=True)
class Head:
    """The end of the chain, and where retention has cut it off."""

    sequence: int = 0
    hash: bytes = b""
    dropped_sequence: int = 0
    dropped_hash: bytes = b""
    lost_sequence: int = 0
    """Entries up to this place were chained with a pepper that is lost."""
    legacy: int = 0
    """Entries up to this id were written before entries had an HMAC."""

    def seal(self, key: bytes) -> bytes:
        """What shows that nobody else changed it."""
        lost = f"lost {self.lost_sequence} " if self.lost_sequence else ""
        numbers = f"{lost}head {self.sequence} {self.dropped_sequence} {self.legacy} {len(self.hash)} "
        return hmac.digest(key, numbers.encode() + self.hash + self.dropped_hash, "sha256")


class Entry(NamedTuple):
    """An entry as it is chained; ids are the 16 bytes of UUIDs."""

    at: datetime
    actor: str
    user: bytes | None
    key: bytes | None
    action: str
    target: str
    organisation: bytes | None
    address: str
    request_id: str
    detail: str
    """JSON."""

    def encode(self) -> bytes:
        """The bytes of the entry: the same ones whatever spaces and order the database gives its JSON."""
        plain = json.dumps(json.loads(self.detail), sort_keys=True, separators=(",", ":"))
        return msgspec.msgpack.encode([(self.at - _EPOCH) // _US, *self[1:-1], plain])


def mac(key: bytes, entry: bytes, nonce: bytes | None = None) -> bytes:
    """What an entry carries: 16 random bytes, so that no entry can be written twice, and an HMAC over both."""
    nonce = secrets.token_bytes(NONCE_BYTES) if nonce is None else nonce
    return nonce + hmac.digest(key, b"entry " + nonce + entry, "sha256")


def link(key: bytes, previous: bytes, sequence: int, number: int, entry: bytes) -> bytes:
    """The hash of entry `number` (its id) behind `previous`."""
    return hmac.digest(key, previous + sequence.to_bytes(8) + number.to_bytes(8, signed=True) + entry, "sha256")


def start(key: bytes) -> bytes:
    """What the first entry is chained to."""
    return hmac.digest(key, b"start", "sha256")


async def load(connection: Any, key: bytes) -> tuple[Head, bool]:
    """The head, and whether its seal is right."""
    row = await connection.fetchrow(_HEAD)
    if row["seal"] is None:
        return Head(hash=start(key), legacy=row["audit_legacy"]), True
    *fields, seal = row
    head = Head(*fields)
    return head, hmac.compare_digest(seal, head.seal(key))


async def save(connection: Any, key: bytes, head: Head) -> None:
    """Writes the head under a new seal."""
    await connection.execute(
        _SET_HEAD,
        head.sequence,
        head.hash,
        head.dropped_sequence,
        head.dropped_hash,
        head.lost_sequence,
        head.seal(key),
    )


async def extend(connection: Any, key: bytes, after: int = 0) -> tuple[int, int]:
    """Chains up to CHUNK entries with an id above `after`, in the caller's transaction, which must hold the lock.

    Returns how many there were and the largest id. Raises ChainError.
    """
    head, sealed = await load(connection, key)
    last = await connection.fetchrow("SELECT sequence, hash FROM helixflow.audit_chain ORDER BY sequence DESC LIMIT 1")
    due = (last["sequence"], last["hash"]) if last else (head.dropped_sequence, head.dropped_hash or start(key))
    if not sealed or due != (head.sequence, head.hash):
        raise ChainError("the head of the audit log's chain was altered, or its last entries were removed")
    if witness := await connection.fetchrow(_WITNESS):
        known, due_hash, found = witness
        if head.sequence < known or (found != due_hash and head.dropped_sequence < known):
            raise ChainError("entries that the last checkpoint names were removed from the audit log")
    rows = await connection.fetch(_UNCHAINED, after, CHUNK)
    if not rows:
        return 0, after
    links = []
    for number, *fields, _ in rows:
        head.sequence += 1
        head.hash = link(key, head.hash, head.sequence, number, Entry(*fields).encode())
        links.append((head.sequence, number, head.hash))
    await connection.execute(_PUT, *(list(column) for column in zip(*links, strict=True)))
    await save(connection, key, head)
    return len(rows), rows[-1][0]


async def prune(connection: Any, key: bytes, before: datetime) -> int:
    """Removes the entries from before a moment, in the caller's transaction, which must hold the lock.

    The head keeps where the chain was cut, under its seal. Returns how many went. Raises ChainError.
    """
    head, sealed = await load(connection, key)
    if not sealed:
        raise ChainError("the head of the audit log's chain was altered")
    cut = await connection.fetchval(_CUT, before)
    if cut is None or cut <= head.dropped_sequence:
        return 0
    head.dropped_hash = await connection.fetchval("SELECT hash FROM helixflow.audit_chain WHERE sequence = $1", cut)
    head.dropped_sequence = cut
    await save(connection, key, head)
    return int(await connection.fetchval("SELECT helixflow.audit_prune($1)", cut))


async def verify(connection: Any, key: bytes, report: Report, witnesses: Sequence[Witness]) -> None:
    """Recomputes the chain; adds what it finds. `connection`: in a transaction that sees one moment."""
    head, sealed = await load(connection, key)
    check = _Check(key, head, witnesses)
    cursor = await connection.cursor(_CHAINED)
    while rows := await cursor.fetch(CHUNK):
        if not check.rows(rows):
            break
    report.entries = check.seen
    if head.dropped_sequence:
        report.dropped.append(f"audit log: entries 1 to {head.dropped_sequence}")
    if head.lost_sequence > head.dropped_sequence:
        report.lost.append(f"audit log: entries {head.dropped_sequence + 1} to {head.lost_sequence}")
    if not check.fault:
        check.end(sealed=sealed)
    if not check.fault:
        await _strays(connection, check)
    if check.fault:
        report.faults.append(check.fault)


async def _strays(connection: Any, check: "_Check") -> None:
    now = await connection.fetchval("SELECT now()")
    cursor = await connection.cursor(_STRAYS)
    while rows := await cursor.fetch(CHUNK):
        for number, *fields, carried in rows:
            if now - fields[0] > LATE:
                check.wrong(0, number, fields[0], "the entry was added: it has no place in the chain")
            else:
                check.entry(0, number, fields, carried)
            if check.fault:
                return
    if twins := await connection.fetchrow(_TWINS):
        check.wrong(0, twins[1], now, f"the entry is a copy of entry {twins[0]}")


class _Check:
    """The chain's entries in order."""

    def __init__(self, key: bytes, head: Head, witnesses: Sequence[Witness]) -> None:
        self._key = key
        self._head = head
        self._next = head.dropped_sequence + 1
        self._previous = head.dropped_hash if head.dropped_sequence else start(key)
        self._witnesses = sorted(((each.checkpoint.audit, each) for each in witnesses), key=lambda one: one[0].sequence)
        self._day = ""
        self.seen = 0
        self.fault: LedgerFault | None = None
        self._witnessed(End(head.dropped_sequence, self._previous))

    def wrong(self, sequence: int, number: int | None, at: datetime | None, problem: str) -> None:
        """Notes a fault; `number`: id of the entry."""
        if at is not None:
            self._day = at.astimezone(UTC).date().isoformat()
        self.fault = LedgerFault(self._day, sequence, "" if number is None else str(number), problem, AUDIT)

    def rows(self, rows: Sequence[Any]) -> bool:
        """Checks the next entries; False at the first that is wrong."""
        for sequence, stored, number, found, *fields, carried in rows:
            if sequence != self._next:
                problem = "was removed" if sequence > self._next else "was added: its number is taken or out of range"
                self.wrong(self._next, None, None, f"the entry {problem}")
            elif found is None:
                self.wrong(sequence, number, None, "the entry was removed")
            elif sequence <= self._head.lost_sequence:
                pass  # its key is lost: that it is there is all that can be said
            elif link(self._key, self._previous, sequence, number, Entry(*fields).encode()) != stored:
                self.wrong(sequence, number, fields[0], "the entry was altered, or another one stood here")
            else:
                self.entry(sequence, number, fields, carried)
                self._witnessed(End(sequence, stored))
            if self.fault:
                return False
            self.seen += 1
            self._previous = stored
            self._next += 1
            self._day = fields[0].date().isoformat()
        return True

    def entry(self, sequence: int, number: int, fields: Sequence[Any], carried: bytes | None) -> None:
        """Checks the HMAC that an entry carries."""
        if carried is None:
            if number > self._head.legacy:
                self.wrong(
                    sequence, number, fields[0], "the entry has no HMAC: an older release or somebody else wrote it"
                )
        elif mac(self._key, Entry(*fields).encode(), carried[:NONCE_BYTES]) != carried:
            self.wrong(sequence, number, fields[0], "the entry was altered, or somebody else wrote it")

    def _witnessed(self, end: End) -> None:
        """Compares with what is known of this place."""
        while self._witnesses and self._witnesses[0][0].sequence <= end.sequence:
            known, witness = self._witnesses.pop(0)
            if known.sequence == end.sequence and known.sequence and known.hash != end.hash:
                self.wrong(end.sequence, None, None, f"history was rewritten: {witness} says otherwise")

    def end(self, *, sealed: bool) -> None:
        """After the last entry."""
        if self._next <= self._head.sequence:
            self.wrong(self._next, None, None, "the entry was removed")
        elif self._witnesses:
            known, witness = self._witnesses[-1]
            self.wrong(self._next, None, None, f"entries were removed from the end: {witness} has {known.sequence}")
        elif not sealed or (self._next - 1, self._previous) != (self._head.sequence, self._head.hash):
            self.wrong(self._head.sequence, None, None, "the head of the chain was altered")
