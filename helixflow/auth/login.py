"""Login with e-mail and password."""

from typing import Any

from helixflow.auth import audit, fields, passwords, sessions, throttle
from helixflow.auth.actors import anonymous
from helixflow.auth.passwords import Passwords
from helixflow.auth.refusals import Refusals
from helixflow.auth.sessions import Issued, Sessions
from helixflow.auth.throttle import Throttle
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

    def __init__(self, pool: Pool, hashes: Passwords, rules: Throttle, begun: Sessions, refused: Refusals) -> None:
        self._pool = pool
        self._passwords = hashes
        self._throttle = rules
        self._sessions = begun
        self._refusals = refused

    async def login(self, email: str, password: str, new_password: str, address: str) -> Issued:
        """Tokens for a password; `new_password`, unless empty, replaces it.

        Raises InvalidCredentials (alike for unknown names), AccountLocked (after wrong ones: wait), InvalidRequest,
        PasswordChangeRequired, PermissionDenied (disabled; only said to who knows the password), QueueFull.
        """
        email = fields.email(email)
        if new_password:
            passwords.acceptable(new_password)
            if new_password == password:
                raise refusal(InvalidRequest, "new_password must differ from the old one", "new_password")
        async with self._passwords.turn(address):
            row, known = await self._attempt(email, address)
            if not await self._passwords.matches(row["password"] if row else None, password):
                await self._refusals.note("login.failed", email, address, row["organisation_id"] if row else None)
                raise refusal(InvalidCredentials, "e-mail or password is wrong")
            stored = row["password"]
            if not (row["must_change_password"] and not new_password):
                rehash = new_password or (password if self._passwords.outdated(stored) else "")
                fresh = await self._passwords.hash(rehash) if rehash else stored
        async with self._pool.acquire() as connection:
            if row["must_change_password"] and not new_password:
                async with connection.transaction():
                    await throttle.passed(connection, email, row["id"], address, was_known=known)
                raise refusal(
                    PasswordChangeRequired, "this password is for the first login only: send new_password with it"
                )
            return await self._begin(
                connection, email, stored, fresh, changed=bool(new_password), address=address, known=known
            )

    async def _attempt(self, email: str, address: str) -> tuple[Any, bool]:
        """Counts the attempt and reads the user, None when there is none, and whether the address is known of it.

        Raises AccountLocked.
        """
        async with self._pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                row = await connection.fetchrow(_USER, email)
                known = await throttle.known(connection, row["id"] if row else None, address)
                wait_s = await self._throttle.attempt(connection, email, address, known=known)
            except BaseException:
                await transaction.rollback()
                raise
            await (transaction.rollback() if wait_s else transaction.commit())
        if not wait_s:
            return row, known
        await self._refusals.note("login.throttled", email, address, row["organisation_id"] if row else None)
        pause_s = throttle.seconds(wait_s)
        error = refusal(AccountLocked, f"too many wrong passwords: try again in {pause_s} s")
        error.retry_after_s = pause_s
        raise error

    async def _begin(
        self, connection: Any, email: str, stored: str, fresh: str, *, changed: bool, address: str, known: bool
    ) -> Issued:
        """The session, if the user is still what was read before the hash was checked."""
        async with connection.transaction():
            row = await connection.fetchrow(_USER + " FOR NO KEY UPDATE OF u", email)
            if row is None or row["password"] != stored:
                raise refusal(InvalidCredentials, "e-mail or password is wrong")
            await throttle.passed(connection, email, row["id"], address, was_known=known)
            if not row["refused"]:
                if fresh != stored:
                    await connection.execute("UPDATE users SET password = $2 WHERE id = $1", row["id"], fresh)
                if changed:
                    await self._changed(connection, email, row, address)
                return await self._sessions.begin(connection, row["id"], "password", address)
        await self._refusals.note("login.refused", email, address, row["organisation_id"])
        raise refusal(PermissionDenied, "this account is disabled; ask an administrator")

    async def _changed(self, connection: Any, email: str, row: Any, address: str) -> None:
        """A new password ends what was begun with the old one."""
        await connection.execute("UPDATE users SET must_change_password = false WHERE id = $1", row["id"])
        ended = await sessions.end_all(connection, row["id"])
        detail = {"sessions_ended": ended}
        await audit.record(
            connection, anonymous(email, address), "user.password", email, row["organisation_id"], detail
        )
