"""Between asyncio and the pool client: who runs, who is woken, who has gone away."""

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from helixflow.config import Config
from helixflow.core_rs import Call, CoreError, Draining, ModelInfo, PoolClient
from helixflow.gateway.certificates import GatewayFiles
from helixflow.gateway.http import ClientGone, Receive
from helixflow.refusals import refusal

WATCH_AFTER_S = 0.02
"""A call this old (seconds) is watched for a disconnect. Most are over by then, and a watch costs more than they do."""
NAMES_S = 1.0
"""Aliases and lengths are looked up again after this time (seconds)."""
UNBOUNDED = 2**31 - 1
"""Positions of a model that nobody knows."""


class Running:
    """One call from its start to its end. Use it as a context manager: leaving it frees the work at the pool."""

    __slots__ = (
        "_bridge",
        "_closed",
        "_failure",
        "_future",
        "_interval",
        "_loop",
        "_receive",
        "_speaking",
        "_spoke",
        "_stall_s",
        "_task",
        "_timer",
        "_woken",
        "call",
        "silent",
        "stalled",
    )

    def __init__(self, bridge: "Bridge", loop: asyncio.AbstractEventLoop, call: Call, receive: Receive) -> None:
        self.call = call
        self.silent = False
        self._bridge = bridge
        self._loop = loop
        self._receive = receive
        self._future: asyncio.Future[None] | None = None
        self._woken = False
        self._closed = False
        self._failure: ClientGone | CoreError | None = None
        self.stalled = False
        self._interval = 0.0
        self._stall_s = 0.0
        self._speaking = False
        self._spoke = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if not self.call.done:
            self.call.cancel()
        self._bridge.forget(self)

    async def changed(self) -> None:
        """Waits for news of the call. Raises ClientGone, or the error that the gateway ended the call with."""
        await self._news()
        if self._failure is not None:
            raise self._failure

    async def settled(self) -> None:
        """Ends the call if it still runs, and waits until the pool has told what it counted: a second at most."""
        if not self.call.done:
            self.call.cancel()
        while not self.call.done:
            await self._news()

    async def _news(self) -> None:
        if not self._woken:
            self._future = self._loop.create_future()
            await self._future
            self._future = None
        self._woken = False

    def wake(self) -> None:
        """Lets `changed` return."""
        self._woken = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def end(self, reason: ClientGone | CoreError) -> None:
        """Ends the call: its work is cancelled, and `changed` raises the reason at once."""
        if self._failure is None and not self._closed:
            self._failure = reason
            self.call.cancel()
            self.wake()

    def keep_alive(self, interval_s: float, stall_s: float) -> None:
        """From now on wakes the call and sets `silent` whenever `interval_s` seconds passed without `spoke`.

        When a client does not take what it is sent for `stall_s` seconds, `stalled` is set and the running task is
        cancelled: nothing else ends a wait for a reader.
        """
        self._interval = interval_s
        self._stall_s = stall_s
        self._task = asyncio.current_task()
        self._spoke = self._loop.time()
        self._timer = self._loop.call_later(interval_s, self._tick)

    def speaks(self) -> None:
        """Something is about to be sent to the client."""
        self.silent = False
        self._speaking = True
        self._spoke = self._loop.time()

    def spoke(self) -> None:
        """The client, or a buffer on the way, has taken it."""
        self._speaking = False
        self._spoke = self._loop.time()

    def _tick(self) -> None:
        passed = self._loop.time() - self._spoke
        left = self._interval - passed
        if self._speaking:
            left = self._stall_s - passed
            if left < 0.001 and self._task is not None:
                self.stalled = True
                self._task.cancel()
                return
        elif left < 0.001:
            self.silent = True
            self.wake()
            left = self._interval
        self._timer = self._loop.call_later(max(0.001, min(left, self._interval)), self._tick)

    def watch(self) -> None:
        """Notices when the client goes away. After the body, only `receive` tells."""
        if not self._closed:
            asyncio.ensure_future(self._receive()).add_done_callback(self._heard)

    def _heard(self, message: "asyncio.Future[Any]") -> None:
        if self._closed:
            return
        heard = None if message.cancelled() or message.exception() else message.result()
        if isinstance(heard, dict) and heard.get("type") != "http.disconnect":
            self.watch()  # the empty end of the body comes first
        else:
            self.end(ClientGone())


