"""The whole service as its process builds it, called over mutual TLS as gateways and the command line do."""

import asyncio
import base64
import contextlib
import itertools
import json
import stat
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from helixflow import config as configuration
from helixflow.auth import build as building
from helixflow.auth import keys, passwords, signing
from helixflow.auth.build import Built, build
from helixflow.auth.errors import PepperError, SigningKeyError
from helixflow.auth.handlers import AuthHandlers
from helixflow.auth.pepper import open_pepper
from helixflow.config import Config
from helixflow.core_rs import (
    InvalidApiKey,
    InvalidCredentials,
    InvalidRequest,
    InvalidToken,
    NotFound,
    PasswordChangeRequired,
    PermissionDenied,
    RateLimitExceeded,
    TlsFiles,
)
from helixflow.db.pool import Pool
from helixflow.db.target import Target
from helixflow.ledger.record import encode
from helixflow.pki.layout import Layout, Role
from helixflow.rpc import messages
from helixflow.rpc.client import Client
from helixflow.rpc.server import Server

from .support import CHEAP, INJECTIONS, copy, rotate, row, run

OWNER = "owner@localhost"
REFUSALS = (InvalidApiKey, InvalidCredentials, InvalidRequest, InvalidToken, NotFound)
CALLERS = {"AuthService": frozenset({"api-gateway"}), "AdminService": frozenset({"api-gateway", "auth-service"})}


def settings(target: Target, layout: Layout, home: Path, **options: str) -> Config:
    environ = {"HELIX_HOME": str(home), "HELIX_CERTS": str(layout.directory), **options}
    return configuration.load(None, environ)


@dataclass
class Service:
    """A service on a socket, with a client of each kind."""

    built: Built
    pool: Pool
    gateway: Client
    command: Client

    @property
    def first_password(self) -> str | None:
        return self.built.first.password if self.built.first else None

    async def call(self, method: str, **values: Any) -> Any:
        """As a gateway, with what JSON would hold."""
        name = method if "/" in method else f"AuthService/{method}"
        request = messages.method(name).request(**values)
        return await self.gateway.call(name, request)

    async def admin(self, method: str, **values: Any) -> Any:
        """As the operator."""
        name = f"AdminService/{method}"
        request = messages.parse(messages.method(name).request, {"actor": {"name": "root"}, **values})
        return await self.command.call(name, request)


def tls(layout: Layout, name: str, role: Role) -> TlsFiles:
    pair = layout.pair(name, role)
    return TlsFiles(str(layout.ca_cert), str(pair.cert), str(pair.key), str(layout.crl))


