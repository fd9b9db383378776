"""People, keys and tokens on a running platform, as the tests of accounts need them."""

import asyncio
import contextlib
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from helixflow.db.embedded import Embedded
from helixflow.db.target import connect

from .accounts import Platform

T = TypeVar("T")
OWNER = "owner@localhost"
MODEL = "gpt-4"
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
CHAT = "/v1/chat/completions"
LOGIN, REFRESH, LOGOUT = "/auth/v1/login", "/auth/v1/refresh", "/auth/v1/logout"
USERS, KEYS, AUDIT = "/admin/v1/users", "/admin/v1/keys", "/admin/v1/audit"
ORGANISATIONS = "/admin/v1/organisations"


@dataclass
class Key:
    """An API key: its id and the key itself."""

    id: str
    secret: str


@dataclass
class Person:
    """A user with a session."""

    id: str
    email: str
    password: str
    access: str
    refresh: str


@dataclass
class Site:
    """A platform with an owner who has logged in, and another organisation whose owner has."""

    platform: Platform
    gateways: list[httpx.Client]
    first_login: list[httpx.Response] = field(default_factory=list)
    """What the owner's first two logins answered: with the one-time password, and with a new one."""
    first_password: str = ""
    people: dict[tuple[str, str], Person] = field(default_factory=dict)
    things: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        """Gives the connections back."""
        for client in self.gateways:
            client.close()

    def send(self, method: str, path: str, token: str = "", *, gateway: int = 0, **options: Any) -> httpx.Response:
        """One request with a key or an access token."""
        headers = {**({"authorization": f"Bearer {token}"} if token else {}), **options.pop("headers", {})}
        return self.gateways[gateway].request(method, path, headers=headers, **options)

    def done(self, method: str, path: str, token: str, **options: Any) -> Any:
        """The answer of a request that must succeed."""
        answer = self.send(method, path, token, **options)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def chat(self, token: str, *, gateway: int = 0, **fields: Any) -> httpx.Response:
        """A short chat."""
        return self.send("POST", CHAT, token, gateway=gateway, json={**HELLO, **fields})

    @property
    def owner(self) -> Person:
        """The owner of the first organisation."""
        return self.people["owner", "default"]

    @property
    def stranger(self) -> Person:
        """The owner of the organisation `other`."""
        return self.people["owner", "other"]

    def person(self, role: str, organisation: str = "default") -> Person:
        """A user who is there for all tests: nobody may change them."""
        if (role, organisation) not in self.people:
            self.people[role, organisation] = self.new_person(role, organisation)
        return self.people[role, organisation]

    def new_person(self, role: str = "member", organisation: str = "default") -> Person:
        """A new user of one of the two organisations, logged in."""
        maker = self.people["owner", organisation]
        domain = {"other": "other.example"}.get(organisation, "example.com")
        body = {"email": f"{role}-{secrets.token_hex(4)}@{domain}", "role": role}
        made = self.done("POST", USERS, maker.access, json=body)
        return self.enter(made["user"], made["one_time_password"])

    def enter(self, user: dict[str, Any], password: str) -> Person:
        """The first login of a user."""
        chosen = f"a good one {secrets.token_hex(6)}"
        body = {"email": user["email"], "password": password, "new_password": chosen}
        tokens = self.done("POST", LOGIN, "", json=body)
        return Person(user["id"], user["email"], chosen, tokens["access_token"], tokens["refresh_token"])

    def login(self, person: Person, gateway: int = 0) -> httpx.Response:
        """One more session."""
        body = {"email": person.email, "password": person.password}
        return self.send("POST", LOGIN, json=body, gateway=gateway)

    def key(self, maker: Person | None = None, **fields: Any) -> Key:
        """A new key; by default of the first owner."""
        token = (maker or self.owner).access
        made = self.done("POST", KEYS, token, json={"name": f"key {secrets.token_hex(4)}", **fields})
        return Key(made["key"]["id"], made["secret"])

    def audit(self, token: str = "") -> list[dict[str, Any]]:
        """The newest rows of the audit log, newest first."""
        rows: list[dict[str, Any]] = self.done("GET", AUDIT, token or self.owner.access)["data"]
        return rows

    def ids(self, kind: str) -> str:
        """Something of the first organisation, by the name that paths have for it: nobody may change it."""
        if not self.things:
            rows = self.done("GET", ORGANISATIONS, self.owner.access)["data"]
            home = next(row for row in rows if row["name"] == "default")
            key = self.key(user=self.person("member").id)
            self.things = {
                "organisation": home["id"],
                "user": self.person("member").id,
                "key": key.id,
                "subject": f"key:{key.id}",
                "id": "helixflow-demo",
                "request": str(uuid.UUID(int=0)),
                "session": str(uuid.UUID(int=0)),
            }
        return self.things[kind]

    def sql(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Does something with a connection of the service's role, which owns every table."""

        async def run() -> T:
            connection = await connect(Embedded(Path(self.platform.environ["HELIX_DATABASE_DIRECTORY"])).target)
            try:
                await connection.execute("SET search_path = helixflow")
                return await work(connection)
            finally:
                await connection.close()

        return asyncio.run(run())

    def value(self, query: str, *arguments: Any) -> Any:
        """One value from the database."""

        async def work(connection: Any) -> Any:
            return await connection.fetchval(query, *arguments)

        return self.sql(work)


def one_time_password(home: Path) -> str:
    """What the auth-service has left for the owner at its first start."""
    file = home / "secrets" / "first-password"
    assert file.stat().st_mode & 0o777 == 0o600
    found = re.findall(r"^password: (\S+)$", file.read_text(), re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


@contextlib.contextmanager
def settled(platform: Platform) -> Iterator[Site]:
    """Lets the first owner in, and makes the second organisation and its owner."""
    with contextlib.closing(Site(platform, [platform.client("", each) for each in platform.gateways])) as site:
        _settle(site)
        yield site


def _settle(site: Site) -> None:
    platform = site.platform
    password, chosen = one_time_password(platform.place), "correct horse battery staple"
    body = {"email": OWNER, "password": password}
    site.first_password = password
    site.first_login = [
        site.send("POST", LOGIN, json=body),
        site.send("POST", LOGIN, json={**body, "new_password": chosen}),
    ]
    tokens = site.first_login[1].json()
    owner = Person("", OWNER, chosen, tokens["access_token"], tokens["refresh_token"])
    owner.id = next(row["id"] for row in site.done("GET", USERS, owner.access)["data"] if row["email"] == OWNER)
    site.people["owner", "default"] = owner
    site.done("POST", ORGANISATIONS, owner.access, json={"name": "other"})
    domains = {"default": ["example.com"], "other": ["other.example"]}
    for row in site.done("GET", ORGANISATIONS, owner.access)["data"]:
        changed = {"domains": domains[row["name"]]}
        site.done("PATCH", f"{ORGANISATIONS}/{row['id']}", owner.access, json=changed)
    made = platform.json("user", "add", "boss@other.example", "--role", "owner", "--organisation", "other")
    site.people["owner", "other"] = site.enter(made["user"], made["one_time_password"])


def own_certificates(certs: Path, place: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(certs, place / "certs"))


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a refused request, which has the envelope of the whole API."""
    assert answer.headers["content-type"] == "application/json", answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return answer.status_code, body["error"]["code"]


def in_one_minute(act: Callable[[], T]) -> T:
    """What `act` returns when it was begun and ended in the same minute: windows of limits are minutes of UTC."""
    while True:
        minute = time.time() // 60
        result = act()
        if time.time() // 60 == minute:
            return result
