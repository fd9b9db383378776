"""What the first start of a database makes: an organisation and its owner. And the key of the development profile.

The owner's one-time password goes into a file that only its reader's account can open, before the owner exists: a start
that fails later loses nothing, and the next one tells of the file again.
"""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from helixflow import log
from helixflow.auth import audit, fields, keys
from helixflow.auth.actors import operator
from helixflow.auth.passwords import Passwords, one_time
from helixflow.auth.pepper import LOCK, Pepper
from helixflow.config import DEVELOPMENT_KEY
from helixflow.pki import files
from helixflow.pki.errors import PkiError

ORGANISATION = "default"
FILE = "first-password"
"""Beside the pepper."""

logger = log.get("auth")

_OWNER = """
SELECT u.id FROM users u JOIN organisations o ON o.id = u.organisation_id
WHERE o.first AND u.role = 'owner' AND NOT u.disabled AND u.deleted_at IS NULL
ORDER BY u.service_account, u.created_at, u.id LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class FirstLogin:
    """How the owner gets in for the first time. `expires_at`: seconds since the epoch."""

    owner: str
    password: str = field(repr=False)
    expires_at: int
    path: Path

    @property
    def until(self) -> str:
        """When it ends, for people."""
        return f"{datetime.fromtimestamp(self.expires_at, UTC):%Y-%m-%d %H:%M} UTC"

    def text(self) -> str:
        """What stands in the file."""
        return f"owner: {self.owner}\npassword: {self.password}\nexpires: {self.expires_at}\n"

    @classmethod
    def of(cls, path: Path) -> "FirstLogin | None":
        """What `text` has written; None for everything else. Raises PkiError when it cannot be read safely."""
        if not path.exists():
            return None
        lines = files.read_private(path).decode(errors="replace").splitlines()
        found = dict(line.split(": ", 1) for line in lines if ": " in line)
        if set(found) != {"owner", "password", "expires"} or not found["expires"].isdecimal():
            return None
        return cls(found["owner"], found["password"], int(found["expires"]), path)


async def left_over(connection: Any, path: Path) -> FirstLogin | None:
    """What an earlier start has left for the owner, if it still opens the door; else its file is removed."""
    found = FirstLogin.of(path)
    valid = found is not None and await connection.fetchval(
        "SELECT must_change_password AND floor(extract(epoch FROM password_expires_at)) = $2 "
        "AND password_expires_at > now() FROM users WHERE email = $1 AND deleted_at IS NULL AND NOT service_account",
        found.owner,
        found.expires_at,
    )
    if not valid:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        return None
    return found


def discard(path: Path, email: str) -> None:
    """Removes the file when it is about this user, who has chosen a password now."""
    try:
        found = FirstLogin.of(path)
        if found is not None and found.owner == email:
            path.unlink(missing_ok=True)
    except (PkiError, OSError) as error:
        logger.warning("the file of the first password was not removed", path=str(path), error=str(error))


async def first_start(connection: Any, hashes: Passwords, owner: str, path: Path, lasts_s: float) -> FirstLogin | None:
    """Makes organisation and owner in a database that has no organisation; returns how the owner gets in then.

    In a transaction: of several first starts at once, one makes them and the others find them. `path`: of the file
    that holds the one-time password, which lasts `lasts_s` seconds. Raises PkiError when it cannot be written.
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
    expires: int = await connection.fetchval(
        "INSERT INTO users (organisation_id, email, role, password, must_change_password, password_expires_at) "
        "VALUES ($1, $2, 'owner', $3, true, date_trunc('second', now() + make_interval(secs => $4))) "
        "RETURNING extract(epoch FROM password_expires_at)::bigint",
        home,
        email,
        stored,
        float(lasts_s),
    )
    actor = operator("first start")
    await audit.record(connection, actor, "organisation.create", ORGANISATION, home)
    await audit.record(connection, actor, "user.create", email, home, {"role": "owner", "service_account": False})
    made = FirstLogin(email, password, expires, path)
    with files.locked(path.parent):
        files.write(path, made.text().encode(), private=True, replace=True)
    return made


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
