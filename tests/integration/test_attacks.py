"""What attackers try: forged tokens, other organisations' ids, hostile text, paths and headers that lie, timing."""

import base64
import contextlib
import hashlib
import hmac
import json
import math
import random
import re
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives import serialization
from joserfc import jwt
from joserfc.jwk import RSAKey

from helixflow.auth.keys import make
from helixflow.auth.roles import METHODS as ROLES
from helixflow.config import load
from helixflow.gateway.admin import ENDPOINTS, Endpoint
from helixflow.gateway.auth import Principal
from helixflow.gateway.credentials import Credentials
from helixflow.pki.layout import Layout
from helixflow.rpc import messages

from .people import CHAT, KEYS, LOGIN, LOGOUT, ORGANISATIONS, REFRESH, USERS, Site, refusal
from .stack import context, until

PARAMETER = re.compile(r"\{([a-z]+)\}")

# --- access tokens --------------------------------------------------------------------


def encoded(value: Any) -> str:
    """A part of a token."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forged(site: Site) -> dict[str, str]:
    """Tokens like the owner's that are none."""
    header, payload, signature = site.owner.access.split(".")
    head, claims = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in (header, payload))
    private = Layout(site.platform.certs).jwt_private.read_bytes()
    ours, theirs = RSAKey.import_key(private), RSAKey.generate_key(2048)
    public_key = serialization.load_pem_private_key(private, None).public_key()
    pem = public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    now = int(time.time())

    def signed(key: RSAKey, head: dict[str, Any] = head, **changes: Any) -> str:
        return jwt.encode(head, {**claims, **changes}, key, algorithms=["RS256", "PS256"])

    def by_secret(secret: bytes, algorithm: str = "HS256") -> str:
        text = f"{encoded({**head, 'alg': algorithm})}.{payload}"
        return f"{text}.{encoded(hmac.digest(secret, text.encode(), hashlib.sha256))}"

    boss = site.stranger.id
    return {
        "alg none": f"{encoded({**head, 'alg': 'none'})}.{payload}.",
        "alg None": f"{encoded({**head, 'alg': 'None'})}.{payload}.{signature}",
        "no signature": f"{header}.{payload}.",
        "the public key as a secret": by_secret(pem),
        "the public key as a secret, trimmed": by_secret(pem.strip()),
        "another key": signed(theirs),
        "another key in the token": signed(theirs, {**head, "jwk": theirs.as_dict(private=False)}),
        "another key at a URL": signed(theirs, {**head, "jku": "https://evil.example/jwks.json"}),
        "an unknown key id": signed(ours, {**head, "kid": "A" * 43}),
        "a key id that is a path": signed(ours, {**head, "kid": "../../../../dev/null"}),
        "a key id that is SQL": signed(ours, {**head, "kid": "x' UNION SELECT jwk FROM signing_keys --"}),
        "PS256": signed(ours, {**head, "alg": "PS256"}),
        "another issuer": signed(ours, iss="https://evil.example"),
        "another audience": signed(ours, aud="another"),
        "no audience": signed(ours, aud=""),
        "expired": signed(ours, iat=now - 2000, exp=now - 1),
        "from the future": signed(ours, iat=now + 3600, exp=now + 7200),
        "for ever": signed(ours, exp="never"),
        "another user": signed(ours, sub=boss),
        "no session": signed(ours, sid=str(uuid.uuid4())),
        "another payload": f"{header}.{encoded({**claims, 'sub': boss})}.{signature}",
        "a changed signature": f"{header}.{payload}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}",
        "a part more": f"{site.owner.access}.x",
        "critical": f"{encoded({**head, 'crit': ['x']})}.{payload}.{signature}",
    }


def test_forged_tokens(site: Site) -> None:
    assert site.send("GET", KEYS, site.owner.access).status_code == 200
    for what, token in forged(site).items():
        for method, path in (("GET", KEYS), ("POST", CHAT)):
            code = "invalid_token" if token.count(".") == 2 else "invalid_api_key"
            assert refusal(site.send(method, path, token)) == (401, code), what
    # A refresh token and a session id are no bearers either.
    for token in (site.owner.refresh, str(uuid.uuid4())):
        assert refusal(site.send("GET", KEYS, token)) == (401, "invalid_api_key")
    assert site.send("GET", KEYS, site.owner.access).status_code == 200


# --- roles and organisations -----------------------------------------------------------

