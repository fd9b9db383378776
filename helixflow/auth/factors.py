"""Second factors: codes of an authenticator (TOTP, RFC 6238), and recovery codes for when it is lost.

Secrets are encrypted under a key derived from the pepper, recovery codes stored as HMACs: a copy of the database gives
neither away.
"""

import base64
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP

from helixflow.auth.pepper import Pepper
from helixflow.core_rs import InvalidRequest
from helixflow.refusals import refusal

STEP_S = 30
DIGITS = 6
SECRET_BYTES = 20
"""What every authenticator understands: SHA-1 (RFC 4226 asks for no more), 6 digits, 30 s."""

SKEW_STEPS = 1
"""Codes of the step before and of the one after are taken too: clocks differ (RFC 6238, 5.2)."""

RECOVERY_CODES = 10
RECOVERY_BYTES = 10
"""80 random bits: nothing that needs a slow hash."""

NONCE_BYTES = 12
TOTP_CODE, RECOVERY_CODE = "totp", "recovery code"

REQUIRED = """(o.factor_from <> '' AND NOT u.service_account AND array_position('{viewer,member,admin,owner}', u.role)
    >= array_position('{viewer,member,admin,owner}', o.factor_from))"""
"""Of a user `u` in an organisation `o`: whether a password needs a second factor beside it."""

MISSING = f"({REQUIRED} AND f.secret IS NULL)"
"""With the factor `f`, if there is one: whether it is needed and not there."""

_TOTP = re.compile(r"[0-9]{6}")
_RECOVERY = re.compile(r"[a-z2-7]{16}")


@dataclass(frozen=True, slots=True)
class Enrolment:
    """A new factor, for the authenticator: base32, and a URI for the QR code."""

    secret: str = field(repr=False)
    uri: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Used:
    """What somebody has shown. `left`: recovery codes that are left."""

    kind: str
    left: int


class Factors:
    """Makes, confirms, checks and removes them, in the caller's transaction."""

    def __init__(self, pepper: Pepper, issuer: str, clock: Callable[[], float] = time.time) -> None:
        """`issuer`: what authenticators show beside the e-mail."""
        self._box = AESGCM(pepper.derive("second-factor"))
        self._recovery = pepper.derive("recovery-code")
        self._issuer = issuer
        self._clock = clock

    async def enrol(self, connection: Any, user_id: UUID, email: str) -> Enrolment:
        """A new secret, which does not count before it is confirmed; another one that was not is forgotten."""
        secret = secrets.token_bytes(SECRET_BYTES)
        await connection.execute(
            "INSERT INTO second_factors (user_id, pending) VALUES ($1, $2) "
            "ON CONFLICT (user_id) DO UPDATE SET pending = excluded.pending",
            user_id,
            self._seal(user_id, secret),
        )
        uri = _totp(secret).get_provisioning_uri(email, self._issuer)
        return Enrolment(base64.b32encode(secret).decode(), uri)

    async def confirm(self, connection: Any, user_id: UUID, code: str) -> list[str] | None:
        """Puts the new secret in the place of the old one. Returns new recovery codes; None when the code is wrong.

        Raises InvalidRequest when there is nothing to confirm.
        """
        row = await _locked(connection, user_id)
        if row is None or row["pending"] is None:
            raise refusal(InvalidRequest, "there is no second factor to confirm: begin with its enrolment")
        step = self._step(self._open(user_id, row["pending"]), code, 0)
        if step is None:
            return None
        await connection.execute(
            "UPDATE second_factors SET secret = pending, pending = NULL, last_step = $2, confirmed_at = now() "
            "WHERE user_id = $1",
            user_id,
            step,
        )
        return await self._new_recovery_codes(connection, user_id)

    async def check(self, connection: Any, user_id: UUID, code: str) -> Used | None:
        """Whether the code is right now; it is used up. None when it is wrong, or was used before."""
        code = "".join(code.split()).replace("-", "").lower()
        if _TOTP.fullmatch(code):
            row = await _locked(connection, user_id)
            if row is None or row["secret"] is None:
                return None
            step = self._step(self._open(user_id, row["secret"]), code, row["last_step"])
            if step is None:
                return None
            await connection.execute("UPDATE second_factors SET last_step = $2 WHERE user_id = $1", user_id, step)
            return Used(TOTP_CODE, await _left(connection, user_id))
        used = _RECOVERY.fullmatch(code) and await connection.fetchval(
            "UPDATE recovery_codes SET used_at = now() WHERE digest = $1 AND user_id = $2 AND used_at IS NULL "
            "RETURNING true",
            self._digest(user_id, code),
            user_id,
        )
        return Used(RECOVERY_CODE, await _left(connection, user_id)) if used else None

    async def _new_recovery_codes(self, connection: Any, user_id: UUID) -> list[str]:
        await connection.execute("DELETE FROM recovery_codes WHERE user_id = $1", user_id)
        made = [base64.b32encode(secrets.token_bytes(RECOVERY_BYTES)).decode().lower() for _ in range(RECOVERY_CODES)]
        await connection.execute(
            "INSERT INTO recovery_codes (digest, user_id) SELECT digest, $2 FROM unnest($1::bytea[]) AS digest",
            [self._digest(user_id, code) for code in made],
            user_id,
        )
        return ["-".join(code[start : start + 4] for start in range(0, len(code), 4)) for code in made]

    def _step(self, secret: bytes, code: str, after: int) -> int | None:
        """The step that the code belongs to: near now, and later than `after`."""
        now, totp = int(self._clock()) // STEP_S, _totp(secret)
        for step in range(max(now - SKEW_STEPS, after + 1), now + SKEW_STEPS + 1):
            if hmac.compare_digest(totp.generate(step * STEP_S), code.encode()):
                return step
        return None

    def _seal(self, user_id: UUID, secret: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._box.encrypt(nonce, secret, user_id.bytes)

    def _open(self, user_id: UUID, sealed: bytes) -> bytes:
        try:
            return self._box.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], user_id.bytes)
        except InvalidTag:
            raise refusal(
                InvalidRequest,
                "the second factor of this account cannot be read: it belongs to another pepper or another user; "
                "an administrator can reset it",
            ) from None

    def _digest(self, user_id: UUID, code: str) -> bytes:
        return hmac.digest(self._recovery, user_id.bytes + code.encode(), "sha256")


async def remove(connection: Any, user_id: UUID) -> bool:
    """Removes a user's factor and recovery codes. True when there was a confirmed one."""
    await connection.execute("DELETE FROM recovery_codes WHERE user_id = $1", user_id)
    return bool(
        await connection.fetchval(
            "DELETE FROM second_factors WHERE user_id = $1 RETURNING confirmed_at IS NOT NULL", user_id
        )
    )


async def _locked(connection: Any, user_id: UUID) -> Any:
    return await connection.fetchrow("SELECT * FROM second_factors WHERE user_id = $1 FOR UPDATE", user_id)


async def _left(connection: Any, user_id: UUID) -> int:
    left: int = await connection.fetchval(
        "SELECT count(*) FROM recovery_codes WHERE user_id = $1 AND used_at IS NULL", user_id
    )
    return left


def _totp(secret: bytes) -> TOTP:
    return TOTP(secret, DIGITS, SHA1(), STEP_S)  # noqa: S303 - as HMAC
