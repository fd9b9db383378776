"""The principal behind a credential: one query, whatever is checked."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson

from helixflow.auth.pepper import Pepper
from helixflow.auth.records import Content
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
_KEY = f"""
SELECT k.id AS key_id, k.name AS key, k.models, k.endpoints, k.development,
    coalesce(floor(extract(epoch FROM k.expires_at)), 0)::bigint AS expires_at,
    k.revoked_at IS NOT NULL OR k.expires_at <= now() AS ended, {_OWNER},
    (SELECT jsonb_object_agg(l.subject, to_jsonb(l)) FROM limits l WHERE l.subject IN
        ('key:' || k.id::text, 'user:' || u.id::text, 'organisation:' || o.id::text)) AS limits
FROM api_keys k JOIN users u ON u.id = k.user_id JOIN organisations o ON o.id = u.organisation_id
WHERE k.digest = $1
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
    """Of key, user, organisation, as far as they have any."""


async def by_key(connection: Any, pepper: Pepper, presented: bytes, *, development: bool) -> Principal:
    """The principal of an API key; `presented`: SHA-256 of the key. Raises InvalidApiKey."""
    row = None
    if len(presented) == DIGEST_BYTES:
        row = await connection.fetchrow(_KEY, pepper.key_digest(presented))
    if row is None or row["ended"] or row["refused"] or (row["development"] and not development):
        raise unknown_key()
    return _principal(
        row,
        expires_at=row["expires_at"],
        key_id=row["key_id"],
        key=row["key"],
        models=row["models"],
        endpoints=row["endpoints"],
    )


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
    return _principal(row, expires_at=access.expires_at, session_id=access.session_id)


def _principal(row: Any, **credential: Any) -> Principal:
    found = orjson.loads(row["limits"]) if row["limits"] else {}
    subjects = sorted(found, key=lambda subject: _ORDER.index(subject.partition(":")[0]))
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
