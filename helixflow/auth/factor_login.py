"""Enrolling, confirming and removing one's own second factor: with the password, not with a session."""

from helixflow.auth import audit, factors, fields, sessions, throttle
from helixflow.auth.actors import anonymous
from helixflow.auth.factors import Enrolment, Factors
from helixflow.auth.login import Login, Proven
from helixflow.auth.passwords import Passwords
from helixflow.auth.refusals import Refusals
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

_REQUIRED = f"""
SELECT {factors.REQUIRED} FROM users u JOIN organisations o ON o.id = u.organisation_id WHERE u.id = $1
"""  # noqa: S608 - the text above


class FactorLogin:
    """What people do with their own second factor. Every act raises what `Login.prove` and `Login.show` raise."""

    def __init__(
        self, pool: Pool, hashes: Passwords, way: Login, made: Factors, rules: Throttle, refused: Refusals
    ) -> None:
        self._pool = pool
        self._passwords = hashes
        self._login = way
        self._factors = made
        self._throttle = rules
        self._refusals = refused

    async def enrol(self, email: str, password: str, code: str, address: str) -> Enrolment:
        """A new secret, which counts once it is confirmed. `code`: of the factor there is. Raises
        PasswordChangeRequired for a one-time password.
        """
        who = await self._proven(email, password, address)
        if who.factor:
            await self._login.show(who, code)
        async with self._pool.acquire() as connection, connection.transaction():
            made = await self._factors.enrol(connection, who.user_id, who.email)
            await self._record(connection, who, "user.factor_enrol")
        return made

    async def confirm(self, email: str, password: str, code: str, address: str) -> list[str]:
        """Makes the new secret count; returns the recovery codes. All sessions end: they were begun without it.

        Raises InvalidRequest when there is nothing to confirm, InvalidCredentials for a wrong code.
        """
        who = await self._proven(email, password, address)
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                await self._throttle.code(connection, who.email)
                codes = await self._factors.confirm(connection, who.user_id, code)
                if codes is not None:
                    await throttle.passed(connection, who.email, who.user_id, address, was_known=who.known)
                    ended = await sessions.end_all(connection, who.user_id)
                    await self._record(connection, who, "user.factor_confirm", {"sessions_ended": ended})
        except AccountLocked:
            await self._refusals.note("login.throttled", who.email, address, who.organisation_id)
            raise
        if codes is None:
            await self._refusals.note("login.failed", who.email, address, who.organisation_id)
            raise refusal(InvalidCredentials, "the code is wrong: is the clock of the authenticator right?", "code")
        return codes

    async def remove(self, email: str, password: str, code: str, address: str) -> None:
        """Goes back to the password alone. Raises InvalidRequest without a factor, PermissionDenied where one is
        required.
        """
        who = await self._proven(email, password, address)
        if not who.factor:
            raise refusal(InvalidRequest, "this account has no second factor")
        async with self._pool.acquire() as connection:
            if await connection.fetchval(_REQUIRED, who.user_id):
                raise refusal(
                    PermissionDenied, "your organisation asks for a second factor: enrol another in its place"
                )
        await self._login.show(who, code)
        async with self._pool.acquire() as connection, connection.transaction():
            await factors.remove(connection, who.user_id)
            ended = await sessions.end_all(connection, who.user_id)
            await self._record(connection, who, "user.factor_remove", {"sessions_ended": ended})

    async def _proven(self, email: str, password: str, address: str) -> Proven:
        async with self._passwords.turn(address):
            who = await self._login.prove(fields.email(email), password, address)
        if who.must_change:
            raise refusal(PasswordChangeRequired, "this password is for the first login only: change it first")
        return who

    async def _record(self, connection: object, who: Proven, action: str, detail: dict[str, int] | None = None) -> None:
        actor = anonymous(who.email, who.address)
        await audit.record(connection, actor, action, who.email, who.organisation_id, detail)
