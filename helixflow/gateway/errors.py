"""Errors of requests: the OpenAI envelope, and the HTTP answer that carries it."""

import orjson

from helixflow import core_rs
from helixflow.core_rs import CoreError, InsufficientQuota
from helixflow.refusals import message_of

RETRY_AFTER_S = 1
"""`Retry-After` of a 429 or 503 that brings no time of its own (seconds): restarts are short."""

_TYPES = {row.code: row.openai_type for row in core_rs.error_table()}


def envelope(error: CoreError) -> bytes:
    """The body `{"error": {message, type, param, code}}`."""
    return orjson.dumps(
        {
            "error": {
                "message": message_of(error),
                "type": _TYPES[error.code],
                "param": error.param,
                "code": error.code,
            }
        }
    )


def final_event(error: CoreError) -> bytes:
    """The error as the last event of a stream, followed by `[DONE]`."""
    return b"data: " + envelope(error) + b"\n\ndata: [DONE]\n\n"


def headers_of(error: CoreError) -> list[tuple[bytes, bytes]]:
    """Headers that the status asks for: `Retry-After` with 429 and 503, the challenge with 401.

    A 504 has `Retry-After` when the pool has estimated it: elsewhere, what was asked for may have been done.
    Where waiting does not help (a request that is larger than a budget) the header that OpenAI's clients honour.
    """
    if isinstance(error, InsufficientQuota) and error.retry_after_s is None:
        return [(b"x-should-retry", b"false")]
    if error.http_status in (429, 503) or (error.http_status == 504 and error.retry_after_s is not None):
        seconds = RETRY_AFTER_S if error.retry_after_s is None else max(error.retry_after_s, 1)
        return [(b"retry-after", b"%d" % seconds)]
    if error.http_status == 401:
        return [(b"www-authenticate", b"Bearer")]
    return []
