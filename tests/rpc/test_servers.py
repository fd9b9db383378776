"""Servers that start, stop, change their certificates, and stand in for each other."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from helixflow.core_rs import Draining, InvalidRequest, RpcServer, TlsError, Unavailable
from helixflow.pki.layout import Layout, Role
from helixflow.rpc import messages
from helixflow.rpc.client import Client
from helixflow.rpc.server import Caller, Server

from .support import CALLERS, echo, files, key, make, methods, run, serving


def test_every_method_needs_a_handler_and_its_callers() -> None:
    handlers = methods()
    callers = dict.fromkeys(handlers, CALLERS)
    lacking = {name: handler for name, handler in handlers.items() if name != "AuthService/Jwks"}
    with pytest.raises(ValueError, match=r"handlers: missing \['AuthService/Jwks'\]"):
        Server(lacking, callers)
    with pytest.raises(ValueError, match=r"callers: .*unknown \['AuthService/Nothing'\]"):
        Server(handlers, {**callers, "AuthService/Nothing": CALLERS})
    with pytest.raises(InvalidRequest, match="Nothing"):
        RpcServer(["Nothing"])


def test_stopping_ends_streams_and_lets_calls_finish(pki: Layout) -> None:
    begun, release, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def verify(request: Any, caller: Caller) -> Any:
        begun.set()
        await release.wait()
        return await echo(request, caller)

    async def watch(_request: Any, _caller: Caller) -> AsyncIterator[Any]:
        try:
            yield messages.Event(resync=True)
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def test() -> None:
        async with serving(pki, verify, watch) as pair:
            stream = pair.watch()
            await anext(stream)
            calling = asyncio.create_task(pair.verify("slow"))
            await begun.wait()
            stopping = asyncio.create_task(pair.server.stop(5))
            with pytest.raises(Draining):
                await anext(stream)
            await closed.wait()
            assert not stopping.done()
            release.set()
            assert (await calling).user == "slow"
            await stopping
            with pytest.raises(Unavailable):
                await pair.verify(timeout_s=0.05)

    run(test)


def test_what_outlasts_the_grace_is_cut(pki: Layout) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def verify(_request: Any, _caller: Caller) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def test() -> None:
        async with serving(pki, verify) as pair:
            calling = asyncio.create_task(pair.verify())
            await begun.wait()
            await pair.server.stop(0.05)
            with pytest.raises(Unavailable, match="stopped before"):
                await calling
            assert ended.is_set()

    run(test)


def test_calls_go_to_the_next_server_while_one_stops_and_when_it_is_gone(pki: Layout) -> None:
    async def named(name: str) -> tuple[Server, str]:
        async def verify(_request: Any, _caller: Caller) -> Any:
            return messages.Principal(user=name)

        server = make(verify)
        return server, server.start("127.0.0.1:0", files(pki, "auth-service", Role.SERVER))

    async def test() -> None:
        first, at_first = await named("first")
        second, at_second = await named("second")
        client = Client([at_first, at_second], files(pki, "api-gateway", Role.CLIENT))
        served = []

        async def ask() -> None:
            served.append((await client.call("AuthService/Verify", key("a"))).user)

        for _ in range(20):
            await ask()
        asking = asyncio.gather(*(ask() for _ in range(50)))
        await first.stop(1)
        await asking
        for _ in range(20):
            await ask()
        # Nobody was told of the change.
        assert len(served) == 90
        assert served[:20] == ["first"] * 20
        assert served[-20:] == ["second"] * 20
        assert client.server == at_second
        client.close()
        await second.stop(0)

    run(test)


def test_certificates_change_while_calls_run(pki: Layout, tmp_path: Path) -> None:
    own = Layout(tmp_path / "certs")
    shutil.copytree(pki.directory, own.directory)
    more = asyncio.Event()

    async def watch(_request: Any, _caller: Caller) -> AsyncIterator[Any]:
        yield messages.Event(key="one")
        await more.wait()
        yield messages.Event(key="two")

    async def test() -> None:
        server = make(watch=watch)
        server_files = own.pair("auth-service", Role.SERVER)
        client_files = own.pair("api-gateway", Role.CLIENT)
        address = server.start("127.0.0.1:0", files(own, "auth-service", Role.SERVER))
        client = Client([address], files(own, "api-gateway", Role.CLIENT))
        stream = client.stream("AuthService/Watch", messages.WatchEventsRequest())
        assert (await anext(stream)).key == "one"
        for side, pair in ((server, server_files), (client, client_files)):
            good = pair.cert.read_bytes()
            pair.cert.write_text("no certificate")
            with pytest.raises(TlsError, match=pair.cert.name):
                side.reload_tls()
            pair.cert.write_bytes(good)
            side.reload_tls()
            assert (await client.call("AuthService/Verify", key("a"))).user == "a"
        more.set()
        assert [event.key async for event in stream] == ["two"]
        client.close()
        await server.stop(0)

    run(test)


def test_a_server_of_another_service_is_refused(pki: Layout) -> None:
    async def test() -> None:
        server = make()
        address = server.start("127.0.0.1:0", files(pki, "monitoring", Role.SERVER))
        client = Client([address], files(pki, "api-gateway", Role.CLIENT))
        with pytest.raises(Unavailable):
            await client.call("AuthService/Verify", key("a"), timeout_s=0.5)
        assert "monitoring" in (client.last_error or "")
        client.close()
        await server.stop(0)

    run(test)


def test_an_address_that_is_taken_and_a_second_start(pki: Layout) -> None:
    async def test() -> None:
        async with serving(pki) as pair:
            identity = files(pki, "auth-service", Role.SERVER)
            with pytest.raises(Unavailable, match="cannot listen"):
                make().start(pair.address, identity)
            with pytest.raises(TlsError, match="loopback"):
                RpcServer(["AuthService"]).serve("0.0.0.0:0", None, [])

    run(test)
