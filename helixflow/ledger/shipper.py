"""From the gateway's spool to the auth-service: in order, in batches, again and again until it answers.

Nothing is remembered on the disk: a batch that is sent twice is in the ledger once, for the request's id says so.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

from helixflow import log
from helixflow.config import LedgerConfig
from helixflow.core_rs import CoreError, InvalidRequest
from helixflow.ledger import frames
from helixflow.ledger.adopt import Orphan, orphans
from helixflow.ledger.record import Begin
from helixflow.ledger.rejected import Rejected
from helixflow.ledger.spool import Spool

Append = Callable[[str, list[bytes]], Awaitable[None]]
"""Sends records of a spool (its UUID); returns when they are in the ledger. Raises CoreError."""
Interrupted = Callable[[list[Begin]], Awaitable[None]]
"""Hears of requests that never ended. Raises CoreError."""

BATCH_BYTES: Final = 3 << 20
"""Most bytes of one call (a message of gRPC may have 4 MiB)."""
SLICE_BYTES: Final = frames.CHUNK
"""After reading so many bytes, others on the event loop have their turn."""
ADOPT_S: Final = 5.0
"""How often spools of dead workers are looked for (seconds)."""
RETRY_MIN_S: Final = 0.1
RETRY_MAX_S: Final = 5.0
"""Pauses while the auth-service or its database is away (seconds)."""
DRAIN_S: Final = 0.01
"""Pause between two rounds of `drain` (seconds)."""

logger = log.get("ledger")


@dataclass(slots=True)
class ShipperStats:
    """Counters since the start."""

    shipped: int = 0
    """Records that are in the ledger."""
    failures: int = 0
    """Calls that failed and are tried again."""
    rejected: int = 0
    """Records that the ledger refused."""
    adopted: int = 0
    """Spools of dead workers."""
    interrupted: int = 0
    """Requests in them that never ended."""


class Shipper:
    """Ships one worker's spool, and those of workers that have died."""

    def __init__(
        self, spool: Spool, append: Append, options: LedgerConfig, interrupted: Interrupted | None = None
    ) -> None:
        """`interrupted`: is told of the requests that a dead worker had begun, once they are in the ledger."""
        self.stats = ShipperStats()
        self._spool = spool
        self._append = append
        self._interrupted = interrupted
        self._root = spool.folder.parent
        self._rejected = Rejected(self._root, options.rejected_max_bytes)
        self._rows = options.batch_rows
        self._pause_s = options.ship_ms / 1000
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._complete = False
        self._task: asyncio.Task[None] | None = None
        self._away = False
        self._reader = frames.Reader(spool.folder, 1)

    async def run(self) -> None:
        """Ships until `drain` is called, then what is left. Never raises but when it is cancelled."""
        self._task = asyncio.current_task()
        adopting = asyncio.create_task(self._adopt_forever())
        try:
            await self._ship_own()
            self._complete = True
        finally:
            adopting.cancel()
            await asyncio.wait({adopting})
            self._reader.close()
            self._ended.set()

    async def drain(self, timeout_s: float) -> bool:
        """Ships what is left and closes the spool; True when all of it is in the ledger.

        After `timeout_s` seconds `run` is cancelled, and the rest stays on the disk for whoever runs next. Call it
        once no request runs.
        """
        self._stopping.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        if self._task is not None and not self._ended.is_set():
            self._task.cancel()
            await self._ended.wait()
        await asyncio.to_thread(self._spool.close, shipped=self._complete)
        complete = self._complete and not self._spool.pending
        if not complete:
            logger.warning("requests stay in the spool until a gateway runs again", spool=str(self._spool.folder))
        return complete

    # --- the worker's own -----------------------------------------------------------

    async def _ship_own(self) -> None:
        reader = self._reader
        while True:
            place = reader.number, reader.offset
            try:
                records, more = await self._collect(self._own())
            except OSError:
                logger.exception("the spool cannot be read", spool=str(self._spool.folder))
                reader.seek(*place)
                await asyncio.sleep(RETRY_MAX_S)
                continue
            if records:
                await self._ship(self._spool.id, records)
            self._spool.release(reader.number, reader.damaged)
            if more:
                continue
            if self._stopping.is_set() and not records and self._spool.retry():
                return
            await self._wait()

    def _own(self) -> Iterator[bytes]:
        """Records of requests that have ended, from where the last one was taken to the end as it is now."""
        reader, spool = self._reader, self._spool
        while True:
            end = spool.end_of(reader.number)
            for kind, payload in reader.read(spool.tail if end is None else end, last=end is not None):
                if kind != frames.BEGIN:
                    yield payload
            if end is None:
                return
            reader.seek(reader.number + 1)

    async def _collect(self, source: Iterator[bytes]) -> tuple[list[bytes], bool]:
        """The next batch, and whether it is full, so that there may be more. Others have their turn meanwhile."""
        records: list[bytes] = []
        size = sliced = 0
        for record in source:
            records.append(record)
            size += len(record)
            # The next record may be as long as a frame.
            if len(records) >= self._rows or size > BATCH_BYTES - frames.FRAME_MAX:
                return records, True
            if size - sliced > SLICE_BYTES:
                sliced = size
                await asyncio.sleep(0)
        return records, False

    async def _wait(self) -> None:
        """Until the next round; `drain` cuts it short."""
        if self._stopping.is_set():
            await asyncio.sleep(DRAIN_S)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pause_s):
                await self._stopping.wait()

    # --- sending --------------------------------------------------------------------

    async def _ship(self, spool: str, records: list[bytes]) -> None:
        """Returns when every record is in the ledger or has been set aside."""
        pause = RETRY_MIN_S
        while records:
            try:
                await self._append(spool, records)
            except InvalidRequest as error:
                await self._separate(spool, records, error)
                return
            except CoreError as error:
                self._failed(str(error))
            except Exception:
                logger.exception("shipping rows failed")
                self._failed("see above")
            else:
                self.stats.shipped += len(records)
                if self._away:
                    self._away = False
                    logger.info("the ledger takes rows again")
                return
            # Apart from each other, or all gateways would come at once.
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - no secret
            pause = min(pause * 2, RETRY_MAX_S)

    def _failed(self, reason: str) -> None:
        self.stats.failures += 1
        if not self._away:
            self._away = True
            logger.warning("the ledger takes no rows now; they stay in the spool", reason=reason)

    async def _separate(self, spool: str, records: list[bytes], error: InvalidRequest) -> None:
        """Finds the records that are refused, by halves, and ships the others."""
        if len(records) > 1:
            half = len(records) // 2
            await self._ship(spool, records[:half])
            await self._ship(spool, records[half:])
            return
        self.stats.rejected += 1
        file = str(self._rejected.path)
        logger.error("the ledger refuses a record; it was set aside", file=file, spool=spool, reason=str(error))
        try:
            self._rejected.add(spool, records[0], str(error))
        except OSError as failure:
            # Here it must not block the others, so the log is its last place.
            logger.error("it could not even be set aside", record=records[0].hex(), error=str(failure))

    # --- others' --------------------------------------------------------------------

    async def _adopt_forever(self) -> None:
        while True:
            for orphan in orphans(self._root):
                try:
                    await self._adopt(orphan)
                except OSError as error:
                    logger.error("a spool cannot be read", spool=str(orphan.folder), error=str(error))
                finally:
                    orphan.close()
            await asyncio.sleep(ADOPT_S)

    async def _adopt(self, orphan: Orphan) -> None:
        logger.info("shipping the spool of a worker that has ended", spool=orphan.id)
        source = orphan.records()
        more = True
        while more:
            records, more = await self._collect(source)
            await self._ship(orphan.id, records)
            await _in_thread(orphan.shipped)
        await _in_thread(orphan.finish)
        self.stats.adopted += 1
        self.stats.interrupted += orphan.interrupted
        if self._interrupted is not None and orphan.unended:
            try:
                await self._interrupted(orphan.unended)
            except CoreError as error:
                logger.warning("what interrupted requests held lapses by itself", reason=str(error))
        if orphan.interrupted:
            logger.warning("requests were interrupted", spool=orphan.id, requests=orphan.interrupted)


async def _in_thread(work: Callable[[], None]) -> None:
    """Removes files, which takes milliseconds each; also when cancelled, it has ended afterwards."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait({task})
