"""Access tokens: JWTs (RFC 7519) signed RS256 with the key pair of `helixflow pki`.

The table `signing_keys` holds the public half of every key that a valid token may be signed with, of all auth-services:
a token outlives the key that signed it. A changed key file is noticed while the service runs.
"""

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey

from helixflow import log
from helixflow.auth.errors import SigningKeyError, database_errors
from helixflow.auth.fields import as_uuid
from helixflow.config import AuthConfig
from helixflow.core_rs import CoreError, InvalidToken, Unavailable
from helixflow.db.pool import Pool
from helixflow.pki import keys
from helixflow.pki.errors import PkiError
from helixflow.refusals import refusal

ALGORITHM = "RS256"
AUDIENCE = "helixflow"
TYPE = "JWT"
LEAST_BITS = 4096
LONGEST_TOKEN = 4096
"""Issued ones have about 1000 characters."""

CLOCK_SKEW_S = 60
"""Clocks of several auth-services may differ by this much."""

REGISTERED_S = 3600
"""A key is registered for this long ahead (seconds), and anew when half of that is over."""

RELOAD_S = 0.25
"""Tokens whose key is not known here wait until all keys are read again, which is done this seldom (seconds)."""

WATCH_S = 1.0
_KID = re.compile(r"[A-Za-z0-9_-]{43}")
"""SHA-256 in base64url."""

_CLAIMS = {"iss", "aud", "sub", "sid", "iat", "exp", "jti"}

logger = log.get("auth")


@dataclass(frozen=True, slots=True)
class Access:
    """What a valid access token says."""

    user_id: UUID
    session_id: UUID
    expires_at: int


@dataclass(frozen=True, slots=True)
class Current:
    """The key that signs, and the state of the file it came from."""

    key: RSAKey
    kid: str
    stamp: tuple[int, int, int]


