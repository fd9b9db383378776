"""A gateway with accounts in front of a scripted auth-service: real TLS outside, real mutual TLS inside."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import structlog

from helixflow.core_rs import InvalidToken
from helixflow.pki.layout import Layout
from helixflow.rpc import messages
from tests.admin.scripted import Scripted, error
from tests.gateway.conftest import Served, serving

ORGANISATION = "7b7e6f3e-0000-4000-8000-00000000000a"
USER = "7b7e6f3e-0000-4000-8000-00000000000b"
KEY = "7b7e6f3e-0000-4000-8000-00000000000c"
OWNER = "owner.access.token"
LIMITED = "limited.access.token"
BACKGROUND = frozenset({"AuthService/Verify", "AuthService/Watch", "AuthService/Prices", "AuthService/Lease"})
"""What a gateway asks by itself."""


def principal(asked: Any) -> Any:
    """Answers Verify: two credentials are known."""
    known: dict[str, dict[str, Any]] = {
        OWNER: {"role": "owner", "user": "boss@example.com", "session_id": KEY},
        LIMITED: {"role": "member", "user": "m@example.com", "key_id": KEY, "key": "ci", "endpoints": ["/v1/models"]},
    }
    fields = known.get(asked.access_token)
    if fields is None:
        return error(InvalidToken, "the access token is not valid, or no longer")
    return messages.Principal(organisation_id=ORGANISATION, organisation="default", user_id=USER, **fields)


@dataclass
class Stage:
    """The gateway and what stands behind it."""

    served: Served
    service: Scripted

    def client(self, token: str | None = OWNER, **options: Any) -> httpx.Client:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return self.served.client(headers={**headers, **options.pop("headers", {})}, **options)

    def reset(self) -> "Stage":
        self.service.reset()
        self.service.answers["AuthService/Verify"] = principal
        return self

    def asked(self) -> list[str]:
        """Methods that were called on behalf of a client."""
        return [call.method for call in self.service.calls if call.method not in BACKGROUND]

    def raw(self, request: bytes) -> tuple[bytes, bytes]:
        """Head and body of the answer to bytes that no client library would send."""
        with contextlib.closing(self.served.raw()) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return head, body


@contextlib.contextmanager
def stage(pki: Layout, home: Path, **more: str) -> Iterator[Stage]:
    """Serves until the block ends. `more`: options by the names of their variables."""
    service = Scripted(pki).start()
    options = {
        "HELIX_PROFILE": "production",
        "HELIX_GATEWAY_ACCOUNTS": "true",
        "HELIX_GATEWAY_AUTH": service.address,
        "HELIX_HOME": str(home),
        **more,
    }
    try:
        with serving(pki, **options) as served:
            yield Stage(served, service)
    finally:
        service.stop()


@contextlib.contextmanager
def log_lines() -> Iterator[list[Any]]:
    """Everything that is logged in the block, by any thread, from `debug` on."""
    before = structlog.get_config()["wrapper_class"]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    try:
        with structlog.testing.capture_logs() as lines:
            yield lines
    finally:
        structlog.configure(wrapper_class=before)


def refusal_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has the envelope of the whole API."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    refused: dict[str, Any] = body["error"]
    return refused


def sent(here: Stage, method: str) -> dict[str, Any]:
    """The fields of the one call of this method, without who acts and what is empty."""
    message = here.service.only(f"AdminService/{method}")
    return {name: value for name, value in message.items() if name != "actor" and value not in ("", 0, False, [])}
