"""Leases over real gRPC with mutual TLS."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core_rs import Conflict, InvalidRequest, RateLimitExceeded, TlsFiles
from helixflow.limits.model import MAX_LIMIT, Metric
from helixflow.limits.remote import METHOD, call_of, granted_of, lease_handler, lease_over, reply_of, request_of
from helixflow.limits.store import Call, Grant, Granted, Item, LimitStore
from helixflow.pki.layout import Layout, Role
from helixflow.rpc import messages
from helixflow.rpc.client import Client
from helixflow.rpc.server import Server

from .support import GATEWAYS, KEY, Clock, ModelStore, item, limiter, limits

_AMOUNT = st.integers(0, MAX_LIMIT)


@given(
    st.builds(
        Call,
        st.uuids().map(str),
        _AMOUNT,
        _AMOUNT,
        st.lists(
            st.builds(Item, st.text(), st.sampled_from(Metric), *([_AMOUNT] * 7)),
            max_size=3,
        ).map(tuple),
    )
)
def test_calls_as_messages(call: Call) -> None:
    assert call_of(messages.LeaseRequest.FromString(request_of(call).SerializeToString())) == call


@given(
    st.builds(
        Granted,
        st.lists(st.builds(Grant, _AMOUNT, _AMOUNT, st.booleans())).map(tuple),
        st.integers(0, 1 << 31),
        _AMOUNT,
    )
)
def test_answers_as_messages(granted: Granted) -> None:
    assert granted_of(messages.LeaseReply.FromString(reply_of(granted).SerializeToString())) == granted


@pytest.mark.parametrize(
    "wrong",
    [
        {"gateway": "gateway-1"},
        {"gateway": ""},
        {"gateway": GATEWAYS[0], "items": [{"subject": KEY, "metric": 0}]},
        {"gateway": GATEWAYS[0], "items": [{"subject": KEY, "metric": 99}]},
    ],
)
def test_calls_of_nobody(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="no call of a gateway"):
        call_of(messages.LeaseRequest(**wrong))


@asynccontextmanager
async def _served(pki: Layout, store: LimitStore) -> AsyncIterator[Callable[[Call], Awaitable[Granted]]]:
    async def absent(*_: Any) -> Any:
        raise NotImplementedError

    methods: dict[str, Any] = dict.fromkeys(messages.service("AuthService"), absent) | {METHOD: lease_handler(store)}
    server = Server(methods, dict.fromkeys(methods, frozenset({"api-gateway"})))
    own, gateway = pki.pair("auth-service", Role.SERVER), pki.pair("api-gateway", Role.CLIENT)
    address = server.start("127.0.0.1:0", TlsFiles(str(pki.ca_cert), str(own.cert), str(own.key)))
    server.set_serving(True)
    client = Client([address], TlsFiles(str(pki.ca_cert), str(gateway.cert), str(gateway.key)))
    try:
        yield lease_over(client)
    finally:
        client.close()
        await server.stop(1)


def test_a_gateway_and_its_store(pki: Layout) -> None:
    chosen = limits(tokens_per_minute=100)

    async def work() -> None:
        clock = Clock()
        async with _served(pki, ModelStore(clock)) as lease:
            gateway = limiter(0, lease, clock, lease_timeout_ms=10_000)
            await gateway.reserve(chosen, 100, 0)
            with pytest.raises(RateLimitExceeded):
                await gateway.reserve(chosen, 1, 0)
            assert not gateway.away
            with pytest.raises(Conflict, match="after a later one"):
                await lease(Call(GATEWAYS[0], 1, 1, ()))
            with pytest.raises(InvalidRequest, match="stands twice"):
                await lease(Call(GATEWAYS[1], 1, 1, (item(), item())))

    asyncio.run(work())
