"""Every refusal of a gateway with accounts: its status, its code, its headers. And the limits, which refuse most."""

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helixflow import core_rs
from helixflow.auth.keys import make

from .people import CHAT, HELLO, KEYS, LOGIN, ORGANISATIONS, REFRESH, USERS, Key, Site, in_one_minute, refusal
from .stack import ROOT, Process, context, until

PRICED = "helixflow-demo"
RESET = re.compile(r"(\d+h)?(\d+m)?\d+s")

NEVER_SENT = {
    "cancelled": "whoever goes away hears nothing",
    "model_file_error": "an engine does not start",
    "tls_error": "a listener does not start",
}
ELSEWHERE = {
    "engine_failed": "integration/test_lifecycle.py",
    "deadline_exceeded": "integration/test_lifecycle.py",
    "queue_full": "integration/test_lifecycle.py",
    "draining": "integration/test_lifecycle.py",
    "second_factor_required": "gateway/test_login.py",
    "second_factor_missing": "gateway/test_login.py",
    "unavailable": "gateway/admin/test_admin.py",
    "internal": "gateway/admin/test_admin.py",
}
"""Refusals that need a platform in trouble, or rules of their own, and the file of their test."""


# --- without limits -----------------------------------------------------------------

BEARERS = [
    ({}, "invalid_api_key"),
    ({"authorization": ""}, "invalid_api_key"),
    ({"authorization": "Bearer"}, "invalid_api_key"),
    ({"authorization": "Basic ZGVtby1rZXk6"}, "invalid_api_key"),
    ({"x-api-key": "demo-key2"}, "invalid_api_key"),
    ({"cookie": "authorization=demo-key"}, "invalid_api_key"),
    ({"authorization": "Bearer demo-key2"}, "invalid_api_key"),
    ({"authorization": "Bearer hf-" + "0" * 49}, "invalid_api_key"),
    ({"authorization": f"Bearer {make()}"}, "invalid_api_key"),  # well-formed, never issued
    ({"authorization": "Bearer " + "x" * 9000}, "invalid_api_key"),
    ({"authorization": b"Bearer \xff\xfe"}, "invalid_api_key"),
    ({"authorization": "Bearer a.b.c"}, "invalid_token"),
    ({"authorization": "Bearer ..."}, "invalid_api_key"),
    ({"authorization": "Bearer .."}, "invalid_token"),
]


@pytest.mark.parametrize(("headers", "code"), BEARERS)
def test_credentials_that_are_none(site: Site, headers: Any, code: str) -> None:
    for path in (CHAT, "/tokenize", KEYS):
        answer = site.send("POST", path, json=HELLO, headers=headers)
        assert refusal(answer) == (401, code)
        assert answer.headers["www-authenticate"] == "Bearer"


ADMIN: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/admin/v1/nothing", None, 404, "not_found"),
    ("PUT", KEYS, {}, 405, "method_not_allowed"),
    ("POST", KEYS, {"name": ""}, 400, "invalid_request"),
    ("POST", KEYS, {"name": "a", "unknown": 1}, 400, "invalid_request"),
    ("POST", KEYS, {"name": "a", "user": "nobody@example.com"}, 404, "not_found"),
    ("GET", f"{KEYS}?page=1", None, 400, "invalid_request"),
    ("PATCH", f"{KEYS}/{'0' * 8}-0000-4000-8000-{'0' * 12}", {"name": "a"}, 404, "not_found"),
    ("PATCH", f"{KEYS}/nothing", {"name": "a"}, 400, "invalid_request"),
    ("POST", USERS, {"email": "owner@localhost", "role": "member"}, 409, "conflict"),
    ("POST", USERS, {"email": "no address", "role": "member"}, 400, "invalid_request"),
    ("POST", USERS, {"email": "a@example.com", "role": "king"}, 400, "invalid_request"),
    ("POST", ORGANISATIONS, {"name": "Other"}, 409, "conflict"),
    ("PUT", "/admin/v1/limits/planet:earth", {}, 400, "invalid_request"),
    ("DELETE", "/admin/v1/prices/never-set", None, 404, "not_found"),
    ("GET", "/admin/v1/usage?from=yesterday", None, 400, "invalid_request"),
    ("POST", KEYS, {"name": "x" * 70_000}, 413, "payload_too_large"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), ADMIN)
def test_administration(site: Site, method: str, path: str, body: Any, status: int, code: str) -> None:
    answer = site.send(method, path, site.owner.access, json=body)
    assert refusal(answer) == (status, code)
    assert (status == 405) == ("allow" in answer.headers)


def test_the_last_owner_stays(site: Site) -> None:
    path = f"{USERS}/{site.owner.id}"
    assert refusal(site.send("DELETE", path, site.owner.access)) == (409, "conflict")
    assert refusal(site.send("PATCH", path, site.owner.access, json={"role": "admin"})) == (409, "conflict")
    assert refusal(site.send("PATCH", path, site.owner.access, json={"disabled": True})) == (409, "conflict")


