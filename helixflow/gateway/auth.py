"""Who calls: the principal behind the bearer token of a request."""

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from helixflow.auth import certificates
from helixflow.config import DEVELOPMENT_KEY
from helixflow.core_rs import DeadlineExceeded, InvalidApiKey, PermissionDenied, Unavailable
from helixflow.gateway.http import Request
from helixflow.limits.model import TOKENS, SubjectLimits
from helixflow.refusals import refusal

FINGERPRINT, SPIFFE = b"x-helixflow-client-fingerprint", b"x-helixflow-client-spiffe"
"""What the front door tells of the client's certificate."""
OTHER_HEADERS = (b"x-api-key", b"api-key")
"""Where clients of Anthropic's and Azure's APIs put the key."""
MAX_CREDENTIAL_BYTES = 8192
"""Longest bearer token that is looked at: issued keys have 52 characters, access tokens about 1,000."""


@dataclass(frozen=True, slots=True)
class Content:
    """Whether texts of an organisation are kept: for how many days, and what is replaced in them."""

    retention_days: int
    redact: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The holder of a key or an access token. `name` is safe to log; the credential never is.

    Identifiers are UUIDs as text; empty where there is none. Empty `models` and `endpoints` mean all of them.
    `installation`: belongs to the first organisation. `age_s`: since the database confirmed it, when that is away.
    """

    name: str
    organisation_id: str = ""
    organisation: str = ""
    user_id: str = ""
    user: str = ""
    key_id: str = ""
    session_id: str = ""
    installation: bool = False
    age_s: int = 0
    role: str = ""
    expires_at: int = 0
    models: frozenset[str] = frozenset()
    endpoints: frozenset[str] = frozenset()
    limits: tuple[SubjectLimits, ...] = ()
    content: Content | None = None
    administers: str = ""
    """The role up to which the credential administers; empty: nothing beyond itself."""
    depends_on: tuple[str, ...] = ()
    """`kind:UUID` of what its validity hangs on beside the above."""
    token_ceiling: int | None = None
    """The smallest limit of tokens in any window."""
    ids: tuple[bytes | None, bytes | None, bytes | None] = (None, None, None)
    """Organisation, user and key as 16 bytes each, as the ledger writes them."""

    @classmethod
    def of(cls, message: Any) -> "Principal":
        """The principal of the message `helixflow.v1.Principal`."""
        content = message.content
        limits = tuple(SubjectLimits.of(item) for item in message.limits)
        return cls(
            name=message.key or message.user,
            organisation_id=message.organisation_id,
            organisation=message.organisation,
            user_id=message.user_id,
            user=message.user,
            key_id=message.key_id,
            session_id=message.session_id,
            role=message.role,
            installation=message.installation,
            age_s=message.age_s,
            expires_at=message.expires_at,
            models=frozenset(message.models),
            endpoints=frozenset(message.endpoints),
            limits=limits,
            token_ceiling=min(
                (limit for item in limits for metric, limit in item.limits if metric in TOKENS), default=None
            ),
            content=Content(content.retention_days, tuple(content.redact)) if content.store else None,
            administers=message.administers,
            depends_on=tuple(message.depends_on),
            ids=(_bytes(message.organisation_id), _bytes(message.user_id), _bytes(message.key_id)),
        )

    def check_endpoint(self, path: str) -> None:
        """Raises PermissionDenied when the credential is not for this route."""
        if self.endpoints and path not in self.endpoints:
            raise refusal(PermissionDenied, f"this API key may not call {path}")

    def check_model(self, name: str, canonical: str) -> None:
        """Raises PermissionDenied when the credential is for other models. `canonical`: what `name` stands for."""
        if self.models and name not in self.models and canonical not in self.models:
            raise refusal(PermissionDenied, f"this API key may not use the model {name[:200]!r}", "model")


def _bytes(text: str) -> bytes | None:
    return UUID(text).bytes if text else None


class KeyStore(Protocol):
    """Where credentials are known."""

    def known(self, credential: bytes) -> Principal | None:
        """The holder as far as it is known without asking anybody; None does not mean that there is none."""

    async def verify(self, credential: bytes, address: str) -> Principal:
        """The holder; `address`: the client's.

        Raises InvalidApiKey or InvalidToken; RateLimitExceeded when too much from there was neither; Unavailable when
        nobody can tell now.
        """


class DevelopmentKeys:
    """Knows the public key of the development profile and nothing else: a gateway without accounts."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(DEVELOPMENT_KEY.encode()).digest()
        self._principal = Principal(name="development")

    def known(self, credential: bytes) -> Principal | None:
        """The holder of the key. Digests are compared: the timing tells nothing about a key."""
        return self._principal if hashlib.sha256(credential).digest() == self._digest else None

    async def verify(self, credential: bytes, address: str) -> Principal:  # noqa: ARG002
        """Raises InvalidApiKey: whom `known` does not know does not exist."""
        raise unknown_key()


