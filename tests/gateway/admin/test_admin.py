"""/admin/v1: HTTP and JSON to AdminService."""

import hashlib
from typing import Any

import httpx
import pytest

from helixflow.auth import keys
from helixflow.core_rs import Conflict, CoreError, DeadlineExceeded, InvalidRequest, PermissionDenied, Unavailable
from helixflow.gateway import admin
from helixflow.rpc import messages
from tests.admin.scripted import error
from tests.gateway.accounts import KEY, LIMITED, ORGANISATION, OWNER, USER, Stage, log_lines, refusal_of, sent

ID = "7b7e6f3e-0000-4000-8000-000000000001"
NAMES = {
    "{organisation}": "default",
    "{user}": "a@example.com",
    "{key}": ID,
    "{session}": ID,
    "{subject}": f"key:{ID}",
    "{id}": "m",
}


def path_of(endpoint: admin.Endpoint) -> str:
    path = endpoint.path
    for name, value in NAMES.items():
        path = path.replace(name, value)
    return path


def test_every_method_of_the_service_has_one_route() -> None:
    calls = sorted(f"AdminService/{endpoint.call}" for endpoint in admin.ENDPOINTS)
    assert calls == sorted(messages.service("AdminService"))
    for endpoint in admin.ENDPOINTS:
        method = messages.service("AdminService")[f"AdminService/{endpoint.call}"]
        assert method.request is getattr(messages, endpoint.message)
        fields = method.request.DESCRIPTOR.fields_by_name
        assert set(endpoint.query) <= set(fields), endpoint
        assert {*endpoint.lists, *filter(None, [endpoint.inner])} <= set(fields), endpoint


@pytest.mark.parametrize("endpoint", admin.ENDPOINTS, ids=lambda endpoint: endpoint.call)
def test_nobody_gets_in_without_a_credential(here: Stage, endpoint: admin.Endpoint) -> None:
    for token, code in ((None, "invalid_api_key"), ("hf-nonsense", "invalid_api_key"), ("a.b.c", "invalid_token")):
        with here.client(token) as nobody:
            answer = nobody.request(endpoint.method, path_of(endpoint))
        assert answer.status_code == 401
        assert refusal_of(answer)["code"] == code
        assert answer.headers["www-authenticate"] == "Bearer"
    assert here.asked() == []


@pytest.mark.parametrize("endpoint", admin.ENDPOINTS, ids=lambda endpoint: endpoint.call)
def test_every_route_asks_its_method_as_the_caller(here: Stage, client: httpx.Client, endpoint: admin.Endpoint) -> None:
    headers = {"x-request-id": "trace-1", "x-forwarded-for": "203.0.113.9", "forwarded": "for=203.0.113.9"}
    answer = client.request(endpoint.method, path_of(endpoint), headers=headers)
    assert answer.status_code == endpoint.status, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert here.asked() == [f"AdminService/{endpoint.call}"]
    message = here.service.only(f"AdminService/{endpoint.call}")
    assert message["actor"] == {
        "access_token": OWNER,
        "address": "127.0.0.1",
        "request_id": "trace-1",
        "name": "",
    }
    (call,) = [call for call in here.service.calls if call.method == f"AdminService/{endpoint.call}"]
    assert call.caller.service == "api-gateway"
    assert call.caller.request_id == "trace-1"


@pytest.mark.parametrize("endpoint", admin.ENDPOINTS, ids=lambda endpoint: endpoint.call)
def test_a_credential_for_other_endpoints_is_refused(here: Stage, endpoint: admin.Endpoint) -> None:
    with here.client(LIMITED) as limited:
        answer = limited.request(endpoint.method, path_of(endpoint))
    assert answer.status_code == 403
    assert refusal_of(answer)["code"] == "permission_denied"
    assert here.asked() == []


