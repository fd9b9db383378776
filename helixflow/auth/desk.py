"""What the methods of AdminService share: who calls, a transaction, the way from rows to messages."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from helixflow.auth import principals
from helixflow.auth.actors import Actor, holder, operator
from helixflow.auth.organisations import Page
from helixflow.auth.pepper import Pepper
from helixflow.auth.refusals import Refusals
from helixflow.auth.signing import Signer
from helixflow.core_rs import InvalidRequest, PermissionDenied
from helixflow.db.pool import Pool
from helixflow.refusals import refusal
from helixflow.rpc.server import Caller

GATEWAY = "api-gateway"
OPERATOR = "auth-service"
"""The command line shows this service's own certificate: whoever can read its key is the operator."""

Handler = Callable[[Any, Caller], Awaitable[Any]]


class Desk:
    """Opens the transaction that an administrative act and its audit row happen in."""

    def __init__(self, pool: Pool, pepper: Pepper, signer: Signer, refused: Refusals, *, development: bool) -> None:
        """`development`: keys of that profile are known. `refused`: where refusals are noted."""
        self._refusals = refused
        self._pool = pool
        self._pepper = pepper
        self._signer = signer
        self._development = development

    @contextlib.asynccontextmanager
    async def act(self, method: str, request: Any, caller: Caller) -> AsyncIterator[tuple[Any, Actor]]:
        """A connection in a transaction, and the actor, who may call `method`.

        Raises PermissionDenied, InvalidToken or InvalidApiKey.
        """
        actor: Actor | None = None
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                actor = await self._actor(connection, request.actor, caller)
                actor.allow(method)
                yield connection, actor
        except PermissionDenied:
            if actor is not None:
                await self._refusals.note(f"{method}.refused", actor.name, actor.address, actor.organisation_id)
            raise

    async def _actor(self, connection: Any, claimed: Any, caller: Caller) -> Actor:
        """The actor: by the certificate the operator, or the holder of the credential that a gateway passes on.

        What a gateway says is the address of the client and the id of the request, never who acts.
        """
        request_id = claimed.request_id or caller.request_id
        kind = claimed.WhichOneof("credential")
        if caller.service == OPERATOR:
            if kind is not None:
                raise refusal(InvalidRequest, "the operator acts by the certificate: leave the credential out", "actor")
            return operator(claimed.name, claimed.address or caller.address, request_id)
        if caller.service != GATEWAY:
            raise refusal(PermissionDenied, "only gateways and the operator administer accounts")
        if kind is None:
            raise refusal(PermissionDenied, "a gateway acts for others only: the call holds no credential of theirs")
        if kind == "access_token":
            found = await principals.by_token(connection, self._signer, claimed.access_token)
        else:
            found = await principals.by_key(connection, self._pepper, claimed.key_digest, development=self._development)
        return holder(found, claimed.address, request_id)


def filled(kind: Any, record: Any) -> Any:
    """A message of a record whose fields have the message's names."""
    return kind(**dataclasses.asdict(record))


def listed(kind: Any, item: Any, page: Page) -> Any:
    """A message of one page."""
    return kind(data=[filled(item, record) for record in page.data], next=page.next)


def optional(request: Any, name: str) -> Any:
    """The value of an optional field, or None."""
    return getattr(request, name) if request.HasField(name) else None