def test_nobody_grants_more_than_they_have(site: Site) -> None:
    admin, member = site.person("admin"), site.person("member")
    body = {"email": "king@example.com", "role": "owner"}
    assert refusal(site.send("POST", USERS, admin.access, json=body)) == (403, "permission_denied")
    for change in ({"role": "owner"}, {"disabled": True}):
        answer = site.send("PATCH", f"{USERS}/{site.owner.id}", admin.access, json=change)
        assert refusal(answer) == (403, "permission_denied")
    assert refusal(site.send("POST", f"{USERS}/{site.owner.id}/password", admin.access)) == (403, "permission_denied")
    mine = site.key()
    # An admin sees the keys of all, a member knows only of their own.
    for person, refused in ((admin, (403, "permission_denied")), (member, (404, "not_found"))):
        assert refusal(site.send("DELETE", f"{KEYS}/{mine.id}", person.access)) == refused
        assert refusal(site.send("PATCH", f"{KEYS}/{mine.id}", person.access, json={"name": "a"})) == refused
        assert refusal(site.send("POST", f"{KEYS}/{mine.id}/rotate", person.access)) == refused
    answer = site.send("POST", KEYS, member.access, json={"name": "a", "user": "owner@localhost"})
    assert refusal(answer) == (403, "permission_denied")


INFERENCE: list[tuple[dict[str, Any], int, str]] = [
    ({"json": {**HELLO, "model": "nothing"}}, 404, "model_not_found"),
    ({"json": {**HELLO, "tools": [{"type": "function"}]}}, 400, "unsupported_parameter"),
    ({"json": {**HELLO, "messages": [{"role": "user", "content": "a " * 10_000}]}}, 400, "context_length_exceeded"),
    ({"json": {**HELLO, "temperature": "hot"}}, 400, "invalid_request"),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_request"),
    ({"content": b"a=1", "headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
    ({"content": b"[" + b" " * (5 << 20) + b"]"}, 413, "payload_too_large"),
]


@pytest.mark.parametrize(("options", "status", "code"), INFERENCE)
def test_inference(site: Site, options: dict[str, Any], status: int, code: str) -> None:
    assert refusal(site.send("POST", CHAT, "demo-key", **options)) == (status, code)


def test_a_viewer_spends_nothing(site: Site) -> None:
    assert refusal(site.chat(site.person("viewer").access)) == (403, "permission_denied")
    assert refusal(site.send("POST", KEYS, site.person("viewer").access, json={"name": "a"})) == (
        403,
        "permission_denied",
    )
    # An access token of a member is as good as a key.
    assert site.chat(site.person("member").access).status_code == 200


LOGINS = [
    (LOGIN, {"email": "nobody@example.com", "password": "x"}, 401, "invalid_credentials"),
    (LOGIN, {"email": "nobody", "password": "x"}, 400, "invalid_request"),
    (LOGIN, {"email": "nobody@example.com"}, 400, "invalid_request"),
    (LOGIN, {"email": "nobody@example.com", "password": 1}, 400, "invalid_request"),
    (LOGIN, {"email": "nobody@example.com", "password": "x", "role": "owner"}, 400, "invalid_request"),
    (LOGIN, {"email": "nobody@example.com", "password": "x" * 20_000}, 413, "payload_too_large"),
    (REFRESH, {"refresh_token": "nothing"}, 401, "invalid_token"),
    (REFRESH, {}, 400, "invalid_request"),
]


@pytest.mark.parametrize(("path", "body", "status", "code"), LOGINS)
def test_login(site: Site, path: str, body: Any, status: int, code: str) -> None:
    assert refusal(site.send("POST", path, json=body)) == (status, code)


def test_no_provider_no_login_through_one(site: Site) -> None:
    answer = site.send("GET", "/auth/v1/oidc/start")
    assert refusal(answer) == (404, "not_found")
    assert refusal(site.send("GET", "/auth/v1/oidc/callback?code=a&state=b")) == (400, "invalid_request")


def test_every_code_has_a_test() -> None:
    here = Path(__file__).read_text() + (ROOT / "tests/integration/test_accounts.py").read_text()
    for row in core_rs.error_table():
        if row.code not in NEVER_SENT:
            text = (ROOT / "tests" / ELSEWHERE[row.code]).read_text() if row.code in ELSEWHERE else here
            assert f'"{row.code}"' in text, row.code


# --- limits ------------------------------------------------------------------------


def limited(site: Site, **limits: int) -> Key:
    """A key of its own with limits."""
    return site.key(limits=limits)


def test_requests_per_minute(site: Site) -> None:
    def act() -> list[httpx.Response]:
        secret = limited(site, requests_per_minute=3).secret
        return [site.chat(secret, gateway=number % 2) for number in range(5)]

    answers = in_one_minute(act)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:1]] == ["2"]
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert RESET.fullmatch(answer.headers["x-ratelimit-reset-requests"])
        assert "x-ratelimit-limit-tokens" not in answer.headers
    for answer in answers[3:]:
        assert refusal(answer) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert "3 requests per minute of this API key" in answers[4].json()["error"]["message"]


