"""Who calls: API keys, looked up by digest."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from helixflow.config import DEVELOPMENT_KEY, Config
from helixflow.core_rs import InvalidApiKey
from helixflow.gateway.errors import refusal
from helixflow.gateway.http import Request
from helixflow.options import StaticKey

MAX_KEY_BYTES = 512
"""Longest key that is looked at; issued keys have some 46 characters."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The holder of a key. `name` is safe to log; the key never is."""

    name: str


class KeyStore(Protocol):
    """Where keys are known. The auth-service implements it; until then the configuration does."""

    async def verify(self, key: bytes) -> Principal | None:
        """The holder of the key, or None when it is unknown."""


class StaticKeys:
    """The keys of the configuration: SHA-256 of each, in hex.

    The lookup compares digests only: its timing tells nothing about a key that the caller does not have.
    """

    def __init__(self, keys: Iterable[StaticKey], development: bool = False) -> None:
        """`development`: also knows the public key of that profile."""
        self._holders = {key.sha256: Principal(key.name) for key in keys}
        if development:
            self._holders[hashlib.sha256(DEVELOPMENT_KEY.encode()).hexdigest()] = Principal("development")

    @classmethod
    def of(cls, config: Config) -> "StaticKeys":
        """The keys of this configuration."""
        return cls(config.gateway.keys, config.development)

    async def verify(self, key: bytes) -> Principal | None:
        """The holder of the key, or None when it is unknown."""
        return self._holders.get(hashlib.sha256(key).hexdigest())


def bearer(header: bytes | None) -> bytes:
    """The key of an `Authorization` header. Raises InvalidApiKey when there is none."""
    if header is None:
        raise refusal(InvalidApiKey, "no API key: send the header `Authorization: Bearer YOUR_KEY`")
    scheme, _, key = header.partition(b" ")
    key = key.strip()
    if scheme.lower() != b"bearer" or not key:
        raise refusal(InvalidApiKey, "the Authorization header must read `Bearer YOUR_KEY`")
    return key


async def authenticate(request: Request, store: KeyStore) -> None:
    """Finds the caller and notes the name in the request. Raises InvalidApiKey."""
    key = bearer(request.headers.get(b"authorization"))
    principal = await store.verify(key) if len(key) <= MAX_KEY_BYTES else None
    if principal is None:
        raise refusal(InvalidApiKey, "the API key is not valid")
    request.principal = principal.name
