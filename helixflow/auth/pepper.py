"""The pepper: the secret that every stored digest depends on, in one file that is not in the database."""

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from helixflow.auth.errors import PepperError
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
    elif not hmac.compare_digest(known, pepper.check()):
        raise PepperError(
            f"{path} (auth.pepper) is not the file that the keys of this database were made with. All auth-services of "
            f"a database need the same one.{_LOST}"
        )
    return pepper


_LOST = (
    " If it is lost for good, every API key and session is: `UPDATE helixflow.meta SET pepper_check = NULL` lets the "
    "next start go on without them"
)


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
