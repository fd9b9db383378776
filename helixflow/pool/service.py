"""The process of the inference-pool: loads model and engine, serves gRPC, runs the engine, stops in order."""

import faulthandler
import os
import queue
import signal
import sys
import threading
import time
import traceback
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import NoReturn, cast

from helixflow import core_rs, log
from helixflow.config import Config, model_of
from helixflow.engine.base import Engine
from helixflow.engine.kinds import AttentionChoice, PrecisionChoice, Provider
from helixflow.engine.load import Kind, load_engine
from helixflow.engine.progress import Bar, Progress
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.errors import EX_SOFTWARE, StartError
from helixflow.liveness import Pulse
from helixflow.pki.layout import Layout, Role
from helixflow.process import notify_ready

SERVICE = "inference-pool"
CALLERS = ["api-gateway"]
"""Services whose client certificates may call the pool."""

POLL_S = 0.02
"""How often (seconds) a draining pool is asked whether it is idle; the wait for a signal is shorter."""
LAST_FRAMES_S = 2.0
"""A pool whose engine stands still ends after this time (seconds), whoever has not heard of it yet."""
STDERR = 2

logger = log.get("pool")


class Event(Enum):
    """What the main thread waits for."""

    STOP = auto()
    RELOAD = auto()
    ENGINE_ENDED = auto()
    ENGINE_STUCK = auto()


class EngineThread(threading.Thread):
    """Runs `pool.run(engine)`; `error` holds what ended it."""

    def __init__(self, pool: core_rs.Pool, engine: Engine, events: "queue.SimpleQueue[Event]") -> None:
        super().__init__(name="engine", daemon=True)
        self.error: BaseException | None = None
        self._pool = pool
        self._engine = engine
        self._events = events

    def run(self) -> None:
        """Blocks until the pool is stopped or the engine fails."""
        try:
            self._pool.run(self._engine)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the main thread must hear of it
            self.error = error
        finally:
            self._events.put(Event.ENGINE_ENDED)


class Heart:
    """Beats while the main thread and the I/O threads go on; a watch over the engine's steps is another's work."""

    def __init__(self, pool: core_rs.Pool) -> None:
        self._pool = pool
        self._pulse = Pulse()
        self._counted = -1
        self._due = 0.0
        self.interval_s = self._pulse.interval_s

    def look(self) -> None:
        """Call it at least every `interval_s`."""
        now, counted = time.monotonic(), self._pool.pulse()
        if now >= self._due and counted != self._counted:
            self._counted = counted
            self._due = now + self.interval_s / 2
            self._pulse.beat()


