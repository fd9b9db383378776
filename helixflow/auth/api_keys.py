"""API keys: made, listed, changed, rotated, revoked. The secret is returned once and never stored."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from helixflow.auth import audit, fields, keys, organisations, users
from helixflow.auth.actors import Actor
from helixflow.auth.organisations import Page, page_of
from helixflow.auth.pepper import Pepper
from helixflow.auth.records import KEY, Key
from helixflow.auth.roles import Role
from helixflow.core_rs import Conflict, InvalidRequest, NotFound, PermissionDenied
from helixflow.refusals import refusal

MOST_KEYS = 1000
"""Keys of one user that are not revoked: no page of a list should be lost in them."""

OVERLAP_S = 86_400
MOST_OVERLAP_S = 90 * 86_400


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a new key is to be. `expires_at`: seconds since the epoch, 0: never; empty lists: everything."""

    name: str
    expires_at: int = 0
    models: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to change of a key; None: nothing."""

    name: str | None = None
    expires_at: int | None = None
    models: tuple[str, ...] | None = None
    endpoints: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """A new key and its secret."""

    key: Key
    secret: str


async def create(connection: Any, actor: Actor, pepper: Pepper, user: str, wanted: Wanted) -> Created:
    """A key of the named user; empty: of the actor.

    Raises PermissionDenied for somebody else's, unless an admin's, and Conflict when there are too many.
    """
    actor.allow_keys()
    if not user and actor.user_id is None:
        raise refusal(InvalidRequest, "user: name whose key this is to be", "user")
    owner = await users.find(connection, actor, user or str(actor.user_id))
    _allow(actor, owner["id"], owner["role"], "user")
    name = fields.text(wanted.name, "name")
    expires = fields.future(wanted.expires_at, "expires_at", datetime.now(UTC))
    models, endpoints = fields.items(wanted.models, "models"), fields.paths(wanted.endpoints, "endpoints")
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
    made = await _insert(connection, pepper, secret, owner["id"], name, models, endpoints, expires)
    detail = {"key": made, "user": owner["email"], "expires_at": expires, "models": models, "endpoints": endpoints}
    await audit.record(connection, actor, "key.create", name, owner["organisation_id"], detail)
    return Created(await by_id(connection, made), secret)


async def listing(connection: Any, actor: Actor, organisation: str, limit: int, after: str) -> Page:
    """Keys of an organisation, of a member those of their own, for the operator of all; oldest first."""
    rows, place = fields.page(limit), fields.place(after)
    found = await connection.fetch(
        f"{KEY} WHERE ($1::uuid IS NULL OR u.organisation_id = $1) AND ($2::uuid IS NULL OR k.user_id = $2) AND "
        "($3::bigint IS NULL OR (k.created_at, k.id) > (timestamptz 'epoch' + $3 * interval '1 microsecond', $4)) "
        "ORDER BY k.created_at, k.id LIMIT $5",
        await organisations.scope(connection, actor, organisation),
        own_only(actor),
        *(place or (None, None)),
        rows + 1,
    )
    return page_of(found, rows, Key.of)


async def update(connection: Any, actor: Actor, key: str, changes: Changes) -> Key:
    """Changes what is given. Raises Conflict for a revoked key."""
    row = await target(connection, actor, key)
    _alive(row)
    wanted: dict[str, Any] = {}
    if changes.name is not None:
        wanted["name"] = fields.text(changes.name, "name")
    if changes.expires_at is not None:
        wanted["expires_at"] = fields.future(changes.expires_at, "expires_at", datetime.now(UTC))
    if changes.models is not None:
        wanted["models"] = fields.items(changes.models, "models")
    if changes.endpoints is not None:
        wanted["endpoints"] = fields.paths(changes.endpoints, "endpoints")
    before = await connection.fetchrow(
        "SELECT name, expires_at, models, endpoints FROM api_keys WHERE id = $1", row["id"]
    )
    detail = {name: {"from": before[name], "to": value} for name, value in wanted.items() if before[name] != value}
    if detail:
        columns = ", ".join(f"{column} = ${number}" for number, column in enumerate(detail, 2))
        values = [wanted[column] for column in detail]
        await connection.execute(f"UPDATE api_keys SET {columns} WHERE id = $1", row["id"], *values)  # noqa: S608 - our own names
        detail["key"] = row["id"]
        await audit.record(connection, actor, "key.update", row["name"], row["organisation_id"], detail)
    return await by_id(connection, row["id"])


async def rotate(connection: Any, actor: Actor, pepper: Pepper, key: str, overlap_s: int | None) -> Created:
    """A new key in place of an old one, which goes on for `overlap_s` seconds (None: a day).

    The new one has everything of the old one, its limits too, and lives as long as that was meant to. Raises Conflict
    when the old one is revoked, has expired or was rotated before.
    """
    overlap = OVERLAP_S if overlap_s is None else overlap_s
    if overlap > MOST_OVERLAP_S:
        raise refusal(InvalidRequest, f"overlap_s must be at most {MOST_OVERLAP_S}", "overlap_s")
    row = await target(connection, actor, key)
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
    made = await _insert(
        connection, pepper, secret, old["user_id"], old["name"], old["models"], old["endpoints"], old["renewed"]
    )
    await connection.execute(
        "UPDATE api_keys SET replaced_by = $2, revoked_at = CASE WHEN $3::float8 = 0 THEN now() END, "
        "expires_at = least(expires_at, now() + make_interval(secs => $3)) WHERE id = $1",
        row["id"],
        made,
        float(overlap),
    )
    detail = {"key": row["id"], "replaced_by": made, "overlap_s": overlap}
    await audit.record(connection, actor, "key.rotate", row["name"], row["organisation_id"], detail)
    return Created(await by_id(connection, made), secret)


async def revoke(connection: Any, actor: Actor, key: str) -> Key:
    """Ends a key at once and for good; again for one that is revoked changes nothing."""
    row = await target(connection, actor, key)
    if not row["revoked"]:
        await connection.execute("UPDATE api_keys SET revoked_at = now() WHERE id = $1", row["id"])
        detail = {"key": row["id"], "user": row["user_name"]}
        await audit.record(connection, actor, "key.revoke", row["name"], row["organisation_id"], detail)
    return await by_id(connection, row["id"])


async def find(connection: Any, actor: Actor, key: str, param: str = "key") -> Any:
    """The row of a key by UUID, within reach of the actor. Raises NotFound."""
    known = fields.uuid(key, param)
    row = await connection.fetchrow(
        f"{KEY} WHERE k.id = $1 AND ($2::uuid IS NULL OR u.organisation_id = $2) AND ($3::uuid IS NULL OR u.id = $3)",
        known,
        actor.organisation_id,
        own_only(actor),
    )
    if row is None:
        raise refusal(NotFound, f"there is no key {key}", param)
    return row


async def target(connection: Any, actor: Actor, key: str) -> Any:
    """As `find`, locked, for a change that the actor may make."""
    actor.allow_keys()
    known = fields.uuid(key, "key")
    await connection.execute("SELECT FROM api_keys WHERE id = $1 FOR NO KEY UPDATE", known)
    row = await find(connection, actor, key)
    _allow(actor, row["user_id"], row["role"], "key")
    return row


async def by_id(connection: Any, key_id: UUID) -> Key:
    """One key that is known to exist."""
    return Key.of(await connection.fetchrow(f"{KEY} WHERE k.id = $1", key_id))


def own_only(actor: Actor) -> UUID | None:
    """The user whose keys and usage alone the actor may see; None: those of the whole organisation.

    Members work for themselves; viewers are there to look.
    """
    return actor.user_id if actor.role is Role.MEMBER else None


def _allow(actor: Actor, user_id: UUID, role: str, param: str) -> None:
    if actor.operator or actor.owns(user_id):
        return
    if actor.role < Role.ADMIN:
        raise refusal(PermissionDenied, "you may manage your own keys only", param)
    actor.allow_role(Role[role.upper()], param)


def _alive(row: Any) -> None:
    if row["revoked"]:
        raise refusal(Conflict, f"the key {row['name']!r} is revoked, which is for good: make a new one", "key")


async def _insert(
    connection: Any,
    pepper: Pepper,
    secret: str,
    user_id: UUID,
    name: str,
    models: list[str],
    endpoints: list[str],
    expires: datetime | None,
) -> UUID:
    made: UUID = await connection.fetchval(
        "INSERT INTO api_keys (user_id, digest, prefix, name, models, endpoints, expires_at) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
        user_id,
        pepper.key_digest(keys.presented(secret.encode())),
        keys.shown(secret),
        name,
        models,
        endpoints,
        expires,
    )
    return made
