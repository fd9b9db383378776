"""HTTP over bare ASGI: one object per request that reads its body and writes its answer."""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from helixflow.core_rs import CoreError, InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from helixflow.refusals import refusal

if TYPE_CHECKING:
    from helixflow.gateway.auth import Principal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

CLIENT = b"x-helixflow-client"
"""Who asks: set by the front door, which takes it from no client."""
CLIENT_HTTP = b"x-helixflow-client-http"
"""Which HTTP the client speaks."""
REQUEST_ID = b"x-request-id"
"""Names the request: the client's id where it is a sane one, else the front door's."""
KNOWN = (b"x-helixflow-known", b"1")
"""Tells the front door that the credential is good; it takes the header off."""
JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
DISCARD_S = 1.0
DISCARD_BYTES = 16 * 1024 * 1024
"""How much of an unwanted body is read and thrown away (seconds, bytes)."""

MAX_QUERY_FIELDS = 32
"""Most parameters of a query string; no route knows half as many."""

_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class ClientGone(Exception):  # noqa: N818 -- an event, nobody's mistake
    """The client closed the connection or reset the stream: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the endpoint accepts and adds: body size (bytes), headers of every answer."""

    body_bytes: int
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Request:
    """One request. Handlers fill in the fields of its log line."""

    __slots__ = (
        "_http2",
        "_limits",
        "_query",
        "_receive",
        "_scope",
        "_send",
        "body",
        "caller",
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
        # No secret, and reading the kernel's random numbers would let go of the GIL.
        self.token = f"{random.getrandbits(96):024x}"
        self.id = self.headers.get(REQUEST_ID, b"").decode("ascii", "replace")
        self.started = time.perf_counter()
        self.status = 0
        self.route = ""
        self.principal = ""
        self.body = b""  # kept for organisations that keep texts
        self.caller: Principal  # set once the credential is checked: on an open route there is none to read
        self.facts: dict[str, Any] = {}
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self._http2 = self.headers.get(CLIENT_HTTP) == b"2"
        self.unread = self.method not in ("GET", "HEAD", "OPTIONS")
        self._limits = limits
        self._query: dict[str, list[str]] | None = None
        self._scope = scope
        self._receive = receive
        self._send = send

    @property
    def receive(self) -> Receive:
        """The ASGI `receive`: after the body it tells only that the client has gone."""
        return self._receive

    @property
    def client(self) -> str:
        """The client's network address, without the port, as the front door knows it."""
        return self.headers.get(CLIENT, b"").decode("ascii", "replace")

    @property
    def raw_path(self) -> bytes:
        """The path as it was sent, percent-encoded."""
        raw = self._scope.get("raw_path")
        return self.path.encode() if raw is None else bytes(raw)

    @property
    def query(self) -> dict[str, list[str]]:
        """The parameters of the query string, each with all its values. Raises InvalidRequest for a malformed one."""
        if self._query is None:
            self._query = _parse_query(self._scope.get("query_string", b""))
        return self._query

    def values(self, name: bytes) -> list[bytes]:
        """Every value of a header; `headers` has the last one only."""
        if len(self.headers) == len(self._scope["headers"]):
            value = self.headers.get(name)
            return [] if value is None else [value]
        return [value for header, value in self._scope["headers"] if header == name]

    def cookie(self, name: str) -> str | None:
        """The value of a cookie; None when it is missing or stands there twice. HTTP/2 may send a header for each."""
        found = []
        for header, value in self._scope["headers"]:
            if header == b"cookie":
                for part in value.decode("latin-1").split(";"):
                    key, _, text = part.strip().partition("=")
                    if key == name:
                        found.append(text)
        return found[0] if len(found) == 1 else None

    async def json(self, most: int | None = None) -> bytes:
        """The body, which must call itself JSON. Raises UnsupportedMediaType, PayloadTooLarge, InvalidRequest.

        `most`: limit in bytes where a route takes less than the endpoint.
        """
        kind = self.headers.get(b"content-type")
        if kind is not None and kind != b"application/json":
            media = kind.split(b";", 1)[0].strip().lower()
            if media != b"application/json" and not (media.startswith(b"application/") and media.endswith(b"+json")):
                raise refusal(
                    UnsupportedMediaType,
                    "the body must be JSON: send the header `Content-Type: application/json` "
                    f"(it was {media[:100].decode('latin-1')!r})",
                )
        limit = self._limits.body_bytes
        return await self._body(limit if most is None else min(limit, most))

    async def _body(self, limit: int) -> bytes:
        length = self.headers.get(b"content-length")
        # A length that is no number never gets here: the HTTP parser refuses it.
        expected = int(length) if length is not None and length.isdigit() else None
        if expected is not None and expected > limit:
            raise self._too_large(limit)
        if self._http2 or b"transfer-encoding" in self.headers:
            # Over HTTP/2 the end of the stream has to arrive too, or the answer may be lost: see `discard`. Chunks
            # outrank a length (RFC 9112, 6.3).
            expected = None
        body = await self._pieces(expected, limit)
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

        Granian closes the connection of an unread body, and the front door, still sending it, loses the answer.
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
        if self.principal:
            headers.append(KNOWN)
        headers.append((REQUEST_ID, self.id.encode("ascii")))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _parse_query(query: bytes) -> dict[str, list[str]]:
    parsed: dict[str, list[str]] = {}
    if not query:
        return parsed
    if _BROKEN_ESCAPE.search(query):
        raise refusal(InvalidRequest, "the query string is malformed: a % without two hex digits behind it")
    try:
        text = query.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS, errors="strict")
    except UnicodeError:
        raise refusal(InvalidRequest, "the query string is not percent-encoded UTF-8") from None
    except ValueError as error:
        raise refusal(InvalidRequest, f"the query string is malformed: {error}") from None
    for name, value in pairs:
        if "\0" in name or "\0" in value:
            raise refusal(InvalidRequest, "the query string holds the character NUL")
        parsed.setdefault(name, []).append(value)
    return parsed
