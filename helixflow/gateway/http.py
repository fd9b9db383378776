"""HTTP over bare ASGI: one object per request that reads its body and writes its answer."""

import asyncio
import itertools
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helixflow.core_rs import CoreError, InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from helixflow.gateway.errors import refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
BODY_TIMEOUT_S = 60.0
"""A body must be complete within this time (seconds): a silent or dribbling client holds a connection."""
SWEEP_S = 1.0
"""Bodies that are late are looked for this often (seconds)."""
DISCARD_S = 1.0
DISCARD_BYTES = 16 * 1024 * 1024
"""How much of an unwanted body is read and thrown away (seconds, bytes)."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class ClientGone(Exception):  # noqa: N818 -- an event, nobody's mistake
    """The client closed the connection or reset the stream: there is nobody to answer."""


class Reading:
    """The tasks that read a body. One timer gives up the late ones: a timer for each costs more than most bodies."""

    def __init__(self) -> None:
        self._since: dict[asyncio.Task[Any], float] = {}  # the oldest first
        self._armed = False

    def begin(self) -> asyncio.Task[Any]:
        """The running task waits for nothing but its body until `end`; when that is late, it is cancelled."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request runs in a task")
        self._since[task] = time.monotonic()
        if not self._armed:
            self._sweep_later(task.get_loop())
        return task

    def end(self, task: asyncio.Task[Any]) -> bool:
        """True when the task was cancelled because its body was late."""
        return self._since.pop(task, None) is None

    def _sweep_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._armed = bool(self._since)
        if self._armed:
            loop.call_later(SWEEP_S, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        limit = time.monotonic() - BODY_TIMEOUT_S
        late = list(itertools.takewhile(lambda task: self._since[task] <= limit, self._since))
        for task in late:
            del self._since[task]
            task.cancel()
        self._sweep_later(loop)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the endpoint accepts and adds: body size (bytes), headers of every answer, the bodies being read."""

    body_bytes: int
    headers: tuple[tuple[bytes, bytes], ...] = ()
    reading: Reading = field(default_factory=Reading)


class Request:
    """One request. Handlers fill in the fields of its log line."""

    __slots__ = (
        "_http2",
        "_limits",
        "_receive",
        "_send",
        "extra_headers",
        "facts",
        "headers",
        "id",
        "method",
        "path",
        "principal",
        "route",
        "started",
        "status",
        "token",
        "unread",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.token = os.urandom(12).hex()
        given = self.headers.get(b"x-request-id")
        self.id = given.decode("ascii") if given and _REQUEST_ID.fullmatch(given) else "req-" + self.token
        self.started = time.perf_counter()
        self.status = 0
        self.route = ""
        self.principal = ""
        self.facts: dict[str, Any] = {}
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self._http2 = scope["http_version"] == "2"
        self.unread = self.method not in ("GET", "HEAD", "OPTIONS")
        self._limits = limits
        self._receive = receive
        self._send = send

    @property
    def receive(self) -> Receive:
        """The ASGI `receive`: after the body it tells only that the client has gone."""
        return self._receive

    async def json(self) -> bytes:
        """The body, which must call itself JSON. Raises UnsupportedMediaType, PayloadTooLarge, InvalidRequest."""
        kind = self.headers.get(b"content-type")
        if kind is not None and kind != b"application/json":
            media = kind.split(b";", 1)[0].strip().lower()
            if media != b"application/json" and not (media.startswith(b"application/") and media.endswith(b"+json")):
                raise refusal(
                    UnsupportedMediaType,
                    "the body must be JSON: send the header `Content-Type: application/json` "
                    f"(it was {media[:100].decode('latin-1')!r})",
                )
        coding = self.headers.get(b"content-encoding")
        if coding is not None and coding.strip().lower() not in (b"", b"identity"):
            raise refusal(
                UnsupportedMediaType,
                f"the body must not be compressed: leave out `Content-Encoding` "
                f"(it was {coding[:100].decode('latin-1')!r})",
            )
        return await self._body()

    async def _body(self) -> bytes:
        limit = self._limits.body_bytes
        length = self.headers.get(b"content-length")
        # A length that is no number never gets here: the HTTP parser refuses it.
        expected = int(length) if length is not None and length.isdigit() else None
        if expected is not None and expected > limit:
            raise self._too_large(limit)
        if self._http2 or b"transfer-encoding" in self.headers:
            # Over HTTP/2 the end of the stream has to arrive too, or the answer may be lost: see `discard`. Chunks
            # outrank a length (RFC 9112, 6.3).
            expected = None
        reading = self._limits.reading
        task = reading.begin()
        try:
            body = await self._pieces(expected, limit)
        except asyncio.CancelledError:
            if not reading.end(task):
                raise
            task.uncancel()
            raise refusal(
                InvalidRequest, f"the request body was not complete after {BODY_TIMEOUT_S:g} seconds"
            ) from None
        finally:
            reading.end(task)
        self.unread = False
        return body

    async def _pieces(self, expected: int | None, limit: int) -> bytes:
        body: bytes | bytearray = b""
        more = True
        while more and len(body) != expected:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                # Said of a client that has gone, and of one that waits for an answer to broken chunks.
                self.unread = False
                raise refusal(InvalidRequest, "the request body broke off, or its chunks are malformed")
            piece: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            if not body:
                body = piece
            else:
                body = bytearray(body) if isinstance(body, bytes) else body
                body += piece
            if len(body) > limit:
                raise self._too_large(limit)
        return bytes(body)

    async def discard(self) -> None:
        """Reads what is left of the body after an early answer.

        Granian drops an unread body with the request, and over HTTP/2 that resets the stream, with the answer.
        """
        seen = 0
        try:
            async with asyncio.timeout(DISCARD_S):
                while self.unread and seen < DISCARD_BYTES:
                    message = await self._receive()
                    seen += len(message.get("body", b""))
                    self.unread = message.get("more_body", False)
        except TimeoutError:
            return

    @staticmethod
    def _too_large(limit: int) -> CoreError:
        return refusal(PayloadTooLarge, f"the request body is over the limit of {limit} bytes")

    async def respond(self, status: int, body: bytes, kind: tuple[bytes, bytes] = JSON, headers: Headers = ()) -> None:
        """Sends a whole answer. To HEAD it sends the same headers and no body."""
        await self._start(status, [kind, (b"content-length", b"%d" % len(body)), *headers])
        body = b"" if self.method == "HEAD" else body
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def start_events(self) -> None:
        """Starts an event stream."""
        await self._start(200, [EVENTS, (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")])

    async def write(self, data: bytes, more: bool = True) -> None:
        """Sends a part of the stream; waits while the client does not read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers += self._limits.headers
        headers += self.extra_headers
        headers.append((b"x-request-id", self.id.encode("ascii")))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
