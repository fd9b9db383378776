"""One supervised process: start, readiness, restart with back-off, stop."""

import asyncio
import contextlib
import os
import signal
import sys
import time

from helixflow import log
from helixflow.config import SuperviseConfig
from helixflow.errors import StartError
from helixflow.liveness import BEAT_FD, DUMP_S, LOOK_S, STACK_FD, Stacks, Watch, ask_for_stacks, is_traced
from helixflow.process import PARENT_PID, READY_FD

STABLE_S = 30.0
"""A service that ran this long (seconds) starts again with the shortest pause."""

logger = log.get("supervisor")


class Service:
    """A `helixflow` command kept running. Not thread-safe; belongs to one event loop."""

    def __init__(self, name: str, command: str, options: SuperviseConfig) -> None:
        """`command` is the sub-command of `helixflow` that runs the service in the foreground."""
        self.name = name
        self.environ: dict[str, str] = {}
        self.launcher: tuple[str, ...] = ()
        """Module that confines the process before it becomes the service."""
        self.address = ""
        self._command = command
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._stacks: Stacks | None = None
        self._beats = -1
        self._watch = Watch(0)
        self._ready = False
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id of what was started last and has not been waited for."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> str:
        """Starts the process and waits until it serves; returns its address. Raises StartError."""
        self._ready = False
        reader, writer = os.pipe()
        try:
            try:
                await self._spawn(writer)
            finally:
                os.close(writer)
            line = await self._read_line(reader)
        finally:
            os.close(reader)
        if not line:
            status = await self._end_failed_start()
            raise StartError(f"{self.name} did not start (exit status {status}); its log above says why", status)
        self._ready = True
        self.address = line
        return line

    async def _spawn(self, ready: int) -> None:
        self._forget_beats()
        stacks = Stacks()
        reader, writer = os.pipe()
        handed = {READY_FD: ready, BEAT_FD: writer, STACK_FD: stacks.fileno()}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *self.launcher,
                "helixflow",
                *self._command.split(),
                env={
                    **self.environ,
                    **{name: str(number) for name, number in handed.items()},
                    PARENT_PID: str(os.getpid()),
                },
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=tuple(handed.values()),
                # Ctrl-C on the terminal must reach the supervisor alone: it stops the services in order.
                start_new_session=True,
            )
        except OSError as error:
            os.close(reader)
            stacks.close()
            raise StartError(f"{self.name} did not start: {error.strerror}; is the machine out of memory?") from error
        finally:
            os.close(writer)
        self._stacks, self._beats = stacks, reader
        asyncio.get_running_loop().add_reader(reader, self._on_beat)

    def _on_beat(self) -> None:
        if os.read(self._beats, 4096):
            self._watch.heard()
        else:
            self._forget_beats()

    def _forget_beats(self) -> None:
        if self._beats >= 0:
            asyncio.get_running_loop().remove_reader(self._beats)
            os.close(self._beats)
            self._beats = -1

    async def _read_line(self, descriptor: int) -> str:
        """The first line of the pipe; empty when the process ended or took too long."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(descriptor, readable.set)
        try:
            async with asyncio.timeout(self._options.ready_timeout_s):
                await readable.wait()
            return os.read(descriptor, 4096).decode().strip()
        except TimeoutError:
            logger.error("not ready in time", name=self.name, timeout_s=self._options.ready_timeout_s)
            return ""
        finally:
            loop.remove_reader(descriptor)

    async def _end_failed_start(self) -> int:
        process = self._process
        if process is None:
            return -1
        try:
            async with asyncio.timeout(2):
                return await process.wait()
        except TimeoutError:
            await self._end(process)
            logger.error("start given up", name=self.name, **self._stack())
            return await process.wait()

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Ends a process that does not go on, and gives it time to write where it stands."""
        ask_for_stacks(process.pid)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DUMP_S):
                await process.wait()
        self.send(signal.SIGKILL)

    def _stack(self) -> dict[str, str]:
        """Where the process stood when a fatal signal ended it, for the log."""
        stacks, self._stacks = self._stacks, None
        text = stacks.take() if stacks is not None else ""
        return {"stack": text} if text else {}

    async def keep(self) -> None:
        """Restarts the process whenever it ends or stands still, until `stop`. No error ends the keeping."""
        pause = self._options.backoff_min_s
        while True:
            began = time.monotonic()
            status = await self._until_end()
            if self._stopping.is_set():
                return
            if time.monotonic() - began >= STABLE_S:
                pause = self._options.backoff_min_s
            logger.error("service ended", name=self.name, status=status, restart_in_s=pause, **self._stack())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
                    return
            pause = min(pause * 2, self._options.backoff_max_s)
            try:
                await self.start()
                logger.info("service is back", name=self.name, address=self.address)
            except StartError as error:
                logger.error("restart failed", name=self.name, error=str(error))
            except Exception:
                logger.exception("restart failed", name=self.name)

    async def _until_end(self) -> int:
        """The exit status of the process; one that stands still is ended, and says where it stood."""
        process = self._process
        if process is None:
            return -1
        guard = asyncio.create_task(self._guard(process))
        try:
            return await process.wait()
        finally:
            guard.cancel()

    async def _guard(self, process: asyncio.subprocess.Process) -> None:
        watch = self._watch = Watch(self._options.stall_timeout_s)
        while not watch.look() or is_traced(process.pid):  # noqa: ASYNC110 - silence sends no event
            await asyncio.sleep(LOOK_S)
        logger.error(
            "service stands still; it is ended and replaced", name=self.name, silent_s=round(watch.silent_s, 1)
        )
        await self._end(process)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process when it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def reload(self) -> None:
        """Tells a process that serves to load new certificates. One that still starts reads the new ones anyway."""
        if self._ready:
            self.send(signal.SIGHUP)

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after `timeout_s` seconds. Returns when the process has ended."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        self.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            logger.error("service did not stop; killed", name=self.name, timeout_s=timeout_s)
            self.send(signal.SIGKILL)
            await process.wait()
