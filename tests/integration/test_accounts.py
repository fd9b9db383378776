"""The whole life of users, keys and tokens over HTTPS, with every service a process of its own."""

import time
from typing import Any

import openai
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from .people import (
    AUDIT,
    CHAT,
    KEYS,
    LOGIN,
    LOGOUT,
    ORGANISATIONS,
    OWNER,
    REFRESH,
    USERS,
    Site,
    refusal,
)
from .stack import Process, context, until

JWKS = "/.well-known/jwks.json"
HOUR_S = 3600


def tokens_of(answer: Any) -> tuple[str, str]:
    """Access and refresh token of a login."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert body["token_type"] == "Bearer"
    assert body["expires_in"] == 900
    return body["access_token"], body["refresh_token"]


# --- people ------------------------------------------------------------------------


def test_the_first_owner_has_a_one_time_password_that_must_be_changed(site: Site) -> None:
    first, second = site.first_login
    assert refusal(first) == (403, "password_change_required")
    tokens_of(second)
    once = site.first_password
    assert not (site.platform.place / "secrets" / "first-password").exists(), "it opens nothing any more"
    assert refusal(site.send("POST", LOGIN, json={"email": OWNER, "password": once})) == (401, "invalid_credentials")
    tokens_of(site.login(site.owner))
    rows = site.done("GET", USERS, site.owner.access)["data"]
    owner = next(row for row in rows if row["email"] == OWNER)
    assert (owner["role"], owner["must_change_password"], owner["organisation"]) == ("owner", False, "default")


def test_no_secret_is_logged(site: Site) -> None:
    logs = "".join(process.text() for process in (site.platform.auth, *site.platform.gateways))
    assert site.first_password not in logs
    assert "secrets/first-password" in logs, "no terminal: the log says where it stands"
    for person in site.people.values():
        assert not [secret for secret in (person.password, person.refresh, person.access) if secret in logs]


def test_the_life_of_a_person(site: Site) -> None:
    email, role = "life@example.com", "viewer"
    made = site.send("POST", USERS, site.owner.access, json={"email": email, "role": role})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    user, password = made.json()["user"], made.json()["one_time_password"]
    assert (user["role"], user["must_change_password"], user["last_login_at"]) == (role, True, 0)
    body = {"email": email, "password": password}
    assert refusal(site.send("POST", LOGIN, json=body)) == (403, "password_change_required")
    assert refusal(site.send("POST", LOGIN, json={**body, "new_password": "short"})) == (400, "invalid_request")
    chosen = "a much longer one"
    access, refresh = tokens_of(site.send("POST", LOGIN, json={**body, "new_password": chosen}))
    assert refusal(site.send("POST", LOGIN, json=body)) == (401, "invalid_credentials"), "the one-time password is over"
    assert site.send("GET", KEYS, access, gateway=1).status_code == 200

    # Every exchange gives a new pair; the access token of before goes on for its time.
    renewed, following = tokens_of(site.send("POST", REFRESH, json={"refresh_token": refresh}, gateway=1))
    assert renewed != access
    assert following != refresh
    for token in (access, renewed):
        assert site.send("GET", KEYS, token).status_code == 200
    assert refusal(site.send("POST", REFRESH, json={"refresh_token": "hr-" + "a" * 43})) == (401, "invalid_token")
    third, last = tokens_of(site.send("POST", REFRESH, json={"refresh_token": following}))

    # Logging out ends this session and no other.
    second, _ = tokens_of(site.send("POST", LOGIN, json={"email": email, "password": chosen}))
    assert site.send("POST", LOGOUT, json={"refresh_token": last}).status_code == 200
    for token in (access, renewed, third):
        until(lambda token=token: site.send("GET", KEYS, token).status_code == 401, "the session is over")
        assert refusal(site.send("GET", KEYS, token)) == (401, "invalid_token")
    assert refusal(site.send("POST", REFRESH, json={"refresh_token": last})) == (401, "invalid_token")
    assert site.send("GET", KEYS, second).status_code == 200
    assert site.send("POST", LOGOUT, second).status_code == 200, "by the access token in the header"
    until(lambda: site.send("GET", KEYS, second).status_code == 401, "that session is over too")


def test_a_replayed_refresh_token_ends_its_session(site: Site) -> None:
    person = site.new_person()
    other, _ = tokens_of(site.login(person))
    fresh, following = tokens_of(site.send("POST", REFRESH, json={"refresh_token": person.refresh}))
    assert site.send("GET", KEYS, fresh).status_code == 200
    assert refusal(site.send("POST", REFRESH, json={"refresh_token": person.refresh}, gateway=1)) == (
        401,
        "invalid_token",
    )
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.send("GET", KEYS, fresh, gateway=gateway).status_code == 401, "it is over")
    assert refusal(site.send("POST", REFRESH, json={"refresh_token": following})) == (401, "invalid_token")
    assert site.send("GET", KEYS, other).status_code == 200, "another session of the same person goes on"
    reuse = next(row for row in site.audit() if row["action"] == "session.reuse")
    assert (reuse["actor"], reuse["target"], reuse["address"]) == (person.email, person.email, "127.0.0.1")


def test_a_service_account_has_keys_and_no_login(site: Site) -> None:
    body = {"email": "nightly-jobs", "role": "member", "service_account": True}
    made = site.done("POST", USERS, site.owner.access, json=body)
    assert made["one_time_password"] == ""
    for name in ("nightly-jobs", "nightly-jobs@default"):
        answer = site.send("POST", LOGIN, json={"email": name, "password": ""})
        assert answer.status_code in (400, 401)
    reset = site.send("POST", f"{USERS}/{made['user']['id']}/password", site.owner.access)
    assert refusal(reset) == (400, "invalid_request")
    key = site.key(user="nightly-jobs")
    assert site.chat(key.secret).status_code == 200
    rows = site.done("GET", KEYS, key.secret)["data"]
    assert [row["user"] for row in rows] == ["nightly-jobs"], "members see their own keys"


def test_wrong_passwords_make_a_user_wait(site: Site) -> None:
    person = site.new_person()
    wrong = {"email": person.email, "password": "not the password"}
    for gateway in (0, 1, 0, 1):
        assert refusal(site.send("POST", LOGIN, json=wrong, gateway=gateway)) == (401, "invalid_credentials")
    # The first pause is a second: longer than that takes as many guesses.
    site.value("UPDATE login_attempts SET free_at = now() + interval '60 s' WHERE failures = 4")
    locked = site.login(person, gateway=1)
    assert refusal(locked) == (429, "account_locked")
    assert 30 < int(locked.headers["retry-after"]) <= 60
    assert site.send("GET", KEYS, person.access).status_code == 200, "who is logged in stays"
    row = next(row for row in site.done("GET", USERS, site.owner.access)["data"] if row["id"] == person.id)
    assert row["locked"]
    assert site.done("POST", f"{USERS}/{person.id}/unlock", site.owner.access)["locked"] is False
    tokens_of(site.login(person))
    mine = [row["action"] for row in site.audit() if row["target"] == person.email]
    assert mine[:4] == ["login.succeeded", "user.unlock", "login.throttled", "login.failed"]


def test_a_reset_password_ends_sessions(site: Site) -> None:
    person = site.new_person()
    made = site.done("POST", f"{USERS}/{person.id}/password", site.person("admin").access)
    assert refusal(site.login(person)) == (401, "invalid_credentials")
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.send("GET", KEYS, person.access, gateway=gateway).status_code == 401, "over")
    again = site.enter(made["user"], made["one_time_password"])
    assert site.send("GET", KEYS, again.access).status_code == 200


# --- keys --------------------------------------------------------------------------


def test_a_key_works_with_the_official_client(site: Site) -> None:
    person = site.new_person()
    key = site.key(person, name="laptop")
    assert key.secret.startswith("hf-")
    assert len(key.secret) == 52
    url = str(site.gateways[0].base_url)
    with openai.DefaultHttpxClient(verify=context(site.platform.certs)) as http:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key.secret, http_client=http, max_retries=0)
        answer = client.chat.completions.create(
            model="gpt-4", messages=[{"role": "user", "content": "Hello"}], max_tokens=5
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        stream = client.chat.completions.create(
            model="gpt-4", messages=[{"role": "user", "content": "Hello"}], max_tokens=5, stream=True
        )
        assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == "length"
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key=key.secret[:-1] + "x", http_client=http, max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            wrong.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Hello"}])
        assert refused.value.code == "invalid_api_key"

    def used() -> bool:
        (row,) = site.done("GET", KEYS, person.access)["data"]
        assert row["name"] == "laptop"
        assert row["prefix"] == key.secret[:9]
        assert key.secret not in str(row)
        return bool(row["last_used_at"])

    until(used, "the last use is noted")


def test_what_is_stored_is_no_key(site: Site) -> None:
    key = site.key()
    everything = site.value("SELECT string_agg(k::text, ' ') FROM api_keys k")
    assert key.id in everything
    assert key.secret not in everything
    assert key.secret[9:] not in everything
    assert key.secret not in "".join(process.text() for process in (site.platform.auth, *site.platform.gateways))


def test_allowed_models_and_endpoints(site: Site) -> None:
    # The canonical name of the model behind the alias is what a list should hold; both are understood.
    for models in (["helixflow-demo"], ["gpt-4"]):
        key = site.key(models=models, endpoints=[CHAT, "/v1/models"])
        assert site.chat(key.secret).status_code == 200
        refused = site.send("POST", "/v1/completions", key.secret, json={"model": "gpt-4", "prompt": "a"})
        assert refusal(refused) == (403, "permission_denied")
        assert refusal(site.send("GET", KEYS, key.secret)) == (403, "permission_denied")
    key = site.key(models=["another-model"])
    assert refusal(site.chat(key.secret)) == (403, "permission_denied")
    changed = site.done("PATCH", f"{KEYS}/{key.id}", site.owner.access, json={"models": ["gpt-4"]})
    assert changed["models"] == ["gpt-4"]
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.chat(key.secret, gateway=gateway).status_code == 200, "the change is known")
    # A key that may do less must not make one that may do more.
    assert refusal(site.send("POST", KEYS, key.secret, json={"name": "wider"})) == (403, "permission_denied")


def test_a_key_expires(site: Site) -> None:
    key = site.key(expires_at=int(time.time()) + 2)
    assert [site.chat(key.secret, gateway=gateway).status_code for gateway in (0, 1)] == [200, 200]
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.chat(key.secret, gateway=gateway).status_code == 401, "it has expired")
        assert refusal(site.chat(key.secret, gateway=gateway)) == (401, "invalid_api_key")
    past = site.send("POST", KEYS, site.owner.access, json={"name": "late", "expires_at": 1})
    assert refusal(past) == (400, "invalid_request")


def test_rotation_with_an_overlap(site: Site) -> None:
    old = site.key(models=["gpt-4"], limits={"requests_per_minute": 1000})
    began = time.time()
    made = site.send("POST", f"{KEYS}/{old.id}/rotate", site.owner.access, json={"overlap_s": 2})
    assert made.status_code == 201
    new, row = made.json()["secret"], made.json()["key"]
    assert row["models"] == ["gpt-4"]
    assert [site.chat(secret, gateway=g).status_code for secret in (old.secret, new) for g in (0, 1)] == [200] * 4
    assert site.chat(new).headers["x-ratelimit-limit-requests"] == "1000"
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.chat(old.secret, gateway=gateway).status_code == 401, "the old one ends")
        assert site.chat(new, gateway=gateway).status_code == 200
    assert 1.5 < time.time() - began < 4.5
    again = site.send("POST", f"{KEYS}/{old.id}/rotate", site.owner.access)
    assert refusal(again) == (409, "conflict")


def test_the_development_key_is_one_of_the_development_profile_alone(site: Site) -> None:
    """A production gateway does not ask for it, and a production auth-service does not know its row."""
    platform = site.platform
    environ = {**platform.environ, "HELIX_PROFILE": "production", "HELIX_GATEWAY_POOLS": platform.pool.address}
    auth = Process(("auth",), environ, platform.place / "production-auth.log").start()
    try:
        environ |= {"HELIX_GATEWAY_AUTH": auth.address, "HELIX_LEDGER_SPOOL": str(platform.place / "production-spool")}
        development = {**environ, "HELIX_PROFILE": "development"}
        real = site.key()
        for name, values in (("production", environ), ("development", development)):
            gateway = Process(("gateway",), values, platform.place / f"{name}-gateway.log").start()
            try:
                with platform.client("demo-key", gateway) as client:
                    until(lambda client=client: client.get("/ready").status_code == 200, "it is ready")
                    body = {"model": "helixflow-demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
                    assert refusal(client.post(CHAT, json=body)) == (401, "invalid_api_key"), name
                    bearer = {"authorization": f"Bearer {real.secret}"}
                    assert client.post(CHAT, json=body, headers=bearer).status_code == 200
            finally:
                gateway.stop()
    finally:
        auth.stop()
    assert site.chat("demo-key").status_code == 200


def test_what_a_key_makes_is_no_more_and_ends_with_it(site: Site) -> None:
    """The attack: a key that expires made one that does not, an admin's key reset its owner, and both lived on."""
    admin = site.person("admin")
    ends = int(time.time()) + HOUR_S
    plain = site.key(admin, models=["gpt-4"], limits={"requests_per_minute": 1000})
    for method, path, body in (
        ("POST", KEYS, {"name": "wider"}),
        ("PATCH", f"{KEYS}/{plain.id}", {"expires_at": 0}),
        ("PUT", f"/admin/v1/limits/key:{plain.id}", {}),
        ("POST", USERS, {"email": "x@example.com", "role": "admin"}),
        ("POST", f"{USERS}/{site.owner.id}/password", None),
        ("GET", USERS, None),
        ("GET", AUDIT, None),
    ):
        assert refusal(site.send(method, path, plain.secret, json=body)) == (403, "permission_denied"), path
    assert [row["id"] for row in site.done("GET", KEYS, plain.secret)["data"]] == [plain.id]

    parent = site.key(admin, admin=True, expires_at=ends)
    assert site.send("GET", "/admin/v1/status", parent.secret).status_code == 200
    made = site.done("POST", KEYS, parent.secret, json={"name": "child", "user": site.person("member").id})
    child = made["secret"]
    assert (made["key"]["expires_at"], made["key"]["parent_id"], made["key"]["role"]) == (ends, parent.id, "")
    assert [site.chat(child, gateway=gateway).status_code for gateway in (0, 1)] == [200, 200]
    for more in ({"admin": True}, {"expires_at": ends + 1}):
        assert refusal(site.send("POST", KEYS, parent.secret, json={"name": "more", **more})) == (
            403,
            "permission_denied",
        )
    assert refusal(site.send("POST", f"{USERS}/{site.owner.id}/password", parent.secret))[0] == 403
    # A limit of the parent is one of the child too, at every gateway.
    site.done("PUT", f"/admin/v1/limits/key:{parent.id}", site.owner.access, json={"requests_per_minute": 0})
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.chat(child, gateway=gateway).status_code == 429, "the parent's limit holds")
    assert refusal(site.send("GET", USERS, parent.secret)) == (403, "permission_denied"), "and it administers no more"
    lifted = site.send("PUT", f"/admin/v1/limits/key:{parent.id}", admin.access, json={})
    assert refusal(lifted) == (403, "permission_denied"), "an owner has set it"
    site.done("PUT", f"/admin/v1/limits/key:{parent.id}", site.owner.access, json={})
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.chat(child, gateway=gateway).status_code == 200, "it is lifted")
    site.done("DELETE", f"{KEYS}/{parent.id}", admin.access)
    for gateway in (0, 1):
        until(lambda gateway=gateway: site.chat(child, gateway=gateway).status_code == 401, "the child has ended")
    assert refusal(site.send("PUT", "/admin/v1/prices/m", site.owner.access, json={})) == (400, "invalid_request")


