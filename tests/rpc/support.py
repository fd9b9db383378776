"""Servers and clients of a small auth-service over mutual TLS."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from helixflow.core_rs import TlsFiles
from helixflow.pki.layout import Layout, Role
from helixflow.rpc import messages
from helixflow.rpc.client import Client
from helixflow.rpc.server import Caller, Server, Streaming, Unary

LIMIT_S = 10.0
CALLERS = frozenset({"api-gateway"})


def files(layout: Layout, name: str, role: Role) -> TlsFiles:
    """The identity of one side."""
    pair = layout.pair(name, role)
    return TlsFiles(str(layout.ca_cert), str(pair.cert), str(pair.key))


def key(text: str) -> Any:
    """A request whose credential is `text`."""
    return messages.VerifyRequest(key_digest=text.encode())


async def echo(request: Any, caller: Caller) -> Any:
    """Answers with what it was asked and by whom."""
    return messages.Principal(user=request.key_digest.decode(), role=caller.request_id, organisation=caller.service)


async def nothing(_request: Any, _caller: Caller) -> Any:
    """For methods that a test does not call."""
    raise NotImplementedError


async def silence(_request: Any, _caller: Caller) -> AsyncIterator[Any]:
    """A stream that says nothing."""
    await asyncio.Event().wait()
    yield


def methods(verify: Unary = echo, watch: Streaming = silence) -> dict[str, Unary | Streaming]:
    """Handlers for the whole service."""
    every: dict[str, Unary | Streaming] = dict.fromkeys(messages.service("AuthService"), nothing)
    return {**every, "AuthService/Verify": verify, "AuthService/Watch": watch}


def make(verify: Unary = echo, watch: Streaming = silence, callers: frozenset[str] = CALLERS) -> Server:
    """A server that is not started."""
    handlers = methods(verify, watch)
    return Server(handlers, dict.fromkeys(handlers, callers))


class Pair:
    """A server and a client of it."""

    def __init__(self, layout: Layout, server: Server, address: str) -> None:
        self.server = server
        self.address = address
        self.client = Client([address], files(layout, "api-gateway", Role.CLIENT))

    async def verify(self, text: str = "a", **options: Any) -> Any:
        """Calls Verify."""
        return await self.client.call("AuthService/Verify", key(text), **options)

    def watch(self) -> Any:
        """Calls Watch."""
        return self.client.stream("AuthService/Watch", messages.WatchEventsRequest(gateway="g"))

    async def idle(self) -> None:
        """Waits until no handler runs."""
        while self.server.outstanding:  # noqa: ASYNC110 (the server tells nobody)
            await asyncio.sleep(0)


@asynccontextmanager
async def serving(layout: Layout, verify: Unary = echo, watch: Streaming = silence) -> AsyncIterator[Pair]:
    """A server and its client for one test."""
    server = make(verify, watch)
    address = server.start("127.0.0.1:0", files(layout, "auth-service", Role.SERVER))
    pair = Pair(layout, server, address)
    try:
        yield pair
    finally:
        pair.client.close()
        await server.stop(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Runs a test on an event loop, not for ever."""

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test()

    asyncio.run(main())
