"""The ASGI application: finds the route, checks the caller, answers, writes one log line."""

import time
from collections.abc import Iterable

from helixflow import log
from helixflow.config import Config
from helixflow.core_rs import CoreError, Internal, PermissionDenied
from helixflow.gateway.auth import Principal, authenticate
from helixflow.gateway.bridge import Bridge
from helixflow.gateway.cors import Cors
from helixflow.gateway.errors import envelope, headers_of
from helixflow.gateway.health import Health
from helixflow.gateway.http import ClientGone, Limits, Receive, Request, Scope, Send
from helixflow.gateway.inference import CLIENT_GONE, Inference
from helixflow.gateway.models import Models
from helixflow.gateway.routes import Allowed, Policy, Route, Router
from helixflow.gateway.services import Services
from helixflow.refusals import refusal

HSTS = (b"strict-transport-security", b"max-age=31536000")

logger = log.get("gateway")

HEALTH = frozenset({"/health", "/live", "/ready"})
"""Routes that are asked every few seconds, by machines."""


VIEWER = "viewer"
"""The role that reads only: its keys may not spend anything."""


def routes(bridge: Bridge, config: Config, services: Services) -> list[Route]:
    """Every route of the gateway."""
    health = Health(bridge, services)
    models = Models(bridge)
    inference = Inference(bridge, config.gateway, services.accountant)
    return [
        Route("GET", "/health", health.health, Policy.PUBLIC),
        Route("GET", "/live", health.live, Policy.PUBLIC),
        Route("GET", "/ready", health.ready, Policy.PUBLIC),
        Route("GET", "/v1/models", models.index, Policy.PUBLIC_IN_DEVELOPMENT),
        Route("GET", "/v1/models/{id}", models.show, Policy.PUBLIC_IN_DEVELOPMENT),
        Route("POST", "/v1/chat/completions", inference.chat, Policy.KEY),
        Route("POST", "/v1/completions", inference.complete, Policy.KEY),
        Route("POST", "/tokenize", inference.tokenize, Policy.KEY),
        Route("POST", "/detokenize", inference.detokenize, Policy.KEY),
        *services.routes(),
    ]


class Gateway:
    """The application of one worker."""

    def __init__(
        self, config: Config, bridge: Bridge, services: Services, table: Iterable[Route] | None = None
    ) -> None:
        """`table`: other routes than the gateway's own, for tests. Raises StartError for a route without a policy."""
        self.bridge = bridge
        self._keys = services.keys
        self._router = Router(routes(bridge, config, services) if table is None else table)
        self._cors = Cors(config.gateway.cors_origins) if config.gateway.cors_origins else None
        self._open = {Policy.PUBLIC, Policy.PUBLIC_IN_DEVELOPMENT} if config.development else {Policy.PUBLIC}
        headers = [(b"server", b"helixflow"), (b"x-content-type-options", b"nosniff")]
        if not config.development:
            # In development the host is localhost, whose other ports the header would bind too.
            headers.append(HSTS)
        self._log_health = config.log.health
        self._limits = Limits(config.gateway.max_body_bytes, tuple(headers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request. Nothing escapes: an unexpected error is a 500 with the request's id."""
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway does not speak {scope['type']}")
        request = Request(scope, receive, send, self._limits)
        try:
            await self._handle(request)
        except ClientGone:
            request.status = CLIENT_GONE
        except CoreError as error:
            await self._refuse(request, error)
        except Exception:
            logger.exception("request failed", request_id=request.id, route=request.route)
            await self._refuse(
                request, refusal(Internal, f"an unexpected error; the log has it under the request id {request.id}")
            )
        self._log(request)
        if request.unread:
            await request.discard()

    async def _handle(self, request: Request) -> None:
        if self._cors is not None and self._cors.apply(request):
            await request.respond(204, b"", headers=self._cors.preflight(request))
            return
        route, request.path = self._router.locate(request.method, request.path)
        request.route = route.path
        if route.policy not in self._open:
            _authorise(await authenticate(request, self._keys), route)
        await route.handler(request)

    async def _refuse(self, request: Request, error: CoreError) -> None:
        request.facts["error"] = error.code
        if request.status:
            return  # the answer has begun: the server closes the connection, which tells the client
        headers = headers_of(error)
        if isinstance(error, Allowed):
            headers.append((b"allow", error.methods.encode()))
        await request.respond(error.http_status, envelope(error), headers=headers)

    def _log(self, request: Request) -> None:
        if request.route in HEALTH and request.status < 400 and not self._log_health:
            return
        if request.status >= 400:
            # Whoever sends what is refused decides how often: repetitions are summed up per address and status.
            request.facts["address"] = request.client or "unknown"
        logger.info(
            "request",
            request_id=request.id,
            method=request.method,
            route=request.route,
            status=request.status,
            duration_ms=round((time.perf_counter() - request.started) * 1000, 2),
            principal=request.principal,
            **request.facts,
        )


def _authorise(principal: Principal, route: Route) -> None:
    """Raises PermissionDenied. What an account may do is the auth-service's to say."""
    if route.policy is Policy.KEY and principal.role == VIEWER:
        raise refusal(PermissionDenied, "the role viewer reads only: ask an administrator for the role member")
    if route.policy is Policy.ACCOUNT and not principal.user_id:
        raise refusal(PermissionDenied, "this needs an account; the gateway runs without accounts")