def test_admins_do_not_reach_their_peers(site: Site) -> None:
    admin, peer = site.person("admin"), site.new_person("admin")
    for who in (peer, site.owner):
        for method, path, body in (
            ("POST", f"{USERS}/{who.id}/password", None),
            ("PATCH", f"{USERS}/{who.id}", {"disabled": True}),
            ("PATCH", f"{USERS}/{who.id}", {"role": "member"}),
            ("DELETE", f"{USERS}/{who.id}", None),
            ("POST", KEYS, {"name": "theirs", "user": who.id}),
        ):
            assert refusal(site.send(method, path, admin.access, json=body)) == (403, "permission_denied"), path
    site.done("PUT", f"/admin/v1/limits/user:{admin.id}", site.owner.access, json={"tokens_per_day": 10**9})
    answer = site.send("PUT", f"/admin/v1/limits/user:{admin.id}", admin.access, json={})
    assert refusal(answer) == (403, "permission_denied")
    site.done("PUT", f"/admin/v1/limits/user:{admin.id}", site.owner.access, json={})


# --- tokens ------------------------------------------------------------------------


def test_an_outsider_checks_a_token_with_the_published_keys(site: Site) -> None:
    answer = site.send("GET", JWKS)
    assert answer.status_code == 200
    assert "public" in answer.headers["cache-control"]
    assert all(not {"d", "p", "q"} & set(key) for key in answer.json()["keys"])
    keys = KeySet.import_key_set(answer.json())
    access, _ = tokens_of(site.login(site.owner))
    token = jwt.decode(access, keys, algorithms=["RS256"])
    wanted = {
        "iss": {"essential": True, "value": "https://helixflow.local"},
        "aud": {"essential": True, "value": "helixflow"},
        "sub": {"essential": True, "value": site.owner.id},
        "exp": {"essential": True},
    }
    jwt.JWTClaimsRegistry(**wanted).validate(token.claims)  # type: ignore[arg-type]
    assert token.header["alg"] == "RS256"
    assert token.header["kid"] in {key.thumbprint() for key in keys.keys}
    assert token.claims["exp"] - token.claims["iat"] == 900