LEAST = {
    "viewer": "ListOrganisations ListKeys ListLimits ListPrices QueryUsage ListSessions EndSession EndSessions",
    "member": "CreateKey UpdateKey RotateKey RevokeKey",
    "admin": "ListUsers CreateUser UpdateUser ResetPassword ResetFactor UnlockUser DeleteUser SetLimits ListRequests "
    "GetTexts ListAudit",
    "owner": "RequireFactor",
    "installation": "CreateOrganisation UpdateOrganisation SetPrice DeletePrice VerifyLedger AnchorLedger",
}
"""The least role that may call what; `installation`: owners of the first organisation alone."""
RANKS = list(LEAST)
NOBODY = str(uuid.UUID(int=0))


def visit(site: Site, endpoint: Endpoint, token: str, **values: str) -> Any:
    """Calls an endpoint about something that does not exist, or about `values`."""
    subject = {"subject": f"key:{NOBODY}", "id": "no-such-model", **values}
    path = re.sub(PARAMETER, lambda match: subject.get(match[1], NOBODY), endpoint.path)
    return site.send(endpoint.method, path, token, json=None if endpoint.method == "GET" else {})


def test_the_table_of_roles_is_this_one() -> None:
    assert sorted(" ".join(LEAST.values()).split()) == sorted(ROLES)
    assert {endpoint.call for endpoint in ENDPOINTS} == set(ROLES)


@pytest.mark.parametrize("role", ["viewer", "member", "admin", "stranger"])
def test_everybody_may_do_what_their_role_may(site: Site, role: str) -> None:
    person = site.stranger if role == "stranger" else site.person(role)
    own = RANKS.index("owner" if role == "stranger" else role)
    for endpoint in ENDPOINTS:
        least = next(rank for rank, (_, calls) in enumerate(LEAST.items()) if endpoint.call in calls.split())
        answer = visit(site, endpoint, person.access)
        if own < least:
            assert refusal(answer) == (403, "permission_denied"), (role, endpoint)
        else:
            assert answer.status_code in (200, 400, 404), (role, endpoint, answer.text)


def state(site: Site) -> list[Any]:
    """Users, keys and limits as the database has them, without when they were used."""
    return [
        site.value("SELECT array_agg(to_jsonb(u) - 'last_login_at' ORDER BY u.id) FROM users u"),
        site.value("SELECT array_agg(to_jsonb(k) - 'last_used_at' ORDER BY k.id) FROM api_keys k"),
        site.value("SELECT array_agg(to_jsonb(l) ORDER BY l.subject) FROM limits l"),
        site.value("SELECT array_agg(to_jsonb(o) ORDER BY o.id) FROM organisations o"),
    ]


def test_ids_of_another_organisation(site: Site) -> None:
    """Every way to name something, by an owner of another organisation."""
    home, person = site.ids("organisation"), site.person("member")
    key = site.key(person)
    values = {"organisation": home, "user": person.id, "key": key.id}
    by_name = {**values, "organisation": "default", "user": person.email}
    before = state(site)
    token = site.stranger.access
    for endpoint in ENDPOINTS:
        if "{" not in endpoint.path:
            continue
        for named in (values, by_name):
            for kind in ("key", "user", "organisation"):
                subject = f"{kind}:{values[kind]}"
                answer = visit(site, endpoint, token, **named, subject=subject)
                assert refusal(answer)[0] in (403, 404), (endpoint, named)
    lists = {endpoint.path: endpoint for endpoint in ENDPOINTS if "organisation" in endpoint.query}
    for path in set(lists) - {"/admin/v1/prices"}:
        for name in ("default", home):
            assert refusal(site.send("GET", f"{path}?organisation={name}", token)) == (404, "not_found"), path
        answer = site.send("GET", path, token)
        assert answer.status_code == 200
        assert not [word for word in (home, person.id, person.email, key.id) if word in answer.text], path
    for query in (f"key={key.id}", f"user={person.id}"):
        assert site.done("GET", f"/admin/v1/usage?{query}", token)["data"] == []
    assert refusal(site.send("GET", f"/admin/v1/usage?user={person.email}", token)) == (404, "not_found")
    for path, body in (
        (KEYS, {"name": "theirs", "user": person.email}),
        (KEYS, {"name": "theirs", "user": person.id}),
        (USERS, {"email": "spy@example.com", "role": "viewer", "organisation": "default"}),
        (USERS, {"email": "spy@example.com", "role": "viewer", "organisation": home}),
    ):
        assert refusal(site.send("POST", path, token, json=body)) == (404, "not_found"), body
    assert state(site) == before
    assert site.chat(key.secret).status_code == 200


