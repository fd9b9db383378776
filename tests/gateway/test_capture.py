"""The texts of a request: taken out of whatever the client sent and the pool rendered."""

import uuid

import pytest

from helixflow.gateway.auth import Content
from helixflow.gateway.capture import Capture, answer_text, prompt_text
from helixflow.ledger.record import Begin, new_id

ID = uuid.uuid4().bytes
AT_US = 1_790_000_000_000_000
EVENTS = b"".join(
    b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % letter for letter in (b"a", b"b")
) + (b"data: [DONE]\n\n")
BEGIN = Begin(new_id(AT_US), AT_US, ID, ID, ID, "m", "/v1/completions", "127.0.0.1", "req-1", ID)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"prompt": "hello"}', "hello"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', '[{"role":"user","content":"hi"}]'),
        (b'{"tokens": [1, 2]}', "[1,2]"),
        (b'{"prompt": "half a pair \\ud800"}', '{"prompt": "half a pair \\ud800"}'),
        (b'{"prompt": "\xff"}', '{"prompt": "\N{REPLACEMENT CHARACTER}"}'),
        (b"[]", "[]"),
        (b"", ""),
    ],
)
def test_what_was_asked(body: bytes, text: str) -> None:
    assert prompt_text(body) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            b'{"choices": [{"index": 0, "message": {"content": "one"}}, {"index": 1, "message": {"content": "two"}}]}',
            "one\ntwo",
        ),
        (b'{"choices": [{"index": 0, "text": "one"}]}', "one"),
        (EVENTS, "ab"),
        (b'data: {"choices":[{"index":0,"text":"a"}]}\n\ndata: {"choi', "a"),
        (b'{"tokens": [1]}', '{"tokens": [1]}'),
    ],
)
def test_what_was_answered(data: bytes, text: str) -> None:
    assert answer_text(data) == text


def test_a_body_that_cannot_be_taken_apart_is_redacted_too() -> None:
    capture = Capture(Content(30, ("[0-9]{16}",)))
    capture.answer(b'{"choices": [{"index": 0, "text": "4111111111111111"}]}')
    kept = capture.content(BEGIN, b'{"prompt": "\\ud800 4111111111111111"}')
    assert kept is not None
    assert kept.prompt == '{"prompt": "\\ud800 [redacted]"}'
    assert kept.answer == "[redacted]"
