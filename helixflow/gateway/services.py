"""What a worker needs beside its pools: the auth-service, and what keeps serving without it."""

import asyncio
import uuid
from collections.abc import Coroutine
from functools import partial
from typing import Any

from helixflow import log
from helixflow.config import Config
from helixflow.core_rs import CoreError
from helixflow.errors import StartError
from helixflow.gateway.accounting import Accountant, Metered, Prices, Unmetered
from helixflow.gateway.admin import Admin
from helixflow.gateway.auth import DevelopmentKeys, KeyStore
from helixflow.gateway.board import Board
from helixflow.gateway.certificates import GatewayFiles
from helixflow.gateway.credentials import Credentials
from helixflow.gateway.login import Login
from helixflow.gateway.public import PublicUrl
from helixflow.gateway.routes import Route
from helixflow.gateway.status import Status
from helixflow.ledger.shipper import Shipper
from helixflow.ledger.spool import Spool
from helixflow.limits.limiter import Limiter
from helixflow.limits.remote import lease_over
from helixflow.limits.returned import give_back
from helixflow.rpc import messages
from helixflow.rpc.client import Client

DRAIN_S = 3.0
"""A worker that ends hands over what its spool holds within this time (seconds); what is left stays on the disk."""
PRICES_RETRY_S = 1.0

logger = log.get("gateway")


class Services:
    """Keys, limits and ledger of one worker. Belongs to one event loop."""

    def __init__(self, keys: KeyStore, accountant: Accountant) -> None:
        """Use `Services.open`."""
        self.keys = keys
        self.accountant = accountant

    @classmethod
    async def open(cls, config: Config, board: Board | None = None) -> "Services":
        """Starts what the configuration asks for. Raises TlsError, or StartError for a spool that cannot be used.

        `board`: where the main process says what the front door has counted.
        """
        if not config.gateway.accounts:
            return cls(DevelopmentKeys(), Unmetered())
        return await Connected.open(config, board)

    def routes(self) -> list[Route]:
        """Routes that exist with accounts only."""
        return []

    def trouble(self) -> list[str]:
        """Why requests would be refused now, in codes."""
        return []

    def warnings(self) -> list[str]:
        """What will refuse requests when it goes on like this, in codes."""
        return []

    async def close(self) -> None:
        """Ends what `open` started."""


class Connected(Services):
    """A worker with an auth-service."""

    def __init__(
        self, config: Config, client: Client, spool: Spool, gateway: uuid.UUID, board: Board | None = None
    ) -> None:
        """Use `Services.open`."""
        name = str(gateway)
        self._client = client
        self._board = board
        self._public = PublicUrl(config)
        self._spool = spool
        self._prices = Prices()
        self._credentials = Credentials(client, config, name)
        self._credentials.on_prices = self._ask_prices
        self._limiter = Limiter(name, lease_over(client), config.limits, gateways=config.gateway.workers)
        self._shipper = Shipper(spool, self._append, config.ledger, partial(give_back, lease_over(client)))
        self._metered = Metered(self._limiter, spool, self._prices, config.limits, gateway.bytes)
        self._tasks: set[asyncio.Task[None]] = set()
        self._pricing: asyncio.Task[None] | None = None
        self._shipping = asyncio.create_task(self._shipper.run())
        super().__init__(self._credentials, self._metered)

    @classmethod
    async def open(cls, config: Config, board: Board | None = None) -> "Connected":
        """Opens the spool and connects in the background: an auth-service that is away stops nobody from starting."""
        gateway = uuid.uuid4()
        try:
            spool = Spool(config.ledger.spool, config.ledger)
        except OSError as error:
            raise StartError(f"the ledger's spool {config.ledger.spool} cannot be used: {error.strerror}") from error
        try:
            client = Client([str(address) for address in config.gateway.auth], GatewayFiles.of(config).to_pools())
        except CoreError:
            spool.close()
            raise
        services = cls(config, client, spool, gateway, board)
        services._keep(services._credentials.watch())
        services._keep(services._limiter.run())
        return services

    def routes(self) -> list[Route]:
        """Administration, login, and the state of this worker."""
        status = Status(self._metered, self._credentials, self._limiter, self._shipper, self._board)
        return [*Admin(self._client.call).routes(), *Login(self._client.call, self._public).routes(), *status.routes()]

    def trouble(self) -> list[str]:
        """The spool is full, or its disk."""
        return ["ledger_full"] if self._spool.refuses() else []

    def warnings(self) -> list[str]:
        """The spool fills up."""
        return ["ledger_high"] if self._spool.high else []

    async def close(self) -> None:
        """Hands over what the ledger still holds, returns what the limits have lent, and disconnects."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._limiter.close()
        await self._shipper.drain(DRAIN_S)
        await asyncio.gather(self._shipping, return_exceptions=True)
        self._client.close()

    def _keep(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task of the gateway failed", exc_info=error)

    async def _append(self, spool: str, records: list[bytes]) -> None:
        request = messages.AppendUsageRequest(spool=spool, records=records)
        await self._client.call("AuthService/AppendUsage", request, timeout_s=30.0)

    def _ask_prices(self) -> None:
        if self._pricing is not None:
            self._pricing.cancel()  # one that still waits for its answer, or for an auth-service, is out of date
        self._pricing = self._keep(self._load_prices())

    async def _load_prices(self) -> None:
        while True:
            try:
                self._prices.replace(await self._client.call("AuthService/Prices", messages.PricesRequest()))
            except CoreError as error:
                logger.warning("the prices are not known yet", error=str(error))
                await asyncio.sleep(PRICES_RETRY_S)
            else:
                return