def test_the_name_of_the_first_organisation_gives_nothing(site: Site) -> None:
    """It may be renamed, and another may take its name: the installation stays with the first one."""
    first, status = site.ids("organisation"), "/admin/v1/status"
    other = site.done("GET", ORGANISATIONS, site.stranger.access)["data"][0]["id"]

    def rename(organisation: str, name: str) -> None:
        site.done("PATCH", f"{ORGANISATIONS}/{organisation}", site.owner.access, json={"name": name})

    try:
        rename(first, "renamed")
        rename(other, "default")
        for gateway in (0, 1):
            assert site.send("GET", status, site.owner.access, gateway=gateway).status_code == 200
            assert refusal(site.send("GET", status, site.stranger.access, gateway=gateway)) == (
                403,
                "permission_denied",
            )
        answer = site.send("POST", ORGANISATIONS, site.stranger.access, json={"name": "third"})
        assert refusal(answer) == (403, "permission_denied")
    finally:
        rename(other, "other")
        rename(first, "default")


def test_nobody_says_who_they_are_in_the_body(site: Site) -> None:
    actor = {"principal_user_id": site.owner.id, "role": "owner"}
    answer = site.send(
        "POST", USERS, site.person("admin").access, json={"email": "a@b.c", "role": "viewer", "actor": actor}
    )
    assert refusal(answer) == (400, "invalid_request")


# --- hostile text ------------------------------------------------------------------------

HOSTILE = [
    "' OR '1'='1' --",
    "'; DROP TABLE helixflow.users; --@x",
    "$1::text || (SELECT string_agg(digest::text, ',') FROM helixflow.api_keys)",
    "%27%20OR%201=1;\\x27\\",
    "{0}%s%(x)s${jndi:ldap://x}",
]
CLEAN = {"invalid_request", "not_found", "conflict", "invalid_token", "invalid_credentials"}
VALID: dict[str, dict[str, Any]] = {
    "CreateOrganisation": {"name": "@"},
    "UpdateOrganisation": {"content": {"store": False, "redact": []}},
    "CreateUser": {"email": "someone@example.com", "role": "viewer"},
    "CreateKey": {"name": "one"},
    "UpdateKey": {"name": "one"},
}
"""What a body must have beside the hostile field."""


