"""Clients that show a certificate instead of a key, through the front door to the auth-service's answer."""

import hashlib
import ssl
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

from helixflow.auth import certificates
from helixflow.core_rs import InvalidApiKey
from helixflow.pki import issue, pairs
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout, Role
from helixflow.rpc import messages
from tests.admin.scripted import error
from tests.gateway.accounts import KEY, ORGANISATION, OWNER, USER, Stage, principal, refusal_of, stage

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}
SPIFFE = "spiffe://helixflow.local/monitoring"


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """An authority of clients, and what it has issued."""
    layout = Layout(tmp_path_factory.mktemp("clients") / "certs")
    issue.init(layout, key_type=KeyType.ECDSA_P256)
    return layout


@pytest.fixture(scope="module")
def running(pki: Layout, others: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(pki, tmp_path_factory.mktemp("home"), HELIX_GATEWAY_CLIENT_CA=str(others.ca_cert)) as made:
        yield made


def fingerprint(others: Layout, name: str) -> str:
    cert = pairs.load_cert(others.pair(name, Role.CLIENT))
    return "sha256:" + hashlib.sha256(cert.public_bytes(serialization.Encoding.DER)).hexdigest()


def bind(here: Stage, name: str) -> None:
    """The auth-service knows one certificate, by this name."""
    digest = hashlib.sha256(certificates.presented(name)).digest()

    def verify(asked: Any) -> Any:
        if not asked.key_digest:
            return principal(asked)
        if asked.key_digest != digest:
            return error(InvalidApiKey, "the API key is not valid")
        fields = {"organisation_id": ORGANISATION, "organisation": "default", "user_id": USER, "role": "member"}
        return messages.Principal(**fields, user="batch", key_id=KEY, key="batch")

    here.reset().service.answers["AuthService/Verify"] = verify


def client(here: Stage, pair: Any = None, **headers: str) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(here.served.config.certs / "helixflow-ca.pem"))
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    return httpx.Client(base_url=here.served.url, verify=context, headers=headers, timeout=10)


@pytest.mark.parametrize("by", ["spiffe", "fingerprint"])
def test_a_certificate_is_its_key(running: Stage, others: Layout, by: str) -> None:
    # The gateway remembers whom it has asked for: each has a certificate of its own.
    name = {"spiffe": "monitoring", "fingerprint": "auth-service"}[by]
    bind(running, SPIFFE if by == "spiffe" else fingerprint(others, name))
    pair = others.pair(name, Role.CLIENT)
    with client(running, pair) as shown:
        answer = shown.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200
        assert "x-helixflow-known" not in answer.headers
        assert shown.get("/admin/v1/users").status_code == 401, "administration wants the key itself"
        owner = {"authorization": f"Bearer {OWNER}"}
        assert shown.get("/admin/v1/users", headers=owner).status_code == 200, "a credential comes first"
        wrong = shown.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer nobody"})
        assert wrong.status_code == 401


def test_nobody_else_is(running: Stage, pki: Layout, others: Layout) -> None:
    bind(running, SPIFFE)
    with client(running, others.pair("inference-pool", Role.CLIENT)) as other:
        assert refusal_of(other.post("/v1/chat/completions", json=CHAT))["code"] == "invalid_api_key"
    forged = {
        "x-helixflow-client-spiffe": SPIFFE,
        "x-helixflow-client-fingerprint": fingerprint(others, "auth-service").removeprefix("sha256:"),
    }
    for headers in (forged, {"authorization": f"Bearer certificate {SPIFFE}"}, {"x-api-key": f"certificate {SPIFFE}"}):
        with client(running, **headers) as liar:
            assert liar.post("/v1/chat/completions", json=CHAT).status_code == 401, headers
    with (
        pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)),
        client(running, pki.pair("monitoring", Role.CLIENT)) as stranger,
    ):
        stranger.post("/v1/chat/completions", json=CHAT)