@pytest.mark.parametrize(
    ("method", "path", "body", "call", "fields"),
    [
        (
            "GET",
            "users?organisation=default&limit=7&after=x%2By",
            None,
            "ListUsers",
            {"organisation": "default", "limit": 7, "after": "x+y"},
        ),
        (
            "POST",
            "users",
            {"email": "a@example.com", "role": "member"},
            "CreateUser",
            {"email": "a@example.com", "role": "member"},
        ),
        (
            "PATCH",
            "users/a%40example.com",
            {"disabled": True},
            "UpdateUser",
            {"user": "a@example.com", "disabled": True},
        ),
        ("POST", "users/a@example.com/password", None, "ResetPassword", {"user": "a@example.com"}),
        (
            "POST",
            f"users/{ID}/password",
            {"keys": "revoke"},
            "ResetPassword",
            {"user": ID, "keys": "revoke"},
        ),
        ("DELETE", f"users/{ID}/second-factor", None, "ResetFactor", {"user": ID}),
        ("DELETE", f"users/{ID}/sessions", None, "EndSessions", {"user": ID}),
        ("GET", "sessions?user=a@example.com&limit=7", None, "ListSessions", {"user": "a@example.com", "limit": 7}),
        ("DELETE", f"sessions/{ID}", None, "EndSession", {"session": ID}),
        (
            "PUT",
            "organisations/default/second-factor",
            {"role": "admin"},
            "RequireFactor",
            {"organisation": "default", "role": "admin"},
        ),
        ("DELETE", f"users/{ID}", None, "DeleteUser", {"user": ID}),
        (
            "POST",
            "keys",
            {"name": "ci", "limits": {"tokens_per_minute": 5}, "models": ["m"]},
            "CreateKey",
            {"name": "ci", "limits": {"tokens_per_minute": 5}, "models": ["m"]},
        ),
        (
            "PATCH",
            f"keys/{ID}",
            {"models": [], "name": "x"},
            "UpdateKey",
            {"key": ID, "models": {"values": []}, "name": "x"},
        ),
        ("POST", f"keys/{ID}/rotate", {"overlap_s": 60}, "RotateKey", {"key": ID, "overlap_s": 60}),
        (
            "PUT",
            f"limits/key:{ID}",
            {"tokens_per_day": 2**63},
            "SetLimits",
            {"subject": f"key:{ID}", "limits": {"tokens_per_day": 2**63}},
        ),
        ("PUT", f"limits/key%3A{ID}", {}, "SetLimits", {"subject": f"key:{ID}", "limits": {}}),
        (
            "PUT",
            "prices/team/llama",
            {"prompt": 1250},
            "SetPrice",
            {"price": {"model": "team/llama", "prompt": 1250}},
        ),
        ("DELETE", "prices/team%2Fllama", None, "DeletePrice", {"model": "team/llama"}),
        (
            "GET",
            "usage?from=2026-01-01&group_by=day,model&user=a",
            None,
            "QueryUsage",
            {"from": "2026-01-01", "group_by": ["day", "model"], "user": "a"},
        ),
        ("GET", "usage?group_by=", None, "QueryUsage", {}),
    ],
)
def test_requests_become_messages(
    here: Stage, client: httpx.Client, method: str, path: str, body: Any, call: str, fields: dict[str, Any]
) -> None:
    answer = client.request(method, f"/admin/v1/{path}", json=body)
    assert answer.is_success, answer.text
    assert sent(here, call) == fields


def test_answers_are_the_message_as_json(here: Stage) -> None:
    key = messages.Key(id=ID, name="ci", models=["m"], created_at=2**40)
    here.service.answers["AdminService/CreateKey"] = messages.CreatedKey(key=key, secret="hf-secret")
    for http2 in (False, True):
        with here.client(http1=not http2, http2=http2) as client:
            answer = client.post("/admin/v1/keys", json={"name": "ci"})
        assert answer.status_code == 201
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == {"key": messages.plain(key), "secret": "hf-secret"}


def test_head_is_get_without_the_body(here: Stage, client: httpx.Client) -> None:
    here.service.answers["AdminService/ListUsers"] = messages.Users(data=[messages.User(id=ID)])
    answer = client.head("/admin/v1/users")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 50


