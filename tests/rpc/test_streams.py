"""Calls whose answer is a stream."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from helixflow.core_rs import Conflict
from helixflow.pki.layout import Layout
from helixflow.refusals import refusal
from helixflow.rpc import messages
from helixflow.rpc.server import Caller

from .support import run, serving


def test_a_stream_comes_in_order_and_whole(pki: Layout) -> None:
    count = 5000  # more than wait in any buffer

    async def watch(request: Any, _caller: Caller) -> AsyncIterator[Any]:
        assert request.gateway == "g"
        for number in range(count):
            yield messages.Event(key=f"{number:0200}")

    async def test() -> None:
        async with serving(pki, watch=watch) as pair:
            seen = [int(event.key) async for event in pair.watch()]
            assert seen == list(range(count))

    run(test)


def test_a_reader_that_is_behind_holds_the_handler_back(pki: Layout) -> None:
    produced = 0
    size = 4096

    async def watch(_request: Any, _caller: Caller) -> AsyncIterator[Any]:
        nonlocal produced
        for number in range(10_000):
            produced = number + 1
            yield messages.Event(key="x" * size)

    async def test() -> None:
        async with serving(pki, watch=watch) as pair:
            stream = pair.watch()
            await anext(stream)
            before = -1
            while produced != before:
                before = produced
                await asyncio.sleep(0.1)
            # 1 MiB at the client, 64 KiB twice on the way, 4 MiB or 1024 messages at the server.
            assert produced < 2000
            assert len([event async for event in stream]) == 9_999

    run(test)


def test_closing_a_stream_closes_the_generator(pki: Layout) -> None:
    closed = asyncio.Event()

    async def watch(_request: Any, _caller: Caller) -> AsyncIterator[Any]:
        try:
            yield messages.Event(resync=True)
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def test() -> None:
        async with serving(pki, watch=watch) as pair:
            stream = pair.watch()
            assert (await anext(stream)).resync
            await stream.aclose()
            await closed.wait()
            await pair.idle()

    run(test)


def test_a_handler_without_room_is_cancelled_too(pki: Layout) -> None:
    closed = asyncio.Event()

    async def watch(_request: Any, _caller: Caller) -> AsyncIterator[Any]:
        try:
            while True:
                yield messages.Event(key="x" * 4096)
        finally:
            closed.set()

    async def test() -> None:
        async with serving(pki, watch=watch) as pair:
            stream = pair.watch()
            await anext(stream)
            await asyncio.sleep(0.2)
            assert not closed.is_set()
            await stream.aclose()
            await closed.wait()

    run(test)


def test_an_error_comes_behind_the_messages(pki: Layout) -> None:
    async def watch(_request: Any, _caller: Caller) -> AsyncIterator[Any]:
        for number in range(3):
            yield messages.Event(key=str(number))
        raise refusal(Conflict, "that was all", "gateway")

    async def test() -> None:
        async with serving(pki, watch=watch) as pair:
            stream = pair.watch()
            assert [(await anext(stream)).key for _ in range(3)] == ["0", "1", "2"]
            with pytest.raises(Conflict, match="that was all") as caught:
                await anext(stream)
            assert caught.value.param == "gateway"

    run(test)
