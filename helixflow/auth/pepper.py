"""The pepper: the secret that every stored digest depends on, in one file that is not in the database."""

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from helixflow.auth.errors import PepperError
from helixflow.ledger import lost
from helixflow.ledger.chain import chain_key
from helixflow.pki import files
from helixflow.pki.errors import PkiError

BYTES = 32
LOCK = 0x48656C6978_02
"""Key of the advisory lock of first starts: "Helix", then 02."""


class Pepper:
    """32 secret bytes and what is derived from them. Has no representation that shows them."""

    __slots__ = ("_refresh", "_secret", "_state")

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError unless there are 32 bytes."""
        if len(secret) != BYTES:
            raise ValueError(f"a pepper has {BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self._refresh = self.derive("refresh-token")
        self._state = self.derive("oidc-state")

    def derive(self, label: str) -> bytes:
        """A 32-byte key for one purpose (HKDF-SHA256, RFC 5869)."""
        return HKDF(hashes.SHA256(), BYTES, salt=None, info=f"helixflow {label}".encode()).derive(self._secret)

    def key_digest(self, presented: bytes) -> bytes:
        """What the database stores of an API key; `presented`: SHA-256 of it."""
        return hmac.digest(self._secret, presented, "sha256")

    def refresh_digest(self, token: str) -> bytes:
        """What the database stores of a refresh token."""
        return hmac.digest(self._refresh, token.encode(), "sha256")

    def state_secret(self, purpose: str, state: str) -> bytes:
        """32 bytes that belong to one login through a provider, for `purpose`."""
        return hmac.digest(self._state, f"{purpose} {state}".encode(), "sha256")

    def ledger_key(self) -> bytes:
        """The key of the ledger's hash chains."""
        return chain_key(self._secret)

    def check(self) -> bytes:
        """Tells whether another pepper is the same, and nothing more."""
        return hashlib.sha256(self.derive("check")).digest()


async def open_pepper(connection: Any, path: Path) -> Pepper:
    """The pepper of this database, in a transaction; the first start of a fresh database makes the file.

    Several starting at once wait for each other. Raises PepperError when the file is missing, unsafe or another one.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
    known: bytes | None = await connection.fetchval("SELECT pepper_check FROM meta")
    pepper = _read(path)
    if pepper is None:
        if known is not None:
            raise PepperError(
                f"{path} (auth.pepper) is missing, but the database has keys made with it. Put the file back from a "
                f"backup, or copy it from the machine of another auth-service.{_LOST}"
            )
        pepper = _make(path)
    if known is None:
        await connection.execute("UPDATE meta SET pepper_check = $1", pepper.check())
        await lost.begin(connection, pepper.ledger_key())
    elif not hmac.compare_digest(known, pepper.check()):
        raise PepperError(
            f"{path} (auth.pepper) is not the file that the keys of this database were made with. All auth-services of "
            f"a database need the same one.{_LOST}"
        )
    return pepper


_LOST = (
    " If it is lost for good, so are every API key and session: stop the auth-service and run `helixflow db "
    "forget-pepper --revoke-all-keys`; the next start goes on with a new one"
)


async def forget(connection: Any, path: Path) -> tuple[int, int]:
    """Gives a lost pepper up, in a transaction: the next start makes another. Returns how many keys and sessions end.

    What was made with the lost one never works again; so that no list shows it as if it did, it is revoked. The chains
    of ledger and audit log end here, and go on with the next one. Raises
    PepperError while the pepper is not lost: its file is there, or an auth-service runs that has it.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
    known: bytes | None = await connection.fetchval("SELECT pepper_check FROM helixflow.meta")
    if known is None:
        raise PepperError("this database has no pepper to forget: the next start makes one")
    try:
        there = _read(path)
    except PepperError as error:
        raise PepperError(f"{error}. When there is no copy, move it out of the way first") from None
    if there is not None and hmac.compare_digest(known, there.check()):
        raise PepperError(f"{path} (auth.pepper) is the pepper of this database: nothing is lost")
    if await connection.fetchval(_USED):
        raise PepperError("an auth-service is connected to this database and has the pepper still: stop it first")
    await connection.execute("UPDATE helixflow.meta SET pepper_check = NULL")
    await lost.forget(connection)
    keys: int = await connection.fetchval(_REVOKE_KEYS)
    sessions: int = await connection.fetchval(_END_SESSIONS)
    return keys, sessions


_USED = """
SELECT EXISTS (
    SELECT FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'helixflow auth-service%'
)
"""
_REVOKE_KEYS = """
WITH ended AS (UPDATE helixflow.api_keys SET revoked_at = now() WHERE revoked_at IS NULL RETURNING 1)
SELECT count(*) FROM ended
"""
_END_SESSIONS = """
WITH ended AS (UPDATE helixflow.sessions SET revoked_at = now() WHERE revoked_at IS NULL RETURNING 1)
SELECT count(*) FROM ended
"""


def _read(path: Path) -> Pepper | None:
    if not path.exists():
        return None
    try:
        content = files.read_private(path)
    except PkiError as error:
        raise PepperError(str(error)) from None
    if len(content) != BYTES:
        raise PepperError(f"{path} (auth.pepper) has {len(content)} bytes, not {BYTES}: put a copy of it back")
    return Pepper(content)


def _make(path: Path) -> Pepper:
    content = secrets.token_bytes(BYTES)
    try:
        with files.locked(path.parent):
            files.write(path, content, private=True, replace=False)
    except PkiError as error:
        raise PepperError(str(error)) from None
    return Pepper(content)