def test_a_new_signing_key_logs_nobody_out(site: Site) -> None:
    def kid(token: str) -> str:
        return str(jwt.decode(token, keys(), algorithms=["RS256"]).header["kid"])

    def keys() -> KeySet:
        return KeySet.import_key_set(site.send("GET", JWKS).json())

    person = site.new_person()
    before = kid(person.access)
    site.platform.run("pki", "rotate-tokens", "--dir", str(site.platform.certs))

    def renewed() -> bool:
        _, person.refresh = pair = tokens_of(site.send("POST", REFRESH, json={"refresh_token": person.refresh}))
        fresh.append(pair[0])
        return jwt_kid(pair[0]) != before

    fresh: list[str] = []
    until(renewed, "tokens are signed with the new key")
    until(lambda: len(keys().keys) == 2, "both keys are published")
    assert kid(person.access) == before
    assert kid(fresh[-1]) != before
    for gateway in (0, 1):
        for token in (person.access, fresh[-1], site.owner.access):
            assert site.send("GET", KEYS, token, gateway=gateway).status_code == 200


def jwt_kid(token: str) -> str:
    """The key id in the header of a token, unchecked."""
    from joserfc import jws

    return str(jws.extract_compact(token.encode()).headers()["kid"])


# --- the audit log ------------------------------------------------------------------


