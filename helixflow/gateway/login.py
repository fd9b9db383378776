"""/auth/v1: logging in and out, with a password or through an OpenID Connect provider; the keys that check tokens.

No password and no token is ever written to a log, repeated in a message, or kept by a cache on the way.
"""

import asyncio
import hmac
import re
import time
from typing import Any

import orjson

from helixflow.core_rs import CoreError, Internal, InvalidCredentials, InvalidRequest
from helixflow.gateway.accounts import NO_STORE, Call, ask, read_object
from helixflow.gateway.auth import bearer
from helixflow.gateway.http import Request
from helixflow.gateway.public import PublicUrl
from helixflow.gateway.routes import Policy, Route
from helixflow.refusals import refusal
from helixflow.rpc import messages

MAX_BODY = 16 * 1024
"""Largest body (bytes): tokens have about 1,000."""
TIMEOUT_S = 10.0
"""Passwords are checked a few at a time: a login may have to wait its turn (seconds)."""
PROVIDER_TIMEOUT_S = 30.0
"""The provider is asked too."""
LONGEST = {
    "email": 320,
    "password": 1024,
    "new_password": 1024,
    "code": 40,
    "keys": 10,
    "refresh_token": 8192,
    "access_token": 8192,
}
"""Longest value of each parameter (characters)."""

JWKS_TIMEOUT_S = 2.0
JWKS_FRESH_S = 5.0
"""The keys are asked for again after this time (seconds): a new one is known to everybody soon."""
JWKS_CACHE = (b"cache-control", b"public, max-age=5")

CALLBACK = "/auth/v1/oidc/callback"
STATE_COOKIE = "__Host-helixflow-oidc"
STATE_S = 600
"""A login at the provider may take this long (seconds)."""
MAX_ANSWER = 4096
"""Longest code or state that a provider sends back (characters)."""

_TOKEN = re.compile(r"[A-Za-z0-9._~-]{1,4096}")
_PLAIN = (b"content-type", b"text/plain; charset=utf-8")
_NO_REFERRER = (b"referrer-policy", b"no-referrer")


