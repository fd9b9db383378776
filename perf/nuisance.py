"""Clients that hold a front door's attention: `python -m perf.nuisance KIND COUNT PORT CA ADDRESS`.

Prints how many connections stand, then keeps them (or opens what was closed anew) until its input ends.
"""

import asyncio
import contextlib
import ssl
import sys
from collections.abc import Awaitable, Callable

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer demo-key\r\n"
JSON = b"content-type: application/json\r\n"
BODY = b'{"model": "gpt-4", "stream": true, "max_tokens": 400, "ignore_eos": true, "messages": [%s]}'
MESSAGE = b'{"role": "user", "content": "Hello"}'
AGAIN_S = 10.0
"""Who was closed comes again after this time (seconds)."""
AT_ONCE = 64
"""Handshakes at a time."""

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


async def silent(reader: Reader, _writer: Writer) -> None:
    """Says nothing after the handshake."""
    await reader.read()


async def slowloris(_reader: Reader, writer: Writer) -> None:
    """A head that never ends, a byte each second."""
    writer.write(HEAD + b"x-filler: ")
    while True:
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(1)


async def dribble(_reader: Reader, writer: Writer) -> None:
    """A body of 1 MB, a byte each second."""
    writer.write(HEAD + JSON + b"content-length: 1000000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(1)


async def sip(reader: Reader, writer: Writer) -> None:
    """Reads its stream at 10 bytes a second."""
    body = BODY % MESSAGE
    writer.write(HEAD + JSON + b"content-length: %d\r\n\r\n" % len(body) + body)
    read = b"x"
    while read:
        await asyncio.sleep(1)
        read = await reader.read(10)


async def idle(reader: Reader, writer: Writer) -> None:
    """One request, then nothing."""
    writer.write(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await reader.readuntil(b"}")
    await reader.read()


KINDS: dict[str, Callable[[Reader, Writer], Awaitable[None]]] = {
    each.__name__: each for each in (silent, slowloris, dribble, sip, idle)
}


class Crowd:
    """Connections of one kind, opened again when they are closed."""

    def __init__(self, kind: str, port: int, ca: str, address: str) -> None:
        self._act = KINDS[kind]
        self._again = kind != "idle"
        self._where = ("127.0.0.1", port)
        self._address = address
        self._context = ssl.create_default_context(cafile=ca)
        self._turn = asyncio.Semaphore(AT_ONCE)
        self.standing = 0

    async def one(self) -> None:
        """One client, for ever."""
        while True:
            with contextlib.suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError):
                await self._once()
            if not self._again:
                return
            await asyncio.sleep(AGAIN_S)

    async def _once(self) -> None:
        async with self._turn:
            reader, writer = await asyncio.open_connection(
                *self._where,
                ssl=self._context,
                server_hostname="localhost",
                local_addr=(self._address, 0),
                limit=1024,
            )
        self.standing += 1
        try:
            await self._act(reader, writer)
        finally:
            self.standing -= 1
            writer.transport.abort()


async def main() -> None:
    """Runs until standard input ends; tells each second how many connections stand."""
    kind, count, port, ca, address = sys.argv[1:]
    crowd = Crowd(kind, int(port), ca, address)
    clients = [asyncio.create_task(crowd.one()) for _ in range(int(count))]
    loop = asyncio.get_running_loop()
    ended = loop.run_in_executor(None, sys.stdin.read)
    while not ended.done():
        print(crowd.standing, flush=True)
        await asyncio.wait({ended}, timeout=1)
    for client in clients:
        client.cancel()


if __name__ == "__main__":
    asyncio.run(main())