def test_every_act_is_in_the_audit_log(site: Site) -> None:
    owner = site.owner.access
    count = 0

    def act(method: str, path: str, body: Any = None) -> Any:
        nonlocal count
        count += 1
        return site.done(method, path, owner, json=body, headers={"x-request-id": f"act-{count}"})

    user = act("POST", USERS, {"email": "watched@example.com", "role": "member"})["user"]["id"]
    act("PATCH", f"{USERS}/{user}", {"role": "viewer"})
    act("POST", f"{USERS}/{user}/password")
    key = act("POST", KEYS, {"name": "watched", "user": user})["key"]["id"]
    act("PATCH", f"{KEYS}/{key}", {"name": "seen"})
    act("PUT", f"/admin/v1/limits/key:{key}", {"requests_per_minute": 5})
    new = act("POST", f"{KEYS}/{key}/rotate")["key"]["id"]
    act("DELETE", f"{KEYS}/{new}")
    act("DELETE", f"{USERS}/{user}")
    act("PUT", "/admin/v1/prices/audited", {"prompt": 1, "cached": 1, "completion": 2})
    act("DELETE", "/admin/v1/prices/audited")
    home = next(row for row in site.done("GET", ORGANISATIONS, owner)["data"] if row["name"] == "default")["id"]
    act("PATCH", f"{ORGANISATIONS}/{home}", {"content": {"store": False, "retention_days": 3}})
    act("PATCH", f"{ORGANISATIONS}/{home}", {"content": {"store": False, "retention_days": 0}})

    rows = {row["request_id"]: row for row in site.audit() if row["request_id"].startswith("act-")}
    expected = [
        *("user.create", "user.update", "user.reset_password", "key.create", "key.update", "limits.set", "key.rotate"),
        *("key.revoke", "user.delete", "price.set", "price.delete", "organisation.update", "organisation.update"),
    ]
    assert [rows[f"act-{number}"]["action"] for number in range(1, count + 1)] == expected
    for row in rows.values():
        assert (row["actor"], row["address"], row["organisation_id"]) == (OWNER, "127.0.0.1", home)
        assert abs(row["at"] - time.time()) < 60
    assert rows["act-2"]["target"] == "watched@example.com"
    assert '"from":"member"' in rows["act-2"]["detail"].replace(" ", "")
    by_key = site.key(admin=True)
    site.done("POST", KEYS, by_key.secret, json={"name": "made by a key"})
    newest = site.audit()[0]
    assert newest["action"] == "key.create"
    assert newest["actor"].startswith(f"{OWNER} (key ")
    assert (newest["actor_user_id"], newest["actor_key_id"]) == (site.owner.id, by_key.id)
    # What must not be there, and what must not change.
    everything = site.value("SELECT string_agg(a::text, ' ') FROM audit_log a")
    assert by_key.secret not in everything
    assert site.owner.password not in everything
    assert refusal(site.send("GET", AUDIT, site.person("member").access)) == (403, "permission_denied")


