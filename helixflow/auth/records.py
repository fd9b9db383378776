"""Rows as AdminService shows them: field names are those of its messages, times seconds since the epoch, 0: never."""

from dataclasses import dataclass
from typing import Any

ORGANISATION = """
SELECT o.id, o.name, o.first, o.suspended, o.content_store, o.content_retention_days, o.content_redact, o.domains,
    o.factor_from,
    floor(extract(epoch FROM o.created_at))::bigint AS created,
    (extract(epoch FROM o.created_at) * 1000000)::bigint AS place
FROM organisations o
"""
USER = """
SELECT u.id, u.email, u.role, u.organisation_id, o.name AS organisation, u.service_account, u.disabled,
    NOT u.service_account AND EXISTS (SELECT FROM login_attempts f WHERE f.account = sha256(convert_to(u.email, 'UTF8'))
        AND f.free_at > now()) AS locked, u.must_change_password,
    floor(extract(epoch FROM u.created_at))::bigint AS created,
    (extract(epoch FROM u.created_at) * 1000000)::bigint AS place,
    coalesce(floor(extract(epoch FROM u.last_login_at)), 0)::bigint AS last_login,
    CASE WHEN u.must_change_password THEN
        coalesce(floor(extract(epoch FROM u.password_expires_at)), 0)::bigint ELSE 0 END AS password_expires,
    EXISTS (SELECT FROM second_factors f WHERE f.user_id = u.id AND f.secret IS NOT NULL) AS second_factor
FROM users u JOIN organisations o ON o.id = u.organisation_id
"""
KEY = """
SELECT k.id, k.name, k.prefix, k.user_id, u.email AS user_name, u.role, u.organisation_id, k.models, k.endpoints,
    floor(extract(epoch FROM k.created_at))::bigint AS created,
    (extract(epoch FROM k.created_at) * 1000000)::bigint AS place,
    coalesce(floor(extract(epoch FROM least(k.expires_at, p.expires_at))), 0)::bigint AS expires,
    coalesce(floor(extract(epoch FROM coalesce(k.revoked_at, p.revoked_at))), 0)::bigint AS revoked,
    coalesce(floor(extract(epoch FROM k.last_used_at)), 0)::bigint AS last_used, k.replaced_by,
    k.role AS key_role, k.parent_id, k.certificate
FROM api_keys k JOIN users u ON u.id = k.user_id LEFT JOIN api_keys p ON p.id = k.parent_id
"""


@dataclass(frozen=True, slots=True)
class Content:
    """Whether and how prompt and answer texts are kept."""

    store: bool
    retention_days: int
    redact: list[str]


@dataclass(frozen=True, slots=True)
class Organisation:
    """One organisation."""

    id: str
    name: str
    suspended: bool
    content: Content
    created_at: int
    domains: list[str]
    factor_from: str

    @classmethod
    def of(cls, row: Any) -> "Organisation":
        """A row of ORGANISATION."""
        content = Content(row["content_store"], row["content_retention_days"], row["content_redact"])
        return cls(
            str(row["id"]),
            row["name"],
            row["suspended"],
            content,
            row["created"],
            row["domains"],
            row["factor_from"],
        )


@dataclass(frozen=True, slots=True)
class User:
    """One person or service account."""

    id: str
    email: str
    role: str
    organisation_id: str
    organisation: str
    service_account: bool
    disabled: bool
    locked: bool
    must_change_password: bool
    created_at: int
    last_login_at: int
    second_factor: bool
    password_expires_at: int

    @classmethod
    def of(cls, row: Any) -> "User":
        """A row of USER."""
        return cls(
            id=str(row["id"]),
            email=row["email"],
            role=row["role"],
            organisation_id=str(row["organisation_id"]),
            organisation=row["organisation"],
            service_account=row["service_account"],
            disabled=row["disabled"],
            locked=row["locked"],
            must_change_password=row["must_change_password"],
            created_at=row["created"],
            last_login_at=row["last_login"],
            second_factor=row["second_factor"],
            password_expires_at=row["password_expires"],
        )


@dataclass(frozen=True, slots=True)
class Key:
    """One API key, without its secret."""

    id: str
    name: str
    prefix: str
    user_id: str
    user: str
    organisation_id: str
    models: list[str]
    endpoints: list[str]
    created_at: int
    expires_at: int
    revoked_at: int
    last_used_at: int
    replaced_by: str
    role: str
    parent_id: str
    certificate: str

    @classmethod
    def of(cls, row: Any) -> "Key":
        """A row of KEY."""
        return cls(
            id=str(row["id"]),
            name=row["name"],
            prefix=row["prefix"],
            user_id=str(row["user_id"]),
            user=row["user_name"],
            organisation_id=str(row["organisation_id"]),
            models=row["models"],
            endpoints=row["endpoints"],
            created_at=row["created"],
            expires_at=row["expires"],
            revoked_at=row["revoked"],
            last_used_at=row["last_used"],
            replaced_by=str(row["replaced_by"] or ""),
            role=row["key_role"] or "",
            parent_id=str(row["parent_id"] or ""),
            certificate=row["certificate"],
        )
