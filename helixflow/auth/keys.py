"""API keys: `hf-`, 256 random bits, a checksum.

A gateway refuses what is not well-formed without asking anybody, and sends SHA-256 of the rest. The database holds
HMAC-SHA256(pepper, SHA-256(key)): neither a gateway's traffic nor a copy of the database gives a key away.
"""

import hashlib
import secrets
import zlib

PREFIX = "hf-"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SECRET_BYTES = 32
SECRET_CHARS = 43
"""Characters that 256 bits take in base 62: ceil(256 / log2(62))."""

CHECK_CHARS = 6
"""Characters that 32 bits take in base 62."""

LENGTH = len(PREFIX) + SECRET_CHARS + CHECK_CHARS
SHOWN_CHARS = len(PREFIX) + 6
"""What is kept of a key to tell it from others by; 220 unknown bits stay."""

_ALLOWED = frozenset(ALPHABET.encode())


def base62(value: int, width: int) -> str:
    """`value` in base 62, `width` characters, the highest first."""
    digits = []
    for _ in range(width):
        value, digit = divmod(value, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def make() -> str:
    """A new key."""
    text = PREFIX + base62(int.from_bytes(secrets.token_bytes(SECRET_BYTES)), SECRET_CHARS)
    return text + _checksum(text.encode())


def well_formed(key: bytes) -> bool:
    """Whether the format and the checksum are those of an issued key. Says nothing about whether it exists."""
    return (
        len(key) == LENGTH
        and key.startswith(PREFIX.encode())
        and _ALLOWED.issuperset(key[len(PREFIX) :])
        and key[-CHECK_CHARS:] == _checksum(key[:-CHECK_CHARS]).encode()
    )


def presented(key: bytes) -> bytes:
    """What a gateway sends of a key (32 bytes)."""
    return hashlib.sha256(key).digest()


def shown(key: str) -> str:
    """The beginning of a key, for people."""
    return key[:SHOWN_CHARS]


def _checksum(text: bytes) -> str:
    return base62(zlib.crc32(text), CHECK_CHARS)