class Watchdog(threading.Thread):
    """Waits for an engine thread that stands still, and says where it does. `stuck`: what was found."""

    def __init__(
        self, pool: core_rs.Pool, engine: EngineThread, events: "queue.SimpleQueue[Event]", step_timeout_s: float
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.stuck: core_rs.Stuck | None = None
        self._pool = pool
        self._engine = engine
        self._events = events
        self._step_timeout_ms = int(step_timeout_s * 1000)

    def run(self) -> None:
        """Blocks until the pool is stopped or the engine stands still."""
        stuck = self._pool.watch(self._step_timeout_ms)
        if stuck is None:
            return
        logger.error(
            "the engine stands still; its requests have ended, and the pool is restarted",
            stood_s=round(stuck.stood_s, 1),
            limit_s=round(stuck.limit_s, 1),
            tokens=stuck.tokens,
            stack=_stack_of(self._engine),
        )
        self.stuck = stuck
        self._events.put(Event.ENGINE_STUCK)


def _stack_of(thread: threading.Thread) -> str:
    """Where a thread is, innermost call last; without the values of variables."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "(outside of Python)"


def run(config: Config) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status: 0, or 70 when the engine failed or stands still.

    Raises StartError, ConfigError or EngineError when it cannot start. SIGHUP reloads the certificates. The first
    SIGTERM drains; a second one, or the drain time limit, cuts what still runs with an error. A process whose engine
    stands still ends here, for the interpreter would wait for its thread.
    """
    if not faulthandler.is_enabled():
        # An engine that holds the interpreter is ended by SIGABRT, and every stack is dumped then.
        faulthandler.enable(STDERR, all_threads=True)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    try:
        pool = _pool(config)
        address = pool.serve(str(config.pool.listen), _tls(config), allow=CALLERS)
    except core_rs.CoreError as error:
        raise StartError(f"the inference-pool cannot start: {error}") from error
    try:
        engine = _engine(config)
    except BaseException:
        pool.stop()
        raise
    thread = EngineThread(pool, engine, events)
    watchdog = Watchdog(pool, thread, events, config.pool.step_timeout_s)
    _handle_signals(events)
    thread.start()
    watchdog.start()
    try:
        return _main(pool, thread, address, events, config.pool.drain_timeout_s)
    finally:
        if watchdog.stuck is None:
            pool.stop()
        while thread.is_alive():
            if watchdog.stuck is not None:
                _leave(pool)
            thread.join(POLL_S)
        engine.close()


def _leave(pool: core_rs.Pool) -> NoReturn:
    """Ends the process without its engine thread, once its clients have heard."""
    deadline = time.monotonic() + LAST_FRAMES_S
    while not pool.idle() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    pool.stop()
    log.flush()
    os._exit(EX_SOFTWARE)


def _main(
    pool: core_rs.Pool,
    thread: EngineThread,
    address: str,
    events: "queue.SimpleQueue[Event]",
    drain_timeout_s: float,
) -> int:
    """Announces readiness and waits for what comes."""
    heart = Heart(pool)
    event = _until_running(pool, events)
    if event is None:
        logger.info("ready", address=address, slots=pool.stats().slots)
        notify_ready(address)
    while True:
        match event if event is not None else _next(events, heart):
            case Event.RELOAD:
                _reload(pool)
            case Event.STOP:
                _drain(pool, events, heart, drain_timeout_s)
                return 0
            case Event.ENGINE_ENDED:
                logger.error("the engine failed", kind=_failure(thread.error), exc_info=thread.error)
                return EX_SOFTWARE
            case Event.ENGINE_STUCK:
                return EX_SOFTWARE
        event = None


def _next(events: "queue.SimpleQueue[Event]", heart: Heart) -> Event:
    while True:
        heart.look()
        try:
            return events.get(timeout=heart.interval_s)
        except queue.Empty:
            continue


def _failure(error: BaseException | None) -> str:
    """What failed, in a word: `out_of_memory`, `lost` or `failed` for a GPU, else `engine`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, DeviceError):
            return error.kind
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return "engine"


def _until_running(pool: core_rs.Pool, events: "queue.SimpleQueue[Event]") -> Event | None:
    """Waits until the engine takes requests; the event that came before that, when one did."""
    while not pool.stats().slots:
        try:
            return events.get(timeout=POLL_S / 10)
        except queue.Empty:
            continue
    return None


def _pool(config: Config) -> core_rs.Pool:
    options = config.pool
    model = model_of(config)
    made = model / "config.json"
    return core_rs.Pool(
        str(model),
        core_rs.PoolOptions(
            model_id=options.model_id,
            aliases=list(options.aliases),
            created=int(made.stat().st_mtime) if made.exists() else int(time.time()),
            queue_requests=options.queue_requests,
            queue_tokens=options.queue_tokens,
            step_tokens=options.step_tokens,
            stall_timeout_ms=options.stall_timeout_ms,
            stall_yield_ms=options.stall_yield_ms,
            default_timeout_ms=options.default_timeout_ms,
            prefix_reuse=options.prefix_reuse,
            step_budget_ms=options.step_budget_ms,
            decode_price=options.decode_price,
            shared_prefixes=[_text(file) for file in options.shared_prefixes],
            control_in_text=options.control_in_text,
        ),
    )


def _text(file: Path) -> str:
    """A declared prefix. Raises StartError."""
    try:
        return file.read_text("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"pool.shared_prefixes: {file} cannot be read: {error}; name a text file in UTF-8") from error


def _engine(config: Config) -> Engine:
    options = config.pool
    # The words were checked when the configuration was read.
    tensorrt = options.engine in ("tensorrt", "tensorrt-rtx")
    return load_engine(
        model_of(config),
        cast("Kind", options.engine),
        provider=cast("Provider", options.provider),
        precision=cast("PrecisionChoice", options.precision),
        slots=options.slots,
        max_len=options.max_len,
        threads=options.threads,
        attention=cast("AttentionChoice", options.attention),
        chunk_tokens=options.chunk_tokens if tensorrt else 0,
        device=options.device,
        engines=config.engines,
        script_step_s=options.script_step_ms / 1000,
        script_tokens=options.script_tokens,
        script_hang_step=options.script_hang_step,
        progress=_progress(config),
    )


def _tls(config: Config) -> core_rs.TlsFiles:
    layout = Layout(config.certs)
    own = layout.pair(SERVICE, Role.SERVER)
    return core_rs.TlsFiles(str(layout.ca_cert), str(own.cert), str(own.key), str(layout.crl))


def _progress(config: Config) -> Progress:
    """A bar on a terminal, a log line per finished stage elsewhere."""
    if log.is_console(config.log):
        return Bar()
    finished: set[str] = set()

    def report(what: str, done: int, total: int) -> None:
        if done >= total and what not in finished:
            finished.add(what)
            logger.info("prepared", stage=what)

    return report


def _handle_signals(events: "queue.SimpleQueue[Event]") -> None:
    # SimpleQueue.put is reentrant: the one way to hand something over from a signal handler.
    def stop(_number: int, _frame: FrameType | None) -> None:
        events.put(Event.STOP)

    def reload(_number: int, _frame: FrameType | None) -> None:
        events.put(Event.RELOAD)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, reload)


def _reload(pool: core_rs.Pool) -> None:
    try:
        pool.reload_tls()
    except core_rs.TlsError as error:
        logger.error("certificates not reloaded; the old ones stay", reason=str(error))
    else:
        logger.info("certificates reloaded")


def _drain(pool: core_rs.Pool, events: "queue.SimpleQueue[Event]", heart: Heart, timeout_s: float) -> None:
    """Refuses new requests and waits for the running ones: until a second signal or the time limit."""
    pool.drain()
    logger.info("draining", timeout_s=timeout_s)
    deadline = time.monotonic() + timeout_s
    while not pool.idle() and time.monotonic() < deadline:
        heart.look()
        try:
            if events.get(timeout=POLL_S) is not Event.RELOAD:
                break
        except queue.Empty:
            continue
    if not pool.idle():
        logger.warning("requests still ran at the end of the drain; cut", running=pool.stats().running)
