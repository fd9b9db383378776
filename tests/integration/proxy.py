"""A TCP proxy between a service and its database or Redis: passes on, delays, or refuses, as the test says."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 16


class Proxy:
    """Listens on a loopback port and connects to a Unix socket. It has a thread and an event loop of its own."""

    def __init__(self, target: Path) -> None:
        """Use `proxy`."""
        self.port = 0
        self.delay_s = 0.0
        """Every piece that passes waits this long (seconds), in both directions."""
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")

    def start(self) -> None:
        """Listens."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(5)

    def stop(self) -> None:
        """Cuts everything."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                far_reader, far_writer = await asyncio.open_unix_connection(str(self._target))
                try:
                    there, back = self._pass(reader, far_writer), self._pass(far_reader, writer)
                    ways = {asyncio.create_task(there), asyncio.create_task(back)}
                    try:
                        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for way in ways:
                            way.cancel()
                        await asyncio.gather(*ways, return_exceptions=True)
                finally:
                    far_writer.transport.abort()
            finally:
                writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(data)
            await writer.drain()


@contextlib.contextmanager
def proxy(target: Path) -> Iterator[Proxy]:
    """A proxy to a Unix socket, which need not be there yet."""
    running = Proxy(target)
    running.start()
    try:
        yield running
    finally:
        running.stop()
