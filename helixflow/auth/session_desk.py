"""Sessions listed and ended: one's own, and of others for who may."""

from dataclasses import dataclass
from typing import Any

from helixflow.auth import audit, factors, fields, roles, sessions, users
from helixflow.auth.actors import Actor, permit
from helixflow.auth.organisations import Page, page_of
from helixflow.auth.records import User
from helixflow.auth.roles import Role
from helixflow.core_rs import NotFound, PermissionDenied
from helixflow.refusals import refusal

_SESSION = """
SELECT s.id, s.user_id, u.email, u.organisation_id, s.method, s.address,
    floor(extract(epoch FROM s.created_at))::bigint AS created,
    (extract(epoch FROM s.created_at) * 1000000)::bigint AS place,
    floor(extract(epoch FROM s.last_used_at))::bigint AS last_used,
    floor(extract(epoch FROM s.expires_at))::bigint AS expires
FROM sessions s JOIN users u ON u.id = s.user_id
WHERE s.revoked_at IS NULL AND s.expires_at > now() AND u.deleted_at IS NULL
"""


@dataclass(frozen=True, slots=True)
class Session:
    """One session that is not over."""

    id: str
    user_id: str
    user: str
    organisation_id: str
    method: str
    address: str
    created_at: int
    last_used_at: int
    expires_at: int

    @classmethod
    def of(cls, row: Any) -> "Session":
        """A row of _SESSION."""
        return cls(
            id=str(row["id"]),
            user_id=str(row["user_id"]),
            user=row["email"],
            organisation_id=str(row["organisation_id"]),
            method=row["method"],
            address=row["address"],
            created_at=row["created"],
            last_used_at=row["last_used"],
            expires_at=row["expires"],
        )


async def listing(connection: Any, actor: Actor, user: str, limit: int, after: str) -> Page:
    """Sessions of a user (empty: the actor's own, for the operator everybody's) that are not over, newest first.

    Raises PermissionDenied for somebody else's, unless an admin's.
    """
    rows, place = fields.page(limit), fields.place(after)
    only = actor.user_id
    if user:
        row = await users.find(connection, actor, user)
        _may_see(actor, row)
        only = row["id"]
    found = await connection.fetch(
        f"{_SESSION} AND ($1::uuid IS NULL OR s.user_id = $1) AND ($2::bigint IS NULL OR (s.created_at, s.id) < "
        "(timestamptz 'epoch' + $2 * interval '1 microsecond', $3)) ORDER BY s.created_at DESC, s.id DESC LIMIT $4",
        only,
        *(place or (None, None)),
        rows + 1,
    )
    return page_of(found, rows, Session.of)


async def end(connection: Any, actor: Actor, session: str) -> str:
    """Ends one session; returns its UUID. Raises NotFound, also for one that is out of the actor's sight."""
    known = fields.uuid(session, "session")
    row = await connection.fetchrow(f"{_SESSION} AND s.id = $1", known)
    hidden = row is None or not (
        actor.operator
        or actor.owns(row["user_id"])
        or (actor.role >= Role.ADMIN and row["organisation_id"] == actor.organisation_id)
    )
    if hidden:
        raise refusal(NotFound, f"there is no session {session}", "session")
    if not actor.operator and not actor.owns(row["user_id"]):
        await users.target(connection, actor, str(row["user_id"]), "session")
    await sessions.end(connection, known)
    detail = {"session": known, "user": row["email"]}
    await audit.record(connection, actor, "session.end", row["email"], row["organisation_id"], detail)
    return str(known)


async def end_all(connection: Any, actor: Actor, user: str) -> int:
    """Ends every session of a user; returns how many there were."""
    row = await users.find(connection, actor, user)
    _may_see(actor, row)
    if not actor.operator and not actor.owns(row["id"]):
        row = await users.target(connection, actor, user)
    ended = await sessions.end_all(connection, row["id"])
    detail = {"sessions_ended": ended}
    await audit.record(connection, actor, "session.end", row["email"], row["organisation_id"], detail)
    return ended


async def reset_factor(connection: Any, actor: Actor, user: str) -> User:
    """Removes a second factor that was lost; all sessions end. Where there is none nothing happens."""
    row = await users.target(connection, actor, user)
    permit(roles.secret(actor.power, Role[row["role"].upper()], own=actor.owns(row["id"])), "user")
    if await factors.remove(connection, row["id"]):
        ended = await sessions.end_all(connection, row["id"])
        detail = {"sessions_ended": ended}
        await audit.record(connection, actor, "user.reset_factor", row["email"], row["organisation_id"], detail)
    return await users.by_id(connection, row["id"])


def _may_see(actor: Actor, row: Any) -> None:
    if not actor.operator and not actor.owns(row["id"]) and actor.role < Role.ADMIN:
        raise refusal(PermissionDenied, "you may see and end your own sessions only", "user")
