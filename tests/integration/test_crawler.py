"""Visits every HTTP route and every gRPC method with the wrong credentials. What may answer is listed here, by name."""

import asyncio
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helixflow.auth.keys import make
from helixflow.config import load
from helixflow.core_rs import CoreError, TlsFiles
from helixflow.gateway.admin import ENDPOINTS
from helixflow.gateway.app import routes
from helixflow.gateway.bridge import Bridge
from helixflow.gateway.routes import Policy, Route
from helixflow.gateway.services import Services
from helixflow.pki.layout import Layout, Role
from helixflow.rpc import messages
from helixflow.rpc.client import Client

from .people import HELLO, MODEL, Site, in_one_minute, refusal
from .stack import ROOT, until

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")

OPEN = {
    "GET /health",
    "GET /live",
    "GET /ready",
    "GET /.well-known/jwks.json",
    "POST /auth/v1/login",
    "POST /auth/v1/second-factor",
    "POST /auth/v1/second-factor/confirm",
    "POST /auth/v1/second-factor/remove",
    "POST /auth/v1/refresh",
    "POST /auth/v1/logout",
    "GET /auth/v1/oidc/start",
    "GET /auth/v1/oidc/callback",
    "POST /auth/v1/oidc/link",
}
"""Everything that answers without a credential."""
OPEN_IN_DEVELOPMENT = {"GET /v1/models", "GET /v1/models/{id}"}
"""And this, in the development profile."""
READS = {
    "GET /v1/models",
    "GET /v1/models/{id}",
    "GET /admin/v1/organisations",
    "GET /admin/v1/keys",
    "GET /admin/v1/limits",
    "GET /admin/v1/prices",
    "GET /admin/v1/usage",
}
"""What a viewer's key that administers may do."""
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": HELLO,
    "/v1/completions": {"model": MODEL, "prompt": "Hello", "max_tokens": 2},
    "/tokenize": {"model": MODEL, "prompt": "Hello"},
    "/detokenize": {"model": MODEL, "tokens": [1, 2]},
}
"""A good request for each route of inference."""


def name(route: Route) -> str:
    """A route in one line."""
    return f"{route.method} {route.path}"


@pytest.fixture(scope="module")
def table(site: Site, tmp_path_factory: pytest.TempPathFactory) -> list[Route]:
    """The routes as a gateway makes them."""
    platform = site.platform
    spool = tmp_path_factory.mktemp("spool")
    environ = {
        **platform.environ,
        "HELIX_GATEWAY_POOLS": platform.pool.address,
        "HELIX_GATEWAY_AUTH": platform.auth.address,
        "HELIX_LEDGER_SPOOL": str(spool),
    }

    async def make_table() -> list[Route]:
        config = load(None, environ)
        services, bridge = await Services.open(config), Bridge.connect(config)
        try:
            return routes(bridge, config, services)
        finally:
            bridge.close()
            await services.close()

    return asyncio.run(make_table())


@pytest.fixture(scope="module")
def production(site: Site) -> Iterator[httpx.Client]:
    """A gateway of the production profile, where nothing more is open than must be."""
    gateway = site.platform.gateway("-production", HELIX_PROFILE="production")
    with site.platform.client("", gateway) as client:
        yield client


def filled(site: Site, path: str) -> str:
    """The path with its parameters: things of the first organisation."""
    return re.sub(r"\{([a-z]+)\}", lambda match: site.ids(match[1]), path)


# --- HTTP ---------------------------------------------------------------------------


def test_the_open_routes_are_the_named_ones(table: list[Route]) -> None:
    assert {name(route) for route in table if route.policy is Policy.PUBLIC} == OPEN
    assert {name(route) for route in table if route.policy is Policy.PUBLIC_IN_DEVELOPMENT} == OPEN_IN_DEVELOPMENT
    assert {route.path for route in table if route.policy is Policy.KEY} == set(BODIES)
    assert len({name(route) for route in table}) == len(table) > 35


