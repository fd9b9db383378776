"""Organisations: whom users, keys and usage belong to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from helixflow.auth import audit, fields
from helixflow.auth.actors import Actor
from helixflow.auth.records import ORGANISATION, Content, Organisation
from helixflow.core_rs import Conflict, InvalidRequest, NotFound, PermissionDenied
from helixflow.ledger.content import RETENTION_DAYS_MAX
from helixflow.ledger.content import check as check_patterns
from helixflow.refusals import refusal

DOMAINS_LOCK = 0x48656C6978_04
"""Key of the advisory lock: "Helix", then 04 for domains. Whoever declares one waits for whoever makes people there."""


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of a list and the cursor to the next page, empty after the last one."""

    data: list[Any]
    next: str


async def find(connection: Any, name: str, param: str = "organisation", *, lock: bool = False) -> Any:
    """The row of an organisation by name or UUID; `lock` keeps others from changing who owns it.

    Raises NotFound.
    """
    known = fields.as_uuid(name)
    where = "o.id = $1" if known else "lower(o.name) = lower($1)"
    value = known or fields.text(name, param)
    row = await connection.fetchrow(f"{ORGANISATION} WHERE {where}{' FOR NO KEY UPDATE' if lock else ''}", value)
    if row is None:
        raise refusal(NotFound, f"there is no organisation {name!r}", param)
    return row


async def scope(connection: Any, actor: Actor, name: str) -> UUID | None:
    """Which organisation a list is about: the named one, else the actor's; None: all, for the operator.

    Raises NotFound for another one than the actor's.
    """
    if not name:
        return actor.organisation_id
    message = f"there is no organisation {name!r}"
    try:
        found: UUID = (await find(connection, name))["id"]
    except NotFound:
        raise refusal(NotFound, message, "organisation") from None
    actor.allow_organisation(found, message, "organisation")
    return found


async def create(connection: Any, actor: Actor, name: str) -> Organisation:
    """A new one, without users. Raises Conflict when the name is taken, whatever its case."""
    name = fields.organisation_name(name)
    try:
        async with connection.transaction():
            made = await connection.fetchval("INSERT INTO organisations (name) VALUES ($1) RETURNING id", name)
    except asyncpg.UniqueViolationError:
        raise refusal(Conflict, f"there is an organisation {name!r} already", "name") from None
    await audit.record(connection, actor, "organisation.create", name, made)
    return Organisation.of(await find(connection, str(made)))


async def listing(connection: Any, actor: Actor, name: str, limit: int, after: str) -> Page:
    """All for those who administer the installation, else the actor's own; oldest first."""
    rows, place = fields.page(limit), fields.place(after)
    only: UUID | None = actor.organisation_id
    if actor.installation:
        only = (await find(connection, name))["id"] if name else None
    elif name:
        only = await scope(connection, actor, name)
    found = await connection.fetch(
        f"{ORGANISATION} WHERE ($1::uuid IS NULL OR o.id = $1) AND ($2::bigint IS NULL OR (o.created_at, o.id) > "
        "(timestamptz 'epoch' + $2 * interval '1 microsecond', $3)) ORDER BY o.created_at, o.id LIMIT $4",
        only,
        *(place or (None, None)),
        rows + 1,
    )
    return page_of(found, rows, Organisation.of)


async def update(
    connection: Any,
    actor: Actor,
    organisation: str,
    name: str | None,
    suspended: bool | None,
    content: Content | None,
    domains: Sequence[str] | None = None,
) -> Organisation:
    """Changes what is given. Raises InvalidRequest for a bad policy, Conflict for a taken name or others' domain."""
    before = await find(connection, organisation, lock=True)
    if suspended and before["id"] == actor.organisation_id:
        raise refusal(InvalidRequest, "nobody can suspend their own organisation", "suspended")
    changes: dict[str, Any] = {}
    if name is not None:
        changes["name"] = fields.organisation_name(name)
    if suspended is not None:
        changes["suspended"] = suspended
    if content is not None:
        policy = checked(content)
        changes |= {
            "content_store": policy.store,
            "content_retention_days": policy.retention_days,
            "content_redact": policy.redact,
        }
    if domains is not None:
        changes["domains"] = await _declared(connection, before["id"], domains)
    detail = {key: {"from": before[key], "to": value} for key, value in changes.items() if before[key] != value}
    if detail:
        columns = ", ".join(f"{column} = ${number}" for number, column in enumerate(detail, 2))
        values = [changes[column] for column in detail]
        try:
            async with connection.transaction():
                await connection.execute(f"UPDATE organisations SET {columns} WHERE id = $1", before["id"], *values)  # noqa: S608 - our own names
        except asyncpg.UniqueViolationError:
            raise refusal(Conflict, f"there is an organisation {changes['name']!r} already", "name") from None
        await audit.record(connection, actor, "organisation.update", before["name"], before["id"], detail)
    return Organisation.of(await find(connection, str(before["id"])))


