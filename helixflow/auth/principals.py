"""The principal behind a credential: one query, whatever is checked."""

from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import orjson

from helixflow.auth.pepper import Pepper
from helixflow.auth.records import Content
from helixflow.auth.roles import Role
from helixflow.auth.signing import Access, Signer
from helixflow.core_rs import InvalidApiKey, InvalidToken
from helixflow.limits.model import Limits, SubjectLimits
from helixflow.refusals import refusal

DIGEST_BYTES = 32
_ORDER = ("key", "user", "organisation")

_OWNER = """
    u.id AS user_id, u.email, u.role, o.id AS organisation_id, o.name AS organisation, o.first,
    o.content_store, o.content_retention_days, o.content_redact,
    u.disabled OR u.deleted_at IS NOT NULL OR o.suspended AS refused
"""
# A key that another one made hangs on it and on its user, and has their limits beside its own.
_KEY = f"""
SELECT k.id AS key_id, k.name AS key, k.digest = $1 AS by_secret, k.models, k.endpoints, k.development,
    k.role AS key_role,
    p.id AS parent_id, p.user_id AS parent_user_id, p.models AS parent_models, p.endpoints AS parent_endpoints,
    coalesce(floor(extract(epoch FROM least(k.expires_at, p.expires_at))), 0)::bigint AS expires_at,
    coalesce(k.revoked_at, p.revoked_at) IS NOT NULL OR least(k.expires_at, p.expires_at) <= now()
        OR pu.disabled OR pu.deleted_at IS NOT NULL AS ended, {_OWNER},
    (SELECT jsonb_object_agg(l.subject, to_jsonb(l)) FROM limits l WHERE l.subject IN
        ('key:' || k.id::text, 'user:' || u.id::text, 'organisation:' || o.id::text,
         'key:' || p.id::text, 'user:' || p.user_id::text)) AS limits
FROM api_keys k JOIN users u ON u.id = k.user_id JOIN organisations o ON o.id = u.organisation_id
LEFT JOIN api_keys p ON p.id = k.parent_id LEFT JOIN users pu ON pu.id = p.user_id
WHERE k.digest = $1 OR k.certificate_digest = $1 AND k.revoked_at IS NULL
"""  # noqa: S608 - the text above
_SESSION = f"""
SELECT s.revoked_at IS NOT NULL OR s.expires_at <= now() AS ended, {_OWNER},
    (SELECT jsonb_object_agg(l.subject, to_jsonb(l)) FROM limits l WHERE l.subject IN
        ('user:' || u.id::text, 'organisation:' || o.id::text)) AS limits
FROM sessions s JOIN users u ON u.id = s.user_id JOIN organisations o ON o.id = u.organisation_id
WHERE s.id = $1 AND u.id = $2
"""  # noqa: S608 - the text above


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a credential stands for. `expires_at`: of the credential, seconds since the epoch, 0: never."""

    organisation_id: UUID
    organisation: str
    user_id: UUID
    user: str
    role: str
    expires_at: int
    content: Content
    key_id: UUID | None = None
    key: str = ""
    session_id: UUID | None = None
    models: list[str] = field(default_factory=list)
    endpoints: list[str] = field(default_factory=list)
    installation: bool = False
    """Belongs to the first organisation."""
    limits: tuple[SubjectLimits, ...] = ()
    """Of keys, users, organisation, as far as they have any; those of the key itself first."""
    administers: str = ""
    """The role up to which the credential administers; empty: nothing beyond itself."""
    depends_on: tuple[str, ...] = ()
    """`key:UUID` and `user:UUID` of the key that made it."""


async def by_key(connection: Any, pepper: Pepper, presented: bytes, *, development: bool) -> Principal:
    """The principal of an API key; `presented`: SHA-256 of the key, or of what stands for its certificate.

    Raises InvalidApiKey.
    """
    row = None
    if len(presented) == DIGEST_BYTES:
        row = await connection.fetchrow(_KEY, pepper.key_digest(presented))
    if row is None or row["ended"] or row["refused"] or (row["development"] and not development):
        raise unknown_key()
    parent = {"key": row["parent_id"], "user": row["parent_user_id"]} if row["parent_id"] else {}
    found = _principal(
        row,
        expires_at=row["expires_at"],
        key_id=row["key_id"],
        key=row["key"],
        models=_both(row["models"], row["parent_models"]),
        endpoints=_both(row["endpoints"], row["parent_endpoints"]),
        depends_on=tuple(f"{kind}:{number}" for kind, number in parent.items()),
    )
    # That a gateway has seen a certificate is its word alone.
    return replace(found, administers=_administers(found, row["key_role"] if row["by_secret"] else None))


def unknown_key() -> InvalidApiKey:
    """The refusal of a key that does not exist or may not be used now: it never says which."""
    return refusal(InvalidApiKey, "the API key is not valid")


async def by_token(connection: Any, signer: Signer, token: str) -> Principal:
    """The principal of an access token. Raises InvalidToken."""
    return await by_session(connection, await signer.check(connection, token))


async def by_session(connection: Any, access: Access) -> Principal:
    """The principal of an access token that was checked. Raises InvalidToken."""
    row = await connection.fetchrow(_SESSION, access.session_id, access.user_id)
    if row is None or row["ended"] or row["refused"]:
        raise refusal(InvalidToken, "the session of this access token is over: log in again")
    return _principal(row, expires_at=access.expires_at, session_id=access.session_id, administers=row["role"])


def _administers(found: Principal, role: str | None) -> str:
    """The role up to which a key administers: a bound one not at all, none more than its holder may now."""
    bound = found.models or found.endpoints or any(item.subject == f"key:{found.key_id}" for item in found.limits)
    if role is None or bound:
        return ""
    return min(Role[role.upper()], Role[found.role.upper()]).word


def _both(own: list[str], above: list[str] | None) -> list[str]:
    """What two lists of names allow together; an empty one allows all. Raises InvalidApiKey when nothing is left."""
    if not own or not above:
        return own or above or []
    kept = [name for name in own if name in above]
    if not kept:
        raise unknown_key()
    return kept


def _principal(row: Any, **credential: Any) -> Principal:
    found = orjson.loads(row["limits"]) if row["limits"] else {}
    own = {f"key:{credential.get('key_id')}", f"user:{row['user_id']}"}
    subjects = sorted(found, key=lambda subject: (_ORDER.index(subject.partition(":")[0]), subject not in own))
    return Principal(
        organisation_id=row["organisation_id"],
        organisation=row["organisation"],
        user_id=row["user_id"],
        user=row["email"],
        role=row["role"],
        installation=row["first"],
        content=Content(row["content_store"], row["content_retention_days"], row["content_redact"]),
        limits=tuple(SubjectLimits(subject, Limits.of_row(found[subject])) for subject in subjects),
        **credential,
    )