ACTOR = {"role": "owner", "organisation_id": ID}


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "users", {"email": "a", "actor": ACTOR}, "actor"),
        ("POST", "users", {"email": "a", "actor": None}, "actor"),
        ("PATCH", f"users/{ID}", {"actor": ACTOR}, "actor"),
        ("PUT", f"limits/key:{ID}", {"actor": ACTOR}, "actor"),
        ("PUT", "prices/m", {"actor": ACTOR}, "actor"),
        ("DELETE", f"users/{ID}", {"actor": ACTOR}, "actor"),
        ("GET", "users?actor=x", None, "actor"),
        ("POST", "users?actor=x", {"email": "a"}, "actor"),
        ("PATCH", f"users/{ID}", {"user": "other"}, "user"),
        ("PATCH", f"keys/{ID}", {"key": "other"}, "key"),
        ("PUT", f"limits/key:{ID}", {"subject": "other"}, "subject"),
        ("PUT", "prices/m", {"model": "other"}, "model"),
        ("POST", "users", {"email": "a", "is_admin": True}, "is_admin"),
        ("POST", "users", {"email": 5}, "email"),
        ("POST", "users", {"email": None}, "email"),
        ("POST", "users", {"service_account": "yes"}, "service_account"),
        ("POST", "keys", {"limits": {"tokens_per_minute": -1}}, "limits.tokens_per_minute"),
        ("POST", "keys", {"limits": {"tokens": 1}}, "limits.tokens"),
        ("POST", "keys", {"models": "m"}, "models"),
        ("POST", "keys", {"models": [1]}, "models[0]"),
        ("PATCH", f"keys/{ID}", {"models": "m"}, "models"),
        ("PATCH", f"keys/{ID}", {"models": {"values": ["m"]}}, "models"),
        ("PATCH", f"keys/{ID}", {"endpoints": ["/v1", 1]}, "endpoints[1]"),
        ("PUT", f"limits/key:{ID}", {"tokens_per_day": 1.5}, "tokens_per_day"),
        ("PUT", f"limits/key:{ID}", {"tokens_per_day": 2**64}, "tokens_per_day"),
        ("PUT", f"limits/key:{ID}", {"limits": {}}, "limits"),
        ("PUT", "prices/m", {"prompt": "1"}, "prompt"),
        ("GET", "users?colour=red", None, "colour"),
        ("GET", "users?limit=1&limit=2", None, "limit"),
        ("GET", "users?organisation=a&organisation=a", None, "organisation"),
        ("GET", "users?limit=ten", None, "limit"),
        ("GET", "users?limit=-1", None, "limit"),
        ("GET", "users?limit=", None, "limit"),
        ("GET", "users?limit=99999999999", None, "limit"),
        ("GET", "users?limit=%D9%A1", None, "limit"),
        ("DELETE", f"users/{ID}?force=1", None, "force"),
        ("POST", "users?_method=DELETE", {"email": "a"}, "_method"),
        ("GET", "usage?group_by=day&group_by=model", None, "group_by"),
    ],
)
def test_what_is_wrong_is_named_and_asks_nobody(
    here: Stage, client: httpx.Client, method: str, path: str, body: Any, param: str
) -> None:
    answer = client.request(method, f"/admin/v1/{path}", json=body)
    assert answer.status_code == 400
    refused = refusal_of(answer)
    assert (refused["code"], refused["param"]) == ("invalid_request", param)
    assert param in refused["message"]
    assert answer.headers["cache-control"] == "no-store"
    assert here.asked() == []


