"""Whether the gateway lives, and whether it can serve."""

from datetime import UTC, datetime

import orjson

from helixflow.gateway.bridge import Bridge
from helixflow.gateway.errors import RETRY_AFTER_S
from helixflow.gateway.http import Request

SERVICE = "api-gateway"


def _body(status: str, **more: str) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return orjson.dumps({"service": SERVICE, "status": status, **more, "timestamp": now})


class Health:
    """The three probes. None of them needs a key, so none tells more than a word."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    async def health(self, request: Request) -> None:
        """GET /health: the process answers."""
        await request.respond(200, _body("healthy"))

    async def live(self, request: Request) -> None:
        """GET /live: as long as this answers, a restart would not help."""
        await request.respond(200, _body("alive"))

    async def ready(self, request: Request) -> None:
        """GET /ready: 200 when a pool is reachable and has a model, else 503 and why not."""
        if self._bridge.draining:
            reason = "draining"
        elif not self._bridge.models():
            reason = "no inference pool is ready"
        else:
            await request.respond(200, _body("ready"))
            return
        headers = [(b"retry-after", b"%d" % RETRY_AFTER_S)]
        await request.respond(503, _body("not_ready", reason=reason), headers=headers)
