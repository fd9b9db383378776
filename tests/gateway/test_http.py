"""The HTTP surface: health, models, keys, errors, limits, headers, CORS, TLS."""

import contextlib
import gzip
import re
import ssl
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from helixflow.config import Config
from helixflow.gateway.accounting import Unmetered
from helixflow.gateway.auth import DevelopmentKeys
from helixflow.gateway.board import Board
from helixflow.gateway.services import Services
from helixflow.pki.layout import Layout
from tests.gateway.conftest import KEY, Served, serving
from tests.gateway.fake import FakePool

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}


def error_of(answer: httpx.Response) -> dict[str, str | None]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, str | None] = body["error"]
    return error


@pytest.mark.parametrize("http2", [False, True])
def test_health_over_both_protocols(served: Served, http2: bool) -> None:
    with served.client(http1=not http2, http2=http2) as client:
        answer = client.get("/health")
    assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert answer.status_code == 200
    body = answer.json()
    assert body["service"] == "api-gateway"
    assert body["status"] == "healthy"
    assert datetime.fromisoformat(body["timestamp"]).tzinfo is not None
    assert set(body) == {"service", "status", "timestamp"}


@pytest.mark.parametrize("http2", [False, True])
def test_head(served: Served, http2: bool) -> None:
    with served.client(http1=not http2, http2=http2) as client:
        answer = client.head("/health")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) > 50
    assert answer.content == b""


def test_live_and_ready(served: Served, client: httpx.Client) -> None:
    assert client.get("/live").json()["status"] == "alive"
    assert client.get("/ready").status_code == 200
    models, served.fake.listed = served.fake.listed, []
    try:
        answer = client.get("/ready")
        one = client.get("/v1/models/echo")
    finally:
        served.fake.listed = models
    assert answer.status_code == 503
    assert answer.json()["reason"] == "no inference pool is ready"
    assert answer.json()["reasons"] == ["no_pool"]
    assert answer.headers["retry-after"] == "1"
    assert one.status_code == 503


@pytest.mark.parametrize(
    ("pools", "reasons"),
    [
        ([FakePool("not_ready", "engine_loading")], ["engine_loading"]),
        ([FakePool("ejected", "engine_stuck"), FakePool("draining", "draining")], ["engine_stuck", "pool_draining"]),
        ([FakePool("ejected", "draining"), FakePool("connecting")], ["no_pool"]),
    ],
)
def test_ready_tells_why_no_pool_serves(
    served: Served, client: httpx.Client, pools: list[FakePool], reasons: list[str]
) -> None:
    listed, served.fake.listed = served.fake.listed, []
    served.fake.pool_list = pools
    try:
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()["reasons"]) == (503, reasons)
        assert client.get("/health").status_code == 200
    finally:
        served.fake.listed, served.fake.pool_list = listed, []


class Ledger(Services):
    """Services whose ledger is in trouble."""

    def __init__(self, trouble: list[str]) -> None:
        super().__init__(DevelopmentKeys(), Unmetered())
        self._trouble = trouble

    def trouble(self) -> list[str]:
        return self._trouble

    def warnings(self) -> list[str]:
        return ["ledger_high"]


@pytest.mark.parametrize(("trouble", "status"), [(["ledger_full"], 503), ([], 200)])
def test_ready_tells_of_the_ledger(
    pki: Layout, monkeypatch: pytest.MonkeyPatch, trouble: list[str], status: int
) -> None:
    async def opened(_config: Config, _board: Board | None = None) -> Services:
        return Ledger(trouble)

    monkeypatch.setattr(Services, "open", opened)
    with serving(pki) as running, running.client() as client:
        answer = client.get("/ready")
        assert answer.status_code == status
        assert answer.json().get("reasons", []) == trouble
        assert answer.json()["warnings"] == ["ledger_high"]


def test_models(served: Served) -> None:
    with served.client() as client:
        listed = client.get("/v1/models").json()
        names = [model["id"] for model in listed["data"]]
        assert listed["object"] == "list"
        assert names == sorted(names)
        assert {"echo", "gpt-4", "team/echo"} <= set(names)
        expected = {
            "id": "gpt-4",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "helixflow",
            "max_model_len": 128,
            "context_length": 128,
        }
        assert client.get("/v1/models/gpt-4").json() == expected
        assert client.get("/v1/models/team/echo").json()["id"] == "team/echo"
        assert client.get("/v1/models/team%2Fecho").json()["id"] == "team/echo"
        for path in ("/models/team/echo", "/v1//models/team/echo", "/v1/models/team/echo/"):
            assert client.get(path).json()["id"] == "team/echo"
        assert client.get("/models/").json() == listed
        answer = client.get("/v1/models/none")
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "header",
    [None, "demo-key", "Basic ZGVtbzprZXk=", "Bearer", "Bearer wrong", "Bearer " + "x" * 5000],
)
def test_without_a_valid_key(served: Served, header: str | None) -> None:
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": header} if header else {})
    assert answer.status_code == 401
    error = error_of(answer)
    assert error["code"] == "invalid_api_key"
    assert error["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert header is None or header not in answer.text or header == "Bearer"


def test_scheme_of_the_key_has_no_case(served: Served) -> None:
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"authorization": "bEARER demo-key"})
    assert answer.status_code == 200