async def _declared(connection: Any, organisation: UUID, domains: Sequence[str]) -> list[str]:
    """Domains for an organisation. Several may have one: departments of a company.

    Raises InvalidRequest, and Conflict when people of an organisation that does not declare a domain live there: its
    admins and those of this one would learn of each other's addresses.
    """
    wanted = fields.domains(domains, "domains")
    await connection.execute("SELECT pg_advisory_xact_lock($1)", DOMAINS_LOCK)
    found = await connection.fetchrow(
        "SELECT o.name, split_part(u.email, '@', 2) AS domain FROM users u JOIN organisations o "
        "ON o.id = u.organisation_id WHERE o.id <> $1 AND NOT u.service_account AND u.deleted_at IS NULL "
        "AND split_part(u.email, '@', 2) = ANY($2) AND NOT split_part(u.email, '@', 2) = ANY(o.domains) LIMIT 1",
        organisation,
        wanted,
    )
    if found is not None:
        raise refusal(
            Conflict,
            f"{found['name']!r} has people at {found['domain']}: declare it there too, or remove them first",
            "domains",
        )
    return wanted


async def admit(connection: Any, actor: Actor, home: UUID, address: str) -> None:
    """Lets an address into an organisation, or raises PermissionDenied.

    Whether somebody else's organisation has the address must not show. So the answer hangs on declared domains alone:
    admins make people at domains of their organisation, the operator and the installation's owners also at domains
    that nobody has declared, everybody does while there is one organisation only.
    """
    domain = fields.domain_of(address)
    await connection.execute("SELECT pg_advisory_xact_lock_shared($1)", DOMAINS_LOCK)
    row = await connection.fetchrow(
        "SELECT count(*) AS all, count(*) FILTER (WHERE $1 = ANY(domains)) AS declaring, "
        "coalesce(bool_or($1 = ANY(domains)) FILTER (WHERE id = $2), false) AS own FROM organisations",
        domain,
        home,
    )
    free = row["declaring"] == 0 and (row["all"] == 1 or actor.installation)
    if not row["own"] and not free:
        raise refusal(
            PermissionDenied,
            f"{domain} is not a domain of this organisation: the operator declares them "
            "(`helixflow organisation update --domain`)",
            "email",
        )


async def require_factor(connection: Any, actor: Actor, organisation: str, role: str) -> Organisation:
    """Says from which role on (empty: from none) a password needs a second factor beside it.

    Whoever has none can enrol one with the password and nothing else from then on. Raises NotFound for another
    organisation than the actor's, unless the actor administers the installation.
    """
    wanted = fields.role(role).word if role else ""
    before = await find(connection, organisation, lock=True)
    if not actor.installation:
        actor.allow_organisation(before["id"], f"there is no organisation {organisation!r}", "organisation")
    if wanted != before["factor_from"]:
        await connection.execute("UPDATE organisations SET factor_from = $2 WHERE id = $1", before["id"], wanted)
        detail = {"factor_from": {"from": before["factor_from"], "to": wanted}}
        await audit.record(connection, actor, "organisation.update", before["name"], before["id"], detail)
    return Organisation.of(await find(connection, str(before["id"])))


def checked(content: Content) -> Content:
    """A policy that can be followed. Raises InvalidRequest."""
    if content.retention_days > RETENTION_DAYS_MAX or (content.store and not content.retention_days):
        raise refusal(
            InvalidRequest,
            f"content.retention_days must be between 1 and {RETENTION_DAYS_MAX} when texts are stored",
            "content.retention_days",
        )
    if any("\0" in pattern for pattern in content.redact):
        raise refusal(InvalidRequest, "content.redact: a pattern must not hold the NUL character", "content.redact")
    check_patterns(content.redact)
    return content


def page_of(found: list[Any], rows: int, make: Any) -> Page:
    """A page of rows that were asked for one more than fits; each has `place` and `id`."""
    following = fields.cursor(found[rows - 1]["place"], found[rows - 1]["id"]) if len(found) > rows else ""
    return Page([make(row) for row in found[:rows]], following)
