"""A client that sees what goes over the wire: HTTP/1.1 over TLS, connections kept alive, fast, rude if asked to."""

import asyncio
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

END = b"\r\n\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"
"""No JSON of an event holds a line break of its own, so this is nowhere else in a stream of events."""
LIMIT = 1 << 22
"""Longest answer (bytes)."""

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
STATUS = "/admin/v1/status"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    head: bytes
    body: bytes

    @property
    def code(self) -> str:
        """The code of the error; empty when there is none."""
        code: str = "" if self.status == 200 else self.json()["error"]["code"]
        return code

    def json(self) -> Any:
        """The body of an answer that is no stream."""
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The events of a stream that has come to its end."""
        parts = [part.removeprefix(b"data: ") for part in _unchunked(self.body).split(b"\n\n")]
        assert parts[-2:] == [b"[DONE]", b""], self.body[-200:]
        return [json.loads(part) for part in parts[:-2] if not part.startswith(b":")]

    def header(self, name: str) -> str:
        """The value of a header; empty when it is not there."""
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key == name:
                return value
        return ""


def _length(head: bytes) -> int | None:
    """Bytes of the body; None when it comes in chunks."""
    at = head.find(b"content-length: ")
    return int(head[at + 16 : head.index(b"\r\n", at)]) if at >= 0 else None


def _unchunked(body: bytes) -> bytes:
    pieces: list[bytes] = []
    at = 0
    while True:
        line = body.index(b"\r\n", at)
        size = int(body[at:line], 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(body[line + 2 : line + 2 + size])
        at = line + 4 + size


def request(path: str, body: Any, key: str, request_id: str = "", **headers: str) -> bytes:
    """A request as it goes over the wire: GET without a body. `body`: bytes go as they are, all else as JSON."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if key:
        lines.append(f"authorization: Bearer {key}")
    if request_id:
        lines.append(f"x-request-id: {request_id}")
    if body is None:
        return ("\r\n".join(lines) + "\r\n\r\n").encode()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines += ["content-type: application/json", f"content-length: {len(data)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


class Line:
    """One connection. A request on a line that has broken raises OSError or IncompleteReadError; the next connects."""

    def __init__(self, port: int, tls: ssl.SSLContext) -> None:
        self.port = port
        self._tls = tls
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, data: bytes) -> Answer:
        """Sends a request and reads its answer to the end."""
        try:
            reader = await self._send(data)
            head = await reader.readuntil(END)
            length = _length(head)
            body = await (reader.readuntil(LAST_CHUNK) if length is None else reader.readexactly(length))
        except BaseException:
            self.close()
            raise
        return Answer(int(head[9:12]), head, body)

    async def start(self, data: bytes) -> Answer | None:
        """Sends a request whose answer is a stream; None once that has begun, the answer when it is none."""
        reader = await self._send(data)
        head = await reader.readuntil(END)
        length = _length(head)
        return None if length is None else Answer(int(head[9:12]), head, await reader.readexactly(length))

    async def begin(self, data: bytes, events: int) -> tuple[int, bytes]:
        """As `start`, and reads so many events. Returns the status and what has come of the stream."""
        answer = await self.start(data)
        if answer is not None or self._streams is None:
            return 0 if answer is None else answer.status, b""
        body = b""
        for _ in range(events):
            body += await self._streams[0].readuntil(b"\n\n")
        return 200, body

    async def leave(self, data: bytes, events: int) -> tuple[int, bytes]:
        """As `begin`, and hangs up then; after no event at all it does not wait for the answer either (status 0)."""
        try:
            if events:
                return await self.begin(data, events)
            await self._send(data)
            return 0, b""
        finally:
            self.close()

    async def _send(self, data: bytes) -> asyncio.StreamReader:
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=self._tls, limit=LIMIT, server_hostname="localhost"
            )
        reader, writer = self._streams
        writer.write(data)
        return reader

    def close(self) -> None:
        """Hangs up, at once."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


def chat(tokens: int, **options: Any) -> Mapping[str, Any]:
    """A chat whose answer has exactly so many tokens."""
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": "gpt-4", "messages": messages, "max_tokens": tokens, "ignore_eos": True, **options}
