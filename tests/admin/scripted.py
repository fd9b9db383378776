"""AuthService and AdminService on the real gRPC server, with real certificates; the test says what they answer."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from helixflow.core_rs import CoreError, TlsFiles
from helixflow.pki.layout import Layout, Role
from helixflow.refusals import refusal
from helixflow.rpc import messages
from helixflow.rpc.server import Caller, Server

SERVICES = ("AuthService", "AdminService")
CALLERS = frozenset({"api-gateway", "auth-service"})


@dataclass
class Call:
    """One call that arrived."""

    method: str
    message: dict[str, Any]
    caller: Caller


@dataclass
class Scripted:
    """The services, in a thread. An answer is a message, an error to raise, or a function of the request."""

    layout: Layout
    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    address: str = ""

    def __post_init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def start(self) -> "Scripted":
        self._thread.start()
        assert self._ready.wait(10)
        assert self.address
        return self

    def stop(self) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def reset(self) -> None:
        self.answers.clear()
        self.calls.clear()

    def only(self, method: str) -> dict[str, Any]:
        """The message of the one call of this method."""
        (call,) = [call for call in self.calls if call.method == method]
        return call.message

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        known = {name: method for service in SERVICES for name, method in messages.service(service).items()}
        handlers: dict[str, Any] = {
            name: self._stream if method.streaming else self._unary(name, method.response)
            for name, method in known.items()
        }
        server = Server(handlers, dict.fromkeys(known, CALLERS))
        pair = self.layout.pair("auth-service", Role.SERVER)
        files = TlsFiles(str(self.layout.ca_cert), str(pair.cert), str(pair.key))
        self.address = server.start("127.0.0.1:0", files)
        server.set_serving(True)
        self._ready.set()
        await self._stop.wait()
        await server.stop(0.1)

    def _unary(self, name: str, reply: Any) -> Callable[[Any, Caller], Any]:
        async def handle(message: Any, caller: Caller) -> Any:
            self.calls.append(Call(name, messages.plain(message), caller))
            answer = self.answers.get(name)
            if callable(answer) and not isinstance(answer, type):
                answer = answer(message)
            if isinstance(answer, CoreError):
                raise answer
            return reply() if answer is None else answer

        return handle

    async def _stream(self, _message: Any, _caller: Caller) -> AsyncIterator[Any]:
        yield messages.Event(resync=True)
        await asyncio.Event().wait()


def error(kind: type[CoreError], message: str, param: str | None = None, retry_after_s: int | None = None) -> CoreError:
    """An error as a service raises it."""
    made = refusal(kind, message, param)
    made.retry_after_s = retry_after_s
    return made


def sent(service: Scripted, method: str) -> dict[str, Any]:
    """The fields that were set in the one call of this method, without who acts."""
    message = service.only(f"AdminService/{method}")
    return {name: value for name, value in message.items() if name != "actor" and value not in ("", 0, False, [])}