@pytest.mark.parametrize(
    "token", ["", "demo-key", make(), "a.b.c", "hf-", "'--"], ids=lambda token: token[:9] or "none"
)
def test_every_route_with_every_method(site: Site, production: httpx.Client, table: list[Route], token: str) -> None:
    known = {name(route) for route in table}
    headers = {"authorization": f"Bearer {token}"} if token else {}
    answered = set()
    for path in sorted({route.path for route in table}):
        for method in METHODS:
            answer = production.request(method, filled(site, path), headers=headers)
            route = f"{'GET' if method == 'HEAD' else method} {path}"
            if route not in known:
                assert answer.status_code == 405, route
                assert method not in answer.headers["allow"].split(", ")
            elif answer.status_code != 401:
                answered.add(route)
            elif method != "HEAD" and route not in OPEN:
                assert refusal(answer)[1] in ("invalid_api_key", "invalid_token"), route
                assert answer.headers["www-authenticate"] == "Bearer"
    # Logging out by the header needs one.
    assert answered | {"POST /auth/v1/logout"} == OPEN


def test_the_development_profile_shows_its_models_too(site: Site, table: list[Route]) -> None:
    answered = {
        name(route)
        for route in table
        if site.send(route.method, filled(site, route.path)).status_code not in (401, 405)
    }
    assert answered | {"POST /auth/v1/logout"} == OPEN | OPEN_IN_DEVELOPMENT


def test_a_viewers_key_reads(site: Site, table: list[Route]) -> None:
    viewer = site.key(user=site.person("viewer").id, admin=True).secret
    for route in table:
        if name(route) in OPEN:
            continue
        path = filled(site, route.path)
        answer = site.send(route.method, path, viewer, json=BODIES.get(route.path))
        if name(route) in READS:
            assert answer.status_code == 200, name(route)
        elif route.method in ("POST", "PUT", "PATCH") and answer.status_code == 400:
            pytest.fail(f"{name(route)}: its body was looked at before its role")
        else:
            assert refusal(answer) == (403, "permission_denied"), name(route)


def test_a_key_of_another_organisation_finds_nothing(site: Site, table: list[Route]) -> None:
    """Of its own organisation it may do what a key that administers may, as an owner's."""
    foreign = site.key(site.stranger, admin=True).secret
    kinds = ("organisation", "user", "key")
    ours = {*map(site.ids, kinds), site.owner.id, site.person("member").email}
    visited = 0
    for route in table:
        if route.policy is not Policy.ACCOUNT:
            continue
        answer = site.send(route.method, filled(site, route.path), foreign, json={} if route.method != "GET" else None)
        visited += 1
        if route.method == "GET" and "{" not in route.path and answer.status_code == 200:
            assert not [word for word in ours if word in answer.text], name(route)
        elif "{" in route.path:
            assert refusal(answer) in ((404, "not_found"), (403, "permission_denied")), name(route)
        else:
            assert answer.status_code in (400, 403), name(route)
    assert visited == len(ENDPOINTS) + 1


def test_every_route_of_inference_passes_the_limiter(site: Site, table: list[Route]) -> None:
    paths = [route.path for route in table if route.policy is Policy.KEY]
    for path in paths:

        def twice(path: str = path) -> list[httpx.Response]:
            secret = site.key(limits={"requests_per_minute": 1}).secret
            return [site.send("POST", path, secret, json=BODIES[path]) for _ in range(2)]

        first, second = in_one_minute(twice)
        assert first.status_code == 200, path
        assert first.headers["x-ratelimit-remaining-requests"] == "0"
        assert refusal(second) == (429, "rate_limit_exceeded"), path
        assert 1 <= int(second.headers["retry-after"]) <= 60
        none = site.send("POST", path, site.key(limits={"requests_per_minute": 0}).secret, json=BODIES[path])
        assert refusal(none) == (429, "insufficient_quota"), path


def test_every_request_of_inference_is_in_the_ledger(site: Site, table: list[Route]) -> None:
    key = site.key()
    for route in table:
        if route.policy is Policy.KEY:
            assert site.send("POST", route.path, key.secret, json=BODIES[route.path]).status_code == 200
    query = "SELECT array_agg(endpoint ORDER BY endpoint) FROM requests WHERE key_id = $1"
    until(lambda: site.value(query, key.id) == sorted(BODIES), "each has one row")


# --- gRPC ---------------------------------------------------------------------------

SERVICES = {
    "auth": {"AuthService", "AdminService"},
    "pool": {"Inference"},
}
"""Services by process, beside health and reflection."""
ALLOWED = {
    ("api-gateway", "AuthService"),
    ("api-gateway", "AdminService"),
    ("auth-service", "AdminService"),  # the operator's command line
    ("api-gateway", "Inference"),
}
"""Whose client certificate may call which service."""


def methods(process: str) -> list[str]:
    """Every method of a process."""
    return sorted(method for service in SERVICES[process] for method in messages.service(service))


