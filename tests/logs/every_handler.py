"""`python -m tests.logs.every_handler CERTS MODEL`: raises in every handler there is, with a secret in every field.

Handlers are taken from where the product takes them: service descriptors, the gateway's own table of routes, the pool's
loop. What they are called with holds CANARY in every text. Prints how many it called, for the test that reads the log.
"""

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import orjson
from google.protobuf.descriptor import FieldDescriptor

from helixflow import config, core_rs, log
from helixflow.auth.service import guarded
from helixflow.config import Config
from helixflow.gateway.app import Gateway, routes
from helixflow.gateway.bridge import Bridge
from helixflow.gateway.http import Request
from helixflow.gateway.routes import Policy, Route
from helixflow.gateway.services import Services
from helixflow.pki.layout import Layout, Role
from helixflow.pool import service as pool_service
from helixflow.rpc import messages
from helixflow.rpc.client import Client
from helixflow.rpc.server import Server
from tests.logs import CANARY
from tests.pool.support import NextByte, connect, finish, request
from tests.rpc.support import files

CALLERS = frozenset({"api-gateway"})
SERVICES = ("AuthService", "AdminService")


def fail(secret: Any) -> None:
    """Raises what code raises that stumbles over a value: an error whose message holds it, from another one."""
    password = str(secret)
    try:
        int(password)
    except ValueError as error:
        broken = asyncpg.UniqueViolationError(f"duplicate key value {password}")
        broken.detail = f"Key (email)=({password}) already exists."
        raise broken from KeyError(password, error)


# --- gRPC --------------------------------------------------------------------------


def filled(kind: Any, depth: int = 3) -> Any:
    """A message with CANARY in every text and all bytes, at every depth."""
    made = kind()
    for field in kind.DESCRIPTOR.fields:
        value: Any = None
        if field.type == FieldDescriptor.TYPE_STRING:
            value = CANARY
        elif field.type == FieldDescriptor.TYPE_BYTES:
            value = CANARY.encode()
        elif field.message_type is not None and depth and not field.message_type.GetOptions().map_entry:
            below = filled(type(getattr(made, field.name)) if not field.is_repeated else _kind(field), depth - 1)
            if field.is_repeated:
                getattr(made, field.name).append(below)
            else:
                getattr(made, field.name).CopyFrom(below)
            continue
        if value is not None:
            if field.is_repeated:
                getattr(made, field.name).append(value)
            else:
                setattr(made, field.name, value)
    return made


def _kind(field: Any) -> Any:
    return getattr(messages, field.message_type.name)


def sabotaged(method: messages.Method) -> Any:
    """A handler of the method, behind the guard that real ones have."""

    async def unary(asked: Any, _caller: Any) -> Any:
        copied = method.request.FromString(asked.SerializeToString())
        fail(copied)

    async def streaming(asked: Any, _caller: Any) -> AsyncIterator[Any]:
        fail(asked)
        yield

    return guarded(streaming if method.streaming else unary)


async def services(layout: Layout) -> int:
    """Calls every method of every service of Python's; the number of them."""
    known = {name: found for service in SERVICES for name, found in messages.service(service).items()}
    server = Server({name: sabotaged(found) for name, found in known.items()}, dict.fromkeys(known, CALLERS))
    address = server.start("127.0.0.1:0", files(layout, "auth-service", Role.SERVER))
    client = Client([address], files(layout, "api-gateway", Role.CLIENT))
    for name, method in known.items():
        asked = filled(method.request)
        assert CANARY.encode() in asked.SerializeToString() or not method.request.DESCRIPTOR.fields
        try:
            if method.streaming:
                async for _ in client.stream(name, asked):
                    raise AssertionError("it answers")
            else:
                await client.call(name, asked)
        except core_rs.CoreError as error:
            if error.code != "internal":
                raise
    client.close()
    await server.stop(0)
    return len(known)


# --- HTTP --------------------------------------------------------------------------


def scope_of(method: str, path: str) -> dict[str, Any]:
    names = (
        b"authorization",
        b"x-api-key",
        b"api-key",
        b"cookie",
        b"user-agent",
        b"referer",
        b"x-forwarded-for",
        b"origin",
    )
    headers = [(name, b"Bearer " + CANARY.encode()) for name in names]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": f"code={CANARY}&state={CANARY}".encode(),
        "headers": [
            *headers,
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"x-helixflow-client", b"192.0.2.7"),
        ],
        "http_version": "1.1",
    }


BODY = orjson.dumps(
    {
        "model": CANARY,
        "messages": [{"role": "user", "content": CANARY}],
        "prompt": CANARY,
        "input": CANARY,
        "user": CANARY,
        "email": CANARY,
        "password": CANARY,
        "new_password": CANARY,
        "refresh_token": CANARY,
        "name": CANARY,
    }
)


async def answer(app: Gateway, method: str, path: str) -> int:
    """The status of one request."""
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(scope_of(method, path), receive, send)
    return status


async def gateway(configuration: Config) -> int:
    """Calls every route twice: as it is, with a credential that nobody knows, and with a handler that fails."""
    bridge = Bridge.connect(configuration)
    running = await Services.open(configuration)
    table = routes(bridge, configuration, running)

    def broken(route: Route) -> Route:
        async def handler(asked: Request) -> None:
            body = await asked.json() if asked.method not in ("GET", "DELETE") else BODY
            fail((asked.headers, asked.query, body))

        return Route(route.method, route.path, handler, Policy.PUBLIC)

    real = Gateway(configuration, bridge, running)
    failing = Gateway(configuration, bridge, running, table=[broken(route) for route in table])
    for route in table:
        path = "/".join(CANARY if part.startswith("{") else part for part in route.path.split("/"))
        assert await answer(real, route.method, path)
        assert await answer(failing, route.method, path) == 500
    assert await answer(real, "GET", f"/{CANARY}") == 404
    await running.close()
    bridge.close()
    return len(table)


# --- the pool ------------------------------------------------------------------------


def pool(model: Path) -> None:
    """A pool that renders and tokenises prompts, and whose engine fails over one."""
    made = core_rs.Pool(str(model), core_rs.PoolOptions(model_id="bytes"))
    address = made.serve("127.0.0.1:0", None)

    def broken(_logits: Any) -> object:
        fail(CANARY)
        return None

    events: queue.SimpleQueue[pool_service.Event] = queue.SimpleQueue()
    thread = pool_service.EngineThread(made, NextByte(broken), events)
    thread.start()
    client = connect(address)
    refusals = 0
    for wanted in (request("x" * 4000 + CANARY), request(CANARY, stop=[CANARY])):
        call = client.complete(wanted, completion_id="cmpl-1", created=0, stream=False)
        try:
            finish(client, call)
        except core_rs.CoreError:
            refusals += 1
    assert refusals == 2, "the first is too long, the second ends with the engine"
    assert events.get(timeout=10) is pool_service.Event.ENGINE_ENDED
    log.get("pool").error("the engine failed", exc_info=thread.error)
    client.close()
    made.stop()
    thread.join()


def main(certs: Path, model: Path) -> None:
    """Everything, once."""
    configuration = config.load()
    log.setup(configuration.log, "every-handler")
    print("methods", asyncio.run(services(Layout(certs))))
    print("routes", asyncio.run(gateway(configuration)))
    pool(model)
    print("pool 1")
    print("threads", threading.active_count())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
