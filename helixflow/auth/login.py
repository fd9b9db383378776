"""Login with e-mail and password."""

from typing import Any

from helixflow.auth import audit, fields, lockout, passwords, sessions
from helixflow.auth.actors import anonymous
from helixflow.auth.lockout import Lockout
from helixflow.auth.passwords import Passwords
from helixflow.auth.sessions import Issued, Sessions
from helixflow.core_rs import (
    AccountLocked,
    InvalidCredentials,
    InvalidRequest,
    PasswordChangeRequired,
    PermissionDenied,
)
from helixflow.db.pool import Pool
from helixflow.refusals import refusal

_USER = """
SELECT u.id, u.password, u.must_change_password, u.organisation_id, u.disabled OR o.suspended AS refused
FROM users u JOIN organisations o ON o.id = u.organisation_id
WHERE u.email = $1 AND NOT u.service_account AND u.deleted_at IS NULL
"""


class Login:
    """Checks passwords. No connection is held while one is being hashed."""

    def __init__(self, pool: Pool, hashes: Passwords, rules: Lockout, begun: Sessions) -> None:
        self._pool = pool
        self._passwords = hashes
        self._lockout = rules
        self._sessions = begun

    async def login(self, email: str, password: str, new_password: str, address: str) -> Issued:
        """Tokens for a password; `new_password`, unless empty, replaces it.

        Raises InvalidCredentials (alike for unknown names), AccountLocked, PasswordChangeRequired, PermissionDenied
        (disabled; only said to who knows the password), InvalidRequest, QueueFull.
        """
        email = fields.email(email)
        if new_password:
            passwords.acceptable(new_password)
            if new_password == password:
                raise refusal(InvalidRequest, "new_password must differ from the old one", "new_password")
        async with self._passwords.turn():
            row = await self._attempt(email)
            if not await self._passwords.matches(row["password"] if row else None, password):
                await self._failed(email, row, address)
                raise refusal(InvalidCredentials, "e-mail or password is wrong")
            stored = row["password"]
            if not (row["must_change_password"] and not new_password):
                rehash = new_password or (password if self._passwords.outdated(stored) else "")
                fresh = await self._passwords.hash(rehash) if rehash else stored
        async with self._pool.acquire() as connection:
            if row["must_change_password"] and not new_password:
                await lockout.clear(connection, email)
                raise refusal(
                    PasswordChangeRequired, "this password is for the first login only: send new_password with it"
                )
            return await self._begin(connection, email, stored, fresh, changed=bool(new_password), address=address)

    async def _attempt(self, email: str) -> Any:
        """Counts the attempt and reads the user; None when there is none. Raises AccountLocked."""
        async with self._pool.acquire() as connection:
            locked_s = await self._lockout.attempt(connection, email)
            if locked_s is not None:
                error = refusal(AccountLocked, f"too many wrong passwords: try again in {locked_s} s")
                error.retry_after_s = locked_s
                raise error
            return await connection.fetchrow(_USER, email)

    async def _failed(self, email: str, row: Any, address: str) -> None:
        actor, organisation = anonymous(email, address), row["organisation_id"] if row else None
        async with self._pool.acquire() as connection, connection.transaction():
            await audit.record(connection, actor, "login.failed", email, organisation)
            if await self._lockout.failed(connection, email):
                detail = {"seconds": self._lockout.seconds}
                await audit.record(connection, actor, "login.lockout", email, organisation, detail)

    async def _begin(
        self, connection: Any, email: str, stored: str, fresh: str, *, changed: bool, address: str
    ) -> Issued:
        """The session, if the user is still what was read before the hash was checked."""
        async with connection.transaction():
            row = await connection.fetchrow(_USER + " FOR NO KEY UPDATE OF u", email)
            if row is None or row["password"] != stored:
                raise refusal(InvalidCredentials, "e-mail or password is wrong")
            await lockout.clear(connection, email)
            if not row["refused"]:
                if fresh != stored:
                    await connection.execute("UPDATE users SET password = $2 WHERE id = $1", row["id"], fresh)
                if changed:
                    await self._changed(connection, email, row, address)
                return await self._sessions.begin(connection, row["id"], "password", address)
            actor = anonymous(email, address)
            await audit.record(connection, actor, "login.refused", email, row["organisation_id"])
        raise refusal(PermissionDenied, "this account is disabled; ask an administrator")

    async def _changed(self, connection: Any, email: str, row: Any, address: str) -> None:
        """A new password ends what was begun with the old one."""
        await connection.execute("UPDATE users SET must_change_password = false WHERE id = $1", row["id"])
        ended = await sessions.end_all(connection, row["id"])
        detail = {"sessions_ended": ended}
        await audit.record(
            connection, anonymous(email, address), "user.password", email, row["organisation_id"], detail
        )
