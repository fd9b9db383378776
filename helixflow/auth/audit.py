"""The audit log: every administrative act, and every login that failed, in the transaction of the act itself.

An entry carries an HMAC and joins the chain of `ledger.audit_chain` once it is committed: nobody waits for a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson

from helixflow.auth.actors import Actor
from helixflow.auth.fields import day_start
from helixflow.ledger import audit_chain

LONGEST_TARGET = 300
OWNER_OF_ALL = "an owner of the installation"
"""How another organisation's people are called in an organisation's log."""

_key: bytes | None = None


def seal_with(key: bytes) -> None:
    """From now on entries of this process carry an HMAC under this key: a process has one pepper."""
    global _key  # noqa: PLW0603 - as many functions write entries as there are acts, and none of them knows secrets
    _key = key


@dataclass(frozen=True, slots=True)
class Entry:
    """One row as AdminService shows it. `at`: seconds since the epoch; `detail`: JSON text."""

    id: str
    at: int
    actor: str
    action: str
    target: str
    organisation_id: str
    address: str
    request_id: str
    detail: str
    actor_user_id: str
    actor_key_id: str


async def record(
    connection: Any,
    actor: Actor,
    action: str,
    target: str,
    organisation_id: UUID | None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Adds a row. `action`: thing and verb (`key.create`); `detail`: what changed, never a secret.

    May be called anywhere in a transaction, side by side with others: it takes no lock.
    """
    at = datetime.now(UTC)
    name, thing = clean(actor.name), clean(target)[:LONGEST_TARGET]
    text = clean(orjson.dumps(detail or {}, default=str).decode().replace("\\u0000", "\\ufffd"))
    ids = [each.bytes if each else None for each in (actor.user_id, actor.key_id, organisation_id)]
    entry = audit_chain.Entry(at, name, ids[0], ids[1], action, thing, ids[2], actor.address, actor.request_id, text)
    await connection.execute(
        "INSERT INTO audit_log (at, actor, actor_user_id, actor_key_id, action, target, organisation_id, address, "
        "request_id, detail, mac) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::jsonb, $11)",
        at,
        name,
        actor.user_id,
        actor.key_id,
        action,
        thing,
        organisation_id,
        actor.address,
        actor.request_id,
        text,
        audit_chain.mac(_key, entry.encode()) if _key else None,
    )


def clean(text: str) -> str:
    """Text that every reader can take: on one line, without control characters and halves of surrogate pairs."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


async def entries(
    connection: Any,
    organisation_id: UUID | None,
    first: date | None,
    last: date | None,
    limit: int,
    before: int | None,
    *,
    own_names_only: bool = False,
) -> list[Entry]:
    """Rows of an organisation (None: of all) from day `first` to `last`, newest first, with an id below `before`.

    `own_names_only`: what owners of the installation have done there is shown, who they are is not.
    """
    rows = await connection.fetch(
        "SELECT a.id, extract(epoch FROM a.at)::bigint AS at, a.actor, a.action, a.target, a.organisation_id, "
        "a.address, a.request_id, a.detail, a.actor_user_id, a.actor_key_id, "
        "$6 AND coalesce(u.organisation_id <> a.organisation_id, false) AS foreign_actor "
        "FROM audit_log a LEFT JOIN users u ON u.id = a.actor_user_id "
        "WHERE ($1::uuid IS NULL OR a.organisation_id = $1) "
        "AND ($2::timestamptz IS NULL OR a.at >= $2) AND ($3::timestamptz IS NULL OR a.at < $3) "
        "AND ($4::bigint IS NULL OR a.id < $4) ORDER BY a.id DESC LIMIT $5",
        organisation_id,
        day_start(first) if first else None,
        day_start(last + timedelta(days=1)) if last else None,
        before,
        limit,
        own_names_only,
    )
    return [_entry(row) for row in rows]


def _entry(row: Any) -> Entry:
    foreign = row["foreign_actor"]
    return Entry(
        id=str(row["id"]),
        at=row["at"],
        actor=OWNER_OF_ALL if foreign else row["actor"],
        action=row["action"],
        target=row["target"],
        organisation_id=str(row["organisation_id"] or ""),
        address="" if foreign else row["address"],
        request_id=row["request_id"],
        detail=row["detail"],
        actor_user_id="" if foreign else str(row["actor_user_id"] or ""),
        actor_key_id="" if foreign else str(row["actor_key_id"] or ""),
    )
