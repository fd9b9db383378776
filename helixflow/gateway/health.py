"""Whether the gateway lives, and whether it can serve."""

from datetime import UTC, datetime
from typing import Any, Final

import orjson

from helixflow.gateway.bridge import Bridge
from helixflow.gateway.errors import RETRY_AFTER_S
from helixflow.gateway.http import Request
from helixflow.gateway.services import Services

SERVICE = "api-gateway"
REASONS: Final = {
    "draining": "draining",
    "no_pool": "no inference pool is ready",
    "pool_draining": "the inference pool is draining",
    "engine_loading": "the engine is still being loaded",
    "engine_failed": "the engine has failed and is being restarted",
    "engine_stuck": "the engine stands still and is being restarted",
    "ledger_full": "the record of requests takes no more",
}
"""What a code in `reasons` means."""


def _body(status: str, **more: Any) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return orjson.dumps({"service": SERVICE, "status": status, **more, "timestamp": now})


class Health:
    """The three probes. None of them needs a key, so none tells more than a word."""

    def __init__(self, bridge: Bridge, services: Services) -> None:
        self._bridge = bridge
        self._services = services

    async def health(self, request: Request) -> None:
        """GET /health: the process answers."""
        await request.respond(200, _body("healthy"))

    async def live(self, request: Request) -> None:
        """GET /live: as long as this answers, a restart would not help."""
        await request.respond(200, _body("alive"))

    async def ready(self, request: Request) -> None:
        """GET /ready: 200 when a request would be served, else 503 and why not.

        `reasons` holds codes (`REASONS`), `warnings` what will be a reason when it goes on (`ledger_high`).
        """
        reasons = ["draining"] if self._bridge.draining else [*self._bridge.trouble(), *self._services.trouble()]
        warnings = self._services.warnings()
        more = {"warnings": warnings} if warnings else {}
        if not reasons:
            await request.respond(200, _body("ready", **more))
            return
        headers = [(b"retry-after", b"%d" % RETRY_AFTER_S)]
        words = "; ".join(REASONS.get(reason, reason) for reason in reasons)
        await request.respond(503, _body("not_ready", reason=words, reasons=reasons, **more), headers=headers)
