"""Users: people with a password or a provider's login, and service accounts, which have keys alone."""

from typing import Any
from uuid import UUID

import asyncpg

from helixflow.auth import audit, factors, fields, held_keys, organisations, roles, sessions, throttle
from helixflow.auth.actors import Actor, permit
from helixflow.auth.organisations import Page, page_of
from helixflow.auth.records import USER, User
from helixflow.auth.roles import Role
from helixflow.core_rs import Conflict, InvalidRequest, NotFound
from helixflow.refusals import refusal

ONE_TIME_S = 259_200.0
"""A one-time password lasts this long unless the configuration says otherwise (seconds)."""

_OTHER_OWNERS = """
SELECT count(*) FROM users
WHERE organisation_id = $1 AND id <> $2 AND role = 'owner' AND NOT disabled AND NOT service_account
    AND deleted_at IS NULL
"""


async def find(connection: Any, actor: Actor, name: str, param: str = "user") -> Any:
    """The row of a user by e-mail, name of a service account, or UUID, within reach of the actor.

    Raises NotFound, and InvalidRequest when several service accounts have the name.
    """
    known, word = fields.as_uuid(name), fields.text(name, param, fields.LONGEST_EMAIL)
    where = "u.id = $1" if known else "u.email = $1 AND NOT u.service_account" if "@" in word else "u.email = $1"
    value = known or (word.lower() if "@" in word else word)
    rows = await connection.fetch(
        f"{USER} WHERE {where} AND u.deleted_at IS NULL AND ($2::uuid IS NULL OR u.organisation_id = $2) LIMIT 2",
        value,
        actor.organisation_id,
    )
    if not rows:
        raise refusal(NotFound, f"there is no user {name!r}", param)
    if len(rows) > 1:
        raise refusal(InvalidRequest, f"several organisations have a service account {name!r}: give its UUID", param)
    return rows[0]


async def target(connection: Any, actor: Actor, name: str, param: str = "user") -> Any:
    """As `find`, for a change: of a user within the actor's reach (`roles.person`), locked with the organisation.

    Who owns an organisation changes under the organisation's lock only, so that the last owner cannot leave twice.
    """
    row = await find(connection, actor, name, param)
    await connection.execute("SELECT FROM organisations WHERE id = $1 FOR NO KEY UPDATE", row["organisation_id"])
    row = await find(connection, actor, str(row["id"]), param)
    permit(roles.person(actor.power, Role[row["role"].upper()], own=actor.owns(row["id"])), param)
    return row


async def create(
    connection: Any,
    actor: Actor,
    *,
    organisation: str,
    email: str,
    role: str,
    password: str | None,
    lasts_s: float = ONE_TIME_S,
) -> User:
    """A new user; `password`: hash of the one-time password, None for a service account. It lasts for `lasts_s`.

    Raises PermissionDenied for an address that has no place in the organisation, and Conflict when the e-mail (of all)
    or the name (of the organisation) is taken.
    """
    service = password is None
    email = fields.service_name(email) if service else fields.email(email)
    wanted = fields.role(role)
    permit(roles.joins(actor.power, wanted, service=service), "role")
    home = await _home(connection, actor, organisation)
    if not service:
        await organisations.admit(connection, actor, home, email)
    try:
        async with connection.transaction():
            made: UUID = await connection.fetchval(
                "INSERT INTO users (organisation_id, email, role, service_account, password, must_change_password, "
                "password_expires_at) VALUES ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7)) RETURNING id",
                home,
                email,
                wanted.word,
                service,
                password,
                not service,
                None if service else lasts_s,
            )
    except asyncpg.UniqueViolationError:
        raise refusal(Conflict, f"there is a user {email!r} already", "email") from None
    detail = {"role": wanted.word, "service_account": service}
    await audit.record(connection, actor, "user.create", email, home, detail)
    return await by_id(connection, made)


async def listing(connection: Any, actor: Actor, organisation: str, limit: int, after: str) -> Page:
    """Users of an organisation, for the operator of all; oldest first."""
    rows, place = fields.page(limit), fields.place(after)
    found = await connection.fetch(
        f"{USER} WHERE u.deleted_at IS NULL AND ($1::uuid IS NULL OR u.organisation_id = $1) AND "
        "($2::bigint IS NULL OR (u.created_at, u.id) > (timestamptz 'epoch' + $2 * interval '1 microsecond', $3)) "
        "ORDER BY u.created_at, u.id LIMIT $4",
        await organisations.scope(connection, actor, organisation),
        *(place or (None, None)),
        rows + 1,
    )
    return page_of(found, rows, User.of)


