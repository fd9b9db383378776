"""What the first start of a database makes: an organisation and its owner. And the key of the development profile."""

from typing import Any
from uuid import UUID

from helixflow.auth import audit, fields, keys
from helixflow.auth.actors import operator
from helixflow.auth.passwords import Passwords, one_time
from helixflow.auth.pepper import LOCK, Pepper
from helixflow.config import DEVELOPMENT_KEY

ORGANISATION = "default"

_OWNER = """
SELECT u.id FROM users u JOIN organisations o ON o.id = u.organisation_id
WHERE o.first AND u.role = 'owner' AND NOT u.disabled AND u.deleted_at IS NULL
ORDER BY u.service_account, u.created_at, u.id LIMIT 1
"""


async def first_start(connection: Any, hashes: Passwords, owner: str) -> str | None:
    """Makes organisation and owner in a database that has no organisation; returns the one-time password then.

    In a transaction: of several first starts at once, one makes them and the others find them.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
    if await connection.fetchval("SELECT EXISTS (SELECT FROM organisations)"):
        return None
    email = fields.email(owner, "auth.owner")
    password = one_time()
    stored = await hashes.hash(password)
    home: UUID = await connection.fetchval(
        "INSERT INTO organisations (name, first) VALUES ($1, true) RETURNING id", ORGANISATION
    )
    await connection.execute(
        "INSERT INTO users (organisation_id, email, role, password, must_change_password) "
        "VALUES ($1, $2, 'owner', $3, true)",
        home,
        email,
        stored,
    )
    actor = operator("first start")
    await audit.record(connection, actor, "organisation.create", ORGANISATION, home)
    await audit.record(connection, actor, "user.create", email, home, {"role": "owner", "service_account": False})
    return password


async def development_key(connection: Any, pepper: Pepper) -> bool:
    """Makes sure, in a transaction, that the public key of the development profile works; True when it did not.

    False also when the first organisation has no owner left whose key it could be.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
    digest = pepper.key_digest(keys.presented(DEVELOPMENT_KEY.encode()))
    works = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM api_keys k JOIN users u ON u.id = k.user_id "
        "WHERE k.digest = $1 AND k.revoked_at IS NULL AND k.expires_at IS NULL AND NOT u.disabled)",
        digest,
    )
    owner = await connection.fetchval(_OWNER)
    if works or owner is None:
        return False
    await connection.execute(
        "INSERT INTO api_keys (user_id, digest, prefix, name, development) VALUES ($1, $2, $3, $3, true) "
        "ON CONFLICT (digest) DO UPDATE SET user_id = excluded.user_id, revoked_at = NULL, expires_at = NULL",
        owner,
        digest,
        DEVELOPMENT_KEY,
    )
    return True