def strings(descriptor: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all text fields of a message, the actor's left out: no client can set those."""
    for field in descriptor.fields:
        if field.message_type is not None and field.name != "actor":
            yield from strings(field.message_type, (*prefix, field.name))
        elif field.type == field.TYPE_STRING:
            yield (*prefix, field.name)


def with_text(endpoint: Endpoint, body: dict[str, Any], path: tuple[str, ...], text: str) -> dict[str, Any]:
    """The body with one field set to the text, as HTTP has it."""
    made: dict[str, Any] = json.loads(json.dumps(body))
    inner = made
    names = [name for name in path if name not in ("values", endpoint.inner)]
    for name in names[:-1]:
        inner = inner.setdefault(name, {})
    several = names[-1] in ("models", "endpoints", "redact", "group_by", "domains")
    inner[names[-1]] = [text] if several else text
    return made


def tables(site: Site) -> Any:
    """Everything that must be there afterwards."""
    return site.value(
        "SELECT array_agg(c.relname || ':' || c.relkind::text ORDER BY c.relname) FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'helixflow'"
    )


def clean(answer: Any, text: str, where: Any) -> None:
    """An answer is a success that has the text as it was sent, or a refusal of ours; never an accident."""
    assert answer.status_code < 500, (where, answer.text)
    if not answer.is_success:
        assert refusal(answer)[1] in CLEAN, where
    for word in ("syntax", "asyncpg", "relation", "Traceback", "PostgreSQL", "argon2", "SELECT u."):
        assert word not in answer.text.replace(json.dumps(text)[1:-1], ""), (where, answer.text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_every_field(site: Site, text: str) -> None:
    before = tables(site)
    users = site.value("SELECT count(*) FROM users")
    scratch = site.done("POST", ORGANISATIONS, site.owner.access, json={"name": f"scratch {uuid.uuid4().hex}"})["id"]
    made = 0

    def target(name: re.Match[str]) -> str:
        return scratch if name[1] == "organisation" else site.ids(name[1])

    for endpoint in ENDPOINTS:
        kind = getattr(messages, endpoint.message).DESCRIPTOR
        inside = set(re.findall(PARAMETER, endpoint.path))
        for path in strings(kind):
            if endpoint.method == "GET" or path[-1] in inside or (path == ("price", "model")):
                continue
            body = with_text(endpoint, VALID.get(endpoint.call, {}), path, text)
            answer = site.send(endpoint.method, re.sub(PARAMETER, target, endpoint.path), site.owner.access, json=body)
            clean(answer, text, (endpoint, path))
            if answer.is_success:
                assert text in json.dumps(answer.json(), ensure_ascii=False).replace("\\\\", "\\"), (endpoint, path)
                made += endpoint.call == "CreateUser"
        for name in endpoint.query:
            answer = site.send("GET", endpoint.path, site.owner.access, params={name: text})
            clean(answer, text, (endpoint, name))
        for name in inside:
            where = endpoint.path.replace(f"{{{name}}}", quote(text, safe=""))
            empty: dict[str, Any] | None = {} if endpoint.method in ("POST", "PUT", "PATCH") else None
            clean(site.send(endpoint.method, where, site.owner.access, json=empty), text, (endpoint, name))
    assert tables(site) == before
    assert site.value("SELECT count(*) FROM users") == users + made
    assert site.login(site.owner).status_code == 200


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_at_the_door(site: Site, text: str) -> None:
    before = tables(site)
    for name in ("email", "password", "new_password"):
        body = {"email": f"{uuid.uuid4()}@example.com", "password": "x", name: text}
        clean(site.send("POST", LOGIN, json=body), text, name)
    clean(site.send("POST", REFRESH, json={"refresh_token": text}), text, "refresh_token")
    clean(site.send("POST", LOGOUT, json={"access_token": f"{text}.a.b"}), text, "access_token")
    for token in (text, f"{text}.{text}.{text}", f"hf-{text}"):
        assert refusal(site.send("GET", KEYS, token))[0] == 401
    answer = site.chat(site.key().secret, model=text, user=text, messages=[{"role": "user", "content": text}])
    assert refusal(answer) == (404, "model_not_found")
    query = "SELECT model FROM requests WHERE request_id = $1"
    until(lambda: site.value(query, answer.headers["x-request-id"]) == text, "the ledger has it as it was sent")
    assert tables(site) == before


# --- paths and headers that lie -------------------------------------------------------------


def raw(site: Site, request: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to bytes that no client library would send."""
    port = int(site.platform.gateways[0].address.rpartition(":")[2])
    plain = socket.create_connection(("127.0.0.1", port), timeout=10)
    with contextlib.closing(context(site.platform.certs).wrap_socket(plain, server_hostname="localhost")) as secure:
        secure.sendall(request)
        answer = b"".join(iter(lambda: secure.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    found = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    return int(found[1]) if found else 0, body


TARGETS = [
    "//admin/v1/users",
    "/admin//v1/users",
    "/%61dmin/v1/users",
    "/admin%2fv1%2fusers",
    "/./admin/v1/users",
    "/v1/../admin/v1/users",
    "/health/../admin/v1/users",
    "/health/%2e%2e/admin/v1/users",
    "/health;/../admin/v1/users",
    "/admin/v1/users/",
    "/admin/v1/users;a=b",
    "/ADMIN/V1/USERS",
    "/admin/v1/users%00",
    "/admin/v1/users%20",
    "/admin/v1/users#x",
    "/health?/../admin/v1/users",
    "/.well-known/jwks.json/../../admin/v1/users",
    "https://localhost/admin/v1/users",
    "http://evil.example/admin/v1/users",
]


@pytest.mark.parametrize("target", TARGETS)
def test_paths_that_lie(site: Site, target: str) -> None:
    """Without a credential nothing of administration is shown, however it is written."""
    for method in ("GET", "POST"):
        request = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        status, body = raw(site, request.encode())
        assert b"example.com" not in body
        assert b'"data"' not in body
        assert status in (400, 401, 404, 405) or (b'"healthy"' in body and target.startswith("/health?")), (
            status,
            body,
        )


@pytest.mark.parametrize(
    "request_line", ["CONNECT localhost:443", "TRACE /admin/v1/users", "GETT /admin/v1/users", "get /health"]
)
def test_methods_that_are_none(site: Site, request_line: str) -> None:
    status, body = raw(site, f"{request_line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert status in (400, 404, 405), body


LIES: list[dict[str, str]] = [
    {"x-original-url": "/admin/v1/users"},
    {"x-rewrite-url": "/admin/v1/users"},
    {"x-forwarded-for": "127.0.0.1", "x-forwarded-host": "localhost", "x-forwarded-proto": "https"},
    {"forwarded": "for=127.0.0.1"},
    {"x-real-ip": "127.0.0.1"},
    {"x-forwarded-user": "owner@localhost", "x-remote-user": "owner@localhost", "remote-user": "owner@localhost"},
    {"x-client-cert": "CN=api-gateway", "x-ssl-client-s-dn": "CN=auth-service"},
    {"x-helixflow-service": "auth-service", "x-helixflow-role": "owner"},
    {"x-http-method-override": "GET", "x-method-override": "GET", "x-http-method": "GET"},
    {"cookie": "access_token=demo-key; session=owner"},
    {"proxy-authorization": "Bearer demo-key"},
]


@pytest.mark.parametrize("headers", LIES, ids=lambda headers: next(iter(headers)))
def test_headers_that_lie(site: Site, headers: dict[str, str]) -> None:
    for method, path in (("GET", USERS), ("POST", USERS), ("DELETE", f"{USERS}/{site.owner.id}")):
        assert refusal(site.send(method, path, headers=headers)) == (401, "invalid_api_key")
    answer = site.send("GET", "/health", headers=headers)
    assert answer.json()["status"] == "healthy"
    # With a credential it says who calls and from where; the headers say nothing.
    viewer = site.person("viewer").access
    assert refusal(site.send("GET", USERS, viewer, headers=headers)) == (403, "permission_denied")
    assert refusal(site.send("DELETE", KEYS, viewer, headers=headers)) == (405, "method_not_allowed")


def test_the_audit_log_has_the_address_of_the_connection(site: Site) -> None:
    headers = {"x-forwarded-for": "203.0.113.9", "x-real-ip": "203.0.113.9", "x-request-id": "where-from"}
    site.done("POST", KEYS, site.owner.access, json={"name": "from here"}, headers=headers)
    row = next(row for row in site.audit() if row["request_id"] == "where-from")
    assert row["address"] == "127.0.0.1"


def test_two_authorization_headers(site: Site) -> None:
    request = (
        f"GET {USERS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {site.owner.access}\r\n"
        "Authorization: Bearer nothing\r\nConnection: close\r\n\r\n"
    )
    status, _ = raw(site, request.encode())
    assert status in (400, 401), "the last one counts, or neither"


# --- timing ---------------------------------------------------------------------------------


DIGITS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def apart(known: Callable[[bytes], object], key: bytes) -> float:
    """How far the times for guesses with the key's beginning and for any others lie apart, in standard errors.

    Guesses are new in each round: where a single one falls in a table of hashes is luck. Rounds come in random order.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    source = random.Random()
    for _ in range(500):
        others = [b"hf-" + bytes(source.choices(DIGITS, k=49)) for _ in range(60)]
        alike = [key[:-4] + other[-4:] for other in others]
        which = source.random() < 0.5
        guesses = alike if which else [other[:-4] + other[-4:] for other in others]
        began = time.perf_counter()
        for guess in guesses:
            known(guess)
        times[which].append(time.perf_counter() - began)
    # The slowest rounds were interrupted by something else.
    kept = [sorted(values)[: int(len(values) * 0.8)] for values in times.values()]
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in kept))
    return abs(statistics.mean(kept[0]) - statistics.mean(kept[1])) / error


def test_timing_tells_nothing_about_a_key() -> None:
    key = make().encode()
    store = Credentials(None, load(None, {}), "gateway")  # type: ignore[arg-type]
    store._remember(hashlib.sha256(key).digest(), Principal(name="somebody", key_id=NOBODY))
    assert store.known(key) is not None

    def careless(guess: bytes) -> bool:
        return all(a == b for a, b in zip(guess, key, strict=True))

    assert apart(careless, key) > 30, "the measure finds a comparison that ends at the first difference"
    # Noise makes a few standard errors, and not each time; a real difference is there in every measure.
    assert min(apart(store.known, key) for _ in range(4)) < 3
