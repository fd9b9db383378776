"""What is taken away stops at every gateway within a second, measured."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from .people import KEYS, LOGOUT, ORGANISATIONS, USERS, Person, Site, refusal
from .stack import until

WITHIN_S = 1.0


def both(site: Site, token: str) -> list[int]:
    """What each gateway answers to a request that an access token or a key may make."""
    return [site.send("GET", "/admin/v1/prices", token, gateway=gateway).status_code for gateway in (0, 1)]


def measured(site: Site, tokens: list[str], act: Callable[[], Any]) -> float:
    """Seconds from the answer of `act` until every gateway refuses every one of the tokens, which work before."""
    for token in tokens:
        assert both(site, token) == [200, 200]
        assert both(site, token) == [200, 200], "now from memory"
    answer = act()
    assert answer.is_success, answer.text
    began = time.monotonic()
    until(lambda: all(both(site, token) == [401, 401] for token in tokens), "nothing of it works any more")
    return time.monotonic() - began


def holder(site: Site, organisation: str = "default") -> tuple[Person, list[str]]:
    """A user, and what they have: an access token and a key."""
    person = site.new_person(organisation=organisation)
    return person, [person.access, site.key(person).secret]


def test_a_revoked_key(site: Site) -> None:
    key = site.key()
    path = f"{KEYS}/{key.id}"
    assert measured(site, [key.secret], lambda: site.send("DELETE", path, site.owner.access)) < WITHIN_S
    assert refusal(site.chat(key.secret)) == (401, "invalid_api_key")
    row = next(row for row in site.done("GET", f"{KEYS}?limit=1000", site.owner.access)["data"] if row["id"] == key.id)
    assert row["revoked_at"]
    # It is for good.
    assert refusal(site.send("PATCH", path, site.owner.access, json={"name": "a"})) == (409, "conflict")
    assert refusal(site.send("POST", f"{path}/rotate", site.owner.access)) == (409, "conflict")


def test_a_key_that_was_rotated_without_an_overlap(site: Site) -> None:
    key = site.key()
    body = {"overlap_s": 0}

    def rotate() -> Any:
        return site.send("POST", f"{KEYS}/{key.id}/rotate", site.owner.access, json=body)

    assert measured(site, [key.secret], rotate) < WITHIN_S


def test_a_disabled_user_and_back(site: Site) -> None:
    person, tokens = holder(site)
    path = f"{USERS}/{person.id}"

    def disable() -> Any:
        return site.send("PATCH", path, site.owner.access, json={"disabled": True})

    assert measured(site, tokens, disable) < WITHIN_S
    assert refusal(site.login(person)) == (403, "permission_denied")
    assert refusal(site.send("POST", "/auth/v1/refresh", json={"refresh_token": person.refresh})) == (
        401,
        "invalid_token",
    )
    site.done("PATCH", path, site.owner.access, json={"disabled": False})
    # Keys rest and come back; sessions are over.
    until(lambda: both(site, tokens[1]) == [200, 200], "the key works again", WITHIN_S)
    assert both(site, tokens[0]) == [401, 401]
    assert site.login(person).status_code == 200


def test_a_removed_user(site: Site) -> None:
    person, tokens = holder(site)
    path = f"{USERS}/{person.id}"
    assert measured(site, tokens, lambda: site.send("DELETE", path, site.owner.access)) < WITHIN_S
    assert refusal(site.login(person)) == (401, "invalid_credentials")
    assert refusal(site.send("PATCH", path, site.owner.access, json={"disabled": False})) == (404, "not_found")
    assert site.value("SELECT email FROM users WHERE id = $1", person.id) == person.email, "ledger and audit name it"


def test_a_suspended_organisation_and_back(site: Site) -> None:
    person, tokens = holder(site, "other")
    home = next(row for row in site.done("GET", ORGANISATIONS, site.owner.access)["data"] if row["name"] == "other")
    path = f"{ORGANISATIONS}/{home['id']}"

    def suspend() -> Any:
        return site.send("PATCH", path, site.owner.access, json={"suspended": True})

    try:
        assert measured(site, [*tokens, site.stranger.access], suspend) < WITHIN_S
        assert refusal(site.login(person)) == (403, "permission_denied")
        assert site.chat(site.key().secret).status_code == 200, "others go on"
    finally:
        site.done("PATCH", path, site.owner.access, json={"suspended": False})
    until(lambda: all(both(site, token) == [200, 200] for token in tokens), "it goes on", WITHIN_S)


def test_a_session_that_was_logged_out(site: Site) -> None:
    person, (access, key) = holder(site)
    body = {"refresh_token": person.refresh}
    assert measured(site, [access], lambda: site.send("POST", LOGOUT, json=body)) < WITHIN_S
    assert both(site, key) == [200, 200], "its keys go on"


def test_a_changed_role(site: Site) -> None:
    person, tokens = holder(site)
    assert site.chat(tokens[1]).status_code == 200
    site.done("PATCH", f"{USERS}/{person.id}", site.owner.access, json={"role": "viewer"})

    def refused() -> bool:
        answers = [site.chat(token, gateway=gateway) for token in tokens for gateway in (0, 1)]
        return all(answer.status_code == 403 for answer in answers)

    until(refused, "a viewer spends nothing", WITHIN_S)


@pytest.mark.parametrize("limit", [{"requests_per_minute": 0}, {"tokens_per_day": 0}])
def test_a_new_limit(site: Site, limit: dict[str, int]) -> None:
    key = site.key()
    assert [site.chat(key.secret, gateway=gateway).status_code for gateway in (0, 1)] == [200, 200]
    site.done("PUT", f"/admin/v1/limits/key:{key.id}", site.owner.access, json=limit)

    def answers(status: int) -> bool:
        return all(site.chat(key.secret, gateway=gateway).status_code == status for gateway in (0, 1))

    until(lambda: answers(429), "the limit binds", WITHIN_S)
    site.done("PUT", f"/admin/v1/limits/key:{key.id}", site.owner.access, json={})
    until(lambda: answers(200), "the limit is gone", WITHIN_S)


def test_by_the_command_line_too(site: Site) -> None:
    key = site.key()
    assert both(site, key.secret) == [200, 200]
    site.platform.run("key", "revoke", key.id)
    until(lambda: both(site, key.secret) == [401, 401], "it is revoked", WITHIN_S)
