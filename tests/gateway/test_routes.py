"""The route table and the keys, without a server."""

import asyncio
import re

import pytest

from helixflow.core_rs import InvalidApiKey, InvalidRequest, NotFound, PermissionDenied
from helixflow.errors import StartError
from helixflow.gateway import app
from helixflow.gateway.auth import DevelopmentKeys, Principal, bearer
from helixflow.gateway.http import Limits, Request
from helixflow.gateway.routes import Allowed, Policy, Route, Router, parameters
from helixflow.gateway.services import Services
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
        services = await Services.open(loaded)
        app.Gateway(loaded, fake.connect(loaded), services, [Route("GET", "/open", nothing)])

    with pytest.raises(StartError):
        asyncio.run(start())


def test_a_route_declared_twice_does_not_start() -> None:
    route = Route("POST", "/a", nothing, Policy.KEY)
    with pytest.raises(StartError, match="twice"):
        Router([route, route])


def test_only_these_routes_are_open(pki: Layout) -> None:
    async def table() -> dict[str, Policy | None]:
        loaded = make_config(pki)
        services = await Services.open(loaded)
        return {route.path: route.policy for route in app.routes(fake.connect(loaded), loaded, services)}

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
    assert router.find("GET", "/m/") is exact
    with pytest.raises(Allowed) as refused:
        router.find("PUT", "/m/a")
    assert refused.value.methods == "GET, HEAD"


def test_a_gateway_without_accounts_knows_one_key() -> None:
    store = DevelopmentKeys()
    principal = store.known(b"demo-key")
    assert principal is not None
    assert (principal.name, principal.user_id, principal.limits) == ("development", "", ())
    assert store.known(b"demo-kez") is None
    with pytest.raises(InvalidApiKey):
        asyncio.run(store.verify(b"demo-kez", "127.0.0.1"))


def test_a_credential_may_be_for_some_routes_and_models_only() -> None:
    principal = Principal(name="ci", endpoints=frozenset({"/v1/completions"}), models=frozenset({"small"}))
    principal.check_endpoint("/v1/completions")
    with pytest.raises(PermissionDenied):
        principal.check_endpoint("/v1/chat/completions")
    principal.check_model("gpt-4", "small")
    principal.check_model("small", "small")
    with pytest.raises(PermissionDenied):
        principal.check_model("gpt-4", "large")


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer  ", b"Token x", b"Bearerx"])
def test_headers_without_a_key(header: bytes | None) -> None:
    with pytest.raises(InvalidApiKey):
        bearer(header)


CHAT = Route("POST", "/v1/chat/completions", nothing, Policy.KEY)
MODEL_ROUTE = Route("GET", "/v1/models/{id}", nothing, Policy.KEY)
TOKENIZE = Route("POST", "/tokenize", nothing, Policy.KEY)


@pytest.mark.parametrize(
    ("path", "route", "spelt"),
    [
        ("/chat/completions", CHAT, "/v1/chat/completions"),
        ("/v1/chat/completions/", CHAT, "/v1/chat/completions"),
        ("//v1///chat//completions//", CHAT, "/v1/chat/completions"),
        ("/v1//chat/completions", CHAT, "/v1/chat/completions"),
        ("/v1/v1/chat/completions", CHAT, "/v1/chat/completions"),
        ("chat/completions", CHAT, "/v1/chat/completions"),
        ("/v1/tokenize", TOKENIZE, "/tokenize"),
        ("/tokenize/", TOKENIZE, "/tokenize"),
        ("/models/team/m", MODEL_ROUTE, "/v1/models/team/m"),
        ("//v1/models/m", MODEL_ROUTE, "/v1/models/m"),
    ],
)
def test_a_path_that_is_spelt_otherwise_is_the_same_route(path: str, route: Route, spelt: str) -> None:
    router = Router([CHAT, MODEL_ROUTE, TOKENIZE])
    assert router.locate(route.method, path) == (route, spelt)
    with pytest.raises(Allowed):
        router.locate("DELETE", path)


@pytest.mark.parametrize(
    ("path", "like"),
    [
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/openai/deployments/gpt-4/chat/completions", "did you mean /v1/chat/completions?"),
        ("/api/v1/chat/completions/", "did you mean /v1/chat/completions?"),
        ("/api/zzz", "the API lives under /v1"),
        ("/v1/chat/completions/../..", "/v1"),
        ("/v1/chat%2Fcompletions", "/v1"),
        ("/" + "v1/" * 1000 + "chat/completions", "the API lives under /v1"),
    ],
)
def test_the_refusal_of_a_path_tells_what_was_meant(path: str, like: str) -> None:
    with pytest.raises(NotFound, match=re.escape(like)):
        Router([CHAT, TOKENIZE]).find("POST", path)


