"""Who may do what in the database: the owner of everything, the services, and whoever audits them.

The owner migrates. The services' role owns nothing: it writes rows, and what is chained it can only add to. The reader
sees the ledger and the audit log, enough for `audit verify`. Grants are put right after every migration.
"""

from typing import Any, Final

from helixflow.db.migrate import Migration, lock, migrate_locked, read, unlock
from helixflow.db.setup import quoted

ADD_ONLY: Final = ("audit_log", "audit_chain", "requests")
"""Chained rows: the services add to them."""
HEADS: Final = ("audit_head", "ledger_checkpoint", "ledger_days", "ledger_sealed")
"""Ends of chains, which move; their seals say who moved them."""
READ_ONLY: Final = ("migrations", "meta")
CHANGED: Final = {"meta": ("pepper_check",)}
"""Columns that the services set for themselves."""
FOR_READERS: Final = (
    *ADD_ONLY, *HEADS, *READ_ONLY, "usage_daily", "usage_keys", "usage_models", "usage_monthly"
)  # fmt: skip
FUNCTIONS: Final = ("requests_partition(date)", "requests_drop(date)", "audit_prune(bigint)")
"""What the services ask of the owner."""

_TABLES: Final = """
SELECT c.relname::text AS name FROM pg_class c
WHERE c.relnamespace = 'helixflow'::regnamespace AND c.relkind IN ('r', 'p') ORDER BY 1
"""
_PARTITIONS: Final = """
SELECT c.relname::text AS name FROM pg_class c
WHERE c.relnamespace = 'helixflow'::regnamespace AND c.relispartition AND c.relkind = 'r'
"""


async def owned(connection: Any) -> bool | None:
    """Whether the role of this connection owns the schema, or is a member of the role that does; None: no schema."""
    found: bool | None = await connection.fetchval(
        "SELECT pg_has_role(nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'helixflow'"
    )
    return found


async def upgrade(connection: Any, service: str, reader: str | None = None) -> list[Migration]:
    """Applies the missing migrations, then puts the grants right; returns what was applied. Raises MigrationError.

    `connection`: the owner's, for this call alone.
    """
    await lock(connection)
    try:
        done = await migrate_locked(connection, read())
        await grant(connection, service, reader)
    finally:
        if not connection.is_closed():
            await unlock(connection)
    return done


async def grant(connection: Any, service: str, reader: str | None = None) -> None:
    """Gives the roles what they need and nothing else. `connection`: the owner's, in no transaction.

    Does nothing for a service that is the owner: there is one role for everything then.
    """
    if service == await connection.fetchval("SELECT current_user"):
        return
    partitions = {row["name"] for row in await connection.fetch(_PARTITIONS)}
    tables = [row["name"] for row in await connection.fetch(_TABLES) if row["name"] not in partitions]
    async with connection.transaction():
        for role in (service, reader):
            if role is not None:
                await connection.execute(f"REVOKE ALL ON ALL TABLES IN SCHEMA helixflow FROM {quoted(role)}")
                await connection.execute(f"GRANT USAGE ON SCHEMA helixflow TO {quoted(role)}")
        for name in tables:
            await connection.execute(f"GRANT {rights(name)} ON helixflow.{quoted(name)} TO {quoted(service)}")
            for column in CHANGED.get(name, ()):
                await connection.execute(f"GRANT UPDATE ({column}) ON helixflow.{quoted(name)} TO {quoted(service)}")
            if reader is not None and name in FOR_READERS:
                await connection.execute(f"GRANT SELECT ON helixflow.{quoted(name)} TO {quoted(reader)}")
        await connection.execute(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA helixflow TO {quoted(service)}")
        for function in FUNCTIONS:
            await connection.execute(f"GRANT EXECUTE ON FUNCTION helixflow.{function} TO {quoted(service)}")


def rights(table: str) -> str:
    """What the services may do with a table."""
    if table in READ_ONLY:
        return "SELECT"
    if table in ADD_ONLY:
        return "SELECT, INSERT"
    if table in HEADS:
        return "SELECT, INSERT, UPDATE"
    return "SELECT, INSERT, UPDATE, DELETE"