async def update(connection: Any, actor: Actor, name: str, role: str | None, disabled: bool | None) -> User:
    """Changes what is given. Disabling ends the sessions; keys rest until the user is enabled again.

    Raises PermissionDenied for a role that is not the actor's to give, Conflict when the last owner would go.
    """
    row = await target(connection, actor, name)
    wanted = row["role"] if role is None else fields.role(role).word
    if wanted != row["role"]:
        permit(roles.grant(actor.power, Role[wanted.upper()]), "role")
    resting = row["disabled"] if disabled is None else disabled
    given = (Role[row["role"].upper()], row["disabled"]), (Role[wanted.upper()], resting)
    permit(roles.enables(actor.power, *given), "role" if given[0][0] < given[1][0] else "disabled")
    before = {"role": row["role"], "disabled": row["disabled"]}
    after = {"role": wanted, "disabled": resting}
    detail = {key: {"from": before[key], "to": after[key]} for key in after if before[key] != after[key]}
    if detail:
        if wanted != "owner" or resting:
            await _keep_an_owner(connection, row)
        await connection.execute("UPDATE users SET role = $2, disabled = $3 WHERE id = $1", row["id"], wanted, resting)
        if resting:
            await sessions.end_all(connection, row["id"])
        await audit.record(connection, actor, "user.update", row["email"], row["organisation_id"], detail)
    return await by_id(connection, row["id"])


async def reset_password(
    connection: Any, actor: Actor, name: str, password: str, keys: str = "", lasts_s: float = ONE_TIME_S
) -> User:
    """A new one-time password (its hash); forgets wrong ones and ends all sessions. `keys`: keep or revoke.

    Raises InvalidRequest, also when the user has keys and `keys` does not say what to do with them.
    """
    row = await target(connection, actor, name)
    permit(roles.secret(actor.power, Role[row["role"].upper()], own=actor.owns(row["id"])), "user")
    if row["service_account"]:
        raise refusal(InvalidRequest, f"{row['email']!r} is a service account: it has keys, no password", "user")
    await connection.execute(
        "UPDATE users SET password = $2, must_change_password = true, "
        "password_expires_at = now() + make_interval(secs => $3) WHERE id = $1",
        row["id"],
        password,
        lasts_s,
    )
    await throttle.clear(connection, row["email"])
    ended = await sessions.end_all(connection, row["id"])
    detail = {"sessions_ended": ended, **await held_keys.settle(connection, row["id"], keys)}
    await audit.record(connection, actor, "user.reset_password", row["email"], row["organisation_id"], detail)
    return await by_id(connection, row["id"])


async def unlock(connection: Any, actor: Actor, name: str) -> User:
    """Forgets the wrong passwords, from everywhere."""
    row = await target(connection, actor, name)
    if not row["service_account"] and await throttle.clear(connection, row["email"]):
        await audit.record(connection, actor, "user.unlock", row["email"], row["organisation_id"])
    return await by_id(connection, row["id"])


async def delete(connection: Any, actor: Actor, name: str) -> str:
    """Removes a user with sessions and keys; the row stays for ledger and audit. Returns the UUID.

    Raises Conflict for the last owner.
    """
    row = await target(connection, actor, name)
    await _keep_an_owner(connection, row)
    await connection.execute(
        "UPDATE users SET deleted_at = now(), password = NULL, must_change_password = false WHERE id = $1", row["id"]
    )
    ended = await sessions.end_all(connection, row["id"])
    await factors.remove(connection, row["id"])
    revoked = await connection.fetch(
        "UPDATE api_keys SET revoked_at = now() WHERE revoked_at IS NULL AND (user_id = $1 OR "
        "parent_id IN (SELECT id FROM api_keys WHERE user_id = $1)) RETURNING id",
        row["id"],
    )
    detail = {"sessions_ended": ended, "keys_revoked": len(revoked)}
    await audit.record(connection, actor, "user.delete", row["email"], row["organisation_id"], detail)
    return str(row["id"])


async def by_id(connection: Any, user_id: UUID) -> User:
    """One user who is known to exist."""
    return User.of(await connection.fetchrow(f"{USER} WHERE u.id = $1", user_id))


async def _home(connection: Any, actor: Actor, organisation: str) -> UUID:
    home = await organisations.scope(connection, actor, organisation)
    if home is not None:
        return home
    rows = await connection.fetch("SELECT id FROM organisations LIMIT 2")
    if len(rows) != 1:
        raise refusal(InvalidRequest, "organisation: there are several, name one", "organisation")
    only: UUID = rows[0]["id"]
    return only


async def _keep_an_owner(connection: Any, row: Any) -> None:
    """Raises Conflict when the organisation would be left without a person who owns it. Needs its lock."""
    if row["role"] != "owner" or row["disabled"] or row["service_account"]:
        return
    if not await connection.fetchval(_OTHER_OWNERS, row["organisation_id"], row["id"]):
        raise refusal(
            Conflict, f"{row['email']!r} is the last owner of {row['organisation']!r}: make somebody else owner first"
        )
