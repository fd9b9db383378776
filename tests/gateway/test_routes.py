"""The route table and the keys, without a server."""

import asyncio
import hashlib

import pytest

from helixflow.core_rs import InvalidApiKey, NotFound
from helixflow.errors import StartError
from helixflow.gateway import app
from helixflow.gateway.auth import Principal, StaticKeys, bearer
from helixflow.gateway.http import Request
from helixflow.gateway.routes import Allowed, Policy, Route, Router
from helixflow.options import StaticKey
from helixflow.pki.layout import Layout
from tests.gateway import fake
from tests.gateway.conftest import make_config


async def nothing(_request: Request) -> None:
    """A handler."""


def test_a_route_without_a_policy_does_not_start(pki: Layout) -> None:
    with pytest.raises(StartError, match="GET /open declares no policy"):
        Router([Route("GET", "/open", nothing)])

    async def start() -> None:
        loaded = make_config(pki)
        app.Gateway(loaded, fake.connect(loaded), StaticKeys.of(loaded), [Route("GET", "/open", nothing)])

    with pytest.raises(StartError):
        asyncio.run(start())


def test_a_route_declared_twice_does_not_start() -> None:
    route = Route("POST", "/a", nothing, Policy.KEY)
    with pytest.raises(StartError, match="twice"):
        Router([route, route])


def test_only_these_routes_are_open(pki: Layout) -> None:
    async def table() -> dict[str, Policy | None]:
        loaded = make_config(pki)
        return {route.path: route.policy for route in app.routes(fake.connect(loaded), loaded)}

    policies = asyncio.run(table())
    public = {path for path, policy in policies.items() if policy is Policy.PUBLIC}
    assert public == {"/health", "/live", "/ready"}
    development = {path for path, policy in policies.items() if policy is Policy.PUBLIC_IN_DEVELOPMENT}
    assert development == {"/v1/models", "/v1/models/{id}"}
    assert {path for path, policy in policies.items() if policy is Policy.KEY} == {
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
    }


def test_finding_routes() -> None:
    exact = Route("GET", "/m", nothing, Policy.KEY)
    one = Route("GET", "/m/{id}", nothing, Policy.KEY)
    router = Router([exact, one])
    assert router.find("GET", "/m") is exact
    assert router.find("HEAD", "/m") is exact
    assert router.find("GET", "/m/a/b") is one
    with pytest.raises(NotFound):
        router.find("GET", "/m/")
    with pytest.raises(Allowed) as refused:
        router.find("PUT", "/m/a")
    assert refused.value.methods == "GET, HEAD"


def test_static_keys() -> None:
    digest = hashlib.sha256(b"s3cret").hexdigest()
    store = StaticKeys([StaticKey("ci", digest)])
    assert asyncio.run(store.verify(b"s3cret")) == Principal("ci")
    assert asyncio.run(store.verify(b"demo-key")) is None
    assert asyncio.run(store.verify(digest.encode())) is None
    assert asyncio.run(StaticKeys([], development=True).verify(b"demo-key")) == Principal("development")


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer  ", b"Token x", b"Bearerx"])
def test_headers_without_a_key(header: bytes | None) -> None:
    with pytest.raises(InvalidApiKey):
        bearer(header)
