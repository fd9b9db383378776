"""A lost pepper: its chains end where they are, and those of the next pepper begin behind them.

Nobody can check what was chained with the lost one, but rows that are missing among them still show. Giving it up is
the owner's act (`forget`); the auth-service that makes the next pepper seals what it left (`begin`).
"""

from typing import Any, Final

from helixflow.ledger import audit_chain, chain
from helixflow.ledger.seals import SealKeys

UNSEALED: Final = b""
"""The seal of a head that waits for the next pepper."""
UNCHECKED: Final = bytes(32)
"""The link of an entry that had not joined the chain when its pepper was given up."""

_JOIN: Final = """
INSERT INTO helixflow.audit_chain (sequence, id, hash)
SELECT coalesce((SELECT sequence FROM helixflow.audit_head), 0) + row_number() OVER (ORDER BY a.id), a.id, $1
FROM helixflow.audit_log a WHERE NOT EXISTS (SELECT FROM helixflow.audit_chain c WHERE c.id = a.id)
"""
_END: Final = (
    """
INSERT INTO helixflow.audit_head (sequence, hash, dropped_sequence, dropped_hash, lost_sequence, seal)
SELECT sequence, hash, 0, '', sequence, ''::bytea FROM helixflow.audit_chain ORDER BY sequence DESC LIMIT 1
ON CONFLICT (singleton) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash,
    lost_sequence = excluded.sequence, seal = excluded.seal
""",
    # Without a row of its own the chain may have been cut off by retention at its end.
    "UPDATE helixflow.audit_head SET lost_sequence = sequence, seal = ''",
    "UPDATE helixflow.ledger_days SET lost_sequence = sequence, seal = ''",
    "DELETE FROM helixflow.ledger_checkpoint",
    "DELETE FROM helixflow.ledger_sealed",
)
_DAYS: Final = """
SELECT day, sequence, hash, dropped_sequence, dropped_hash, lost_sequence FROM helixflow.ledger_days
WHERE seal = '' AND lost_sequence = sequence
"""
_SEAL_DAYS: Final = """
UPDATE helixflow.ledger_days d SET seal = n.seal
FROM unnest($1::date[], $2::bytea[]) n (day, seal) WHERE d.day = n.day
"""


async def forget(connection: Any) -> None:
    """Ends every chain where it is. `connection`: the owner's, in a transaction, while no auth-service runs."""
    await connection.execute(_JOIN, UNCHECKED)
    for statement in _END:
        await connection.execute(statement)


async def begin(connection: Any, chain_key: bytes) -> None:
    """Seals the heads that `forget` has left, in a transaction. Does nothing without them.

    Only the owner can remove a checkpoint. As long as there is one nothing was forgotten, and what looks like it is
    left for `audit verify` to find.
    """
    if await connection.fetchval("SELECT EXISTS (SELECT FROM helixflow.ledger_checkpoint)"):
        return
    keys = SealKeys.of(chain_key)
    heads = [chain.Head(*row) for row in await connection.fetch(_DAYS)]
    await connection.execute(_SEAL_DAYS, [head.day for head in heads], [head.seal(chain_key) for head in heads])
    head, _ = await audit_chain.load(connection, keys.audit)
    if head.lost_sequence and head.lost_sequence == head.sequence:
        await audit_chain.save(connection, keys.audit, head)
