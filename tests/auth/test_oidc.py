"""Login through an OpenID Connect provider, and everything that must not log anybody in."""

import asyncio
import base64
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from helixflow.auth import oidc, organisations, principals, users
from helixflow.auth.oidc import Provider
from helixflow.auth.oidc_login import OidcLogin
from helixflow.config import AuthConfig
from helixflow.core_rs import (
    CoreError,
    InvalidCredentials,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from helixflow.db.target import Target
from helixflow.errors import ConfigError
from helixflow.pki.layout import Layout
from helixflow.secret import Secret

from .provider import CALLBACK, CLIENT, TestProvider
from .provider import SECRET as CLIENT_SECRET
from .support import INJECTIONS, OPERATOR, SECRET, World, run, world


@dataclass
class Flow:
    """A world with a provider."""

    w: World
    provider: TestProvider
    login: OidcLogin
    client: Provider

    async def enter(self) -> Any:
        """The whole way of a browser."""
        url, state = await self.login.start(CALLBACK)
        code, returned = self.provider.authorize(url)
        assert returned == state
        return await self.login.finish(code, returned, CALLBACK, "10.0.0.1")

    async def who(self, issued: Any) -> principals.Principal:
        async with self.w.pool.acquire() as connection:
            return await principals.by_token(connection, self.w.signer, issued.access_token)


@contextlib.asynccontextmanager
async def flow(target: Target, pki: Layout, **options: Any) -> AsyncIterator[Flow]:
    async with world(target, pki) as w:
        provider = TestProvider()
        await provider.start(pki)
        chosen = replace(
            w.options,
            **{
                "oidc_issuer": provider.issuer,
                "oidc_client_id": CLIENT,
                "oidc_client_secret": Secret(CLIENT_SECRET),
                "oidc_ca": pki.ca_cert,
                **options,
            },
        )
        client = Provider(chosen)
        try:
            yield Flow(w, provider, OidcLogin(w.pool, chosen, SECRET, w.sessions, client), client)
        finally:
            await client.close()
            await provider.stop()


def test_a_known_user_logs_in_by_verified_email_and_later_by_subject(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(each, pki) as f:
            user = await f.w.user("ann@example.com", "admin")
            seen = await f.who(await f.enter())
            assert (seen.user_id, seen.role) == (user, "admin")
            # The e-mail of an identity that is tied says nothing any more.
            f.provider.claims |= {"email": "other@example.com", "email_verified": False}
            assert (await f.who(await f.enter())).user_id == user
            assert await f.w.value("SELECT count(*) FROM oidc_identities") == 1
            assert await f.w.value("SELECT count(*) FROM sessions WHERE method = 'oidc'") == 2
            (row,) = await f.w.audited("user.identity")
            assert row["target"] == "ann@example.com"
            # The provider was asked for its settings and keys once.
            assert f.provider.asked.count("/.well-known/openid-configuration") == 1
            assert f.provider.asked.count("/keys") == 1

    run(test())


def test_what_is_stored_of_a_login_under_way_gives_nothing_away(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            url, state = await f.login.start(CALLBACK)
            query = dict(parse_qsl(urlsplit(url).query))
            assert query["state"] == state
            assert query["redirect_uri"] == CALLBACK
            stored = str(await f.w.rows("SELECT *, encode(digest, 'escape') FROM oidc_states"))
            for secret in (state, query["nonce"], query["code_challenge"]):
                assert secret not in stored
            assert await f.w.value("SELECT expires_at - now() BETWEEN '9 min' AND '10 min' FROM oidc_states")
            other, _ = await f.login.start(CALLBACK)
            assert dict(parse_qsl(urlsplit(other).query))["nonce"] != query["nonce"]

    run(test())


def test_newcomers_join_the_configured_organisation(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki, oidc_organisation="Newcomers", oidc_role="viewer") as f:
            with pytest.raises(NotFound, match="does not exist"):
                await f.enter()
            await f.w.do(organisations.create, OPERATOR, "newcomers")
            # Two first logins at once make one user.
            found = await asyncio.gather(f.enter(), f.enter())
            seen = [await f.who(issued) for issued in found]
            assert {(one.user, one.role, one.organisation) for one in seen} == {
                ("ann@example.com", "viewer", "newcomers")
            }
            assert seen[0].user_id == seen[1].user_id
            assert await f.w.value(
                "SELECT password IS NULL AND NOT must_change_password FROM users WHERE email LIKE 'ann%'"
            )
            assert len([row for row in await f.w.audited("user.create") if row["target"] == "ann@example.com"]) == 1

    run(test())


def test_strangers_are_refused_unless_newcomers_may_join(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            with pytest.raises(PermissionDenied, match="ask an administrator"):
                await f.enter()
            (row,) = await f.w.audited("login.refused")
            assert (row["target"], row["address"]) == ("ann@example.com", "10.0.0.1")
            assert await f.w.value("SELECT count(*) FROM sessions") == 0

    run(test())


def test_an_unverified_email_is_nobodys(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki, oidc_organisation="default") as f:
            await f.w.user("ann@example.com", "owner")
            right = dict(f.provider.claims)
            wrong: list[dict[str, Any]] = [{"email_verified": value} for value in (False, None, "true", 1)]
            wrong += [{"email": value} for value in ("", "no address", 5, "a@b\x00", "x" * 300 + "@example.com")]
            for claims in wrong:
                f.provider.claims = right | claims
                with pytest.raises(PermissionDenied, match="has not verified"):
                    await f.enter()
            assert await f.w.value("SELECT count(*) FROM oidc_identities") == 0

    run(test())


def test_service_accounts_disabled_and_removed_users_do_not_enter(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki, oidc_organisation="default") as f:
            user = await f.w.user("ann@example.com")
            await f.enter()
            await f.w.do(users.update, OPERATOR, "ann@example.com", None, True)
            with pytest.raises(PermissionDenied, match="disabled"):
                await f.enter()
            # Whoever was removed does not come back as a newcomer...
            await f.w.do(users.delete, OPERATOR, str(user))
            with pytest.raises(PermissionDenied, match="ask an administrator"):
                await f.enter()
            # ...but may be made anew.
            again = await f.w.user("ann@example.com")
            assert (await f.who(await f.enter())).user_id == again
            f.provider.claims = {"sub": "robot", "email": "robot@example.com", "email_verified": True}
            await f.w.value("UPDATE users SET email = 'robot@example.com' WHERE id = $1", await f.w.service("robot"))
            seen = await f.who(await f.enter())
            assert seen.user_id != await f.w.value("SELECT id FROM users WHERE service_account")

    run(test())


# --- states ----------------------------------------------------------------------


def test_states_are_used_once_in_time_and_with_their_own_address(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            await f.w.user("ann@example.com")

            async def begun() -> tuple[str, str]:
                url, _ = await f.login.start(CALLBACK)
                return f.provider.authorize(url)

            async def refused(code: str, state: str, redirect_uri: str = CALLBACK) -> None:
                asked = len(f.provider.asked)
                with pytest.raises(InvalidCredentials, match="start again"):
                    await f.login.finish(code, state, redirect_uri, "")
                # The provider is not bothered with it.
                assert len(f.provider.asked) == asked

            code, state = await begun()
            await refused(code, state + "x")
            await refused(code, "")
            for text in INJECTIONS:
                await refused(code, text)
            await f.login.finish(code, state, CALLBACK, "")
            await refused(code, state)
            code, state = await begun()
            await f.w.value("UPDATE oidc_states SET expires_at = now()")
            await refused(code, state)
            code, state = await begun()
            await refused(code, state, "https://evil.example/callback")
            await refused(code, state)
            code, state = await begun()
            finishing = (f.login.finish(code, state, CALLBACK, "") for _ in range(4))
            found = await asyncio.gather(*finishing, return_exceptions=True)
            assert sum(isinstance(item, InvalidCredentials) for item in found) == 3
            # Somebody else's code with one's own state: the verifier does not fit.
            code, _ = await begun()
            _, state = await begun()
            with pytest.raises(InvalidCredentials, match="did not accept"):
                await f.login.finish(code, state, CALLBACK, "")

    run(test())


def test_codes_that_are_none(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            _, state = await f.login.start(CALLBACK)
            for code in ("", "x" * 3000):
                with pytest.raises(InvalidRequest, match="code"):
                    await f.login.finish(code, state, CALLBACK, "")
            with pytest.raises(InvalidCredentials, match="did not accept"):
                await f.login.finish("unknown", state, CALLBACK, "")

    run(test())


def test_addresses_that_no_browser_should_be_sent_to(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            for uri in (
                "",
                "http://gateway.example/cb",
                "javascript:alert(1)",
                "https://gateway.example/cb#x",
                "https:///cb",
                "/cb",
                "https://[::1/cb",
                "x" * 3000,
                "https://gateway.example/\x00",
            ):
                with pytest.raises(InvalidRequest) as caught:
                    await f.login.start(uri)
                assert caught.value.param == "redirect_uri"
            for local in ("http://localhost:8443/cb", "http://127.0.0.1/cb", "http://[::1]/cb"):
                await f.login.start(local)

    run(test())


# --- ID tokens -------------------------------------------------------------------


CLAIMS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"iss": "https://elsewhere.example"}, "another issuer"),
    ({"iss": None}, "another issuer"),
    ({"aud": "another client"}, "another audience"),
    ({"aud": None}, "another audience"),
    ({"aud": ["another client"]}, "another audience"),
    ({"aud": [CLIENT, "another client"]}, "another party"),
    ({"aud": [CLIENT, "another client"], "azp": "another client"}, "another party"),
    ({"azp": "another client"}, "another party"),
    ({"exp": int(time.time()) - 3600}, "has expired"),
    ({"exp": None}, "has expired"),
    ({"exp": "9999999999"}, "has expired"),
    ({"iat": int(time.time()) - 7200}, "not made just now"),
    ({"iat": int(time.time()) + 7200}, "not made just now"),
    ({"iat": None}, "not made just now"),
    ({"iat": True}, "not made just now"),
    ({"nonce": "of another login"}, "another login"),
    ({"nonce": None}, "another login"),
    ({"sub": ""}, "names nobody"),
    ({"sub": None}, "names nobody"),
    ({"sub": 5}, "names nobody"),
    ({"sub": "x" * 256}, "names nobody"),
    ({"sub": "a\x00"}, "names nobody"),
)


def test_claims_that_do_not_log_in(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            await f.w.user("ann@example.com")
            right = dict(f.provider.claims)
            for claims, reason in CLAIMS:
                f.provider.claims = right | claims
                with pytest.raises(InvalidCredentials, match=reason):
                    await f.enter()
            assert await f.w.value("SELECT count(*) FROM sessions") == 0

    run(test())


def test_claims_that_do(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            await f.w.user("ann@example.com")
            for claims in ({"aud": [CLIENT]}, {"aud": [CLIENT, "other"], "azp": CLIENT}, {"iat": time.time()}):
                f.provider.claims |= claims
                await f.enter()
            assert await f.w.value("SELECT count(*) FROM sessions") == 3

    run(test())


def _encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _none(f: Flow) -> Callable[[dict[str, Any]], str]:
    return lambda claims: f"{_encoded({'alg': 'none'})}.{_encoded(claims)}."


def _hmac(f: Flow) -> Callable[[dict[str, Any]], str]:
    def sign(claims: dict[str, Any]) -> str:
        body = f"{_encoded({'alg': 'HS256', 'kid': f.provider.key.kid})}.{_encoded(claims)}"
        secret = CLIENT_SECRET.encode()
        return body + "." + base64.urlsafe_b64encode(hmac.digest(secret, body.encode(), "sha256")).decode().rstrip("=")

    return sign


def _other(f: Flow) -> Callable[[dict[str, Any]], str]:
    other = ECKey.generate_key("P-256")
    return lambda claims: jwt.encode({"alg": "ES256", "kid": f.provider.key.kid}, claims, other, algorithms=["ES256"])


def _unknown(f: Flow) -> Callable[[dict[str, Any]], str]:
    other = ECKey.generate_key("P-256", auto_kid=True)
    return lambda claims: jwt.encode({"alg": "ES256", "kid": other.kid}, claims, other, algorithms=["ES256"])


def _altered(f: Flow) -> Callable[[dict[str, Any]], str]:
    def sign(claims: dict[str, Any]) -> str:
        head, _, signature = f.provider.signed(claims).split(".")
        return ".".join((head, _encoded({**claims, "sub": "somebody else"}), signature))

    return sign


def test_signatures_that_do_not_log_in(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            await f.w.user("ann@example.com")
            for forge in (_none, _hmac, _other, _unknown, _altered):
                f.provider.sign = forge(f)
                with pytest.raises(InvalidCredentials, match="signature is wrong"):
                    await f.enter()
            f.provider.sign = lambda _claims: "nonsense"
            with pytest.raises(InvalidCredentials, match="signature is wrong"):
                await f.enter()

    run(test())


def test_a_new_key_of_the_provider_is_asked_for(target: Target, pki: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            await f.w.user("ann@example.com")
            await f.enter()
            f.provider.key = ECKey.generate_key("P-256", auto_kid=True)
            # Not at once: whoever sends nonsense must not make us hammer the provider.
            with pytest.raises(InvalidCredentials):
                await f.enter()
            assert f.provider.asked.count("/keys") == 1
            monkeypatch.setattr(oidc, "RENEW_S", 0.0)
            await f.enter()
            assert f.provider.asked.count("/keys") == 2
            monkeypatch.setattr(oidc, "KEEP_S", 0.0)
            await f.enter()
            assert f.provider.asked.count("/.well-known/openid-configuration") > 1

    run(test())


def test_a_provider_that_takes_the_secret_in_the_form(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            await f.w.user("ann@example.com")
            f.provider.settings["token_endpoint_auth_methods_supported"] = ["client_secret_post"]
            await f.enter()

    run(test())


# --- a provider that is away -----------------------------------------------------


def test_what_a_provider_says_of_itself_must_be_usable(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            settings: tuple[dict[str, Any], ...] = (
                {"issuer": "https://elsewhere.example"},
                {"token_endpoint": "http://localhost/token"},
                {"jwks_uri": None},
                {"authorization_endpoint": 5},
                {"x": "y" * (2 << 20)},
            )
            for f.provider.settings in settings:
                with pytest.raises(Unavailable, match="identity provider"):
                    await f.enter()
            f.provider.settings = {}
            keys: tuple[list[Any], ...] = ([], [{"kty": "EC"}], [{"kty": "strange"}], [5])
            for f.provider.keys in keys:
                with pytest.raises(Unavailable, match="identity provider"):
                    await f.enter()
            f.provider.keys = None
            await f.login.start(CALLBACK)

    run(test())


def test_a_provider_that_fails_or_is_down(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            await f.w.user("ann@example.com")
            for status in (500, 503, 302):
                f.provider.status = status
                with pytest.raises(Unavailable):
                    await f.login.start(CALLBACK)
            f.provider.status = 200
            url, state = await f.login.start(CALLBACK)
            code, _ = f.provider.authorize(url)
            f.provider.status = 502
            with pytest.raises(Unavailable):
                await f.login.finish(code, state, CALLBACK, "")
            gone = replace(f.w.options, oidc_issuer="https://localhost:1", oidc_client_id=CLIENT, oidc_ca=pki.ca_cert)
            client = Provider(gone)
            with pytest.raises(Unavailable, match="does not answer as it should"):
                await client.authorize_url(redirect_uri=CALLBACK, state="s", nonce="n", verifier="v")
            await client.close()

    run(test())


def test_a_certificate_of_another_authority_is_refused(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            strict = replace(f.w.options, oidc_issuer=f.provider.issuer, oidc_client_id=CLIENT)
            client = Provider(strict)
            with pytest.raises(Unavailable):
                await client.authorize_url(redirect_uri=CALLBACK, state="s", nonce="n", verifier="v")
            assert f.provider.asked == []
            await client.close()

    run(test())


def test_without_a_provider_there_is_no_such_login(shared: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(shared, pki) as w:
            login = OidcLogin(w.pool, w.options, SECRET, w.sessions, None)
            for call in (login.start(CALLBACK), login.finish("c", "s", CALLBACK, "")):
                with pytest.raises(NotFound, match="no identity provider"):
                    await call

    run(test())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"oidc_issuer": "http://idp.example", "oidc_client_id": "c"}, "oidc_issuer"),
        ({"oidc_issuer": "https://idp.example"}, "oidc_client_id"),
        ({"oidc_issuer": "https://idp.example", "oidc_client_id": "c", "oidc_ca": Path("/missing")}, "oidc_ca"),
    ],
)
def test_wrong_configurations(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Provider(replace(AuthConfig(), **options))


def test_every_refusal_is_one_of_ours() -> None:
    for error in (InvalidCredentials, PermissionDenied, Unavailable, NotFound, InvalidRequest):
        assert issubclass(error, CoreError)
