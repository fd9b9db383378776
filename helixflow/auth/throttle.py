"""Wrong passwords make the next attempt wait, longer each time. Nothing is ever locked.

Three counts, of names that exist and of others alike, so that none of them tells which do:

- of one account from one address: a few are free, then the pause doubles up to `auth.login_delay_max_s`;
- of one address for whatever account, likewise, after more;
- of one account from whatever address, up to ACCOUNT_DELAY_S: what a botnet may guess of one account.

The last two do not count where the user has logged in before: no stranger elsewhere can keep a user out of there, and
one of the same address can only make them wait, KNOWN_DELAY_S at most.

An attempt counts before its password is looked at, so that many at once get no more tries than one after another.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from helixflow.addresses import network
from helixflow.config import AuthConfig
from helixflow.core_rs import AccountLocked
from helixflow.refusals import refusal

FORGET_S = 86_400.0
"""Failures are forgotten when none followed for this long (seconds)."""

KNOWN_S = 90 * 86_400.0
"""An address is known this long after the last login from there (seconds)."""

KNOWN_MOST = 20
"""Addresses that are known of one user; the one that was used longest ago goes first."""

KNOWN_DELAY_S = 60.0
"""Longest pause where the user has logged in before (seconds)."""

ACCOUNT_FREE = 50
ACCOUNT_DELAY_S = 60.0
"""Of one account from addresses that are not known: 50, then at most 1,440 a day."""

CODE = "(code)"
"""Stands for the address of codes."""

_ENTER = """
INSERT INTO login_attempts (account, address) SELECT * FROM unnest($1::bytea[], $2::text[]) AS s (account, address)
ORDER BY account, address ON CONFLICT DO NOTHING
"""
# In order, so that two attempts cannot wait for each other; with the time after the wait for the lock.
_LOCK = """
SELECT a.account, a.address, a.failures, extract(epoch FROM a.free_at - clock_timestamp())::float8 AS wait_s,
    extract(epoch FROM clock_timestamp() - a.last_at)::float8 AS age_s
FROM login_attempts a JOIN unnest($1::bytea[], $2::text[]) AS s (account, address) USING (account, address)
ORDER BY a.account, a.address FOR UPDATE OF a
"""
_COUNT = """
UPDATE login_attempts a SET failures = s.failures, last_at = clock_timestamp(),
    free_at = clock_timestamp() + make_interval(secs => s.pause_s)
FROM unnest($1::bytea[], $2::text[], $3::int[], $4::float8[]) AS s (account, address, failures, pause_s)
WHERE a.account = s.account AND a.address = s.address
"""
_UNCOUNT = """
UPDATE login_attempts a SET failures = greatest(a.failures - 1, 0), free_at = least(a.free_at, clock_timestamp())
FROM unnest($1::bytea[], $2::text[]) AS s (account, address) WHERE a.account = s.account AND a.address = s.address
"""
_REMEMBER = """
INSERT INTO known_addresses (user_id, address) VALUES ($1, $2)
ON CONFLICT (user_id, address) DO UPDATE SET last_at = now()
"""
_PRUNE = """
DELETE FROM known_addresses WHERE user_id = $1 AND address IN
    (SELECT address FROM known_addresses WHERE user_id = $1 ORDER BY last_at DESC, address OFFSET $2)
"""


@dataclass(frozen=True, slots=True)
class Count:
    """One of the counts that an attempt adds to. `free`: attempts without a pause; then the first and longest pause."""

    account: bytes
    address: str
    free: int
    first_s: float
    longest_s: float

    def pause_s(self, failures: int) -> float:
        """How long the next attempt has to wait after this many failures (seconds)."""
        beyond = failures - self.free
        return 0.0 if beyond <= 0 else min(self.longest_s, self.first_s * 2.0 ** min(beyond - 1, 30))


@dataclass(frozen=True, slots=True)
class Throttle:
    """The rules, from the configuration."""

    free: int
    free_per_address: int
    first_s: float
    longest_s: float

    @classmethod
    def of(cls, options: AuthConfig) -> "Throttle":
        """As configured."""
        return cls(
            options.login_free_attempts,
            options.login_free_per_address,
            options.login_delay_s,
            options.login_delay_max_s,
        )

    async def attempt(self, connection: Any, email: str, address: str, *, known: bool) -> None:
        """Counts one attempt, in the caller's transaction. `known`: the user has logged in from there before.

        Raises AccountLocked when it comes too early: then nothing is counted.
        """
        account, client = subject(email), place(address)
        longest_s = min(self.longest_s, KNOWN_DELAY_S) if known else self.longest_s
        counts = [Count(account, client, self.free, self.first_s, longest_s)]
        if not known:
            counts.append(Count(b"", client, self.free_per_address, self.first_s, self.longest_s))
            counts.append(Count(account, "", ACCOUNT_FREE, self.first_s, min(self.longest_s, ACCOUNT_DELAY_S)))
        await _count(connection, counts)

    async def code(self, connection: Any, email: str) -> None:
        """Counts a code of a second factor, whose sender knows the password: from wherever. Raises AccountLocked."""
        await _count(connection, [Count(subject(email), CODE, self.free, self.first_s, self.longest_s)])


async def _count(connection: Any, counts: list[Count]) -> None:
    names = [count.account for count in counts], [count.address for count in counts]
    rows: dict[tuple[bytes, str], Any] = {}
    while len(rows) < len(counts):  # one that was there may be removed while we wait for it
        await connection.execute(_ENTER, *names)
        rows = {(row["account"], row["address"]): row for row in await connection.fetch(_LOCK, *names)}
    found = [rows[count.account, count.address] for count in counts]
    wait_s = max(row["wait_s"] for row in found)
    if wait_s > 0:
        error = refusal(AccountLocked, f"too many wrong passwords or codes: try again in {math.ceil(wait_s)} s")
        error.retry_after_s = math.ceil(wait_s)
        raise error
    failures = [1 if row["age_s"] > FORGET_S else row["failures"] + 1 for row in found]
    pauses = [count.pause_s(number) for count, number in zip(counts, failures, strict=True)]
    await connection.execute(_COUNT, *names, failures, pauses)


async def known(connection: Any, user_id: UUID | None, address: str) -> bool:
    """Whether the user has logged in from there before."""
    return user_id is not None and bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM known_addresses WHERE user_id = $1 AND address = $2 "
            "AND last_at > now() - make_interval(secs => $3))",
            user_id,
            place(address),
            KNOWN_S,
        )
    )


async def passed(connection: Any, email: str, user_id: UUID, address: str, *, was_known: bool) -> None:
    """The counted attempt was right, its code too: it is undone, and the address is known from now on."""
    account, client = subject(email), place(address)
    await connection.execute(
        "DELETE FROM login_attempts WHERE account = $1 AND address = ANY($2::text[])", account, [client, CODE]
    )
    if not was_known:
        await connection.execute(_UNCOUNT, [b"", account], [client, ""])
    await connection.execute(_REMEMBER, user_id, client)
    await connection.execute(_PRUNE, user_id, KNOWN_MOST)


async def clear(connection: Any, email: str) -> bool:
    """Forgets the failures of an account from everywhere: an administrator unlocked it. True when there were any."""
    rows = await connection.fetch("DELETE FROM login_attempts WHERE account = $1 RETURNING failures", subject(email))
    return any(row["failures"] for row in rows)


def subject(email: str) -> bytes:
    """What the table knows an account by: people type passwords into the wrong field."""
    return hashlib.sha256(email.encode()).digest()


def place(address: str) -> str:
    """What the tables know an address by; never empty, which means all of them."""
    return network(address) or "unknown"
