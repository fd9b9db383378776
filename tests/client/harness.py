"""Pools with a scripted engine in this process, and an event loop that waits for calls."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from helixflow.core_rs import (
    Call,
    CoreError,
    GenerateRequest,
    Pool,
    PoolClient,
    PoolInfo,
    PoolOptions,
    PoolStats,
    Prompt,
    TlsFiles,
)
from helixflow.engine.scripted import Gate, ScriptedEngine
from helixflow.pki.layout import Layout, Pair

MODEL = Path(__file__).parent.parent / "fixtures" / "golden" / "llama-tiny"
LIMIT_S = 10.0
T = TypeVar("T")


def files(layout: Layout, pair: Pair) -> TlsFiles:
    """The identity of one side."""
    return TlsFiles(str(layout.ca_cert), str(pair.cert), str(pair.key))


class Served:
    """One pool with its engine thread."""

    def __init__(
        self,
        *,
        tokens: int = 4,
        slots: int = 4,
        max_len: int = 4096,
        listen: str = "127.0.0.1:0",
        tls: TlsFiles | None = None,
        gate: Gate | None = None,
        fail_at_step: int | None = None,
        model_id: str = "tiny",
        queue_requests: int = 64,
    ) -> None:
        self.gate = gate
        self._engine = ScriptedEngine.from_model(
            MODEL, slots=slots, max_len=max_len, tokens=tokens, gate=gate, fail_at_step=fail_at_step
        )
        options = PoolOptions(model_id=model_id, aliases=["gpt-4"], created=7, queue_requests=queue_requests)
        self.pool = Pool(str(MODEL), options)
        self.address = self.pool.serve(listen, tls, allow=["api-gateway"])
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.pool.run(self._engine)
        except Exception as error:  # noqa: BLE001 (what a broken engine raises is the test's business)
            self.failure = error

    def stop(self) -> None:
        """Cuts what runs and ends the engine thread."""
        self.pool.stop()
        if self.gate is not None:
            self.gate.open()
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()


@contextmanager
def serving(**options: Any) -> Iterator[Served]:
    """A pool for one test."""
    served = Served(**options)
    try:
        yield served
    finally:
        served.stop()


class Harness:
    """A client on the running event loop."""

    def __init__(self, addresses: list[str], tls: TlsFiles | None = None, **options: Any) -> None:
        self.client = PoolClient(addresses, tls, **options)
        self.wakes = 0
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Event] = {}
        self._loop.add_reader(self.client.fileno(), self._ready)

    def _ready(self) -> None:
        self.wakes += 1
        for number in self.client.ready():
            self._waiting.setdefault(number, asyncio.Event()).set()

    async def changed(self, call: Call) -> None:
        """Waits for a wake-up of this call."""
        event = self._waiting.setdefault(call.id, asyncio.Event())
        await asyncio.wait_for(event.wait(), LIMIT_S)
        event.clear()

    async def until(self, call: Call, done: Callable[[Call], bool]) -> None:
        """Waits until `done(call)`, looking at every wake-up."""
        while not done(call):
            await self.changed(call)

    async def finish(self, call: Call) -> bytes:
        """Reads a call to its end."""
        out = bytearray()
        while True:
            done = call.done
            out += call.take()
            if done:
                return bytes(out)
            await self.changed(call)

    async def pools(self, done: Callable[[list[PoolInfo]], bool]) -> list[PoolInfo]:
        """Waits until `done(pools)`; the states come from the network, so they are polled."""
        return await poll(self.client.pools, done)

    async def ready(self) -> None:
        """Waits until every pool is ready."""
        await self.pools(lambda pools: all(pool.state == "ready" for pool in pools))

    def chat(self, text: str = "Hello", *, stream: bool = True, usage: bool = False, **options: Any) -> Call:
        """Starts a chat."""
        prompts = [Prompt.chat([("user", text, None)])]
        return self.client.chat(
            request(prompts=prompts, **options),
            completion_id="chatcmpl-1",
            created=5,
            stream=stream,
            include_usage=usage,
        )

    async def failure(self, call: Call) -> CoreError:
        """Waits for the end of a call and returns the error that `take` raises."""
        await self.until(call, lambda call: call.done)
        try:
            taken = call.take()
        except CoreError as error:
            return error
        raise AssertionError(f"no error, but {taken!r}")


async def poll(read: Callable[[], T], done: Callable[[T], bool]) -> T:
    """Reads until `done`, at most `LIMIT_S` seconds."""
    async with asyncio.timeout(LIMIT_S):
        while not done(value := read()):  # noqa: ASYNC110 (the state of another thread has no event)
            await asyncio.sleep(0.005)
    return value


async def idle(served: Served, running: int = 0) -> PoolStats:
    """Waits until a pool runs no more than `running` sequences and queues none."""
    return await poll(served.pool.stats, lambda stats: stats.running <= running and stats.queued == 0)


def request(model: str = "tiny", **options: Any) -> GenerateRequest:
    """A request with the defaults of the tests."""
    options.setdefault("prompts", [Prompt.text("Hello")])
    return GenerateRequest(request_id="req-1", model=model, **options)


def run(test: Callable[[Harness], Awaitable[None]], addresses: list[str], tls: Any = None, **options: Any) -> None:
    """Runs a test on an event loop with a client of these pools."""

    async def main() -> None:
        harness = Harness(addresses, tls, **options)
        try:
            await test(harness)
        finally:
            asyncio.get_running_loop().remove_reader(harness.client.fileno())
            harness.client.close()

    asyncio.run(main())


def events(data: bytes) -> list[Any]:
    """The JSON of every event but the last, which must be `[DONE]`."""
    parts = data.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], data[-200:]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def text_of(chunks: list[Any]) -> str:
    """The text of the first choice of a streamed chat."""
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk.get("choices", [])
        if choice["index"] == 0
    )