KEY_HEADERS = ("Authorization", "x-api-key", "api-key")


def presented(name: str, key: str) -> tuple[str, str]:
    return name, f"Bearer {key}" if name == "Authorization" else key


@pytest.mark.parametrize("name", KEY_HEADERS)
def test_a_key_may_come_in_three_headers(served: Served, name: str) -> None:
    with served.client(headers=[presented(name, "demo-key")]) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    for wrong in ["nobody"] if name == "Authorization" else ["nobody", ""]:
        with served.client(headers=[presented(name, wrong)]) as client:
            answer = client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"


@pytest.mark.parametrize("second", KEY_HEADERS)
@pytest.mark.parametrize("first", KEY_HEADERS)
@pytest.mark.parametrize("http2", [False, True])
def test_keys_that_differ_are_refused_in_any_order(served: Served, http2: bool, first: str, second: str) -> None:
    with served.client(http1=not http2, http2=http2) as client:
        for keys in (("demo-key", "other"), ("other", "demo-key")):
            headers = [presented(first, keys[0]), presented(second, keys[1])]
            answer = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == (400 if first == second else 401)
            assert "several" in str(error_of(answer)["message"])
        same = [presented(first, "demo-key"), presented(second, "demo-key")]
        status = client.post("/v1/chat/completions", json=CHAT, headers=same).status_code
        assert status == (400 if first == second else 200), "a header that comes twice is refused, whatever it says"


def test_production_does_not_know_the_public_key(pki: Layout, tmp_path: Path) -> None:
    options = {"HELIX_PROFILE": "production", "HELIX_GATEWAY_ACCOUNTS": "true", "HELIX_GATEWAY_AUTH": "127.0.0.1:1"}
    with serving(pki, **options, HELIX_HOME=str(tmp_path)) as production, production.client() as client:
        assert client.get("/health").headers["strict-transport-security"] == "max-age=31536000"
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers=KEY).status_code == 401
        assert client.post("/tokenize", headers=KEY, json={}).status_code == 401


def test_unknown_path_and_wrong_method(client: httpx.Client) -> None:
    answer = client.get("/v2/nothing")
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "not_found"
    answer = client.get("/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert error_of(answer)["code"] == "method_not_allowed"
    assert client.delete("/health").headers["allow"] == "GET, HEAD"
    assert "did you mean /v1/models?" in client.get("/v1/model").text


def test_request_id(client: httpx.Client) -> None:
    given = client.get("/health", headers={"x-request-id": "a-b_c.9"})
    assert given.headers["x-request-id"] == "a-b_c.9"
    for bad in ("with space", "x" * 129, "semi;colon"):
        made = client.get("/nothing", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{24}", made)


def test_headers_of_every_answer(client: httpx.Client) -> None:
    for answer in (client.get("/health"), client.get("/nothing"), client.post("/v1/chat/completions", json=CHAT)):
        assert answer.headers["server"] == "helixflow"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "strict-transport-security" not in answer.headers, "localhost would be bound for all its ports"
        assert "access-control-allow-origin" not in answer.headers


def test_body_over_the_limit(served: Served, client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", content=b"x" * 200_001, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "payload_too_large"

    def pieces() -> object:
        for _ in range(30):
            yield b" " * 10_000

    with served.client(headers=KEY) as other:
        answer = other.post("/tokenize", content=pieces(), headers={"content-type": "application/json"})  # type: ignore[arg-type]
    assert answer.status_code == 413


def test_body_in_pieces(served: Served) -> None:
    body = b'{"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}'

    def pieces() -> object:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    for http2 in (False, True):
        with served.client(headers=KEY, http1=not http2, http2=http2) as client:
            answer = client.post("/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"})  # type: ignore[arg-type]
            assert answer.status_code == 200


def test_content_type(client: httpx.Client) -> None:
    body = b'{"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}'
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json"):
        assert client.post("/v1/chat/completions", content=body, headers={"content-type": kind}).status_code == 200
    assert client.post("/v1/chat/completions", content=body).status_code == 200
    answer = client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert answer.status_code == 415
    assert "Content-Type: application/json" in str(error_of(answer)["message"])


def test_a_compressed_body_is_unfolded(client: httpx.Client) -> None:
    body = b'{"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}'
    folded = gzip.compress(body)
    assert client.post("/v1/chat/completions", content=folded, headers={"content-encoding": "gzip"}).is_success
    answer = client.post("/v1/chat/completions", content=body, headers={"content-encoding": "gzip"})
    assert answer.status_code == 400
    bomb = gzip.compress(b" " * 1_000_000)
    answer = client.post("/v1/chat/completions", content=bomb, headers={"content-encoding": "gzip"})
    assert answer.status_code == 413
    answer = client.post("/v1/chat/completions", content=body, headers={"content-encoding": "br"})
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"
    assert client.post("/v1/chat/completions", content=body, headers={"content-encoding": "identity"}).is_success


POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer demo-key\r\n"


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"transfer-encoding: chunked\r\n\r\nzz\r\n{", b"400"),
        (b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n-1\r\n", b"400"),
        (b"content-length: 300000\r\nexpect: 100-continue\r\n\r\n", b"413"),
    ],
)
def test_broken_framing_gets_an_answer(served: Served, rest: bytes, status: bytes) -> None:
    with contextlib.closing(served.raw()) as connection:
        connection.sendall(POST + rest)
        answer = connection.recv(4096)
    assert answer.split(b" ", 2)[1] == status
    assert b"x-request-id: req-" in answer
    assert b'"code":' in answer


