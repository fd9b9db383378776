"""Passwords of people: argon2id in threads, a few at a time."""

import asyncio
import contextlib
import secrets
import unicodedata
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from helixflow.auth import weak
from helixflow.auth.turns import Turns
from helixflow.core_rs import InvalidRequest
from helixflow.refusals import refusal

SHORTEST = 15
"""Characters of a password that may be the only factor (NIST SP 800-63B-4, 3.1.1.1); beside it counts `weak` alone."""

LONGEST = 1024
"""Characters; nobody types more, and hashing starts with reading all of it."""

ONE_TIME_BYTES = 18
"""Random bytes of a one-time password, which makes 24 characters."""


def one_time() -> str:
    """A password for the first login only."""
    return secrets.token_urlsafe(ONE_TIME_BYTES)


def acceptable(password: str, param: str = "new_password") -> str:
    """A new password. Raises InvalidRequest when it is too short or too long."""
    if not SHORTEST <= len(password) <= LONGEST:
        raise refusal(InvalidRequest, f"{param} must have {SHORTEST} to {LONGEST} characters", param)
    return password


class Passwords:
    """Hashes and checks. One instance per process: it owns the threads."""

    def __init__(self, at_a_time: int, hasher: PasswordHasher | None = None) -> None:
        """`at_a_time`: hashes under way at once; each takes the memory that the hasher's parameters say (64 MiB)."""
        self._hasher = hasher or PasswordHasher()
        self._threads = ThreadPoolExecutor(at_a_time, thread_name_prefix="password")
        self._turns = Turns(at_a_time)
        weak.load()
        # What a password of nobody is compared with: an unknown name costs as much as a known one.
        self._nobody = self._hasher.hash(secrets.token_hex(16))

    def turn(self, address: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Waits until one more password of this client may be looked at. Raises QueueFull when too many wait already.

        Only who holds a turn hashes and matches.
        """
        return self._turns.turn(address)

    async def hash(self, password: str) -> str:
        """The password in argon2's own notation, with parameters and salt."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._hasher.hash, _normal(password))

    async def matches(self, stored: str | None, password: str) -> bool:
        """Whether the password is the stored one. None, for somebody without one, costs the same and never matches."""
        loop = asyncio.get_running_loop()
        same = await loop.run_in_executor(self._threads, self._verify, stored or self._nobody, _normal(password))
        return same and stored is not None

    async def weak(self, password: str, context: frozenset[str]) -> bool:
        """Whether a new password is among those that are guessed first. `context`: of `weak.expected`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, weak.weak, password, context)

    def outdated(self, stored: str) -> bool:
        """Whether the hash was made with other parameters than new ones are."""
        return self._hasher.check_needs_rehash(stored)

    def close(self) -> None:
        """Ends the threads; a hash under way is waited for (0.1 s)."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _verify(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except (VerificationError, InvalidHashError):
            return False


def _normal(password: str) -> str:
    """The same characters whatever keyboard they come from (NFC)."""
    return unicodedata.normalize("NFC", password[: LONGEST + 1])