def unknown_key() -> InvalidApiKey:
    """The refusal of a key that does not exist, was revoked or has expired: it never says which."""
    return refusal(InvalidApiKey, "the API key is not valid")


def bearer(header: bytes | None) -> bytes:
    """The token of an `Authorization` header. Raises InvalidApiKey when there is none."""
    if header is None:
        raise refusal(InvalidApiKey, "no API key: send the header `Authorization: Bearer YOUR_KEY`")
    scheme, _, token = header.partition(b" ")
    token = token.strip()
    if scheme.lower() != b"bearer" or not token:
        raise refusal(InvalidApiKey, "the Authorization header must read `Bearer YOUR_KEY`")
    return token


def presented(request: Request) -> bytes:
    """The credential of a request: the bearer token, or what `x-api-key` or `api-key` holds, as other APIs send it.

    Raises InvalidApiKey when there is none that anybody can have issued, and when there are several: which one counts
    must not depend on their order, because whatever stands before the gateway may have looked at another one.
    """
    given = {bearer(value) for value in request.values(b"authorization")}
    for name in OTHER_HEADERS:
        given.update(value.strip() for value in request.values(name))
    given.discard(b"")
    if len(given) > 1:
        raise refusal(InvalidApiKey, "the request holds several API keys that differ: send one")
    token = given.pop() if given else bearer(None)
    if len(token) > MAX_CREDENTIAL_BYTES or token.startswith(certificates.PREFIX):
        raise unknown_key()
    return token


def shown(request: Request) -> list[bytes]:
    """What stands for the client's certificate, by each of its names; empty when it shows none, or sends a key."""
    if any(request.headers.get(name) for name in (b"authorization", *OTHER_HEADERS)):
        return []
    fingerprint, spiffe = request.headers.get(FINGERPRINT), request.headers.get(SPIFFE)
    names = [fingerprint and b"sha256:" + fingerprint, spiffe]
    return [certificates.PREFIX + name for name in names if name]


async def _verified(request: Request, store: KeyStore, tokens: list[bytes]) -> Principal:
    """The holder of the first credential that has one. Raises what `KeyStore.verify` raises."""
    *others, last = tokens
    for token in others:
        # When nobody can tell of one name, the other may be remembered.
        with contextlib.suppress(InvalidApiKey, Unavailable, DeadlineExceeded):
            return await store.verify(token, request.client)
    return await store.verify(last, request.client)


async def authenticate(request: Request, store: KeyStore) -> Principal:
    """Finds the caller and notes it in the request.

    Raises InvalidApiKey, InvalidToken, PermissionDenied (not for this route), RateLimitExceeded or Unavailable.
    """
    tokens = shown(request) or [presented(request)]
    principal = next(filter(None, map(store.known, tokens)), None) or await _verified(request, store, tokens)
    request.caller = principal
    request.principal = principal.name
    if principal.endpoints:
        principal.check_endpoint(request.route)
    return principal
