"""/admin/v1: no spelling of a path and no header leads somewhere else, or makes somebody of the caller."""

import json

import httpx
import pytest

from tests.gateway.accounts import OWNER, Stage, sent

ID = "7b7e6f3e-0000-4000-8000-000000000001"
HEAD = f"HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {OWNER}\r\nconnection: close\r\n".encode()


@pytest.mark.parametrize(
    "path",
    [
        "//admin/v1/users",
        "/admin//v1/users",
        "/admin/v1//users",
        "/admin/v1/users/",
        "/admin/v1/./users",
        "/admin/v1/../v1/users",
        "/v1/../admin/v1/users",
        "/admin/v1/users/../users",
        "/admin/v1/%75sers",
        "/admin%2Fv1/users",
        "/admin/v1%2fusers",
        "/admin/v1/%2e/users",
        "/ADMIN/v1/users",
        "/admin/v1/users;x=1",
        "/admin/v1/users%00",
        "/admin/v1/users%20",
        "/admin/v1/users%3Flimit=1",
        "/admin\\v1\\users",
        "https://localhost//admin/v1/users",
        "*",
    ],
)
def test_path_tricks_find_nothing(here: Stage, path: str) -> None:
    head, body = here.raw(b"GET " + path.encode() + b" " + HEAD + b"\r\n")
    assert head.split(b" ")[1] in (b"404", b"400"), head
    assert here.asked() == []
    if body:
        assert set(json.loads(body)) == {"error"}


@pytest.mark.parametrize(
    "path",
    [
        f"/admin/v1/users/{ID}%2Fpassword",
        f"/admin/v1/users/x%2F..%2F{ID}",
        f"/admin/v1/users/..%2Fusers%2F{ID}",
        f"/admin/v1/users//{ID}",
        f"/admin/v1/users/{ID}/",
        f"/admin/v1/users/{ID}/x",
        "/admin/v1/users/..",
        "/admin/v1/users/%2e%2e",
        "/admin/v1/users/%2e",
        "/admin/v1/users/a%00b",
        "/admin/v1/users/a%0d%0ax-evil:%201",
        "/admin/v1/users/%ff",
        "/admin/v1/users/a%5Cb",
        f"/admin/v1/keys/%2e%2e%2fusers%2f{ID}",
        "/admin/v1/prices/../users",
        "/admin/v1/prices/a/%2e%2e/b",
        "/admin/v1/prices/",
    ],
)
def test_parameters_hide_no_path(here: Stage, path: str) -> None:
    head, body = here.raw(b"DELETE " + path.encode() + b" " + HEAD + b"\r\n")
    status = head.split(b" ")[1]
    assert status in (b"400", b"404", b"405"), head
    assert b"x-evil" not in head
    assert json.loads(body)["error"]["code"] in ("invalid_request", "not_found", "method_not_allowed")
    assert here.asked() == []


def test_an_absolute_target_is_the_same_route(here: Stage) -> None:
    head, _ = here.raw(b"GET https://other.example/admin/v1/users?limit=3 " + HEAD + b"\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert sent(here, "ListUsers") == {"limit": 3}
    here.reset()
    head, _ = here.raw(b"GET https://other.example/admin/v1/users HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    "header", ["x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url"]
)
def test_override_headers_do_nothing(here: Stage, client: httpx.Client, header: str) -> None:
    value = "/admin/v1/prices" if "url" in header else "DELETE"
    answer = client.get("/admin/v1/users", headers={header: value})
    assert answer.status_code == 200
    assert here.asked() == ["AdminService/ListUsers"]
    here.reset()
    answer = client.post(f"/admin/v1/users/{ID}", headers={header: value})
    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, PATCH"
    assert here.asked() == []


@pytest.mark.parametrize("header", ["x-helix-role", "x-role", "x-user", "x-organisation", "x-forwarded-user"])
def test_headers_do_not_say_who_calls(here: Stage, header: str) -> None:
    with here.client(None, headers={header: "owner"}) as client:
        assert client.get("/admin/v1/users").status_code == 401
    assert here.asked() == []
