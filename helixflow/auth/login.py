"""Login with e-mail and password, and a second factor where there is one."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from helixflow.auth import audit, fields, held_keys, passwords, sessions, throttle, weak
from helixflow.auth.actors import anonymous
from helixflow.auth.factors import MISSING, RECOVERY_CODE, Factors, Used
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
    SecondFactorMissing,
    SecondFactorRequired,
)
from helixflow.db.pool import Pool
from helixflow.refusals import refusal

_USER = f"""
SELECT u.id, u.password, u.must_change_password, u.organisation_id, o.name AS organisation,
    u.disabled OR o.suspended AS refused, u.must_change_password AND u.password_expires_at <= now() AS expired,
    f.secret IS NOT NULL AS factor, {MISSING} AS factor_missing
FROM users u JOIN organisations o ON o.id = u.organisation_id LEFT JOIN second_factors f ON f.user_id = u.id
WHERE u.email = $1 AND NOT u.service_account AND u.deleted_at IS NULL
"""  # noqa: S608 - the text above


@dataclass(frozen=True, slots=True)
class Proven:
    """Somebody who knows the password of a user who may log in, from an address. `stored`: its hash."""

    email: str
    address: str
    user_id: UUID
    organisation_id: UUID
    organisation: str
    stored: str = field(repr=False)
    must_change: bool
    factor: bool
    known: bool


@dataclass(frozen=True, slots=True)
class Change:
    """A new password. `keys`: `keep` or `revoke`, what becomes of the user's API keys."""

    password: str = field(repr=False)
    keys: str


