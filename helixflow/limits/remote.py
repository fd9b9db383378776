"""Leases over gRPC: the gateway's end and the auth-service's."""

import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from helixflow.core_rs import InvalidRequest
from helixflow.db.pool import Pool
from helixflow.limits import settings
from helixflow.limits.model import Metric, Price
from helixflow.limits.store import Call, Grant, Granted, Item, LimitStore
from helixflow.refusals import refusal
from helixflow.rpc import messages

METHOD = "AuthService/Lease"


def lease_over(client: Any) -> Callable[[Call], Awaitable[Granted]]:
    """Leases from the auth-service that a `helixflow.rpc.client.Client` leads to."""

    async def lease(call: Call) -> Granted:
        return granted_of(await client.call(METHOD, request_of(call)))

    return lease


def lease_handler(store: LimitStore) -> Callable[[Any, Any], Awaitable[Any]]:
    """Answers AuthService/Lease from a store."""

    async def lease(request: Any, _caller: Any) -> Any:
        return reply_of(await store.lease(call_of(request)))

    return lease


def prices_handler(pool: Pool, currency: str) -> Callable[[Any, Any], Awaitable[Any]]:
    """Answers AuthService/Prices: all prices, in nano units of `currency`."""

    async def prices(_request: Any, _caller: Any) -> Any:
        async with pool.acquire() as connection:
            found, _ = await settings.prices(connection)
        return price_list(found, currency)

    return prices


def price_list(found: Iterable[Price], currency: str) -> Any:
    """A helixflow.v1.PriceList."""
    return messages.PriceList(currency=currency, prices=[price.message() for price in found])


def request_of(call: Call) -> Any:
    """The call as a helixflow.v1.LeaseRequest."""
    request = messages.LeaseRequest(gateway=call.gateway, sequence=call.sequence, batch=call.batch)
    for item in call.items:
        request.items.add(
            subject=item.subject,
            metric=item.metric.value,
            window=item.window,
            limit=item.limit,
            floor=item.floor,
            need=item.need,
            want=item.want,
            held=item.held,
            spent=item.spent,
        )
    return request


def call_of(request: Any) -> Call:
    """Reads a helixflow.v1.LeaseRequest. Raises InvalidRequest."""
    try:
        gateway = str(uuid.UUID(request.gateway))
        items = tuple(
            Item(
                item.subject,
                Metric(item.metric),
                item.window,
                item.limit,
                item.floor,
                item.need,
                item.want,
                item.held,
                item.spent,
            )
            for item in request.items
        )
    except ValueError as error:
        raise refusal(InvalidRequest, f"this is no call of a gateway: {error}") from None
    return Call(gateway, request.sequence, request.batch, items)


def reply_of(granted: Granted) -> Any:
    """The answer as a helixflow.v1.LeaseReply."""
    reply = messages.LeaseReply(gateways=granted.gateways, now_ms=granted.now_ms)
    for grant in granted.grants:
        reply.grants.add(granted=grant.granted, room=grant.room, uncounted=grant.uncounted)
    return reply


def granted_of(reply: Any) -> Granted:
    """Reads a helixflow.v1.LeaseReply."""
    grants = tuple(Grant(grant.granted, grant.room, grant.uncounted) for grant in reply.grants)
    return Granted(grants, reply.gateways, reply.now_ms)
