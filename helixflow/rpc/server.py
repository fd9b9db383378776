"""A gRPC server whose methods are coroutines and asynchronous generators."""

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import structlog
from google.protobuf.message import DecodeError

from helixflow.core_rs import CoreError, RpcIncoming, RpcServer, TlsFiles
from helixflow.rpc import messages

logger = structlog.get_logger()

LAST_FRAMES_MS = 1000
"""Time for the last answers to leave, behind the time that the handlers have."""


WATCHERS = frozenset({"monitoring"})
"""Services that may always connect: for health and reflection, which name nobody."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: the service of the client certificate, the address of the connection, and the id of the request."""

    service: str | None
    address: str
    request_id: str


Unary = Callable[[Any, Caller], Awaitable[Any]]
Streaming = Callable[[Any, Caller], AsyncIterator[Any]]


@dataclass(frozen=True, slots=True)
class _Route:
    method: messages.Method
    handler: Unary | Streaming
    callers: frozenset[str]


@dataclass(slots=True)
class _Running:
    """A call whose handler runs."""

    call: RpcIncoming
    task: "asyncio.Task[None]"
    room: asyncio.Event | None
    """Set when a stream takes messages again; None when the answer is no stream."""


class Server:
    """The server of one service. Belongs to the event loop that `start` is called in."""

    def __init__(self, methods: Mapping[str, Unary | Streaming], callers: Mapping[str, frozenset[str]]) -> None:
        """`methods`: a handler for every method of each service named (`AuthService/Verify`).

        `callers`: the services whose client certificates may call each method; nobody else may. Raises ValueError
        when a method is missing or unknown.
        """
        self._services = sorted({name.partition("/")[0] for name in methods})
        known = {name: found for service in self._services for name, found in messages.service(service).items()}
        for what, names in (("handlers", methods), ("callers", callers)):
            if names.keys() != known.keys():
                missing, unknown = sorted(known.keys() - names.keys()), sorted(names.keys() - known.keys())
                raise ValueError(f"{what}: missing {missing}, unknown {unknown}")
        self._routes = {name: _Route(found, methods[name], callers[name]) for name, found in known.items()}
        self._server = RpcServer(self._services)
        self._running: dict[int, _Running] = {}
        self._idle = asyncio.Event()
        self._stopping = False

    def start(self, listen: str, tls: TlsFiles) -> str:
        """Serves on `listen` (`host:port`) and returns the bound address; health says "not serving" at first.

        Only the services that may call some method can connect, and `WATCHERS`. Raises TlsError, InvalidRequest or
        Unavailable.
        """
        allow = sorted(WATCHERS.union(*(route.callers for route in self._routes.values())))
        address = self._server.serve(listen, tls, allow)
        asyncio.get_running_loop().add_reader(self._server.fileno(), self._ready)
        return address

    def set_serving(self, serving: bool) -> None:
        """What the health service answers."""
        self._server.set_serving(serving)

    def reload_tls(self) -> None:
        """Verifies the certificate files and swaps them in. Raises TlsError and keeps the old ones otherwise."""
        self._server.reload_tls()

    @property
    def outstanding(self) -> int:
        """Calls whose handlers run."""
        return len(self._running)

    async def stop(self, grace_s: float) -> None:
        """Ends streams as Draining at once, and as Unavailable the other calls that still run after `grace_s` seconds.

        New calls are refused as Draining, so that clients go to another server.
        """
        self._stopping = True
        self._server.set_serving(False)
        closing = asyncio.create_task(asyncio.to_thread(self._server.stop, int(grace_s * 1000) + LAST_FRAMES_MS))
        for running in list(self._running.values()):
            if running.room is not None:
                running.task.cancel()
        if not await self._idle_within(grace_s):
            for running in list(self._running.values()):
                running.task.cancel()
            await self._idle_within(LAST_FRAMES_MS / 1000)
        await closing
        asyncio.get_running_loop().remove_reader(self._server.fileno())

    async def _idle_within(self, seconds: float) -> bool:
        """Waits until no handler runs."""
        try:
            async with asyncio.timeout(seconds):
                while self._running:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return not self._running
        return True

    def _ready(self) -> None:
        for call in self._server.calls():
            self._accept(call)
        for number in self._server.changed():
            running = self._running.get(number)
            if running is None:
                continue
            if running.call.cancelled:
                running.task.cancel()
            elif running.room is not None:
                running.room.set()

    def _accept(self, call: RpcIncoming) -> None:
        route = self._routes[call.method]
        if self._stopping:
            call.fail("draining", "the service is about to stop; send the request again", None, 1)
        elif call.service not in route.callers:
            logger.warning("call refused", method=call.method, caller=call.service, address=call.address)
            call.fail("permission_denied", f"{call.service or 'nobody'} may not call {call.method}")
        else:
            room = asyncio.Event() if route.method.streaming else None
            task = asyncio.create_task(self._answer(call, route, room))
            self._running[call.id] = _Running(call, task, room)
            task.add_done_callback(functools.partial(self._end, call.id))

    async def _answer(self, call: RpcIncoming, route: _Route, room: asyncio.Event | None) -> None:
        """Runs the handler of one call."""
        if call.request_id:
            structlog.contextvars.bind_contextvars(request_id=call.request_id)
        try:
            request = route.method.request.FromString(call.message)
            answer = route.handler(request, Caller(call.service, call.address, call.request_id))
            if room is None:
                call.finish(_encode(route, await cast("Awaitable[Any]", answer)))
            else:
                await _stream(call, route, cast("AsyncIterator[Any]", answer), room)
        except DecodeError:
            call.fail("invalid_request", f"the message is not a {route.method.request.__name__}")
        except CoreError as error:
            call.fail(error.code, str(error.args[0]) if error.args else error.code, error.param, error.retry_after_s)
        except Exception:
            logger.exception("a handler failed", method=call.method)
            call.fail("internal", "the service failed; its log says why")

    def _end(self, number: int, task: "asyncio.Task[None]") -> None:
        running = self._running.pop(number)
        if task.cancelled():
            # The caller has gone, and hears nothing, or the service stops. A stream can start again elsewhere; what
            # else a handler had done by now, nobody knows.
            code = "unavailable" if running.room is None else "draining"
            running.call.fail(code, "the service stopped before the answer was complete; send the request again")
        if not self._running:
            self._idle.set()


async def _stream(call: RpcIncoming, route: _Route, answer: AsyncIterator[Any], room: asyncio.Event) -> None:
    try:
        async for message in answer:
            data = _encode(route, message)
            room.clear()
            # A call that was cancelled has no room either, but its task is cancelled then.
            while not call.send(data):
                await room.wait()
                room.clear()
        call.finish()
    finally:
        if isinstance(answer, AsyncGenerator):
            await answer.aclose()


def _encode(route: _Route, message: Any) -> bytes:
    if type(message) is not route.method.response:
        raise TypeError(f"{route.method.path} answers with {route.method.response.__name__}, not {type(message)}")
    data: bytes = message.SerializeToString()
    return data