class Bridge:
    """The pool client of one worker, and the calls that run through it. Belongs to one event loop."""

    def __init__(self, client: PoolClient) -> None:
        self.draining = False
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, Running] = {}
        self._young: deque[tuple[float, Running]] = deque()
        self._sweeping = False
        self._on_idle: Callable[[], None] | None = None
        self._names: dict[str, str] = {}
        self._seen: set[str] = set()
        self._positions: dict[str, int] = {}
        self._variables: dict[str, frozenset[str]] = {}
        self._names_until = 0.0
        self._loop.add_reader(client.fileno(), self._wake_ready)

    @classmethod
    def connect(cls, config: Config) -> "Bridge":
        """Connects to the pools of the configuration with the gateway's client certificate. Raises TlsError."""
        options = config.gateway
        client = PoolClient(
            [str(address) for address in options.pools],
            GatewayFiles.of(config).to_pools(),
            expect_service="inference-pool",
            stream_buffer_bytes=options.stream_buffer_bytes,
        )
        return cls(client)

    def admit(self) -> PoolClient:
        """The client for one new call. Raises Draining."""
        if self.draining:
            raise refusal(Draining, "the gateway is about to stop; send the request again")
        return self._client

    def follow(self, call: Call, receive: Receive) -> Running:
        """Takes charge of a call that was just started."""
        running = Running(self, self._loop, call, receive)
        self._running[call.id] = running
        self._young.append((self._loop.time() + WATCH_AFTER_S, running))
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(WATCH_AFTER_S, self._sweep)
        return running

    def forget(self, running: Running) -> None:
        """Lets go of a call that is over."""
        self._running.pop(running.call.id, None)
        if self._on_idle is not None and not self._running:
            self._on_idle()

    def models(self) -> list[ModelInfo]:
        """Models of the pools that are ready now."""
        return self._client.models()

    def trouble(self) -> list[str]:
        """Why no pool takes requests, in codes; empty when one does."""
        if self._client.models():
            return []
        pools = self._client.pools()
        told = {pool.reason for pool in pools if pool.reason.startswith("engine_")}
        if any(pool.state == "draining" for pool in pools):
            told.add("pool_draining")
        return sorted(told) or ["no_pool"]

    def canonical(self, name: str) -> str:
        """The model behind an alias; `name` itself when it is none. At most a second old."""
        self._look_up()
        return self._names.get(name, name)

    def has_seen(self, name: str) -> bool:
        """Whether a pool has had this model, or a model of this alias, since this worker started."""
        self._look_up()
        return name in self._seen

    def positions(self, name: str) -> int:
        """The most tokens that prompt and answer of this model may have; `UNBOUNDED` while no pool tells."""
        self._look_up()
        return self._positions.get(self._names.get(name, name), UNBOUNDED)

    def template_variables(self, name: str) -> frozenset[str]:
        """Variables of the model's chat template that a request may set."""
        self._look_up()
        return self._variables.get(self._names.get(name, name), frozenset())

    def _look_up(self) -> None:
        now = self._loop.time()
        if now >= self._names_until:
            models = self._client.models()
            self._names = {alias: model.id for model in models for alias in model.aliases}
            self._seen.update(self._names, (model.id for model in models))
            self._positions = {model.id: model.max_model_len for model in models}
            self._variables = {model.id: frozenset(model.template_variables) for model in models}
            self._names_until = now + NAMES_S

    @property
    def outstanding(self) -> int:
        """Calls that run."""
        return len(self._running)

    def drain(self, on_idle: Callable[[], None]) -> None:
        """Takes nothing new; calls `on_idle` once nothing runs any more, which may be now."""
        self.draining = True
        self._on_idle = on_idle
        if not self._running:
            on_idle()

    def cut(self) -> None:
        """Ends everything that runs as Draining."""
        for running in list(self._running.values()):
            running.end(refusal(Draining, "the gateway stopped before the answer was complete; send the request again"))

    def close(self) -> None:
        """Gives the connections back."""
        self._loop.remove_reader(self._client.fileno())
        self._client.close()

    def _wake_ready(self) -> None:
        for number in self._client.ready():
            running = self._running.get(number)
            if running is not None:
                running.wake()

    def _sweep(self) -> None:
        young = self._young
        now = self._loop.time() + 0.001
        while young and young[0][0] <= now:
            young.popleft()[1].watch()
        self._sweeping = bool(young)
        if young:
            self._loop.call_later(young[0][0] - now + 0.001, self._sweep)