def test_the_list_of_fields_does_not_name_the_actor(client: httpx.Client) -> None:
    message = refusal_of(client.post("/admin/v1/users", json={"x": 1}))["message"]
    assert "email" in message
    assert "actor" not in message


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'"text"', {}, 400),
        (b"null", {}, 400),
        (b'{"email": "\xff"}', {}, 400),
        (b'{"email": "\\ud800"}', {}, 400),
        (b'{"email": "a\\u0000b"}', {}, 400),
        (b'{"a\\u0000b": 1}', {}, 400),
        (b'{"x": ' + b"[" * 20_000, {}, 400),
        (b"email=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b'{"email": "a"}', {"content-type": "text/plain"}, 415),
        (b'{"email": "a"}', {"content-type": "multipart/form-data; boundary=x"}, 415),
        (b'{"email": "a"}', {"content-encoding": "gzip"}, 400),
        (b'{"email": "' + b"a" * 65536 + b'"}', {}, 413),
    ],
)
def test_bodies_that_are_none(
    here: Stage, client: httpx.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = client.post("/admin/v1/users", content=content, headers={"content-type": "application/json", **headers})
    assert answer.status_code == status
    refusal_of(answer)
    assert here.asked() == []


def test_a_backslash_before_u0000_is_text(here: Stage, client: httpx.Client) -> None:
    body = {"content": {"redact": [r"\u0000"]}}
    assert client.patch("/admin/v1/organisations/default", json=body).status_code == 200
    assert here.service.only("AdminService/UpdateOrganisation")["content"]["redact"] == [r"\u0000"]


@pytest.mark.parametrize(
    ("refused", "status", "code"),
    [
        (error(PermissionDenied, "members see their own keys only"), 403, "permission_denied"),
        (error(Conflict, "a@example.com exists already", "email"), 409, "conflict"),
        (error(InvalidRequest, "role: not one of owner, admin", "role"), 400, "invalid_request"),
    ],
)
def test_refusals_of_the_auth_service_are_passed_on(
    here: Stage, client: httpx.Client, refused: CoreError, status: int, code: str
) -> None:
    here.service.answers["AdminService/CreateUser"] = refused
    answer = client.post("/admin/v1/users", json={"email": "a@example.com"})
    assert answer.status_code == status
    assert refusal_of(answer) == {
        "message": refused.args[0],
        "type": answer.json()["error"]["type"],
        "param": refused.param,
        "code": code,
    }
    assert answer.headers["cache-control"] == "no-store"


def test_parameters_are_named_as_the_client_knows_them(here: Stage, client: httpx.Client) -> None:
    refused = error(InvalidRequest, "limits.tokens_per_day: at most 2^63-1", "limits.tokens_per_day")
    here.service.answers["AdminService/SetLimits"] = refused
    answer = client.put(f"/admin/v1/limits/key:{ID}", json={"tokens_per_day": 2**63})
    assert refusal_of(answer)["param"] == "tokens_per_day"
    assert refusal_of(answer)["message"] == "tokens_per_day: at most 2^63-1"


@pytest.mark.parametrize(
    ("refused", "status", "code"),
    [
        (error(Unavailable, "10.1.2.3:8502: connection refused", None, 3), 503, "unavailable"),
        (error(DeadlineExceeded, "10.1.2.3:8502 is slow"), 504, "deadline_exceeded"),
    ],
)
def test_addresses_of_the_inside_stay_inside(
    here: Stage, client: httpx.Client, refused: CoreError, status: int, code: str
) -> None:
    here.service.answers["AdminService/ListUsers"] = refused
    with log_lines() as lines:
        answer = client.get("/admin/v1/users")
    assert answer.status_code == status
    assert refusal_of(answer)["code"] == code
    assert "10.1.2.3" not in answer.text
    assert [line for line in lines if "10.1.2.3" in str(line.get("error"))], "the log has the reason"
    assert code != "unavailable" or answer.headers["retry-after"] == "3"


def test_a_bug_behind_tells_nothing(here: Stage, client: httpx.Client) -> None:
    def bug(_asked: Any) -> Any:
        raise RuntimeError("secret detail")

    here.service.answers["AdminService/ListUsers"] = bug
    answer = client.get("/admin/v1/users")
    assert answer.status_code == 500
    assert refusal_of(answer)["code"] == "internal"
    assert "secret detail" not in answer.text


def test_no_secret_is_logged(here: Stage, client: httpx.Client) -> None:
    made = messages.CreatedKey(key=messages.Key(id=ID, name="ci"), secret="hf-SECRET-KEY")
    here.service.answers["AdminService/CreateKey"] = made
    here.service.answers["AdminService/RotateKey"] = made
    created = messages.CreatedUser(user=messages.User(id=ID), one_time_password="SECRET-PASSWORD")
    here.service.answers["AdminService/CreateUser"] = created
    here.service.answers["AdminService/ResetPassword"] = created
    with log_lines() as lines:
        assert client.post("/admin/v1/keys", json={"name": "ci"}).json()["secret"] == "hf-SECRET-KEY"
        assert client.post(f"/admin/v1/keys/{ID}/rotate").status_code == 201
        assert client.post("/admin/v1/users", json={"email": "a"}).json()["one_time_password"] == "SECRET-PASSWORD"
        assert client.post(f"/admin/v1/users/{ID}/password").status_code == 200
        assert client.get("/admin/v1/users?after=SECRET-CURSOR").status_code == 200
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["route"] for line in requests] == [
        "/admin/v1/keys",
        "/admin/v1/keys/{key}/rotate",
        "/admin/v1/users",
        "/admin/v1/users/{user}/password",
        "/admin/v1/users",
    ]
    assert requests[0]["call"] == "CreateKey"
    assert requests[0]["principal"] == "boss@example.com"
    assert "SECRET" not in str(lines)
    assert OWNER not in str(lines)


def test_who_acts_by_key(here: Stage) -> None:
    """The key itself never leaves the gateway, and nothing that the gateway knows of its holder goes with the call."""
    secret = keys.make()
    here.service.answers["AuthService/Verify"] = messages.Principal(
        organisation_id=ORGANISATION, user_id=USER, key_id=KEY, key="ci", role="admin", user="a@example.com"
    )
    with here.client(secret) as client:
        assert client.get("/admin/v1/keys").status_code == 200
    actor = here.service.only("AdminService/ListKeys")["actor"]
    assert actor["key_digest"] == hashlib.sha256(secret.encode()).hexdigest()
    assert set(actor) == {"key_digest", "address", "request_id", "name"}
    assert secret not in str(here.service.calls)
