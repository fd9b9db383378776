"""What the routes of accounts share: small JSON bodies, questions to the auth-service."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from helixflow import log
from helixflow.core_rs import DeadlineExceeded, InvalidRequest, Unavailable
from helixflow.gateway.http import Request
from helixflow.refusals import message_of, refusal

Call = Callable[..., Awaitable[Any]]
"""`helixflow.rpc.client.Client.call`."""

NO_STORE = (b"cache-control", b"no-store")
"""Answers hold keys, tokens or what only this caller may see: nobody on the way keeps them."""

logger = log.get("gateway")


async def read_object(request: Request, most: int) -> dict[str, Any]:
    """The JSON object of the body; no body is an empty one. `most`: bytes.

    Raises InvalidRequest, UnsupportedMediaType or PayloadTooLarge. No message repeats a value: it may be a secret.
    """
    body = await request.json(most)
    if not body:
        return {}
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise refusal(InvalidRequest, f"the body is not JSON: see {where}") from None
    if not isinstance(parsed, dict):
        raise refusal(InvalidRequest, "the body: expected a JSON object")
    if b"\\u0000" in body and _has_nul(parsed):
        raise refusal(InvalidRequest, "the body: no text may hold the character NUL")
    return parsed


def _has_nul(value: Any) -> bool:
    """Whether a text in it holds a NUL, which PostgreSQL cannot keep."""
    if isinstance(value, dict):
        return any(_has_nul(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return any(map(_has_nul, value))
    return isinstance(value, str) and "\0" in value


async def ask(call: Call, method: str, message: Any, request: Request, timeout_s: float) -> Any:
    """Calls the auth-service on behalf of a request. Raises its CoreError.

    The reason why it cannot be reached has addresses of the inside: it goes to the log, not to the client.
    """
    try:
        return await call(method, message, timeout_s=timeout_s, request_id=request.id)
    except Unavailable as error:
        _note(method, request, error)
        refused: Unavailable | DeadlineExceeded = refusal(
            Unavailable, "accounts cannot be reached now; try again in a moment"
        )
        refused.retry_after_s = error.retry_after_s
    except DeadlineExceeded as error:
        _note(method, request, error)
        refused = refusal(
            DeadlineExceeded, f"accounts did not answer within {timeout_s:g} s; what was asked for may have been done"
        )
    raise refused


def _note(method: str, request: Request, error: Unavailable | DeadlineExceeded) -> None:
    logger.warning("the auth-service did not help", call=method, request_id=request.id, error=message_of(error))