def test_no_requests_at_all(site: Site) -> None:
    secret = limited(site, requests_per_minute=0).secret
    assert refusal(site.chat(secret)) == (429, "insufficient_quota")
    # What reads models or administers is no inference.
    assert site.send("GET", "/v1/models", secret).status_code == 200
    assert site.send("GET", KEYS, secret).status_code == 200


def test_tokens_per_minute(site: Site) -> None:
    def act() -> list[httpx.Response]:
        secret = limited(site, tokens_per_minute=400).secret
        return [
            site.chat(secret),
            site.chat(secret, max_tokens=500),
            site.chat(secret, max_tokens=300),
            site.chat(secret, max_tokens=300, gateway=1),
            site.chat(secret, max_tokens=300, gateway=1, stream=True),
        ]

    first, huge, large, over, streamed = in_one_minute(act)
    used = first.json()["usage"]["total_tokens"]
    assert first.headers["x-ratelimit-limit-tokens"] == "400"
    assert 400 - 3 * used < int(first.headers["x-ratelimit-remaining-tokens"]) < 400
    assert refusal(huge) == (429, "insufficient_quota"), "this one can never be admitted"
    assert huge.json()["error"]["param"] == "max_tokens"
    assert huge.headers["x-should-retry"] == "false"
    assert "retry-after" not in huge.headers
    assert large.status_code == 200
    for answer in (over, streamed):
        assert refusal(answer) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert RESET.fullmatch(answer.headers["x-ratelimit-reset-tokens"])


def test_a_small_limit_lets_in_who_names_no_maximum(site: Site) -> None:
    """Nobody knows how long the answer will be: what is reserved for it is not more than the limit has."""

    def act() -> tuple[httpx.Response, httpx.Response]:
        secret = limited(site, tokens_per_minute=60).secret
        return site.chat(secret, max_tokens=None), site.chat(secret)

    first, second = in_one_minute(act)
    assert first.status_code == 200
    assert first.json()["usage"]["total_tokens"] > 60, "it could not be known, and is charged"
    assert refusal(second) == (429, "rate_limit_exceeded")


def test_what_fits_is_let_in_at_once(site: Site) -> None:
    """What a request gives back is there for the next one, however soon that comes."""
    for _ in range(40):
        secret = limited(site, tokens_per_month=100).secret
        left = 100 - site.chat(secret, max_tokens=5).json()["usage"]["total_tokens"]
        # Fewer than 25 tokens are guessed for the prompt.
        answer = site.chat(secret, max_tokens=left - 25)
        assert answer.status_code == 200, answer.text


@contextlib.contextmanager
def streaming(site: Site, secret: str, tokens: int) -> Iterator[httpx.Response]:
    """A stream of which the first event has come."""
    body = {**HELLO, "max_tokens": tokens, "stream": True}
    headers = {"authorization": f"Bearer {secret}"}
    with site.gateways[0].stream("POST", CHAT, json=body, headers=headers) as answer:
        assert answer.status_code == 200
        next(answer.iter_lines())
        yield answer


def test_requests_at_a_time(site: Site) -> None:
    secret = limited(site, concurrent_requests=1).secret
    with streaming(site, secret, 4000):
        for gateway in (0, 1):
            over = site.chat(secret, gateway=gateway)
            assert refusal(over) == (429, "rate_limit_exceeded")
            assert over.headers["retry-after"] == "1"
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.chat(secret, gateway=gateway).status_code == 200, "the place is free again")


def test_a_cancelled_stream_is_refunded_to_the_token(site: Site) -> None:
    def act() -> int:
        key = limited(site, tokens_per_minute=2000)
        with streaming(site, key.secret, 1900) as answer:
            request_id = answer.headers["x-request-id"]
        query = "SELECT prompt_tokens + completion_tokens FROM requests WHERE request_id = $1"
        until(lambda: site.value(query, request_id) is not None, "its row is in the ledger")
        used: int = site.value(query, request_id)
        # What it did not use is there again, and no more than that.
        with streaming(site, key.secret, 2000 - used - 100):
            assert refusal(site.chat(key.secret, max_tokens=100)) == (429, "rate_limit_exceeded")
        return used

    assert 0 < in_one_minute(act) < 1900


BUDGETS = ["tokens_per_day", "tokens_per_month", "cost_per_day", "cost_per_month"]