def test_every_service_of_the_protos_is_visited() -> None:
    proto = "".join(path.read_text() for path in (ROOT / "core_rs/proto/helixflow/v1").glob("*.proto"))
    assert set(re.findall(r"^service (\w+)", proto, re.MULTILINE)) == set().union(*SERVICES.values())
    declared = re.findall(r"^  rpc (\w+)\(", proto, re.MULTILINE)
    assert sorted(declared) == sorted(method.partition("/")[2] for each in SERVICES for method in methods(each))


def outcomes(site: Site, process: str, identity: str, certs: Path | None = None) -> dict[str, str]:
    """What each method answers to a client certificate: `done` or the code of the error."""
    layout = Layout(certs or site.platform.certs)
    pair = layout.pair(identity, Role.CLIENT)
    server = site.platform.auth if process == "auth" else site.platform.pool
    expected = "auth-service" if process == "auth" else "inference-pool"

    async def visit() -> dict[str, str]:
        files = TlsFiles(str(layout.ca_cert), str(pair.cert), str(pair.key))
        client = Client([server.address], files, expect_service=expected)
        try:
            found = await asyncio.gather(*(outcome(client, method) for method in methods(process)))
        finally:
            client.close()
        return dict(zip(methods(process), found, strict=True))

    async def outcome(client: Client, method: str) -> str:
        kind = messages.method(method)
        try:
            if kind.streaming:
                async for _ in client.stream(method, kind.request()):
                    break
            else:
                await client.call(method, kind.request(), timeout_s=2)
        except CoreError as error:
            return error.code
        return "done"

    return asyncio.run(visit())


@pytest.mark.parametrize("process", ["auth", "pool"])
@pytest.mark.parametrize("identity", ["inference-pool", "monitoring", "auth-service"])
def test_methods_with_the_certificate_of_another_service(site: Site, process: str, identity: str) -> None:
    allowed = {method for method in methods(process) if (identity, method.partition("/")[0]) in ALLOWED}
    found = outcomes(site, process, identity)
    # The auth-service lets two others connect, which are refused by name: the operator's, and monitoring for health.
    connects = process == "auth" and identity != "inference-pool"
    refused = {method for method, code in found.items() if code == ("permission_denied" if connects else "unavailable")}
    assert refused == set(found) - allowed


def test_a_gateways_certificate_alone_administers_nothing(site: Site) -> None:
    found = outcomes(site, "auth", "api-gateway")
    admin = {method: code for method, code in found.items() if method.startswith("AdminService/")}
    assert set(admin.values()) == {"permission_denied"}, admin
    assert found["AuthService/Verify"] == "invalid_request"
    assert found["AuthService/Watch"] == "done"
    assert not {"unavailable", "permission_denied"} & set(outcomes(site, "pool", "api-gateway").values())


def grpc(site: Site, process: str, identity: str = "") -> httpx.Client:
    """HTTP/2 without our client, with any certificate or none."""
    tls = ssl.create_default_context(cafile=str(site.platform.certs / "helixflow-ca.pem"))
    tls.check_hostname = False
    if identity:
        pair = Layout(site.platform.certs).pair(identity, Role.CLIENT)
        tls.load_cert_chain(pair.cert, pair.key)
    server = site.platform.auth if process == "auth" else site.platform.pool
    headers = {"content-type": "application/grpc", "te": "trailers"}
    return httpx.Client(http1=False, http2=True, verify=tls, base_url=f"https://{server.address}", headers=headers)


@pytest.mark.parametrize("process", ["auth", "pool"])
def test_methods_without_a_certificate(site: Site, process: str) -> None:
    paths = [messages.method(method).path for method in methods(process)]
    for path in (*paths, "/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"):
        with grpc(site, process) as client, pytest.raises(httpx.TransportError):
            client.post(path, content=b"\0\0\0\0\0")


@pytest.mark.parametrize("process", ["auth", "pool"])
def test_reflection_names_no_other_service(site: Site, process: str) -> None:
    asked = b"\x3a\x01*"  # list_services: "*"
    content = b"\0" + len(asked).to_bytes(4) + asked
    with grpc(site, process, "api-gateway") as client:
        answer = client.post("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", content=content)
    assert answer.status_code == 200
    found = {text.decode() for text in re.findall(rb"(?:helixflow|grpc)\.[A-Za-z0-9.]+", answer.content)}
    standard = {"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"}
    assert found - standard == {f"helixflow.v1.{service}" for service in SERVICES[process]}
