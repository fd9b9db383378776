"""GET /admin/v1/status: the counters of the worker that answers, and of the front door before all of them."""

from dataclasses import asdict
from typing import Any

import orjson

from helixflow.core_rs import PermissionDenied, log_counts
from helixflow.gateway.accounting import Metered
from helixflow.gateway.board import Board
from helixflow.gateway.credentials import Credentials
from helixflow.gateway.http import Request
from helixflow.gateway.routes import Policy, Route
from helixflow.ledger.shipper import Shipper
from helixflow.limits.limiter import Limiter
from helixflow.refusals import refusal

PATH = "/admin/v1/status"
ROLES = ("owner", "admin")


class Status:
    """What this worker has counted since its start."""

    def __init__(
        self,
        metered: Metered,
        credentials: Credentials,
        limiter: Limiter,
        shipper: Shipper,
        board: Board | None = None,
    ) -> None:
        """`board`: where the main process says what the front door has counted."""
        self._board = board
        self._metered = metered
        self._credentials = credentials
        self._limiter = limiter
        self._shipper = shipper

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("GET", PATH, self.show, Policy.ACCOUNT)]

    async def show(self, request: Request) -> None:
        """Raises PermissionDenied for others than owners and administrators of the first organisation.

        The counters are those of all organisations together.
        """
        caller = request.caller
        if not caller.installation or caller.administers not in ROLES:
            raise refusal(PermissionDenied, "owners and administrators of the first organisation only")
        await request.respond(200, orjson.dumps(self._counters()), headers=[(b"cache-control", b"no-store")])

    def _counters(self) -> dict[str, Any]:
        lost, waiting = log_counts()
        return {
            "front": self._board.read() if self._board is not None else {},
            "requests": dict(self._metered.counts),
            "ledger": {
                **asdict(self._metered.spool.stats),
                **asdict(self._shipper.stats),
                "pending": self._metered.spool.pending,
                "bytes": self._metered.spool.held,
                "high": self._metered.spool.high,
                "refuses": self._metered.spool.refuses(),
            },
            "credentials": {
                "remembered": self._credentials.remembered,
                "listening": self._credentials.listening,
                "served_from_grace": self._credentials.served_from_grace,
            },
            "limits": {"fallbacks": self._limiter.fallbacks, "gateways": self._limiter.gateways},
            "log": {"lines_lost": lost, "bytes_waiting": waiting},
        }