class Login:
    """The handlers of /auth/v1 and of the key set."""

    def __init__(self, call: Call, public: PublicUrl) -> None:
        """`call`: of a client that reaches the auth-service."""
        self._call = call
        self._public = public
        self._jwks = b""
        self._jwks_until = 0.0
        self._jwks_lock = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Every route. All of them are open: who calls is what they find out."""
        return [
            Route("POST", "/auth/v1/login", self.login, Policy.PUBLIC),
            Route("POST", "/auth/v1/second-factor", self.enrol_factor, Policy.PUBLIC),
            Route("POST", "/auth/v1/second-factor/confirm", self.confirm_factor, Policy.PUBLIC),
            Route("POST", "/auth/v1/second-factor/remove", self.remove_factor, Policy.PUBLIC),
            Route("POST", "/auth/v1/refresh", self.refresh, Policy.PUBLIC),
            Route("POST", "/auth/v1/logout", self.logout, Policy.PUBLIC),
            Route("GET", "/auth/v1/oidc/start", self.oidc_start, Policy.PUBLIC),
            Route("POST", "/auth/v1/oidc/link", self.oidc_link, Policy.PUBLIC),
            Route("GET", CALLBACK, self.oidc_callback, Policy.PUBLIC),
            Route("GET", "/.well-known/jwks.json", self.jwks, Policy.PUBLIC),
        ]

    async def login(self, request: Request) -> None:
        """POST /auth/v1/login: tokens for a password, which `new_password` replaces, and a code where one is needed."""
        request.extra_headers.append(NO_STORE)
        await self._tokens(request, "Login", await _login_request(request), TIMEOUT_S)

    async def enrol_factor(self, request: Request) -> None:
        """POST /auth/v1/second-factor: a new secret for an authenticator; it counts once it is confirmed."""
        await self._factor(request, "EnrolFactor", ("email", "password"), ("code",))

    async def confirm_factor(self, request: Request) -> None:
        """POST /auth/v1/second-factor/confirm: with the first code; answers with recovery codes."""
        await self._factor(request, "ConfirmFactor", ("email", "password", "code"))

    async def remove_factor(self, request: Request) -> None:
        """POST /auth/v1/second-factor/remove: back to the password alone."""
        await self._factor(request, "RemoveFactor", ("email", "password", "code"))

    async def refresh(self, request: Request) -> None:
        """POST /auth/v1/refresh: new tokens for a refresh token, which is used up."""
        request.extra_headers.append(NO_STORE)
        body = await _strings(request, ("refresh_token",))
        await self._tokens(request, "Refresh", messages.RefreshRequest(**body, address=request.client), TIMEOUT_S)

    async def logout(self, request: Request) -> None:
        """POST /auth/v1/logout: ends the session of a refresh token, or of the access token in the header."""
        request.extra_headers.append(NO_STORE)
        body = await _strings(request, (), ("refresh_token", "access_token"))
        if len(body) > 1:
            raise refusal(InvalidRequest, "access_token: send either refresh_token or access_token", "access_token")
        if not body:
            token = bearer(request.headers.get(b"authorization"))
            if len(token) > LONGEST["access_token"]:
                raise refusal(InvalidRequest, "the Authorization header holds no access token")
            body = {"access_token": token.decode("latin-1")}
        message = messages.LogoutRequest(**body, address=request.client)
        await ask(self._call, "AuthService/Logout", message, request, TIMEOUT_S)
        await request.respond(200, b"{}")

    async def oidc_start(self, request: Request) -> None:
        """GET /auth/v1/oidc/start: sends the browser to the provider."""
        request.extra_headers += [NO_STORE, _NO_REFERRER]
        url, cookie = await self._begin(request)
        await request.respond(302, b"", _PLAIN, [(b"location", url.encode("ascii")), cookie])

    async def oidc_link(self, request: Request) -> None:
        """POST /auth/v1/oidc/link: as a login, but the answer is a URL of the provider, to tie the account to it.

        Whoever logs in there with this browser may log in here so from then on. It takes the password: a stolen token
        must tie nothing.
        """
        request.extra_headers += [NO_STORE, _NO_REFERRER]
        message = await _login_request(request)
        tokens = await ask(self._call, "AuthService/Login", message, request, TIMEOUT_S)
        url, cookie = await self._begin(request, tokens.access_token)
        await request.respond(200, orjson.dumps({"url": url}), headers=[cookie])

    async def _begin(self, request: Request, access_token: str = "") -> tuple[str, tuple[bytes, bytes]]:
        """The provider's URL, and the cookie that this browser keeps until it comes back."""
        message = messages.OidcStartRequest(
            redirect_uri=self._public.of(request, CALLBACK), access_token=access_token, address=request.client
        )
        answer = await ask(self._call, "AuthService/OidcStart", message, request, PROVIDER_TIMEOUT_S)
        url, state = str(answer.url), str(answer.state)
        if not (url.isascii() and url.isprintable() and _TOKEN.fullmatch(state)):
            raise refusal(Internal, "the provider's URL cannot be sent as a header")
        return url, _state_cookie(state, STATE_S)

    async def oidc_callback(self, request: Request) -> None:
        """GET /auth/v1/oidc/callback: the browser is back with a code; answers with tokens.

        The state must be the one that this browser was sent away with, and works once.
        """
        # Whatever comes of it, this state is used up.
        request.extra_headers += [NO_STORE, _NO_REFERRER, _state_cookie("", 0)]
        error = _only(request, "error")
        if error:
            shown = error if _TOKEN.fullmatch(error[:64]) else "an error"
            raise refusal(InvalidCredentials, f"the provider refused the login: {shown[:64]}")
        code, state = _only(request, "code"), _only(request, "state")
        if not code or not state:
            raise refusal(InvalidRequest, "code: the provider sends code and state", "code" if not code else "state")
        kept = request.cookie(STATE_COOKIE)
        if kept is None or not hmac.compare_digest(kept.encode(), state.encode()):
            raise refusal(
                InvalidRequest, "state: this browser did not start this login; begin at /auth/v1/oidc/start", "state"
            )
        message = messages.OidcFinishRequest(
            code=code, state=state, redirect_uri=self._public.of(request, CALLBACK), address=request.client
        )
        await self._tokens(request, "OidcFinish", message, PROVIDER_TIMEOUT_S)

    async def jwks(self, request: Request) -> None:
        """GET /.well-known/jwks.json: the public keys of access tokens (RFC 7517)."""
        if time.monotonic() >= self._jwks_until:
            async with self._jwks_lock:
                if time.monotonic() >= self._jwks_until:
                    await self._renew_jwks(request)
        await request.respond(200, self._jwks, headers=[JWKS_CACHE])

    async def _renew_jwks(self, request: Request) -> None:
        """Keys that are known stay good while nobody answers. Raises Unavailable when none is known."""
        try:
            answer = await ask(self._call, "AuthService/Jwks", messages.JwksRequest(), request, JWKS_TIMEOUT_S)
        except CoreError:
            if not self._jwks:
                raise
        else:
            self._jwks = bytes(answer.json)
        self._jwks_until = time.monotonic() + JWKS_FRESH_S

    async def _factor(
        self, request: Request, method: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> None:
        request.extra_headers.append(NO_STORE)
        body = await _strings(request, required, optional)
        message = messages.FactorRequest(**body, address=request.client)
        answer = await ask(self._call, f"AuthService/{method}", message, request, TIMEOUT_S)
        await request.respond(200, orjson.dumps(messages.plain(answer)))

    async def _tokens(self, request: Request, method: str, message: Any, timeout_s: float) -> None:
        answer = await ask(self._call, f"AuthService/{method}", message, request, timeout_s)
        await request.respond(200, orjson.dumps({"token_type": "Bearer", **messages.plain(answer)}))


async def _login_request(request: Request) -> Any:
    """What a login has in its body."""
    body = await _strings(request, ("email", "password"), ("new_password", "code", "keys"))
    return messages.LoginRequest(**body, address=request.client)


async def _strings(request: Request, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, str]:
    """The body's parameters, all of them strings. Raises InvalidRequest, which repeats no value."""
    if request.query:
        raise refusal(InvalidRequest, "there are no query parameters here: a URL is no place for a secret")
    body = await read_object(request, MAX_BODY)
    known = (*required, *optional)
    for name, value in body.items():
        if name not in known:
            shown = name[:100]
            raise refusal(InvalidRequest, f"{shown}: is not a parameter here; there are {', '.join(known)}", shown)
        if not isinstance(value, str) or not value:
            raise refusal(InvalidRequest, f"{name}: expected a string that is not empty", name)
        if len(value) > LONGEST[name]:
            raise refusal(InvalidRequest, f"{name}: at most {LONGEST[name]} characters", name)
    for name in required:
        if name not in body:
            raise refusal(InvalidRequest, f"{name}: is required", name)
    return body


def _only(request: Request, name: str) -> str:
    """A parameter of the provider's answer; empty when it is missing. Others are ignored, providers add their own."""
    values = request.query.get(name, [""])
    if len(values) > 1 or len(values[0]) > MAX_ANSWER:
        raise refusal(InvalidRequest, f"{name}: stands twice in the query string, or is too long", name)
    return values[0]


def _state_cookie(state: str, max_age_s: int) -> tuple[bytes, bytes]:
    cookie = f"{STATE_COOKIE}={state}; Path=/; Max-Age={max_age_s}; Secure; HttpOnly; SameSite=Lax"
    return b"set-cookie", cookie.encode("ascii")