USER = "/u/{user}"
UNLOCK = "/u/{user}/unlock"
MODEL = "/p/{id}"


def asked(raw_path: bytes) -> Request:
    """A request that was sent with this path."""
    scope = {"method": "GET", "path": "", "raw_path": raw_path, "headers": [], "http_version": "1.1"}
    return Request(scope, None, None, Limits(1024))  # type: ignore[arg-type]


def test_parameters_take_one_segment() -> None:
    one = Route("PATCH", USER, nothing, Policy.ACCOUNT)
    two = Route("POST", UNLOCK, nothing, Policy.ACCOUNT)
    rest = Route("PUT", MODEL, nothing, Policy.ACCOUNT)
    router = Router([rest, one, two])
    assert router.find("PATCH", "/u/a") is one
    assert router.find("POST", "/u/a/unlock") is two
    assert router.find("PUT", "/p/a/b") is rest
    for path in (
        "/u",
        "/u/",
        "/u//unlock",
        "/u/a/",
        "/u/a/b",
        "/u/a/unlock/",
        "/u/a/b/unlock",
        "/x/u/a",
        "//u/a",
        "/p/",
    ):
        with pytest.raises(NotFound):
            router.find("POST", path)
    with pytest.raises(Allowed) as refused:
        router.find("GET", "/u/a/unlock")
    assert refused.value.methods == "POST"
    with pytest.raises(StartError, match="twice"):
        Router([one, one])


def test_parameters_are_decoded() -> None:
    assert parameters(UNLOCK, asked(b"/u/a%40b.example%20%C3%A4/unlock")) == {"user": "a@b.example \u00e4"}
    assert parameters(USER, asked(b"/u/100%25")) == {"user": "100%"}
    assert parameters(MODEL, asked(b"/p/team/a%2Fb")) == {"id": "team/a/b"}
    assert parameters("/exact", asked(b"/exact")) == {}


@pytest.mark.parametrize(
    "path",
    [
        b"/u/a%2Fb",
        b"/u/a%2funlock",
        b"/u/..",
        b"/u/%2e%2e",
        b"/u/.",
        b"/u/a%00b",
        b"/u/a%0d%0ab",
        b"/u/a%5cb",
        b"/u/%ff",
        b"/u/\xc3\xa4",
        b"/%75/a",
        b"/u%2Fa",
        b"//u/a",
        b"/u/a/",
        b"/u/",
    ],
)
def test_nothing_hides_in_a_parameter(path: bytes) -> None:
    with pytest.raises(NotFound):
        parameters(USER, asked(path))


@pytest.mark.parametrize("path", [b"/p/../u/a", b"/p/a/%2e%2e/b", b"/p/.", b"/p/a%0Ab"])
def test_what_follows_has_no_dot_segments(path: bytes) -> None:
    with pytest.raises(NotFound):
        parameters(MODEL, asked(path))


def query(text: bytes) -> dict[str, list[str]]:
    """The parameters of a query string."""
    scope = {"method": "GET", "path": "/", "query_string": text, "headers": [], "http_version": "1.1"}
    return Request(scope, None, None, Limits(1024)).query  # type: ignore[arg-type]


def test_query_strings() -> None:
    assert query(b"") == {}
    assert query(b"a=1&b=x%20y+z&a=2&c=&d") == {"a": ["1", "2"], "b": ["x y z"], "c": [""], "d": [""]}
    assert query(b"q=%C3%A4") == {"q": ["\u00e4"]}


@pytest.mark.parametrize("text", [b"a=%zz", b"a=%", b"a=%ff", b"a=\xff", b"a=%00", b"&".join([b"a=1"] * 33)])
def test_malformed_query_strings(text: bytes) -> None:
    with pytest.raises(InvalidRequest):
        query(text)


def test_where_a_request_comes_from() -> None:
    headers = [(b"x-helixflow-client", b"192.0.2.1")]
    scope = {"method": "GET", "path": "/a", "headers": headers, "http_version": "1.1", "client": None}
    request = Request(scope, None, None, Limits(1024))  # type: ignore[arg-type]
    assert request.client == "192.0.2.1"
    assert request.raw_path == b"/a"
    assert asked(b"/").client == ""


def test_cookies() -> None:
    headers = [(b"cookie", b"a=1; b=x=y"), (b"x", b"z=1"), (b"cookie", b"c=3; d=4; d=5")]
    scope = {"method": "GET", "path": "/a", "headers": headers, "http_version": "2"}
    request = Request(scope, None, None, Limits(1024))  # type: ignore[arg-type]
    assert [request.cookie(name) for name in "abcdz"] == ["1", "x=y", "3", None, None]