class Login:
    """Checks passwords and codes. No connection is held while one is being hashed."""

    def __init__(
        self,
        pool: Pool,
        hashes: Passwords,
        rules: Throttle,
        begun: Sessions,
        refused: Refusals,
        *,
        factors: Factors,
        on_change: Callable[[str], None] = lambda _email: None,
    ) -> None:
        """`on_change`: called with the e-mail of whoever has a new password."""
        self._pool = pool
        self._passwords = hashes
        self._throttle = rules
        self._sessions = begun
        self._refusals = refused
        self._factors = factors
        self._on_change = on_change

    async def login(
        self, email: str, password: str, new_password: str, address: str, *, code: str = "", keys: str = ""
    ) -> Issued:
        """Tokens for a password; `new_password`, unless empty, replaces it.

        Raises InvalidCredentials (alike for unknown names), AccountLocked (after wrong ones: wait), InvalidRequest,
        QueueFull; and, only to who knows the password, PasswordChangeRequired, SecondFactorRequired (send `code`),
        SecondFactorMissing (enrol one first), PermissionDenied (disabled, expired).
        """
        email = fields.email(email)
        change = Change(new_password, keys) if new_password else None
        if change is not None:
            passwords.acceptable(new_password)
            if new_password == password:
                raise refusal(InvalidRequest, "new_password must differ from the old one", "new_password")
        async with self._passwords.turn(address):
            who = await self.prove(email, password, address)
            if who.must_change and change is None:
                raise refusal(
                    PasswordChangeRequired, "this password is for the first login only: send new_password with it"
                )
            if change is not None:
                await self._check_change(who, change)
            used = await self.show(who, code) if who.factor else None
            rehash = new_password or (password if self._passwords.outdated(who.stored) else "")
            fresh = await self._passwords.hash(rehash) if rehash else who.stored
        return await self._begin(who, fresh, change, used)

    async def prove(self, email: str, password: str, address: str) -> Proven:
        """Checks a password; the caller holds a turn. Whoever has a second factor is not let in by that alone.

        Raises InvalidCredentials, AccountLocked, PermissionDenied.
        """
        row, known = await self._attempt(email, address)
        if not await self._passwords.matches(row["password"] if row else None, password):
            await self._refusals.note("login.failed", email, address, row["organisation_id"] if row else None)
            raise refusal(InvalidCredentials, "e-mail or password is wrong")
        if not row["factor"]:
            async with self._pool.acquire() as connection, connection.transaction():
                await throttle.passed(connection, email, row["id"], address, was_known=known)
        if row["refused"] or row["expired"]:
            await self._refusals.note("login.refused", email, address, row["organisation_id"])
            why = "this account is disabled" if row["refused"] else "this one-time password has expired"
            raise refusal(PermissionDenied, f"{why}; ask an administrator")
        return Proven(
            email=email,
            address=address,
            user_id=row["id"],
            organisation_id=row["organisation_id"],
            organisation=row["organisation"],
            stored=row["password"],
            must_change=row["must_change_password"],
            factor=row["factor"],
            known=known,
        )

    async def show(self, who: Proven, code: str) -> Used:
        """Uses up a code of the second factor. Raises SecondFactorRequired, AccountLocked, InvalidCredentials."""
        if not code:
            await self._refusals.note("login.unfinished", who.email, who.address, who.organisation_id)
            raise refusal(
                SecondFactorRequired, "code: send the code of your authenticator, or a recovery code, as well", "code"
            )
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                await self._throttle.code(connection, who.email)
                used = await self._factors.check(connection, who.user_id, code)
                if used is not None:
                    await throttle.passed(connection, who.email, who.user_id, who.address, was_known=who.known)
        except AccountLocked:
            await self._refusals.note("login.throttled", who.email, who.address, who.organisation_id)
            raise
        if used is None:
            await self._refusals.note("login.failed", who.email, who.address, who.organisation_id)
            raise refusal(InvalidCredentials, "the code is wrong, or was used before", "code")
        return used

    async def _attempt(self, email: str, address: str) -> tuple[Any, bool]:
        """Counts the attempt and reads the user, None when there is none, and whether the address is known of it.

        Raises AccountLocked.
        """
        row = None
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                row = await connection.fetchrow(_USER, email)
                known = await throttle.known(connection, row["id"] if row else None, address)
                await self._throttle.attempt(connection, email, address, known=known)
        except AccountLocked:
            await self._refusals.note("login.throttled", email, address, row["organisation_id"] if row else None)
            raise
        return row, known

    async def _check_change(self, who: Proven, change: Change) -> None:
        """Raises InvalidRequest for a password that is guessed first, and when `keys` does not say what it must."""
        if await self._passwords.weak(change.password, weak.expected(who.email, who.organisation)):
            raise refusal(
                InvalidRequest,
                "new_password is one that is guessed first: common, a pattern, or made of your address; choose another",
                "new_password",
            )
        async with self._pool.acquire() as connection:
            await held_keys.check(connection, who.user_id, change.keys)

    async def _begin(self, who: Proven, fresh: str, change: Change | None, used: Used | None) -> Issued:
        """The session, if the user is still what was read before the hash was checked."""
        outcome: dict[str, Any] = {}
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(_USER + " FOR NO KEY UPDATE OF u", who.email)
            if row is None or row["password"] != who.stored or row["refused"]:
                raise refusal(InvalidCredentials, "e-mail or password is wrong")
            if fresh != who.stored:
                await connection.execute("UPDATE users SET password = $2 WHERE id = $1", who.user_id, fresh)
            if change is not None:
                outcome = await _changed(connection, who, change)
            issued = None
            if not row["factor_missing"]:
                issued = await self._sessions.begin(
                    connection, who.user_id, "password", who.address, factor=used.kind if used else ""
                )
        if change is not None:
            self._on_change(who.email)
        if issued is None:
            raise refusal(
                SecondFactorMissing,
                "your organisation asks for a second factor: enrol one first, at POST /auth/v1/second-factor",
            )
        if used is not None and used.kind == RECOVERY_CODE:
            outcome["recovery_codes_left"] = used.left
        return dataclasses.replace(issued, **outcome)


async def _changed(connection: Any, who: Proven, change: Change) -> dict[str, int]:
    """A new password ends the sessions that were begun with the old one; of the keys the user has decided."""
    await connection.execute(
        "UPDATE users SET must_change_password = false, password_expires_at = NULL WHERE id = $1", who.user_id
    )
    outcome = {
        "sessions_ended": await sessions.end_all(connection, who.user_id),
        **await held_keys.settle(connection, who.user_id, change.keys),
    }
    actor = anonymous(who.email, who.address)
    await audit.record(connection, actor, "user.password", who.email, who.organisation_id, outcome)
    return outcome
