"""Removing what has ended: sessions, tokens, public keys, logins that were not finished."""

import asyncio

from helixflow import log
from helixflow.auth.errors import database_errors
from helixflow.core_rs import CoreError
from helixflow.db.pool import Pool

EVERY_S = 3600.0
RETRY_S = 60.0
KEEP_S = 86_400.0
"""What has ended stays this long (seconds): clocks differ, and a late reuse is still told from nonsense."""

BATCH = 10_000
"""Rows of one statement: it stays far below the statement timeout."""

# Each takes the batch and the seconds.
_STATEMENTS = (
    """DELETE FROM oidc_states WHERE digest IN
    (SELECT digest FROM oidc_states WHERE expires_at < now() - make_interval(secs => $2) LIMIT $1)""",
    """DELETE FROM refresh_tokens WHERE digest IN
    (SELECT digest FROM refresh_tokens WHERE expires_at < now() - make_interval(secs => $2) LIMIT $1)""",
    """DELETE FROM sessions WHERE id IN
    (SELECT id FROM sessions WHERE expires_at < now() - make_interval(secs => $2) LIMIT $1)""",
    """DELETE FROM signing_keys WHERE kid IN
    (SELECT kid FROM signing_keys WHERE expires_at < now() - make_interval(secs => $2) LIMIT $1)""",
    """DELETE FROM login_attempts WHERE (account, address) IN
    (SELECT account, address FROM login_attempts WHERE last_at < now() - make_interval(secs => $2)
        AND free_at < now() LIMIT $1)""",
    """DELETE FROM known_addresses WHERE (user_id, address) IN
    (SELECT user_id, address FROM known_addresses WHERE last_at < now() - interval '90 days' - make_interval(secs => $2)
        LIMIT $1)""",
)

logger = log.get("auth")


async def purge(pool: Pool) -> int:
    """One round; returns how many rows went. Raises Unavailable without a database."""
    removed = 0
    with database_errors():
        for statement in _STATEMENTS:
            full = True
            while full:
                async with pool.acquire() as connection:
                    count = int((await connection.execute(statement, BATCH, KEEP_S)).split()[-1])
                removed += count
                full = count == BATCH
    return removed


async def run(pool: Pool) -> None:
    """A round every hour. Never returns."""
    while True:
        try:
            await purge(pool)
            pause = EVERY_S
        except CoreError:
            pause = RETRY_S
        await asyncio.sleep(pause)
