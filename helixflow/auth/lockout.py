"""Wrong passwords in a row lock a name, whether it exists or not: the lock tells nothing about that.

An attempt counts before its password is looked at, so that many at once get no more tries than one after another.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from helixflow.config import AuthConfig

FORGET_S = 86_400
"""Failures are forgotten when none followed for this long (seconds)."""

_COUNT = """
INSERT INTO login_failures AS f (subject, failures) VALUES ($1, 1)
ON CONFLICT (subject) DO UPDATE SET
    failures = CASE
        WHEN f.locked_until IS NOT NULL OR f.last_at < now() - make_interval(secs => $4) THEN 1
        ELSE f.failures + 1 END,
    locked_until = CASE
        WHEN f.locked_until > now() THEN f.locked_until
        -- All tries are taken and none has come back yet.
        WHEN f.locked_until IS NULL AND f.last_at >= now() - make_interval(secs => $4) AND f.failures >= $2
            THEN now() + make_interval(secs => $3)
        END,
    last_at = now()
RETURNING extract(epoch FROM locked_until - now())::float8 AS locked_s
"""
_LOCK = """
UPDATE login_failures SET locked_until = now() + make_interval(secs => $3)
WHERE subject = $1 AND failures >= $2 AND (locked_until IS NULL OR locked_until <= now())
RETURNING true
"""


@dataclass(frozen=True, slots=True)
class Lockout:
    """The rules, from the configuration."""

    failures: int
    seconds: int

    @classmethod
    def of(cls, options: AuthConfig) -> "Lockout":
        """As configured."""
        return cls(options.lockout_failures, options.lockout_s)

    async def attempt(self, connection: Any, email: str) -> int | None:
        """Counts one attempt. Returns seconds until the next one when the name is locked, else None."""
        locked: float | None = await connection.fetchval(
            _COUNT, subject(email), self.failures, self.seconds, float(FORGET_S)
        )
        return None if locked is None else max(1, math.ceil(locked))

    async def failed(self, connection: Any, email: str) -> bool:
        """Notes that the counted attempt was wrong. True when that locked the name."""
        return bool(await connection.fetchval(_LOCK, subject(email), self.failures, self.seconds))


async def clear(connection: Any, email: str) -> bool:
    """Forgets the failures of a name: it logged in, or an administrator unlocked it. True when there were any."""
    return bool(
        await connection.fetchval("DELETE FROM login_failures WHERE subject = $1 RETURNING true", subject(email))
    )


def subject(email: str) -> bytes:
    """What the table knows a name by: people type passwords into the wrong field."""
    return hashlib.sha256(email.encode()).digest()
