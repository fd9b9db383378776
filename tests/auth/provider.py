"""An OpenID Connect provider on a real HTTPS socket, which can be told to misbehave."""

import asyncio
import base64
import hashlib
import json
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

from joserfc import jwt
from joserfc.jwk import ECKey

from helixflow.pki.layout import Layout, Role

CLIENT = "helix client"
SECRET = "s3cret:of client"
CALLBACK = "https://gateway.example/auth/v1/oidc/callback"


class TestProvider:
    """Issues ID tokens for whoever `subject` names. Attributes are what tests change."""

    __test__ = False

    def __init__(self) -> None:
        self.key = ECKey.generate_key("P-256", auto_kid=True)
        self.claims: dict[str, Any] = {"sub": "subject-1", "email": "Ann@Example.com", "email_verified": True}
        self.settings: dict[str, Any] = {}
        self.sign: Callable[[dict[str, Any]], str] = self.signed
        self.status = 200
        self.keys: list[Any] | None = None
        self.asked: list[str] = []
        self.issuer = ""
        self._codes: dict[str, dict[str, str]] = {}
        self._server: asyncio.Server | None = None

    async def start(self, pki: Layout) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pair = pki.pair("auth-service", Role.SERVER)
        context.load_cert_chain(pair.cert, pair.key)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        self.issuer = f"https://localhost:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    def authorize(self, url: str) -> tuple[str, str]:
        """What a browser does at the provider: the code and the state that it brings back."""
        query = dict(parse_qsl(urlsplit(url).query))
        assert query["response_type"] == "code"
        assert query["client_id"] == CLIENT
        assert query["code_challenge_method"] == "S256"
        assert "openid" in query["scope"].split()
        code = f"code-{len(self._codes)}"
        self._codes[code] = query
        return code, query["state"]

    def signed(self, claims: dict[str, Any]) -> str:
        return jwt.encode({"alg": "ES256", "kid": self.key.kid}, claims, self.key, algorithms=["ES256"])

    def _discovery(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            **self.settings,
        }

    def _token(self, headers: dict[str, str], form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Checks what a provider has to check (RFC 6749, 4.1.3; RFC 7636, 4.6)."""
        query = self._codes.pop(form.get("code", ""), None)
        methods = self.settings.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        if "client_secret_basic" in methods:
            sent = base64.b64decode(headers.get("authorization", "Basic ").removeprefix("Basic ")).decode()
            client = tuple(parse_qs(f"x={part}")["x"][0] for part in sent.split(":"))
        else:
            client = (form["client_id"], form["client_secret"])
        if client != (CLIENT, SECRET):
            return 401, {"error": "invalid_client"}
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        right = query is not None and query["redirect_uri"] == form["redirect_uri"]
        if query is None or not right or query["code_challenge"] != challenge:
            return 400, {"error": "invalid_grant"}
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": CLIENT,
            "iat": now,
            "exp": now + 300,
            "nonce": query["nonce"],
            **self.claims,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        return 200, {"access_token": "x", "token_type": "Bearer", "id_token": self.sign(claims)}

    def _answer(self, path: str, headers: dict[str, str], body: str) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, {"error": "server_error"}
        if path == "/.well-known/openid-configuration":
            return 200, self._discovery()
        if path == "/keys":
            keys = [self.key.as_dict(private=False)] if self.keys is None else self.keys
            return 200, {"keys": keys}
        if path == "/token":
            return self._token(headers, dict(parse_qsl(body)))
        return 404, {}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
                }
                body = (await reader.readexactly(int(headers.get("content-length", "0")))).decode()
                path = first.split()[1]
                self.asked.append(path)
                status, found = self._answer(path, headers, body)
                content = found if isinstance(found, bytes) else json.dumps(found).encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(content)) + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