# --- texts --------------------------------------------------------------------------


def test_texts_are_kept_only_where_somebody_wants_it(site: Site) -> None:
    key = site.key(site.stranger)
    other = next(row for row in site.done("GET", ORGANISATIONS, site.owner.access)["data"] if row["name"] == "other")

    def kept() -> Any:
        return site.value("SELECT count(*) FROM contents")

    def ask(text: str, **fields: Any) -> str:
        messages = [{"role": "user", "content": text}]
        answer = site.chat(key.secret, messages=messages, **fields)
        assert answer.status_code == 200
        request_id = answer.headers["x-request-id"]
        query = "SELECT count(*) FROM requests WHERE request_id = $1"
        until(lambda: site.value(query, request_id) == 1, "the row is in the ledger")
        return request_id

    def policy(**fields: Any) -> None:
        body = {"content": fields}
        site.done("PATCH", f"{ORGANISATIONS}/{other['id']}", site.owner.access, json=body)

    ask("my card is 4111111111111111")
    assert kept() == 0
    policy(store=True, retention_days=30, redact=["[0-9]{16}"])
    # The change has reached the gateway once a request is kept.
    until(lambda: bool(ask("my card is 4111111111111111")) and kept() > 0, "texts are kept")
    rows = site.value("SELECT string_agg(c::text, E'\\n') FROM contents c")
    assert "4111111111111111" not in rows
    assert "my card is " in rows
    days = site.value("SELECT extract(day FROM min(expires_at - at))::int FROM contents")
    assert days == 30
    assert site.value("SELECT count(*) FROM contents WHERE organisation_id <> $1", other["id"]) == 0
    assert site.chat(site.key().secret).status_code == 200
    before = kept()
    ask("streamed", stream=True)
    assert kept() == before + 1
    assert site.value("SELECT answer <> '' FROM contents ORDER BY at DESC LIMIT 1") is True
    request = str(site.value("SELECT id FROM contents ORDER BY at DESC LIMIT 1"))
    theirs = site.send("GET", f"/admin/v1/requests/{request}/texts", site.owner.access)
    assert theirs.status_code == 404, "it is another organisation's"
    text = site.platform.json("usage", "texts", request)
    assert "streamed" in text["prompt"]
    assert text["answer"]
    assert site.value("SELECT count(*) FROM audit_log WHERE action = 'texts.read' AND target = $1", request) == 1
    policy(store=False, retention_days=0)
    ask("no more")
    time_is_over = kept()
    ask("really no more")
    assert kept() == time_is_over
