"""A pool with an engine in a thread."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helixflow import core_rs
from helixflow.engine.base import Engine
from tests.pool.support import connect, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "bytes")


@dataclass
class Running:
    """A pool, the thread of its engine, and what ended that thread."""

    pool: core_rs.Pool
    address: str
    client: core_rs.PoolClient
    thread: threading.Thread
    errors: list[Exception] = field(default_factory=list)

    def ended(self) -> list[Exception]:
        """Waits for the engine loop to end and returns what it raised."""
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.errors


Start = Callable[[Engine], Running]


@pytest.fixture
def start(model: Path) -> Iterator[Start]:
    """Starts a pool with an engine; stops all of them at the end."""
    started: list[Running] = []

    def begin(engine: Engine) -> Running:
        pool = core_rs.Pool(str(model), core_rs.PoolOptions(model_id="bytes", aliases=["gpt-4"]))
        address = pool.serve("127.0.0.1:0", None)
        errors: list[Exception] = []

        def run() -> None:
            try:
                pool.run(engine)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        running = Running(pool, address, connect(address), thread, errors)
        started.append(running)
        return running

    yield begin
    for running in started:
        running.client.close()
        running.pool.stop()
        running.ended()