class Signer:
    """Signs and checks access tokens."""

    def __init__(self, path: Path, options: AuthConfig, current: Current) -> None:
        """Use `Signer.open`."""
        self._path = path
        self._options = options
        self._current = current
        self._registered_until = 0.0
        self._public: dict[str, RSAKey] = {}
        self._reading: asyncio.Task[None] | None = None
        self._read_at = float("-inf")

    @classmethod
    async def open(cls, connection: Any, path: Path, options: AuthConfig) -> "Signer":
        """Loads the private key and registers it. Raises SigningKeyError when it cannot be used."""
        signer = cls(path, options, await asyncio.to_thread(_load, path))
        await signer._register(connection, signer._current)
        return signer

    @property
    def kid(self) -> str:
        """Of the key that signs now: its thumbprint (RFC 7638)."""
        return self._current.kid

    def issue(self, user_id: UUID, session: UUID) -> str:
        """A new access token. Raises Unavailable when the key could not be registered for as long as it would live."""
        current, now = self._current, int(time.time())
        expires = now + self._options.access_ttl_s
        if expires > self._registered_until:
            raise refusal(
                Unavailable, "no access token can be signed before the database has answered again; try again"
            )
        claims = {
            "iss": self._options.issuer,
            "aud": AUDIENCE,
            "sub": str(user_id),
            "sid": str(session),
            "iat": now,
            "exp": expires,
            "jti": str(uuid4()),
        }
        header = {"alg": ALGORITHM, "kid": current.kid, "typ": TYPE}
        return jwt.encode(header, claims, current.key, algorithms=[ALGORITHM])

    async def access(self, pool: Pool, token: str) -> Access:
        """As `check`. A forged token costs no connection, and many with unknown keys cost one together.

        Raises InvalidToken, or the database's errors when the key is not known here.
        """
        found = self._known(token)
        if found is None:
            await self._reload(pool)
            found = self._known(token)
        if found is None:
            raise _refused("its key is unknown")
        return found

    async def check(self, connection: Any, token: str) -> Access:
        """Checks signature and claims; the caller checks session and user. Raises InvalidToken."""
        found = self._known(token)
        if found is None:
            await self._load_public(connection)
            found = self._known(token)
        if found is None:
            raise _refused("its key is unknown")
        return found

    def _known(self, token: str) -> Access | None:
        """What a token says; None when its key is not known here. Raises InvalidToken."""
        if len(token) > LONGEST_TOKEN or not token.isascii():
            raise _refused("it is not one of ours")
        try:
            header = jws.extract_compact(token.encode()).headers()
        except (JoseError, ValueError, TypeError):
            raise _refused("it is not one of ours") from None
        # Before any key is looked for: with another algorithm a public key could pass for a secret.
        kid = header.get("kid")
        ours = header.get("alg") == ALGORITHM and header.get("typ") == TYPE
        if not ours or not isinstance(kid, str) or not _KID.fullmatch(kid):
            raise _refused("it is not one of ours")
        key = self._public.get(kid)
        if key is None:
            return None
        try:
            claims = jwt.decode(token, key, algorithms=[ALGORITHM]).claims
        except (JoseError, ValueError, TypeError):
            raise _refused("its signature is wrong") from None
        return _checked(claims, self._options, time.time())

    async def jwks(self, connection: Any) -> bytes:
        """The document of /.well-known/jwks.json: every key that a valid token may be signed with."""
        rows = await connection.fetch(
            "SELECT kid, jwk FROM signing_keys WHERE expires_at > now() ORDER BY created_at, kid"
        )
        found = {row["kid"]: orjson.loads(row["jwk"]) for row in rows}
        found.setdefault(self._current.kid, _public(self._current))
        return orjson.dumps({"keys": list(found.values())})

    async def watch(self, pool: Pool) -> None:
        """Takes up a changed key file within a second, and keeps the key registered. Never returns.

        Until a changed file can be used, the old key goes on.
        """
        told = ""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self.look(pool)
                told = ""
            except (SigningKeyError, CoreError) as error:
                if str(error) != told:
                    told = str(error)
                    logger.error("the key of access tokens cannot be renewed yet; the old one goes on", error=told)

    async def look(self, pool: Pool) -> None:
        """One round of `watch`. Raises SigningKeyError, or Unavailable without a database."""
        stamp = await asyncio.to_thread(_stamp, self._path)
        fresh = self._current if stamp == self._current.stamp else await asyncio.to_thread(_load, self._path)
        changed = fresh.kid != self._current.kid
        due = time.time() + self._options.access_ttl_s + REGISTERED_S / 2
        if changed or due > self._registered_until:
            with database_errors():
                async with pool.acquire() as connection:
                    await self._register(connection, fresh)
        self._current = fresh
        if changed:
            logger.info("access tokens are signed with a new key", kid=fresh.kid)

    async def _register(self, connection: Any, current: Current) -> None:
        """Makes the public half known, before the first token is signed and for as long as the last one may live.

        Not in the transaction of a login: when that is rolled back, tokens signed meanwhile would lose their key.
        """
        until = time.time() + self._options.access_ttl_s + REGISTERED_S
        await connection.execute(
            "INSERT INTO signing_keys (kid, jwk, expires_at) VALUES ($1, $2::jsonb, to_timestamp($3)) "
            "ON CONFLICT (kid) DO UPDATE SET expires_at = greatest(signing_keys.expires_at, excluded.expires_at)",
            current.kid,
            orjson.dumps(_public(current)).decode(),
            until,
        )
        self._registered_until = until

    async def _reload(self, pool: Pool) -> None:
        """Reads the registered keys. Callers share a reading that has not begun; one begins each RELOAD_S at most."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(pool))
            # Callers may all have gone when it fails.
            self._reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._reading)

    async def _read(self, pool: Pool) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.sleep(self._read_at + RELOAD_S - loop.time())
        finally:
            # A key that is registered from now on may be missed: who asks for it waits for the next reading.
            self._reading, self._read_at = None, loop.time()
        async with pool.acquire() as connection:
            await self._load_public(connection)

    async def _load_public(self, connection: Any) -> None:
        """Adds the registered keys. Those that were are remembered: a token that ended is refused for that."""
        for row in await connection.fetch("SELECT kid, jwk FROM signing_keys"):
            if row["kid"] not in self._public:
                self._public[row["kid"]] = RSAKey.import_key(orjson.loads(row["jwk"]))


def _checked(claims: dict[str, Any], options: AuthConfig, now: float) -> Access:
    """The claims of a token whose signature is right. Raises InvalidToken."""
    if missing := _CLAIMS - set(claims):
        raise _refused(f"it lacks {', '.join(sorted(missing))}")
    if claims["iss"] != options.issuer:
        raise _refused("another issuer made it")
    if claims["aud"] != AUDIENCE:
        raise _refused("it is meant for another audience")
    issued, expires = claims["iat"], claims["exp"]
    if type(issued) is not int or type(expires) is not int:
        raise _refused("its times are no whole numbers")
    if issued > now + CLOCK_SKEW_S:
        raise _refused("it comes from the future")
    if expires <= now:
        raise _refused("it has expired")
    user, session = as_uuid(str(claims["sub"])), as_uuid(str(claims["sid"]))
    if user is None or session is None or not isinstance(claims["jti"], str):
        raise _refused("its names are wrong")
    return Access(user, session, expires)


def _refused(reason: str) -> InvalidToken:
    return refusal(InvalidToken, f"the access token is not valid: {reason}")


def _public(current: Current) -> dict[str, Any]:
    return {**current.key.as_dict(private=False), "kid": current.kid, "use": "sig", "alg": ALGORITHM}


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        info = path.stat()
    except OSError as error:
        raise SigningKeyError(f"{path}: {error.strerror}") from None
    return info.st_mtime_ns, info.st_ino, info.st_size


def _load(path: Path) -> Current:
    # The stamp first: a file that changes meanwhile is then loaded once more, never missed.
    stamp = _stamp(path)
    try:
        private = keys.load_private(path)
    except PkiError as error:
        raise SigningKeyError(str(error)) from None
    if not isinstance(private, rsa.RSAPrivateKey) or private.key_size < LEAST_BITS:
        raise SigningKeyError(
            f"{path} is {keys.describe(private)}, not RSA-{LEAST_BITS}: `helixflow pki rotate-tokens` makes a new one"
        )
    key = RSAKey.import_key(private)
    return Current(key, key.thumbprint(), stamp)
