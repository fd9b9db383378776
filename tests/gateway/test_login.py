"""/auth/v1 and the key set."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helixflow.core_rs import (
    AccountLocked,
    CoreError,
    InvalidCredentials,
    InvalidToken,
    PasswordChangeRequired,
    SecondFactorMissing,
    SecondFactorRequired,
    Unavailable,
)
from helixflow.gateway import login
from helixflow.pki.layout import Layout
from helixflow.rpc import messages
from tests.admin.scripted import error
from tests.gateway.accounts import OWNER, Stage, log_lines, refusal_of, stage

TOKENS = {
    "access_token": "SECRET.ACCESS.TOKEN",
    "expires_in": 900,
    "refresh_token": "hr-SECRET",
    "refresh_expires_in": 9,
}
CALLBACK = "/auth/v1/oidc/callback"
STATE = "state-of-this-browser"
COOKIE = {"cookie": f"other=1; {login.STATE_COOKIE}={STATE}"}


@pytest.fixture(scope="module")
def running(pki: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(pki, tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest.fixture
def here(running: Stage) -> Stage:
    here = running.reset()
    for method in ("Login", "Refresh", "OidcFinish"):
        here.service.answers[f"AuthService/{method}"] = messages.Tokens(**TOKENS)
    started = messages.OidcStartReply(url="https://provider.example/authorize?state=x", state=STATE)
    here.service.answers["AuthService/OidcStart"] = started
    return here


@pytest.fixture
def client(here: Stage) -> Iterator[httpx.Client]:
    with here.client(None) as made:
        yield made


def given(here: Stage, method: str) -> dict[str, Any]:
    """What the one call of this method says."""
    return {name: value for name, value in here.service.only(f"AuthService/{method}").items() if value}


def test_login(here: Stage, client: httpx.Client) -> None:
    body = {"email": "a@example.com", "password": "correct horse"}
    answer = client.post("/auth/v1/login", json=body, headers={"x-forwarded-for": "203.0.113.9"})
    assert answer.status_code == 200
    assert answer.json() == {"token_type": "Bearer", **TOKENS}
    assert answer.headers["cache-control"] == "no-store"
    assert given(here, "Login") == {**body, "address": "127.0.0.1"}
    here.service.calls.clear()
    more = {"new_password": "battery staple", "code": "123456", "keys": "revoke"}
    here.service.answers["AuthService/Login"] = messages.Tokens(**TOKENS, sessions_ended=2, keys_revoked=1, keys_kept=0)
    answer = client.post("/auth/v1/login", json={**body, **more})
    assert given(here, "Login") == {**body, **more, "address": "127.0.0.1"}
    assert answer.json() == {"token_type": "Bearer", **TOKENS, "sessions_ended": 2, "keys_revoked": 1, "keys_kept": 0}


def test_second_factors(here: Stage, client: httpx.Client) -> None:
    answers = {
        "EnrolFactor": (messages.FactorSecret(secret="ABC", uri="otpauth://totp/x"), "", ()),
        "ConfirmFactor": (messages.RecoveryCodes(codes=["a", "b"]), "/confirm", ("code",)),
        "RemoveFactor": (messages.RemoveFactorReply(), "/remove", ("code",)),
    }
    body = {"email": "a@example.com", "password": "SECRET", "code": "123456"}
    for method, (made, path, needed) in answers.items():
        here.service.answers[f"AuthService/{method}"] = made
        with log_lines() as lines:
            answer = client.post(f"/auth/v1/second-factor{path}", json=body)
        assert (answer.status_code, answer.json()) == (200, messages.plain(made))
        assert answer.headers["cache-control"] == "no-store"
        assert here.service.only(f"AuthService/{method}") == {**body, "address": "127.0.0.1"}
        assert "SECRET" not in str(lines)
        assert "123456" not in str(lines)
        for name in ("email", "password", *needed):
            less = {key: value for key, value in body.items() if key != name}
            refused = client.post(f"/auth/v1/second-factor{path}", json=less)
            assert (refused.status_code, refusal_of(refused)["param"]) == (400, name)


def test_refresh(here: Stage, client: httpx.Client) -> None:
    answer = client.post("/auth/v1/refresh", json={"refresh_token": "hr-old"})
    assert answer.json()["refresh_token"] == "hr-SECRET"
    assert answer.headers["cache-control"] == "no-store"
    assert here.service.only("AuthService/Refresh") == {"refresh_token": "hr-old", "address": "127.0.0.1"}


def test_logout(here: Stage, client: httpx.Client) -> None:
    for body, headers, asked in (
        ({"refresh_token": "hr-1"}, {}, {"refresh_token": "hr-1"}),
        ({"access_token": "a.b.c"}, {}, {"access_token": "a.b.c"}),
        (None, {"authorization": "Bearer d.e.f"}, {"access_token": "d.e.f"}),
    ):
        here.service.calls.clear()
        answer = client.post("/auth/v1/logout", json=body, headers=headers)
        assert (answer.status_code, answer.json()) == (200, {})
        assert here.service.only("AuthService/Logout") == {**asked, "address": "127.0.0.1"}
    here.service.calls.clear()
    assert client.post("/auth/v1/logout").status_code == 401
    answer = client.post("/auth/v1/logout", json={"refresh_token": "x", "access_token": "y"})
    assert answer.status_code == 400
    assert here.asked() == []
    here.service.answers["AuthService/Logout"] = error(InvalidToken, "the session has ended")
    assert client.post("/auth/v1/logout", json={"refresh_token": "x"}).status_code == 401


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("login", {}, "email"),
        ("login", {"email": "a"}, "password"),
        ("login", {"email": "a", "password": ""}, "password"),
        ("login", {"email": "a", "password": None}, "password"),
        ("login", {"email": "a", "password": 5}, "password"),
        ("login", {"email": "a", "password": ["HUNTER2"]}, "password"),
        ("login", {"email": "a", "password": "HUNTER2" * 200}, "password"),
        ("login", {"email": "a" * 321, "password": "HUNTER2"}, "email"),
        ("login", {"email": "a", "password": "HUNTER2", "address": "1.2.3.4"}, "address"),
        ("login", {"email": "a", "password": "HUNTER2", "role": "owner"}, "role"),
        ("refresh", {}, "refresh_token"),
        ("refresh", {"refresh_token": {"a": 1}}, "refresh_token"),
        ("refresh", {"refresh_token": "HUNTER2" * 1200}, "refresh_token"),
        ("refresh", {"refresh_token": "x", "address": "1.2.3.4"}, "address"),
        ("logout", {"session": "x"}, "session"),
    ],
)
def test_what_is_wrong_is_named_without_the_value(
    here: Stage, client: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    with log_lines() as lines:
        answer = client.post(f"/auth/v1/{path}", json=body)
    assert answer.status_code == 400
    assert refusal_of(answer)["param"] == param
    assert answer.headers["cache-control"] == "no-store"
    assert "HUNTER2" not in answer.text
    assert "HUNTER2" not in str(lines)
    assert here.asked() == []


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", {}, 400),
        (b'{"email": "a", "password": HUNTER2}', {}, 400),
        (b'["HUNTER2"]', {}, 400),
        (b'{"email": "a\\u0000", "password": "HUNTER2"}', {}, 400),
        (b"email=a&password=HUNTER2", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b'{"email": "a", "password": "HUNTER2"}', {"content-type": "text/plain"}, 415),
        (b'{"email": "a", "password": "HUNTER2"' + b" " * 16384 + b"}", {}, 413),
    ],
)
def test_bodies_that_are_none(
    here: Stage, client: httpx.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    headers = {"content-type": "application/json", **headers}
    with log_lines() as lines:
        answer = client.post("/auth/v1/login", content=content, headers=headers)
    assert answer.status_code == status
    refusal_of(answer)
    assert "HUNTER2" not in answer.text + str(lines)
    assert here.asked() == []


def test_a_url_is_no_place_for_a_secret(here: Stage, client: httpx.Client) -> None:
    with log_lines() as lines:
        answer = client.post(
            "/auth/v1/login?password=HUNTER2", json={"email": "a", "password": "HUNTER2"}, headers={"x-request-id": "r"}
        )
    assert answer.status_code == 400
    assert "HUNTER2" not in answer.text + str(lines)
    assert here.asked() == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_only_post(client: httpx.Client, method: str) -> None:
    answer = client.request(method, "/auth/v1/login")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("refused", "status", "code"),
    [
        (error(InvalidCredentials, "e-mail or password are wrong"), 401, "invalid_credentials"),
        (error(AccountLocked, "too many wrong passwords", None, 120), 429, "account_locked"),
        (error(PasswordChangeRequired, "send new_password", "new_password"), 403, "password_change_required"),
        (error(SecondFactorRequired, "send a code", "code"), 403, "second_factor_required"),
        (error(SecondFactorMissing, "enrol one"), 403, "second_factor_missing"),
        (error(Unavailable, "10.1.2.3:8502 is away"), 503, "unavailable"),
    ],
)
def test_refusals(here: Stage, client: httpx.Client, refused: CoreError, status: int, code: str) -> None:
    here.service.answers["AuthService/Login"] = refused
    answer = client.post("/auth/v1/login", json={"email": "a", "password": "x"})
    assert answer.status_code == status
    assert refusal_of(answer)["code"] == code
    assert answer.headers["cache-control"] == "no-store"
    assert "10.1.2.3" not in answer.text
    if status == 429:
        assert answer.headers["retry-after"] == "120"


def test_no_secret_is_logged(here: Stage, client: httpx.Client) -> None:
    with log_lines() as lines:
        client.post("/auth/v1/login", json={"email": "a", "password": "SECRET", "new_password": "SECRET2"})
        client.post("/auth/v1/refresh", json={"refresh_token": "SECRET"})
        client.post("/auth/v1/logout", headers={"authorization": "Bearer SECRET.x.y"})
        client.get("/auth/v1/oidc/start")
        client.get(f"{CALLBACK}?code=SECRET&state={STATE}", headers=COOKIE)
        here.service.answers["AuthService/Login"] = error(InvalidCredentials, "e-mail or password are wrong")
        client.post("/auth/v1/login", json={"email": "SECRET", "password": "SECRET"})
    assert [line["status"] for line in lines if line["event"] == "request"] == [200, 200, 200, 302, 200, 401]
    assert "SECRET" not in str(lines)
    assert STATE not in str(lines)


# --- OpenID Connect -------------------------------------------------------------


def test_oidc_start(here: Stage, client: httpx.Client) -> None:
    answer = client.get("/auth/v1/oidc/start", headers={"host": "localhost:8443", "x-forwarded-host": "evil.example"})
    assert answer.status_code == 302
    assert answer.headers["location"] == "https://provider.example/authorize?state=x"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    cookie = answer.headers["set-cookie"]
    name, _, rest = cookie.partition("=")
    assert name == "__Host-helixflow-oidc"
    value, *attributes = re.split("; ?", rest)
    assert value == STATE
    assert {"Secure", "HttpOnly", "SameSite=Lax", "Path=/", "Max-Age=600"} == set(attributes)
    assert given(here, "OidcStart") == {
        "redirect_uri": f"https://localhost:8443{CALLBACK}",
        "address": "127.0.0.1",
    }


@pytest.mark.parametrize(
    "host",
    [
        b"ai.example",
        b"evil.example:8443",
        b"localhost.evil.example",
        b"127.0.0.1.evil.example",
        b"evil.example/x",
        b"a b",
        b"user@evil.example",
        b"a?x",
        b"a#x",
        b"",
        b"a:1:2",
        b"[::1",
        b"a\\b",
    ],
)
def test_a_host_that_is_none(here: Stage, host: bytes) -> None:
    head, _ = here.raw(b"GET /auth/v1/oidc/start HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert here.asked() == []


def test_an_ipv6_host(here: Stage) -> None:
    here.raw(b"GET /auth/v1/oidc/start HTTP/1.1\r\nhost: [::1]:8443\r\nconnection: close\r\n\r\n")
    assert here.service.only("AuthService/OidcStart")["redirect_uri"] == f"https://[::1]:8443{CALLBACK}"


def test_the_public_url_is_the_configured_one(pki: Layout, tmp_path: Path) -> None:
    with stage(pki, tmp_path, HELIX_AUTH_PUBLIC_URL="https://ai.example:8443") as made:
        made.reset().service.answers["AuthService/OidcStart"] = messages.OidcStartReply(url="https://p", state="x")
        with made.client(None) as client:
            for host in ("localhost", "evil.example"):
                assert client.get("/auth/v1/oidc/start", headers={"host": host}).status_code == 302
        asked = [call.message for call in made.service.calls if call.method == "AuthService/OidcStart"]
        assert {message["redirect_uri"] for message in asked} == {f"https://ai.example:8443{CALLBACK}"}


def test_an_account_is_tied_with_its_password(here: Stage, client: httpx.Client) -> None:
    """A token alone would let whoever has stolen it keep the account."""
    answer = client.post("/auth/v1/oidc/link", json={"email": "a", "password": "b", "code": "123456"})
    assert answer.status_code == 200
    assert here.service.only("AuthService/Login")["code"] == "123456"
    assert answer.json() == {"url": "https://provider.example/authorize?state=x"}
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["set-cookie"].startswith(f"{login.STATE_COOKIE}={STATE};")
    assert here.service.only("AuthService/Login")["password"] == "b"
    assert here.service.only("AuthService/OidcStart")["access_token"] == TOKENS["access_token"]
    here.reset()
    here.service.answers["AuthService/Login"] = error(InvalidCredentials, "e-mail or password is wrong")
    answer = client.post("/auth/v1/oidc/link", json={"email": "a", "password": "c"})
    assert refusal_of(answer)["code"] == "invalid_credentials"
    answer = client.post("/auth/v1/oidc/link", headers={"authorization": f"Bearer {OWNER}"})
    assert refusal_of(answer)["param"] == "email"
    assert here.asked() == ["AuthService/Login"]


@pytest.mark.parametrize(
    ("url", "state"), [("https://p.example/\r\nset-cookie: a=b", "x"), ("https://p/\u00e4", "x"), ("https://p", "a;b")]
)
def test_nothing_gets_into_the_headers(here: Stage, client: httpx.Client, url: str, state: str) -> None:
    here.service.answers["AuthService/OidcStart"] = messages.OidcStartReply(url=url, state=state)
    answer = client.get("/auth/v1/oidc/start")
    assert answer.status_code == 500
    assert "set-cookie" not in answer.headers
    assert "location" not in answer.headers


@pytest.mark.parametrize("http2", [False, True])
def test_oidc_callback(here: Stage, http2: bool) -> None:
    """Providers add parameters of their own."""
    path = f"{CALLBACK}?code=abc&state={STATE}&session_state=1&iss=https%3A%2F%2Fprovider.example"
    with here.client(None, http1=not http2, http2=http2) as client:
        answer = client.get(path, headers={**COOKIE, "host": "localhost"})
    assert answer.status_code == 200
    assert answer.json() == {"token_type": "Bearer", **TOKENS}
    assert answer.headers["cache-control"] == "no-store"
    assert "Max-Age=0" in answer.headers["set-cookie"], "the state works once"
    asked = here.service.only("AuthService/OidcFinish")
    assert asked["code"] == "abc"
    assert asked["state"] == STATE
    assert asked["address"] == "127.0.0.1"
    if not http2:
        assert asked["redirect_uri"] == f"https://localhost{CALLBACK}"


@pytest.mark.parametrize(
    ("query", "headers", "param"),
    [
        (f"code=a&state={STATE}", {}, "state"),
        ("code=a&state=other", COOKIE, "state"),
        (f"code=a&state={STATE}x", COOKIE, "state"),
        ("code=a&state=%C3%A4", COOKIE, "state"),
        ("code=a&state=", COOKIE, "state"),
        ("code=a&state=", {"cookie": f"{login.STATE_COOKIE}="}, "state"),
        ("code=a", COOKIE, "state"),
        (f"state={STATE}", COOKIE, "code"),
        (f"code=a&state={STATE}&state={STATE}", COOKIE, "state"),
        (f"code=a&code=b&state={STATE}", COOKIE, "code"),
        (f"code={'a' * 5000}&state={STATE}", COOKIE, "code"),
        (f"code=a&state={STATE}", {"cookie": f"{login.STATE_COOKIE}={STATE}; {login.STATE_COOKIE}=x"}, "state"),
        (f"code=a&state={STATE}", {"cookie": f"helixflow-oidc={STATE}"}, "state"),
    ],
)
def test_a_callback_that_this_browser_did_not_begin(
    here: Stage, client: httpx.Client, query: str, headers: dict[str, str], param: str
) -> None:
    answer = client.get(f"{CALLBACK}?{query}", headers=headers)
    assert answer.status_code == 400
    assert refusal_of(answer)["param"] == param
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert here.asked() == []


def test_the_provider_says_no(here: Stage, client: httpx.Client) -> None:
    answer = client.get(f"{CALLBACK}?error=access_denied&error_description=x&state={STATE}", headers=COOKIE)
    assert answer.status_code == 401
    assert "access_denied" in refusal_of(answer)["message"]
    answer = client.get(f"{CALLBACK}?error=%3Cscript%3E", headers=COOKIE)
    assert "script" not in answer.text
    assert here.asked() == []


# --- the key set ------------------------------------------------------------------


def test_jwks(here: Stage, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "JWKS_FRESH_S", 0.0)
    here.service.answers["AuthService/Jwks"] = messages.JwksReply(json=b'{"keys":[{"kid":"1"}]}')
    answer = client.get("/.well-known/jwks.json")
    assert answer.json() == {"keys": [{"kid": "1"}]}
    assert answer.headers["cache-control"] == "public, max-age=5"
    assert answer.headers["content-type"] == "application/json"
    here.service.answers["AuthService/Jwks"] = messages.JwksReply(json=b'{"keys":[{"kid":"2"}]}')
    assert client.get("/.well-known/jwks.json").json() == {"keys": [{"kid": "2"}]}
    here.service.answers["AuthService/Jwks"] = error(Unavailable, "away")
    answer = client.get("/.well-known/jwks.json")
    assert answer.json() == {"keys": [{"kid": "2"}]}, "what is known stays good while nobody answers"
    assert client.head("/.well-known/jwks.json").content == b""


def test_the_key_set_is_asked_for_once_in_a_while(pki: Layout, tmp_path: Path) -> None:
    with stage(pki, tmp_path) as made, made.client(None) as client:
        made.service.answers["AuthService/Jwks"] = error(Unavailable, "10.1.2.3 is away")
        answer = client.get("/.well-known/jwks.json")
        assert answer.status_code == 503
        assert "max-age" not in answer.headers.get("cache-control", "")
        assert "10.1.2.3" not in answer.text
        made.service.answers["AuthService/Jwks"] = messages.JwksReply(json=b'{"keys":[]}')
        made.service.calls.clear()
        assert [client.get("/.well-known/jwks.json").status_code for _ in range(5)] == [200] * 5
        assert made.asked() == ["AuthService/Jwks"]