@contextlib.asynccontextmanager
async def service(target: Target, layout: Layout, home: Path, **options: str) -> AsyncIterator[Service]:
    config = settings(target, layout, home, **options)
    pool = await Pool.open(config.database, target, name="test")
    built = await build(config, pool)
    callers = {name: CALLERS[name.partition("/")[0]] for name in built.methods}
    server = Server(built.methods, callers)
    address = server.start("127.0.0.1:0", tls(layout, "auth-service", Role.SERVER))
    server.set_serving(True)
    names = ("api-gateway", "auth-service")
    gateway, command = (Client([address], tls(layout, name, Role.CLIENT)) for name in names)
    made = Service(built, pool, gateway, command)
    try:
        yield made
    finally:
        for client in (gateway, command):
            client.close()
        await server.stop(1.0)
        await built.close()
        await pool.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key files are looked at more often than each second."""
    monkeypatch.setattr(signing, "WATCH_S", 0.02)


def test_the_whole_life_over_the_wire(each: Target, pki: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        async with service(each, pki, tmp_path) as s:
            assert s.first_password is not None
            login = {"email": OWNER, "password": s.first_password, "address": "10.0.0.1"}
            with pytest.raises(PasswordChangeRequired):
                await s.call("Login", **login)
            tokens = await s.call("Login", **login, new_password="correct horse battery")
            assert (tokens.expires_in, tokens.refresh_expires_in) == (900, 2_592_000)
            owner = await s.call("Verify", access_token=tokens.access_token)
            assert (owner.kind, owner.user, owner.role, owner.key_id) == (2, OWNER, "owner", "")
            assert owner.session_id
            assert owner.expires_at > time.time()

            actor = {"access_token": tokens.access_token, "name": "whoever"}
            request = messages.parse(
                messages.CreateKeyRequest, {"actor": actor, "name": "first", "limits": {"tokens_per_day": 7}}
            )
            made = await s.gateway.call("AdminService/CreateKey", request)
            digest = keys.presented(made.secret.encode())
            found = await s.call("Verify", key_digest=digest)
            assert (found.kind, found.key, found.key_id, found.session_id) == (1, "first", made.key.id, "")
            assert (found.organisation, found.expires_at, found.content.store) == ("default", 0, False)
            assert [(item.subject, item.limits.tokens_per_day) for item in found.limits] == [(f"key:{made.key.id}", 7)]

            stream = s.gateway.stream("AuthService/Watch", messages.WatchEventsRequest(gateway=str(uuid4())))
            assert (await anext(stream)).resync
            await s.built.events.listening.wait()
            began = time.monotonic()
            await s.admin("RevokeKey", key=made.key.id)
            while (event := await anext(stream)).WhichOneof("kind") == "resync":
                pass
            assert event.key == made.key.id
            assert time.monotonic() - began < 1
            await stream.aclose()
            with pytest.raises(InvalidApiKey):
                await s.call("Verify", key_digest=digest)

            fresh = await s.call("Refresh", refresh_token=tokens.refresh_token)
            await s.call("Logout", access_token=fresh.access_token)
            for token in (tokens.access_token, fresh.access_token):
                with pytest.raises(InvalidToken):
                    await s.call("Verify", access_token=token)
            with pytest.raises(InvalidToken):
                await s.call("Refresh", refresh_token=fresh.refresh_token)
            again = await s.call("Login", email=OWNER, password="correct horse battery")
            await s.call("Logout", refresh_token=again.refresh_token)
            with pytest.raises(InvalidToken):
                await s.call("Verify", access_token=again.access_token)
            with pytest.raises(InvalidCredentials):
                await s.call("Login", email=OWNER, password="wrong password")

    run(test())


def test_what_is_no_credential(target: Target, pki: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        async with service(target, pki, tmp_path) as s:
            for method in ("Verify", "Logout"):
                with pytest.raises(InvalidRequest):
                    await s.call(method)
            with pytest.raises(InvalidApiKey):
                await s.call("Verify", key_digest=b"short")
            with pytest.raises(InvalidToken):
                await s.call("Verify", access_token="hf-not-a-token")
            # Whoever is not logged in is logged out.
            await s.call("Logout", access_token="nonsense")
            await s.call("Logout", refresh_token="nonsense")
            for method in ("OidcStart", "OidcFinish"):
                with pytest.raises(NotFound):
                    await s.call(method, redirect_uri="https://gateway.example/cb")

    run(test())


def test_injections_through_every_field(
    target: Target, pki: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passwords, "PasswordHasher", lambda: CHEAP)

    async def test() -> None:
        async with service(
            target, pki, tmp_path, HELIX_AUTH_LOGIN_FREE_ATTEMPTS="1000", HELIX_AUTH_LOGIN_FREE_PER_ADDRESS="1000"
        ) as s:
            tried = 0
            for name, method in messages.service("AuthService").items():
                values = {"email": OWNER, "password": "wrong password"} if name.endswith("/Login") else {}
                texts = [entry.name for entry in method.request.DESCRIPTOR.fields if entry.type == entry.TYPE_STRING]
                for text, field in itertools.product(INJECTIONS, () if method.streaming else texts):
                    with contextlib.suppress(*REFUSALS):
                        await s.call(name, **{**values, field: text})
                    tried += 1
            assert tried > 100
            async with s.pool.acquire() as connection:
                assert await connection.fetchval("SELECT count(*) FROM users") == 1
                assert await connection.fetchval("SELECT count(*) FROM sessions") == 0

    run(test())


def test_other_certificates_are_refused_by_every_method(target: Target, pki: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        async with service(target, pki, tmp_path) as s:
            # The operator is let in, but does not pass for a gateway.
            for name in messages.service("AuthService"):
                request = messages.method(name).request()
                streaming = messages.method(name).streaming
                call = anext(s.command.stream(name, request)) if streaming else s.command.call(name, request)
                with pytest.raises(PermissionDenied, match="may not call"):
                    await call

    run(test())


def test_the_development_key_is_known_in_its_profile_only(target: Target, pki: Layout, tmp_path: Path) -> None:
    digest = keys.presented(b"demo-key")

    async def test() -> None:
        async with service(target, pki, tmp_path, HELIX_PROFILE="development") as s:
            found = await s.call("Verify", key_digest=digest)
            assert (found.key, found.user, found.role) == ("demo-key", OWNER, "owner")
        async with service(target, pki, tmp_path) as s:
            with pytest.raises(InvalidApiKey):
                await s.call("Verify", key_digest=digest)
            assert s.first_password is not None, "nobody has used it yet"

    run(test())


def test_two_services_start_at_once_and_share_everything(target: Target, pki: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            both = await asyncio.gather(*(stack.enter_async_context(service(target, pki, tmp_path)) for _ in range(2)))
            (password,) = {one.first_password for one in both if one.first_password}
            tokens = await both[0].call("Login", email=OWNER, password=password, new_password="correct horse battery")
            assert (await both[1].call("Verify", access_token=tokens.access_token)).user == OWNER
            fresh = await both[1].call("Refresh", refresh_token=tokens.refresh_token)
            with pytest.raises(InvalidToken):
                await both[0].call("Refresh", refresh_token=tokens.refresh_token)
            with pytest.raises(InvalidToken):
                await both[1].call("Verify", access_token=fresh.access_token)

    run(test())


def test_keys_of_tokens_are_rotated_under_way(
    target: Target, pki: Layout, rotated: Layout, tmp_path: Path, quick: None
) -> None:
    async def test() -> None:
        layout = copy(pki, tmp_path)
        async with service(target, layout, tmp_path) as s:
            login = {"email": OWNER, "password": s.first_password}
            old = await s.call("Login", **login, new_password="correct horse battery")
            before = {key["kid"] for key in json.loads((await s.call("Jwks")).json)["keys"]}
            rotate(layout, rotated)
            kids = before
            while kids == before:
                kids = {key["kid"] for key in json.loads((await s.call("Jwks")).json)["keys"]}
            assert before < kids
            new = await s.call("Login", email=OWNER, password="correct horse battery")
            for tokens in (old, new):
                assert (await s.call("Verify", access_token=tokens.access_token)).user == OWNER

    run(test())


@contextlib.contextmanager
def counted(pool: Pool) -> Iterator[list[None]]:
    """What stands in the list afterwards: one item for each connection that was asked for."""
    taken: list[None] = []
    acquire = pool.acquire

    def counting() -> Any:
        taken.append(None)
        return acquire()

    pool.acquire = counting  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        pool.acquire = acquire  # type: ignore[method-assign]


def test_what_is_invented_costs_no_transaction(each: Target, pki: Layout, tmp_path: Path) -> None:
    async def refused(s: Service, kind: type[Exception], **credential: Any) -> None:
        with pytest.raises(kind):
            await s.call("Verify", **credential)

    async def test() -> None:
        async with service(each, pki, tmp_path) as s:
            login = {"email": OWNER, "password": s.first_password}
            tokens = await s.call("Login", **login, new_password="correct horse battery")
            await s.call("Verify", access_token=tokens.access_token)
            await s.built.events.listening.wait()
            secret = keys.make()
            digest = keys.presented(secret.encode())
            head, body, signature = tokens.access_token.split(".")
            with counted(s.pool) as taken:
                for _ in range(5):
                    await refused(s, InvalidApiKey, key_digest=digest)
                assert len(taken) == 1, "the second time it is known to be nothing"
                taken.clear()
                # Forged, with a key that is known; malformed.
                for token in (f"{head}.{body}.{'A' * len(signature)}", f"{head}.{body}.", "a.b.c", "x" * 9000):
                    await refused(s, InvalidToken, access_token=token)
                    await s.call("Logout", access_token=token)
                assert taken == []
                # Under invented names of keys: fifty at once share two readings.
                invented = [signing_header(f"{number:043}") for number in range(50)]
                await asyncio.gather(
                    *(refused(s, InvalidToken, access_token=f"{kid}.{body}.{signature}") for kid in invented)
                )
                assert 1 <= len(taken) <= 2
            # The key is made after all.
            async with s.pool.acquire() as connection:
                user = (await s.call("Verify", access_token=tokens.access_token)).user_id
                pepper = await open_pepper(connection, tmp_path / "secrets" / "pepper")
                await connection.execute(
                    "INSERT INTO api_keys (user_id, digest, prefix, name) VALUES ($1, $2, 'hf-', 'late')",
                    UUID(user),
                    pepper.key_digest(digest),
                )
            found = None
            while found is None:
                with contextlib.suppress(InvalidApiKey):
                    found = await s.call("Verify", key_digest=digest)
            assert found.key == "late"

    run(test())


def test_refresh_tokens_that_are_none_have_a_budget(target: Target, pki: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        async with service(target, pki, tmp_path) as s:
            login = {"email": OWNER, "password": s.first_password}
            tokens = await s.call("Login", **login, new_password="correct horse battery")
            with counted(s.pool) as taken:
                for _ in range(5):
                    with pytest.raises(InvalidToken):
                        await s.call("Refresh", refresh_token="nonsense", address="10.0.0.1")
                    await s.call("Logout", refresh_token="nonsense", address="10.0.0.1")
                assert taken == []
                outcomes = await asyncio.gather(
                    *(s.call("Refresh", refresh_token=f"hr-{number}", address="10.0.0.1") for number in range(200)),
                    return_exceptions=True,
                )
                kinds = [type(outcome) for outcome in outcomes]
                assert (kinds.count(InvalidToken), kinds.count(RateLimitExceeded)) == (len(taken), 200 - len(taken))
                assert 60 <= len(taken) < 100
            for _ in range(3):  # from elsewhere, and there is no limit for those who have one
                tokens = await s.call("Refresh", refresh_token=tokens.refresh_token, address="10.0.0.2")

    run(test())


def signing_header(kid: str) -> str:
    header = json.dumps({"alg": "RS256", "kid": kid, "typ": "JWT"}).encode()
    return base64.urlsafe_b64encode(header).rstrip(b"=").decode()


def test_rows_of_the_ledger_note_when_a_key_was_used(target: Target, pki: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        async with service(target, pki, tmp_path) as s:
            made = await s.admin("CreateKey", user=OWNER, name="k")
            at_us = int(time.time() * 1_000_000)
            used = row(
                at_us,
                organisation=UUID(made.key.organisation_id),
                user=UUID(made.key.user_id),
                key=UUID(made.key.id),
            )
            reply = await s.call("AppendUsage", spool=str(uuid4()), records=[encode(used)])
            assert (reply.written, reply.known) == (1, 0)
            (key,) = (await s.admin("ListKeys")).data
            assert key.last_used_at == at_us // 1_000_000
            (usage,) = (await s.admin("QueryUsage", group_by=["key"])).data
            assert (usage.requests, usage.key) == (1, "k")
            checked = await s.admin("VerifyLedger")
            assert (checked.days, checked.rows, list(checked.faults)) == (1, 1, [])
            prices = await s.call("Prices")
            assert prices.currency == "USD"

    run(test())


@pytest.mark.parametrize("what", ["pepper", "key"])
def test_a_service_that_cannot_be_trusted_does_not_start(
    target: Target, pki: Layout, tmp_path: Path, what: str
) -> None:
    async def test() -> None:
        layout = copy(pki, tmp_path)
        async with service(target, layout, tmp_path):
            path = tmp_path / "secrets" / "pepper"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        if what == "pepper":
            path.unlink()
        else:
            layout.jwt_private.unlink()
        config = settings(target, layout, tmp_path)
        pool = await Pool.open(config.database, target, name="test")
        with pytest.raises(PepperError if what == "pepper" else SigningKeyError):
            await build(config, pool)
        await pool.close()

    run(test())


def test_a_background_task_that_fails_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "AGAIN_S", 0.0)

    async def test() -> None:
        again, runs = asyncio.Event(), []

        async def task() -> None:
            runs.append(1)
            if len(runs) == 3:
                again.set()
                await asyncio.Event().wait()
            if len(runs) == 1:
                raise ZeroDivisionError

        async with contextlib.AsyncExitStack() as stack:
            await building._begin(stack, {"test": task})
            await again.wait()
        assert len(runs) == 3

    run(test())


def test_handlers_are_all_there() -> None:
    nothing: Any = None
    with pytest.raises(ValueError, match="Prices, Lease, AppendUsage"):
        AuthHandlers(
            nothing, nothing, nothing, ways=nothing, events=nothing, memory=nothing, elsewhere={}, development=False
        )
