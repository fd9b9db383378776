"""API keys: made, listed, changed, rotated, revoked. The secret is returned once and never stored.

What a key makes has it for a parent: it ends with it, and never may more than it (`principals` sees to that at every
use).
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg

from helixflow.auth import audit, certificates, fields, keys, organisations, roles, users
from helixflow.auth.actors import Actor, permit
from helixflow.auth.organisations import Page, page_of
from helixflow.auth.pepper import Pepper
from helixflow.auth.records import KEY, Key
from helixflow.auth.roles import Ceiling, KeyFacts, Role
from helixflow.core_rs import Conflict, InvalidRequest, NotFound
from helixflow.limits import settings
from helixflow.refusals import refusal

MOST_KEYS = 1000
"""Keys of one user that are not revoked: no page of a list should be lost in them."""

OVERLAP_S = 86_400
MOST_OVERLAP_S = 90 * 86_400


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a new key is to be. `expires_at`: seconds since the epoch, 0: never; empty lists: everything.

    `admin`: it administers, up to the role of its holder; else it is for inference only. `certificate`: one that
    stands for it, empty: none.
    """

    name: str
    expires_at: int = 0
    models: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()
    admin: bool = False
    certificate: str = ""


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to change of a key; None: nothing."""

    name: str | None = None
    expires_at: int | None = None
    models: tuple[str, ...] | None = None
    endpoints: tuple[str, ...] | None = None
    admin: bool | None = None
    certificate: str | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """A new key and its secret."""

    key: Key
    secret: str = field(repr=False)


async def create(connection: Any, actor: Actor, pepper: Pepper, user: str, wanted: Wanted) -> Created:
    """A key of the named user; empty: of the actor.

    Raises PermissionDenied for somebody else's, unless an admin's, and for more than the actor's own key may; Conflict
    when there are too many.
    """
    if not user and actor.user_id is None:
        raise refusal(InvalidRequest, "user: name whose key this is to be", "user")
    owner = await users.find(connection, actor, user or str(actor.user_id))
    name = fields.text(wanted.name, "name")
    ends = wanted.expires_at or actor.power.expires_at
    expires = fields.future(ends, "expires_at", datetime.now(UTC))
    models, endpoints = fields.items(wanted.models, "models"), fields.paths(wanted.endpoints, "endpoints")
    ceiling = Ceiling.of(models, endpoints, ends, administers=wanted.admin)
    holder = Role[owner["role"].upper()]
    permit(roles.makes_key(actor.power, holder, ceiling, own=actor.owns(owner["id"])), "user")
    if wanted.admin and (models or endpoints):
        raise bound()
    # The lock makes counting and adding one step, and keeps a removed user from getting one more key.
    alive = await connection.fetchrow(
        "SELECT FROM users WHERE id = $1 AND deleted_at IS NULL FOR NO KEY UPDATE", owner["id"]
    )
    if alive is None:
        raise refusal(NotFound, f"there is no user {user!r}", "user")
    count = await connection.fetchval(
        "SELECT count(*) FROM api_keys WHERE user_id = $1 AND revoked_at IS NULL", owner["id"]
    )
    if count >= MOST_KEYS:
        raise refusal(Conflict, f"{owner['email']!r} has {MOST_KEYS} keys: revoke some first", "user")
    secret = keys.make()
    values = {
        "user_id": owner["id"],
        "name": name,
        "models": models,
        "endpoints": endpoints,
        "expires_at": expires,
        "role": holder.word if wanted.admin else None,
        "parent_id": actor.key_id,
        **(_certificate(actor, pepper, wanted.certificate) if wanted.certificate else {"certificate": ""}),
    }
    with _one_key_each():
        made = await _insert(connection, pepper, secret, values)
    detail = {"key": made, "user": owner["email"], "expires_at": expires, "models": models, "endpoints": endpoints}
    detail |= {"role": values["role"], "parent": actor.key_id, "certificate": values["certificate"]}
    await audit.record(connection, actor, "key.create", name, owner["organisation_id"], detail)
    return Created(await by_id(connection, made), secret)


def bound() -> InvalidRequest:
    """The refusal of a key that is to administer and is bound."""
    message = "admin: a key that is bound to models, endpoints or limits administers nothing; leave one of them out"
    return refusal(InvalidRequest, message, "admin")


async def listing(connection: Any, actor: Actor, organisation: str, limit: int, after: str) -> Page:
    """Keys of an organisation, of a member those of their own, for the operator of all; oldest first.

    By a key that does not administer: that key.
    """
    rows, place = fields.page(limit), fields.place(after)
    found = await connection.fetch(
        f"{KEY} WHERE ($1::uuid IS NULL OR u.organisation_id = $1) AND ($2::uuid IS NULL OR k.user_id = $2) AND "
        "($6::uuid IS NULL OR k.id = $6) AND "
        "($3::bigint IS NULL OR (k.created_at, k.id) > (timestamptz 'epoch' + $3 * interval '1 microsecond', $4)) "
        "ORDER BY k.created_at, k.id LIMIT $5",
        await organisations.scope(connection, actor, organisation),
        own_only(actor),
        *(place or (None, None)),
        rows + 1,
        actor.only_key,
    )
    return page_of(found, rows, Key.of)


async def update(connection: Any, actor: Actor, pepper: Pepper, key: str, changes: Changes) -> Key:
    """Changes what is given.

    Raises Conflict for a revoked key, PermissionDenied for what widens a key beyond the one that is acted by, and
    InvalidRequest for one that is to administer and is bound.
    """
    row, facts = await target(connection, actor, key)
    _alive(row)
    before = await connection.fetchrow(
        "SELECT name, expires_at, models, endpoints, role, certificate, certificate_digest FROM api_keys WHERE id = $1",
        row["id"],
    )
    wanted = _wanted(row, changes)
    if changes.certificate is not None:
        wanted |= _certificate(actor, pepper, changes.certificate)
    after = {**before, **wanted}
    permit(roles.changes_key(actor.power, facts, _ceiling(before), _ceiling(after)))
    if changes.admin:
        await _may_administer(connection, row, after)
    detail = {name: {"from": before[name], "to": value} for name, value in wanted.items() if before[name] != value}
    if detail:
        columns = ", ".join(f"{column} = ${number}" for number, column in enumerate(detail, 2))
        values = [wanted[column] for column in detail]
        with _one_key_each():
            await connection.execute(f"UPDATE api_keys SET {columns} WHERE id = $1", row["id"], *values)  # noqa: S608 - our own names
        detail.pop("certificate_digest", None)
        detail["key"] = row["id"]
        await audit.record(connection, actor, "key.update", row["name"], row["organisation_id"], detail)
    return await by_id(connection, row["id"])


def _wanted(row: Any, changes: Changes) -> dict[str, Any]:
    """Columns and their new values. Raises InvalidRequest."""
    wanted: dict[str, Any] = {}
    if changes.name is not None:
        wanted["name"] = fields.text(changes.name, "name")
    if changes.expires_at is not None:
        wanted["expires_at"] = fields.future(changes.expires_at, "expires_at", datetime.now(UTC))
    if changes.models is not None:
        wanted["models"] = fields.items(changes.models, "models")
    if changes.endpoints is not None:
        wanted["endpoints"] = fields.paths(changes.endpoints, "endpoints")
    if changes.admin is not None:
        wanted["role"] = row["role"] if changes.admin else None
    return wanted


def _ceiling(values: Any) -> Ceiling:
    ends = values["expires_at"]
    return Ceiling.of(
        values["models"],
        values["endpoints"],
        int(ends.timestamp()) if ends else 0,
        administers=values["role"] is not None,
    )


async def _may_administer(connection: Any, row: Any, after: Any) -> None:
    if row["parent_id"]:
        raise refusal(InvalidRequest, "admin: this key was made by another one, and may not administer", "admin")
    limited = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM limits WHERE subject = 'key:' || $1::uuid::text)", row["id"]
    )
    if after["models"] or after["endpoints"] or limited:
        raise bound()


async def rotate(connection: Any, actor: Actor, pepper: Pepper, key: str, overlap_s: int | None) -> Created:
    """A new key in place of an old one, which goes on for `overlap_s` seconds (None: a day).

    The new one has everything of the old one: its limits, its parent, and the keys that it has made. By a person's or
    the operator's act it lives as long as the old one was meant to, by a key's only as long as the old one. Raises
    Conflict when the old one is revoked, has expired or was rotated before.
    """
    overlap = OVERLAP_S if overlap_s is None else overlap_s
    if overlap > MOST_OVERLAP_S:
        raise refusal(InvalidRequest, f"overlap_s must be at most {MOST_OVERLAP_S}", "overlap_s")
    row, facts = await target(connection, actor, key)
    permit(roles.replaces_key(actor.power, facts))
    _alive(row)
    old = await connection.fetchrow(
        "SELECT *, expires_at <= now() AS expired, now() + (expires_at - created_at) AS renewed "
        "FROM api_keys WHERE id = $1",
        row["id"],
    )
    if old["expired"] or old["replaced_by"] or old["development"]:
        reason = "has expired" if old["expired"] else "was rotated before" if old["replaced_by"] else "is a fixed one"
        raise refusal(Conflict, f"the key {row['name']!r} {reason}", "key")
    secret = keys.make()
    values = {name: old[name] for name in ("user_id", "name", "models", "endpoints", "role", "parent_id")}
    values["expires_at"] = old["expires_at"] if actor.power.by_key else old["renewed"]
    # A certificate goes over at once: it is the same holder.
    values |= {name: old[name] for name in ("certificate", "certificate_digest")}
    await connection.execute("UPDATE api_keys SET certificate = '', certificate_digest = NULL WHERE id = $1", row["id"])
    made = await _insert(connection, pepper, secret, values)
    await connection.execute(
        "UPDATE api_keys SET replaced_by = $2, revoked_at = CASE WHEN $3::float8 = 0 THEN now() END, "
        "expires_at = least(expires_at, now() + make_interval(secs => $3)) WHERE id = $1",
        row["id"],
        made,
        float(overlap),
    )
    # What the old one has made goes on with the new one.
    await connection.execute("UPDATE api_keys SET parent_id = $2 WHERE parent_id = $1", row["id"], made)
    await settings.copy_limits(connection, f"key:{row['id']}", f"key:{made}")
    detail = {"key": row["id"], "replaced_by": made, "overlap_s": overlap}
    await audit.record(connection, actor, "key.rotate", row["name"], row["organisation_id"], detail)
    return Created(await by_id(connection, made), secret)


async def revoke(connection: Any, actor: Actor, key: str) -> Key:
    """Ends a key and those that it has made, at once and for good; again for one that is revoked changes nothing."""
    row, _ = await target(connection, actor, key)
    if not row["revoked"]:
        ended = await connection.fetch(
            "UPDATE api_keys SET revoked_at = now() WHERE (id = $1 OR parent_id = $1) AND revoked_at IS NULL "
            "RETURNING id",
            row["id"],
        )
        detail = {"key": row["id"], "user": row["user_name"]}
        if children := [found["id"] for found in ended if found["id"] != row["id"]]:
            detail["children"] = children
        await audit.record(connection, actor, "key.revoke", row["name"], row["organisation_id"], detail)
    return await by_id(connection, row["id"])


async def find(connection: Any, actor: Actor, key: str, param: str = "key") -> Any:
    """The row of a key by UUID, within reach of the actor. Raises NotFound."""
    known = fields.uuid(key, param)
    row = await connection.fetchrow(
        f"{KEY} WHERE k.id = $1 AND ($2::uuid IS NULL OR u.organisation_id = $2) AND ($3::uuid IS NULL OR u.id = $3) "
        "AND ($4::uuid IS NULL OR k.id = $4)",
        known,
        actor.organisation_id,
        own_only(actor),
        actor.only_key,
    )
    if row is None:
        raise refusal(NotFound, f"there is no key {key}", param)
    return row


async def target(connection: Any, actor: Actor, key: str, param: str = "key") -> tuple[Any, KeyFacts]:
    """As `find`, locked, for a change that the actor may make; and the key as the actor stands to it."""
    known = fields.uuid(key, param)
    await connection.execute("SELECT FROM api_keys WHERE id = $1 FOR NO KEY UPDATE", known)
    row = await find(connection, actor, key, param)
    facts = actor.facts(
        row["id"], row["parent_id"], row["user_id"], row["role"], administers=row["key_role"] is not None
    )
    permit(roles.touches_key(actor.power, facts), param)
    return row, facts


async def by_id(connection: Any, key_id: UUID) -> Key:
    """One key that is known to exist."""
    return Key.of(await connection.fetchrow(f"{KEY} WHERE k.id = $1", key_id))


def own_only(actor: Actor) -> UUID | None:
    """The user whose keys and usage alone the actor may see; None: those of the whole organisation.

    Members work for themselves; viewers are there to look.
    """
    return actor.user_id if actor.role is Role.MEMBER else None


def _certificate(actor: Actor, pepper: Pepper, name: str) -> dict[str, Any]:
    """The columns of a certificate. Raises InvalidRequest, and PermissionDenied unless the actor owns the installation.

    Whoever claims another's certificate would be sent what its holder asks.
    """
    if not actor.installation:
        permit("certificates are bound by owners of the first organisation, and by `helixflow key`", "certificate")
    if not name:
        return {"certificate": "", "certificate_digest": None}
    name = certificates.named(name)
    digest = pepper.key_digest(hashlib.sha256(certificates.presented(name)).digest())
    return {"certificate": name, "certificate_digest": digest}


@contextlib.contextmanager
def _one_key_each() -> Iterator[None]:
    """Raises Conflict when another key has the certificate."""
    try:
        yield
    except asyncpg.UniqueViolationError:
        raise refusal(Conflict, "another key has this certificate", "certificate") from None


def _alive(row: Any) -> None:
    if row["revoked"]:
        raise refusal(Conflict, f"the key {row['name']!r} is revoked, which is for good: make a new one", "key")


async def _insert(connection: Any, pepper: Pepper, secret: str, values: Mapping[str, Any]) -> UUID:
    """`values`: by the names of columns."""
    row = {
        **values,
        "digest": pepper.key_digest(keys.presented(secret.encode())),
        "prefix": keys.shown(secret),
    }
    places = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    made: UUID = await connection.fetchval(
        f"INSERT INTO api_keys ({', '.join(row)}) VALUES ({places}) RETURNING id",  # noqa: S608 - our own names
        *row.values(),
    )
    return made