@pytest.fixture
def priced(site: Site) -> Iterator[None]:
    """The model costs 1,000 nano units for each token."""
    path = f"/admin/v1/prices/{PRICED}"
    site.done("PUT", path, site.owner.access, json={"prompt": 1000, "cached": 1000, "completion": 1000})
    key = site.key()

    def known() -> bool:
        answer = site.chat(key.secret)
        query = "SELECT cost FROM requests WHERE request_id = $1"
        until(lambda: site.value(query, answer.headers["x-request-id"]) is not None, "the row is in the ledger")
        return bool(site.value(query, answer.headers["x-request-id"]))

    until(known, "the price is known")
    yield
    site.done("DELETE", path, site.owner.access)


def test_budgets(site: Site, priced: None) -> None:
    for metric in BUDGETS:
        scale = 1000 if metric.startswith("cost") else 1
        secret = limited(site, **{metric: 100 * scale}).secret
        first = site.chat(secret, max_tokens=5)
        assert first.status_code == 200
        assert not [name for name in first.headers if name.startswith("x-ratelimit-")], "those are for minutes"
        assert site.chat(secret, max_tokens=40).status_code == 200
        spent = site.chat(secret, max_tokens=50)
        assert refusal(spent) == (429, "insufficient_quota"), metric
        seconds = int(spent.headers["retry-after"])
        assert 1 <= seconds <= (86_400 if metric.endswith("day") else 31 * 86_400)
        assert -3 < (time.time() + seconds + 43_200) % 86_400 - 43_200 < 3, "it ends at midnight of UTC"


def test_limits_of_a_user_and_an_organisation(site: Site) -> None:
    """Each binds all keys below it, at every gateway."""
    body = {"email": "pair", "role": "member", "service_account": True}
    user = site.done("POST", USERS, site.owner.access, json=body)["user"]["id"]
    (home,) = site.done("GET", ORGANISATIONS, site.stranger.access)["data"]
    ours = [site.key(user=user).secret for _ in range(2)]
    theirs = [site.key(site.stranger).secret for _ in range(2)]
    for subject, keys in ((f"user:{user}", ours), (f"organisation:{home['id']}", theirs)):
        path = f"/admin/v1/limits/{subject}"
        places = [(key, gateway) for key in keys for gateway in (0, 1)]

        def act(path: str = path, places: list[tuple[str, int]] = places) -> list[int]:
            site.done("PUT", path, site.owner.access, json={"requests_per_minute": 2, "tokens_per_minute": 200})
            for key, gateway in places:
                # More than the limit can never be admitted, and is not counted.
                until(
                    lambda k=key, g=gateway: site.chat(k, gateway=g, max_tokens=201).status_code == 429, "it is known"
                )
            return [site.chat(key, gateway=gateway).status_code for key, gateway in places]

        assert in_one_minute(act) == [200, 200, 429, 429], subject
        site.done("PUT", path, site.owner.access, json={})
        for key, gateway in places:
            until(lambda k=key, g=gateway: site.chat(k, gateway=g).status_code == 200, "without limits it works again")


# --- the ledger ---------------------------------------------------------------------


def test_a_full_spool_refuses(site: Site) -> None:
    platform = site.platform
    environ = {
        **platform.environ,
        "HELIX_GATEWAY_POOLS": platform.pool.address,
        "HELIX_GATEWAY_AUTH": platform.auth.address,
        "HELIX_LEDGER_SPOOL": str(platform.place / "small-spool"),
        "HELIX_LEDGER_SPOOL_MAX_BYTES": str(1 << 20),
        "HELIX_LEDGER_SHIP_MS": "60000",
    }
    gateway = Process(("gateway",), environ, platform.place / "small-gateway.log").start()
    body = {"model": "m" * 250, "tokens": [1]}

    async def fill() -> httpx.Response:
        port = gateway.address.rpartition(":")[2]
        headers = {"authorization": f"Bearer {site.key().secret}"}
        tls = context(platform.certs)
        async with httpx.AsyncClient(
            base_url=f"https://localhost:{port}", verify=tls, headers=headers, http2=True
        ) as one:
            while True:
                answers = await asyncio.gather(
                    *(
                        one.post("/detokenize", json=body, headers={"x-request-id": secrets.token_hex(60)})
                        for _ in range(50)
                    )
                )
                full = [answer for answer in answers if answer.status_code == 503]
                if full:
                    return full[0]
                assert {answer.status_code for answer in answers} == {404}

    try:
        with platform.client("", gateway) as client:
            until(lambda: client.get("/ready").status_code == 200, "it is ready")
        refused = asyncio.run(fill())
        assert refusal(refused) == (503, "ledger_full")
        assert refused.headers["retry-after"]
    finally:
        gateway.stop()