def test_two_lengths_are_refused(served: Served) -> None:
    with contextlib.closing(served.raw()) as connection:
        connection.sendall(POST + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_a_body_that_never_comes(pki: Layout) -> None:
    with serving(pki, HELIX_GATEWAY_BODY_GRACE_S="0.05") as served:
        for begun in (b"", b'{"model"'):
            with contextlib.closing(served.raw()) as connection:
                connection.sendall(POST + b"content-length: 50\r\n\r\n" + begun)
                answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"too slowly" in answer


@pytest.mark.parametrize(
    "path", ["/v1/%2e%2e/health", "/v1/../health", "/HEALTH", "/v1/models/%0d%0ax-evil:%201", "//evil.example/x", "*"]
)
def test_path_tricks_find_nothing(served: Served, path: str) -> None:
    with contextlib.closing(served.raw()) as connection:
        connection.sendall(b"GET " + path.encode() + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    assert b"x-evil" not in head
    assert set(httpx.Response(404, content=body).json()) == {"error"}


def test_cors_for_named_origins_only(pki: Layout) -> None:
    with serving(pki, HELIX_GATEWAY_CORS_ORIGINS="https://a.example") as served, served.client() as client:
        wanted = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, x-stainless-os",
        }
        answer = client.options("/v1/chat/completions", headers={"origin": "https://a.example", **wanted})
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        methods = answer.headers["access-control-allow-methods"].split(", ")
        assert {"GET", "POST", "PATCH", "PUT", "DELETE"} <= set(methods)
        assert "origin" in answer.headers["vary"]
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://a.example", **KEY})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        limits = {
            f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
        }
        assert {"x-request-id", "retry-after", "x-helixflow-ignored", *limits} <= set(exposed)
        other = client.options("/v1/chat/completions", headers={"origin": "https://b.example", **wanted})
        assert other.status_code == 405
        assert "access-control-allow-origin" not in other.headers
        assert (
            "access-control-allow-origin"
            not in client.get("/health", headers={"origin": "https://a.example.b"}).headers
        )


def test_cors_is_off_by_default(client: httpx.Client) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    answer = client.options("/v1/chat/completions", headers=headers)
    assert answer.status_code == 405
    assert "gateway.cors_origins" in str(error_of(answer)["message"])
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_tls_1_2_is_refused(served: Served) -> None:
    context = ssl.create_default_context(cafile=str(served.config.certs / "helixflow-ca.pem"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        httpx.Client(verify=context) as client,
        pytest.raises(httpx.ConnectError, match=r"(?i)version|handshake|alert"),
    ):
        client.get(served.url + "/health")


def test_plain_http_on_loopback(pki: Layout) -> None:
    with serving(pki, HELIX_GATEWAY_PLAIN_HTTP="true") as served, served.client() as client:
        assert served.url.startswith("http://")
        assert client.get("/health").status_code == 200


def test_early_refusals_arrive_over_http2(served: Served) -> None:
    big = b"x" * 5_000_000
    with served.client(http1=False, http2=True) as client:
        for _ in range(10):
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 401
            assert client.post("/nothing", content=big).status_code == 404
            assert client.post("/v1/chat/completions", content=big, headers=KEY).status_code == 413
            assert client.post("/v1/chat/completions", content=b"{", headers=KEY).status_code == 400
