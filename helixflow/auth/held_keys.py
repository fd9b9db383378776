"""What becomes of a user's API keys when the password changes: whoever changes it has to say."""

from typing import Any
from uuid import UUID

from helixflow.core_rs import InvalidRequest
from helixflow.refusals import refusal

KEEP, REVOKE = "keep", "revoke"

# The public key of the development profile is nobody's.
_HELD = "user_id = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now()) AND NOT development"


async def check(connection: Any, user_id: UUID, choice: str, param: str = "keys") -> int:
    """How many keys the user has. Raises InvalidRequest when there are any and `choice` does not say what to do."""
    held: int = await connection.fetchval(f"SELECT count(*) FROM api_keys WHERE {_HELD}", user_id)  # noqa: S608 - the text above
    if choice not in (KEEP, REVOKE) and (held or choice):
        raise refusal(
            InvalidRequest,
            f"{param}: say keep or revoke: the account has {held} API {'key' if held == 1 else 'keys'}, which a new "
            "password does not end by itself",
            param,
        )
    return held


async def settle(connection: Any, user_id: UUID, choice: str) -> dict[str, int]:
    """Does it, in the caller's transaction; returns `keys_revoked` and `keys_kept`. Raises InvalidRequest."""
    held = await check(connection, user_id, choice)
    if choice != REVOKE:
        return {"keys_revoked": 0, "keys_kept": held}
    rows = await connection.fetch(
        f"UPDATE api_keys SET revoked_at = now() WHERE {_HELD} RETURNING id",  # noqa: S608 - the text above
        user_id,
    )
    return {"keys_revoked": len(rows), "keys_kept": 0}
