"""The texts of a request, for organisations that keep them: the prompt as it came, the answer without its wrapping."""

from typing import Any

import orjson

from helixflow.gateway.auth import Content as Policy
from helixflow.ledger.content import content
from helixflow.ledger.record import Begin, Content

MAX_ANSWER_BYTES = 1 << 20
"""Of an answer no more than this is kept (bytes as sent)."""
_EVENT = b"data: "


class Capture:
    """Collects what is sent to the client, which is cheap, and makes text of it at the end."""

    __slots__ = ("_parts", "_policy", "_size")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._parts: list[bytes] = []
        self._size = 0

    def answer(self, data: bytes) -> None:
        """A part of the answer: a JSON body, or whole server-sent events."""
        if self._size < MAX_ANSWER_BYTES:
            self._parts.append(data)
            self._size += len(data)

    def content(self, begin: Begin, body: bytes) -> Content | None:
        """What the ledger keeps, with the organisation's patterns replaced. `body`: of the request."""
        asked = prompt_text(body)
        answered = answer_text(b"".join(self._parts))
        return content(begin, asked, answered, self._policy.redact, self._policy.retention_days)


def prompt_text(body: bytes) -> str:
    """What was asked: messages, prompt or tokens of a request; the body itself when it cannot be taken apart.

    Never raises: the end of a request's row must not depend on what the request says.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None  # orjson is stricter than what has checked the body
    if not isinstance(document, dict):
        return body.decode("utf-8", "replace")
    prompt = document.get("messages", document.get("prompt", document.get("tokens")))
    return prompt if isinstance(prompt, str) else orjson.dumps(prompt).decode()


def answer_text(data: bytes) -> str:
    """The text of an answer: that of its choices, or the JSON itself when it has none."""
    if not data.startswith(_EVENT):
        choices = _choices(data)
        if not choices:
            return data.decode("utf-8", "replace")
        return "\n".join(_text(choice) for choice in choices)
    texts: dict[int, list[str]] = {}
    for line in data.split(b"\n"):
        if line.startswith(_EVENT):
            for choice in _choices(line[len(_EVENT) :]):
                texts.setdefault(choice.get("index", 0), []).append(_text(choice))
    return "\n".join("".join(texts[index]) for index in sorted(texts))


def _choices(data: bytes) -> list[dict[str, Any]]:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return []  # `[DONE]`, or cut off at the limit
    choices: list[dict[str, Any]] = document.get("choices", []) if isinstance(document, dict) else []
    return choices


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("delta") or choice.get("message") or choice
    return message.get("content") or message.get("text") or ""
