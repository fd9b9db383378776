"""Calls that have one answer."""

import asyncio
import time
from typing import Any

import pytest
from structlog.testing import capture_logs

from helixflow.core_rs import (
    AccountLocked,
    Cancelled,
    CoreError,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    PermissionDenied,
    RpcClient,
    Unavailable,
)
from helixflow.pki.layout import Layout, Role
from helixflow.refusals import refusal
from helixflow.rpc import messages
from helixflow.rpc.client import Client
from helixflow.rpc.server import Caller

from .support import echo, files, key, make, run, serving


def test_a_call_carries_message_caller_and_request_id(pki: Layout) -> None:
    callers = []

    async def verify(request: Any, caller: Caller) -> Any:
        callers.append(caller)
        return await echo(request, caller)

    async def test() -> None:
        async with serving(pki, verify) as pair:
            answer = await pair.verify("grüße", request_id="req-7")
            assert (answer.user, answer.role, answer.organisation) == ("grüße", "req-7", "api-gateway")
            assert (await pair.verify("")).role == ""
            assert callers[0].address.startswith("127.0.0.1:")
            assert pair.client.server == pair.address
            assert pair.client.last_error is None
            assert pair.server.outstanding == 0

    run(test)


def test_errors_of_handlers_come_whole(pki: Layout) -> None:
    async def verify(request: Any, _caller: Caller) -> Any:
        if request.key_digest == b"locked":
            error = refusal(AccountLocked, "wait a little — später", "email")
            error.retry_after_s = 17
            raise error
        if request.key_digest == b"wrong type":
            return messages.Tokens()
        raise RuntimeError("secret detail")

    async def test() -> None:
        async with serving(pki, verify) as pair:
            with pytest.raises(AccountLocked, match="später") as caught:
                await pair.verify("locked")
            assert (caught.value.param, caught.value.retry_after_s) == ("email", 17)
            for text in ("wrong type", "bug"):
                with capture_logs() as logs, pytest.raises(Internal) as internal:
                    await pair.verify(text, request_id="req-8")
                assert "secret" not in str(internal.value)
                assert [line["event"] for line in logs] == ["a handler failed"]

    run(test)


def test_a_deadline_ends_the_call_and_its_handler(pki: Layout) -> None:
    ended = asyncio.Event()

    async def verify(_request: Any, _caller: Caller) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def test() -> None:
        async with serving(pki, verify) as pair:
            with pytest.raises(DeadlineExceeded):
                await pair.verify(timeout_s=0.1)
            await ended.wait()
            await pair.idle()

    run(test)


def test_cancelling_a_caller_cancels_the_handler(pki: Layout) -> None:
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
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            await ended.wait()

    run(test)


def test_two_thousand_calls_at_once(pki: Layout) -> None:
    count = 2000
    everybody = asyncio.Event()
    waiting = 0

    async def verify(request: Any, caller: Caller) -> Any:
        nonlocal waiting
        waiting += 1
        if waiting == count:
            everybody.set()
        await everybody.wait()
        return await echo(request, caller)

    async def test() -> None:
        async with serving(pki, verify) as pair:
            answers = await asyncio.gather(*(pair.verify(str(number), timeout_s=20) for number in range(count)))
            assert [answer.user for answer in answers] == [str(number) for number in range(count)]

    run(test)


def test_callers_that_are_not_named_are_refused(pki: Layout) -> None:
    async def test() -> None:
        for service, target, expected in (
            # Its certificate lets it in for another method only.
            ("auth-service", _restricted(), PermissionDenied),
            # Comes in for health and reflection.
            ("monitoring", make(), PermissionDenied),
            # Nothing is for it: the handshake fails.
            ("auth-service", make(), Unavailable),
            ("auth-service", make(callers=frozenset({"api-gateway", "auth-service"})), None),
        ):
            address = target.start("127.0.0.1:0", files(pki, "auth-service", Role.SERVER))
            client = Client([address], files(pki, service, Role.CLIENT))
            try:
                await client.call("AuthService/Verify", key("a"))
            except CoreError as error:
                assert type(error) is expected  # noqa: PT017 (one of the cases has none)
            else:
                assert expected is None
            client.close()
            await target.stop(0)

    def _restricted() -> Any:
        server = make()
        return type(server)(
            {name: route.handler for name, route in server._routes.items()},
            {name: frozenset({"auth-service" if name.endswith("/Jwks") else "api-gateway"}) for name in server._routes},
        )

    run(test)


def test_nobody_there_is_unavailable_soon(pki: Layout) -> None:
    async def test() -> None:
        client = Client(["127.0.0.1:1"], files(pki, "api-gateway", Role.CLIENT))
        started = time.monotonic()
        with pytest.raises(Unavailable, match="no auth-service is reachable"):
            await client.call("AuthService/Verify", key("a"), timeout_s=0.1)
        assert time.monotonic() - started < 0.9
        assert client.server is None
        assert client.last_error is not None
        assert client.last_error.startswith("127.0.0.1:1: ")
        client.close()

    run(test)


def test_close_ends_calls(pki: Layout) -> None:
    begun = asyncio.Event()

    async def verify(_request: Any, _caller: Caller) -> Any:
        begun.set()
        await asyncio.Event().wait()

    async def test() -> None:
        async with serving(pki, verify) as pair:
            calling = asyncio.create_task(pair.verify())
            await begun.wait()
            pair.client.close()
            pair.client.close()
            with pytest.raises(Unavailable, match="closed"):
                await calling
            with pytest.raises(Unavailable, match="closed"):
                await pair.verify()

    run(test)


def test_wrong_use_is_refused(pki: Layout) -> None:
    async def test() -> None:
        async with serving(pki) as pair:
            with pytest.raises(KeyError):
                await pair.client.call("AuthService/Nothing", key("a"))
            with pytest.raises(TypeError, match="VerifyRequest"):
                await pair.client.call("AuthService/Verify", messages.Tokens())
        identity = files(pki, "api-gateway", Role.CLIENT)
        with pytest.raises(InvalidRequest, match="empty"):
            Client([], identity)
        raw = RpcClient(["127.0.0.1:1"], None, expect_service="auth-service")
        with pytest.raises(InvalidRequest, match="no proto has"):
            raw.call("/helixflow.v1.AuthService/Nothing", b"", request_id="", timeout_ms=0)
        call = raw.call("/helixflow.v1.AuthService/Verify", b"", request_id="", timeout_ms=0)
        call.cancel()
        assert call.done
        with pytest.raises(Cancelled):
            call.take()
        raw.close()

    run(test)
