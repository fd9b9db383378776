"""`helixflow serve`: prepares the machine, then keeps every service of it running."""

import asyncio
import shlex
import signal
from collections.abc import Callable

from helixflow import command, log
from helixflow.config import DEFAULT_AUTH, DEFAULT_POOLS, DEVELOPMENT_KEY, Config, model_of
from helixflow.confine.copies import COPY_S, Copies
from helixflow.confine.settle import settle
from helixflow.db.embedded import STOP_TIMEOUT_S
from helixflow.engine.recipe import pool_recipe
from helixflow.errors import EX_UNAVAILABLE, EX_USAGE, StartError
from helixflow.liveness import Pulse, Systemd
from helixflow.options import Address
from helixflow.pki import keeper
from helixflow.process import has_terminal
from helixflow.reaper import Reaper
from helixflow.service import Service

STOP_MARGIN_S = 10.0
"""A service gets its drain time and this much more (seconds) before it is killed."""

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Weights on large pages: a fp32 decode step of one sequence costs a quarter less processor time."""

logger = log.get("supervisor")


def run(config: Config, say: Callable[[str], None]) -> int:
    """Serves until a signal ends it. Returns the exit status. `say` prints a line for the operator.

    Raises ConfigError, before anything is made, when there is no model to serve.
    """
    model_of(config)
    try:
        return asyncio.run(Supervisor(config, say).run())
    except StartError as error:
        logger.error("start failed", error=str(error))
        return EX_USAGE if error.status == EX_USAGE else EX_UNAVAILABLE


async def prepare(config: Config, say: Callable[[str], None]) -> None:
    """Certificates and tables: makes what is missing. Raises StartError."""
    say(f"certificates  {config.certs}")
    await _command("pki", "init", *keeper.options(config))
    if config.database.owner_url:
        say("database      migrations")
        await _command("db", "migrate")


async def build(config: Config, pool: Service, say: Callable[[str], None]) -> None:
    """The engine, when it is missing. Strangers' checkpoints are read here, so it runs as what the pool may be.

    Raises StartError.
    """
    if config.pool.engine == "scripted":
        return
    model, recipe = model_of(config), pool_recipe(config.pool)
    say(f"engine        {config.pool.model_id} ({model}), {recipe.kind} {recipe.precision}")
    # The launcher leaves this folder.
    checkpoint, engines = (str(path.expanduser().absolute()) for path in (model, config.engines))
    await _command("engine", "build", checkpoint, *recipe.arguments(), "--engines", engines, service=pool)


async def _command(*arguments: str, service: Service | None = None) -> None:
    """Runs a sub-command of `helixflow`, confined as `service` is. Raises StartError when it fails."""
    if service is None:
        status = await command.run(*arguments)
    else:
        status = await command.run(*arguments, environ=service.environ, launcher=service.launcher)
    if status:
        raise StartError(f"`helixflow {' '.join(arguments[:2])}` failed; the message above says why", status)


class Supervisor:
    """Ordered start, restart, ordered stop."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._database = Service("database", "db run", config.supervise)
        self._auth = Service("auth-service", "auth", config.supervise)
        self._pool = Service("inference-pool", "pool", config.supervise)
        self._gateway = Service("api-gateway", "gateway", config.supervise)
        self._copies: list[Copies] = []
        accounts = [self._auth] if config.gateway.accounts else []
        embedded = [self._database] if accounts and not config.database.url else []
        self._services = [*embedded, *accounts, self._pool, self._gateway]
        """In the order in which they start; they stop in the opposite one."""
        self._reaper = Reaper(lambda: {service.pid for service in self._services})
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        # Under nohup it stays when the terminal goes.
        self._ends_with_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and has_terminal()

    async def run(self) -> int:
        """Prepares, starts every service in order, watches them, stops them in the opposite order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        start = asyncio.create_task(self._start())
        stop = asyncio.create_task(self._until_stop())
        beside = [asyncio.create_task(work) for work in (Pulse().run(), self._reaper.run(), self._follow())]
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                start.cancel()
                await asyncio.wait({start})
                return 0
            start.result()
            self._say(self._banner())
            Systemd().tell(f"READY=1\nSTATUS=serves on {self._gateway.address}")
            beside.append(asyncio.create_task(keeper.keep(self._config)))
            await self._keep(stop)
            return 0
        finally:
            stop.cancel()
            Systemd().tell("STOPPING=1")
            await self._stop()
            for task in beside:
                task.cancel()

    async def _start(self) -> None:
        await prepare(self._config, self._say)
        await self._settle()
        await build(self._config, self._pool, self._say)
        if self._database in self._services:
            await self._database.start()
        if self._auth in self._services:
            await self._start_auth()
        await self._start_pool()
        address = Address.parse(await self._gateway.start())
        if self._config.gateway.listen.port == 0:
            self._gateway.environ["HELIX_GATEWAY_LISTEN"] = str(address)

    async def _settle(self) -> None:
        """Gives every service its environment, and for root its account, folders and certificates."""
        places = {"database": self._database, "auth": self._auth, "pool": self._pool, "gateway": self._gateway}
        wanted = {name: service for name, service in places.items() if service in self._services}
        found = await asyncio.gather(*(settle(name, self._config) for name in wanted))
        for service, settled in zip(wanted.values(), found, strict=True):
            service.environ, service.launcher = settled.environ, settled.launcher
            if settled.copies is not None:
                self._copies.append(settled.copies)
            if service is self._auth and settled.account is not None:
                self._database.environ["HELIX_DATABASE_CLIENT"] = str(settled.account.uid)
        self._pool.environ = {**LARGE_PAGES, **self._pool.environ}

    async def _follow(self) -> None:
        """Brings new certificates to the services, for ever."""
        while True:
            await asyncio.sleep(COPY_S)
            for copies in self._copies:
                copies.follow()

    async def _start_auth(self) -> None:
        listen = self._config.auth.listen
        address = Address.parse(await self._auth.start())
        if listen.port == 0:
            self._auth.environ["HELIX_AUTH_LISTEN"] = str(address)
        if listen.port == 0 or self._config.gateway.auth == DEFAULT_AUTH:
            self._gateway.environ["HELIX_GATEWAY_AUTH"] = str(address.from_here)

    async def _start_pool(self) -> None:
        pool = self._config.pool.listen
        address = Address.parse(await self._pool.start())
        if pool.port == 0:
            # A service keeps the port it got, so that others find it again after a restart.
            self._pool.environ["HELIX_POOL_LISTEN"] = str(address)
        if pool.port == 0 or self._config.gateway.pools == DEFAULT_POOLS:
            self._gateway.environ["HELIX_GATEWAY_POOLS"] = str(address.from_here)

    async def _keep(self, stop: asyncio.Task[None]) -> None:
        """Keeps every service up until it is time to stop: what worked once is tried again, whatever fails."""
        keepers = [asyncio.create_task(service.keep()) for service in self._services]
        try:
            await asyncio.wait({stop, *keepers}, return_when=asyncio.FIRST_COMPLETED)
            for task in keepers:
                if task.done():
                    task.result()
        finally:
            for task in keepers:
                task.cancel()

    async def _until_stop(self) -> None:
        """Returns at the first SIGINT or SIGTERM, or when the terminal is closed; hands SIGHUP on to the services."""
        while await self._signals.get() == signal.SIGHUP:
            if self._ends_with_terminal and not has_terminal():
                logger.info("the terminal was closed")
                return
            for copies in self._copies:
                copies.follow()
            for service in self._services:
                service.reload()

    async def _stop(self) -> None:
        cut = asyncio.create_task(self._cut_on_second_signal())
        drain_s = {
            self._gateway: self._config.gateway.drain_timeout_s,
            self._pool: self._config.pool.drain_timeout_s,
            self._auth: self._config.auth.drain_timeout_s,
            self._database: STOP_TIMEOUT_S,
        }
        for service in reversed(self._services):
            await service.stop(drain_s[service] + STOP_MARGIN_S)
        cut.cancel()
        self._say("stopped")

    async def _cut_on_second_signal(self) -> None:
        while True:
            if await self._signals.get() != signal.SIGHUP:
                for service in (self._gateway, self._pool):
                    service.send(signal.SIGTERM)

    def _key_line(self) -> str:
        if self._config.development:
            return f"{DEVELOPMENT_KEY}  (this profile only)"
        return "make one with `helixflow key add NAME`"

    def _banner(self) -> str:
        config = self._config
        bound = Address.parse(self._gateway.address)
        scheme = "http" if config.gateway.plain_http else "https"
        host = Address("localhost" if bound.loopback or bound.everywhere else bound.host, bound.port)
        url = f"{scheme}://{host}"
        ca = config.certs.resolve() / "helixflow-ca.pem"
        key = DEVELOPMENT_KEY if config.development else "$API_KEY"
        names = ", ".join((config.pool.model_id, *config.pool.aliases))
        body = f'{{"model": "{config.pool.model_id}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        tls = [] if config.gateway.plain_http else [f"  CA file  {ca}"]
        option = "" if config.gateway.plain_http else f" --cacert {shlex.quote(str(ca))}"
        return "\n".join(
            [
                "",
                f"HelixFlow is ready ({config.profile} profile)",
                "",
                f"  URL      {url}/v1",
                *tls,
                f"  Model    {names}",
                f"  Key      {self._key_line()}",
                "",
                f"  curl{option} {url}/v1/chat/completions \\",
                f'    -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\',
                f"    -d '{body}'",
                "",
                "Ctrl-C stops everything.",
            ]
        )
