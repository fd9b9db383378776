"""An OpenID Connect provider (OpenID Connect Core 1.0): where to send a browser, and what came back from there.

Authorisation code flow with PKCE (RFC 7636) and a nonce. Only the provider is asked here, never the database.
"""

import base64
import hashlib
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import orjson
from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from helixflow import log
from helixflow.auth import fields
from helixflow.config import UNSET, AuthConfig
from helixflow.core_rs import InvalidCredentials, InvalidRequest, Unavailable
from helixflow.errors import ConfigError
from helixflow.refusals import refusal

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures by a key pair only: with HMAC, whoever may check a token can make one."""

TIMEOUT_S = 5.0
LONGEST_ANSWER = 1 << 20
KEEP_S = 3600.0
"""The provider's settings and keys are asked for again after this time (seconds)."""

RENEW_S = 10.0
"""An unknown key id has the keys asked for again, but not more often than this (seconds)."""

CLOCK_SKEW_S = 60
OLDEST_S = 600
"""An ID token is made for the login that it ends."""

LONGEST_SUBJECT = 255
"""OpenID Connect Core 1.0, section 2."""

logger = log.get("auth")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who logged in at the provider. `email` is empty unless the provider has verified it."""

    issuer: str
    subject: str
    email: str


@dataclass(slots=True)
class _Known:
    """What the provider said of itself."""

    settings: dict[str, Any]
    keys: KeySet
    at: float
    keys_at: float


class Provider:
    """The configured provider."""

    def __init__(self, options: AuthConfig) -> None:
        """Raises ConfigError when `oidc_ca` is no file of certificates or the issuer is no https URL."""
        self._options = options
        self._issuer = options.oidc_issuer
        if urlsplit(self._issuer).scheme != "https" or not options.oidc_client_id:
            raise ConfigError(["auth.oidc_issuer: must be an https URL, and auth.oidc_client_id must be set with it"])
        try:
            context = ssl.create_default_context(cafile=str(options.oidc_ca) if options.oidc_ca != UNSET else None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError([f"auth.oidc_ca: {options.oidc_ca} cannot be used: {error}"]) from None
        self._client = httpx.AsyncClient(verify=context, timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)
        self._known: _Known | None = None

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def authorize_url(self, *, redirect_uri: str, state: str, nonce: str, verifier: str) -> str:
        """Where to send the browser. Raises Unavailable when the provider does not answer."""
        known = await self._discover()
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code",
            "client_id": self._options.oidc_client_id,
            "redirect_uri": redirect_uri,
            "scope": "openid email",
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        endpoint = known.settings["authorization_endpoint"]
        return f"{endpoint}{'&' if urlsplit(endpoint).query else '?'}{urlencode(query)}"

    async def exchange(self, *, code: str, redirect_uri: str, nonce: str, verifier: str) -> Identity:
        """Who the code stands for. Raises InvalidCredentials, or Unavailable when the provider does not answer."""
        known = await self._discover()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
        }
        secret, methods = (
            self._options.oidc_client_secret.reveal(),
            known.settings.get("token_endpoint_auth_methods_supported"),
        )
        auth: httpx.BasicAuth | None = None
        if secret and (not isinstance(methods, list) or "client_secret_basic" in methods):
            # RFC 6749, 2.3.1: both are form-encoded first.
            name, word = urlencode({"": self._options.oidc_client_id})[1:], urlencode({"": secret})[1:]
            auth = httpx.BasicAuth(name, word)
        else:
            form |= {"client_id": self._options.oidc_client_id} | ({"client_secret": secret} if secret else {})
        status, answer = await self._ask("POST", known.settings["token_endpoint"], data=form, auth=auth)
        if status != 200 or not isinstance(answer.get("id_token"), str):
            if status >= 500:
                raise _away(f"its token endpoint answered {status}")
            logger.warning("the identity provider refused a code", status=status, error=str(answer.get("error"))[:100])
            raise refusal(InvalidCredentials, "the identity provider did not accept this login: start again")
        return await self._identity(answer["id_token"], nonce)

    async def _identity(self, token: str, nonce: str) -> Identity:
        """Checks an ID token (OpenID Connect Core 1.0, 3.1.3.7)."""
        try:
            header = jws.extract_compact(token.encode()).headers()
            keys = await self._keys(header.get("kid"))
            claims = jwt.decode(token, keys, algorithms=ALGORITHMS).claims
        except (JoseError, ValueError, TypeError) as error:
            raise _refused(f"its signature is wrong ({type(error).__name__})") from None
        problem = self._problem(claims, nonce, time.time())
        if problem:
            raise _refused(problem)
        return Identity(self._issuer, claims["sub"], _verified_email(claims))

    def _problem(self, claims: dict[str, Any], nonce: str, now: float) -> str | None:
        """What is wrong with the claims of a token whose signature is right."""
        client, audience = self._options.oidc_client_id, claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        # With several audiences the token has to say which of them it was made for.
        party = claims.get("azp", client if len(audiences) == 1 else None)
        issued, expires, subject = _number(claims.get("iat")), _number(claims.get("exp")), claims.get("sub")
        checks = (
            (claims.get("iss") == self._issuer, "another issuer made it"),
            (client in audiences, "it is meant for another audience"),
            (party == client, "it was made for another party"),
            (expires > now - CLOCK_SKEW_S, "it has expired"),
            (now - OLDEST_S <= issued <= now + CLOCK_SKEW_S, "it was not made just now"),
            (claims.get("nonce") == nonce, "it belongs to another login"),
            (
                isinstance(subject, str) and 0 < len(subject) <= LONGEST_SUBJECT and subject.isprintable(),
                "it names nobody",
            ),
        )
        return next((problem for right, problem in checks if not right), None)

    async def _discover(self) -> _Known:
        """The provider's settings and keys. Raises Unavailable."""
        now = time.monotonic()
        if self._known is None or now - self._known.at > KEEP_S:
            url = self._issuer.rstrip("/") + "/.well-known/openid-configuration"
            status, settings = await self._ask("GET", url)
            names = ("authorization_endpoint", "token_endpoint", "jwks_uri")
            if status != 200 or settings.get("issuer") != self._issuer:
                raise _away(f"{url} answered {status}, issuer {str(settings.get('issuer'))[:100]!r}")
            for name in names:
                value = settings.get(name)
                if not isinstance(value, str) or urlsplit(value).scheme != "https":
                    raise _away(f"its {name} is no https URL")
            self._known = _Known(settings, await self._fetch_keys(settings["jwks_uri"]), now, now)
        return self._known

    async def _keys(self, kid: object) -> KeySet:
        """The provider's keys, asked for again when one of them is new."""
        known = await self._discover()
        now = time.monotonic()
        if kid is not None and all(key.kid != kid for key in known.keys) and now - known.keys_at > RENEW_S:
            known.keys_at = now
            known.keys = await self._fetch_keys(known.settings["jwks_uri"])
        return known.keys

    async def _fetch_keys(self, url: str) -> KeySet:
        status, answer = await self._ask("GET", url)
        if status != 200:
            raise _away(f"{url} answered {status}")
        try:
            return KeySet.import_key_set(answer)  # type: ignore[arg-type]
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise _away(f"its keys cannot be read: {error}") from None

    async def _ask(self, method: str, url: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of an answer. Raises Unavailable when there is none."""
        try:
            async with self._client.stream(method, url, headers={"accept": "application/json"}, **arguments) as answer:
                content = b""
                async for part in answer.aiter_bytes():
                    content += part
                    if len(content) > LONGEST_ANSWER:
                        raise _away("its answer is too long")
            found = orjson.loads(content)
        except (httpx.HTTPError, httpx.InvalidURL, orjson.JSONDecodeError) as error:
            raise _away(f"{url}: {type(error).__name__}: {error}") from None
        return answer.status_code, found if isinstance(found, dict) else {}


def _verified_email(claims: dict[str, Any]) -> str:
    value = claims.get("email")
    if claims.get("email_verified") is not True or not isinstance(value, str):
        return ""
    try:
        return fields.email(value)
    except InvalidRequest:
        return ""


def _number(value: object) -> float:
    """A claimed time; what is none lies in the year 1970."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _refused(reason: str) -> InvalidCredentials:
    logger.warning("an ID token was refused", reason=reason)
    return refusal(InvalidCredentials, f"the identity provider's token is not valid: {reason}")


def _away(reason: str) -> Unavailable:
    logger.warning("the identity provider cannot be used", reason=reason)
    return refusal(Unavailable, "the identity provider does not answer as it should; try again later")
