"""Calls to a service that is written in Python, from asyncio."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from helixflow.core_rs import Internal, RpcCall, RpcClient, TlsFiles, Unavailable
from helixflow.rpc.messages import Method, method


class Client:
    """One connection to one of several equal servers. Belongs to the event loop it is created in."""

    def __init__(self, addresses: Sequence[str], tls: TlsFiles | None, *, expect_service: str = "auth-service") -> None:
        """Connects in the background to the first of `addresses` (`host:port`) that works, and later to the next.

        `expect_service`: whose certificate a server must show. Raises InvalidRequest for a bad address and TlsError
        for bad files.
        """
        self._loop = asyncio.get_running_loop()
        self._client = RpcClient(list(addresses), tls, expect_service=expect_service)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._closed = False
        self._loop.add_reader(self._client.fileno(), self._wake)

    @property
    def server(self) -> str | None:
        """Address that calls go to now; None while nothing is connected."""
        return self._client.server

    @property
    def last_error(self) -> str | None:
        """Why there is no connection, for operators."""
        return self._client.last_error

    async def call(self, name: str, request: Any, *, timeout_s: float = 5.0, request_id: str = "") -> Any:
        """Calls a method (`AuthService/Verify`) and returns its answer.

        Raises the error that the server answers with; Unavailable when no server is reachable within 1 s or
        `timeout_s`, or the connection breaks; DeadlineExceeded behind `timeout_s` (seconds). Cancelling the
        task cancels the call at the server.
        """
        target = method(name)
        call = self._start(target, request, max(1, int(timeout_s * 1000)), request_id)
        try:
            while not call.done:
                await self._change(call)
        except asyncio.CancelledError:
            call.cancel()
            raise
        messages = call.take()
        if len(messages) != 1:
            raise Internal(f"{name} was answered with {len(messages)} messages instead of one")
        return _decode(target, messages[0])

    async def stream(self, name: str, request: Any, *, request_id: str = "") -> AsyncGenerator[Any, None]:
        """Calls a method whose answer is a stream and yields its messages; closing the generator cancels the call.

        Raises as `call` does, at any message; there is no deadline.
        """
        target = method(name)
        call = self._start(target, request, 0, request_id)
        try:
            while True:
                done = call.done
                messages = call.take()
                for message in messages:
                    yield _decode(target, message)
                if messages:
                    continue
                if done:
                    return
                await self._change(call)
        finally:
            call.cancel()

    def reload_tls(self) -> None:
        """Verifies the certificate files and swaps them in. Raises TlsError and keeps the old ones otherwise."""
        self._client.reload_tls()

    def close(self) -> None:
        """Gives the connection back; calls under way end as Unavailable. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._client.fileno())
        self._client.close()
        for future in self._waiting.values():
            _set(future)

    def _start(self, target: Method, request: Any, timeout_ms: int, request_id: str) -> RpcCall:
        if type(request) is not target.request:
            raise TypeError(f"{target.path} takes {target.request.__name__}, not {type(request).__name__}")
        return self._client.call(target.path, request.SerializeToString(), request_id=request_id, timeout_ms=timeout_ms)

    async def _change(self, call: RpcCall) -> None:
        """Waits for news of a call."""
        future = self._loop.create_future()
        self._waiting[call.id] = future
        try:
            await future
        finally:
            del self._waiting[call.id]
        if self._closed:
            raise Unavailable("the client is closed")

    def _wake(self) -> None:
        for number in self._client.ready():
            future = self._waiting.get(number)
            if future is not None:
                _set(future)


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _decode(target: Method, data: bytes) -> Any:
    try:
        return target.response.FromString(data)
    except DecodeError:
        raise Internal(f"the answer of {target.path} is not a {target.response.__name__}") from None
