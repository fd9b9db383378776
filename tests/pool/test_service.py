"""The process: readiness, signals, exit status."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from helixflow import config, core_rs
from helixflow.engine.base import Candidates, Capacity, EngineError
from helixflow.engine.scripted import Gate, ScriptedEngine, repeat
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.errors import EX_SOFTWARE, StartError
from helixflow.pki.layout import Layout, Role
from helixflow.pool import service
from helixflow.process import READY_FD
from tests.pool.support import VOCAB, complete, connect, finish, request, until


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def settings(model: Path, pki: Layout, tmp_path: Path) -> Callable[..., config.Config]:
    def make(**options: str) -> config.Config:
        environ = {
            "HELIX_HOME": str(tmp_path / "home"),
            "HELIX_CERTS": str(pki.directory),
            "HELIX_MODEL": str(model),
            "HELIX_POOL_LISTEN": "127.0.0.1:0",
            "HELIX_POOL_ENGINE": "scripted",
            "HELIX_POOL_SCRIPT_TOKENS": "3",
            **options,
        }
        return config.load(None, environ)

    return make


def gateway_files(pki: Layout) -> core_rs.TlsFiles:
    pair = pki.pair("api-gateway", Role.CLIENT)
    return core_rs.TlsFiles(str(pki.ca_cert), str(pair.cert), str(pair.key))


def signalled(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


class Client(threading.Thread):
    """Does something with a pool that runs in the main thread, and stops it when that fails."""

    def __init__(self, pki: Layout, act: Callable[[core_rs.PoolClient], None], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(daemon=True)
        reader, writer = os.pipe()
        monkeypatch.setenv(READY_FD, str(writer))
        self._reader = reader
        self._pki = pki
        self._act = act
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with os.fdopen(self._reader, "rb") as ready:
                address = ready.readline().decode().strip()
            client = connect(address, gateway_files(self._pki))
            self._act(client)
            client.close()
        except BaseException as error:  # noqa: BLE001 - raised again by `check`
            self.error = error
            signalled(signal.SIGTERM)
            signalled(signal.SIGTERM)

    def check(self) -> None:
        self.join(10)
        if self.error:
            raise self.error


def test_it_serves_over_mutual_tls_until_sigterm(
    settings: Callable[..., config.Config], pki: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(client: core_rs.PoolClient) -> None:
        [model] = client.models()
        assert (model.id, model.max_model_len) == ("bytes", 128)
        assert len(complete(client, request("a", 9))) == 3
        signalled(signal.SIGHUP)
        assert len(complete(client, request("a", 9))) == 3
        signalled(signal.SIGTERM)

    client = Client(pki, act, monkeypatch)
    assert service.run(settings()) == 0
    client.check()


def use_engine(monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> None:
    def load(*_: Any, **__: Any) -> ScriptedEngine:
        return engine

    monkeypatch.setattr(service, "load_engine", load)


def test_a_drain_waits_for_what_runs(
    settings: Callable[..., config.Config], pki: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    use_engine(monkeypatch, ScriptedEngine(Capacity(2, 64, VOCAB), repeat([120]), gate=gate))

    def act(client: core_rs.PoolClient) -> None:
        running = client.complete(request("a", 5), completion_id="c", created=0, stream=True)
        assert gate.arrived(10)
        signalled(signal.SIGTERM)
        until(lambda: client.pools()[0].state == "draining", "the pool drains")
        gate.open()
        events = [
            json.loads(line[6:]) for line in finish(client, running).split(b"\n\n") if line.startswith(b"data: {")
        ]
        assert "".join(event["choices"][0]["text"] for event in events) == "xxxxx"
        assert running.finish_reason == "length"

    client = Client(pki, act, monkeypatch)
    assert service.run(settings()) == 0
    client.check()


def test_a_second_signal_cuts(
    settings: Callable[..., config.Config], pki: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    use_engine(monkeypatch, ScriptedEngine(Capacity(2, 1 << 20, VOCAB), repeat([120]), step_s=0.001, gate=gate))
    gate.open()

    def act(client: core_rs.PoolClient) -> None:
        running = client.complete(request("a", 1_000_000), completion_id="c", created=0, stream=True)
        until(lambda: bool(running.take()), "text comes")
        signalled(signal.SIGTERM)
        until(lambda: client.pools()[0].state == "draining", "the pool drains")
        signalled(signal.SIGTERM)
        finish(client, running)
        assert running.finish_reason == "error"
        assert running.error_code == "draining"

    client = Client(pki, act, monkeypatch)
    assert service.run(settings()) == 0
    client.check()


def test_the_drain_has_a_time_limit(
    settings: Callable[..., config.Config], pki: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, ScriptedEngine(Capacity(2, 1 << 20, VOCAB), repeat([120]), step_s=0.001))

    def act(client: core_rs.PoolClient) -> None:
        running = client.complete(request("a", 1_000_000), completion_id="c", created=0, stream=True)
        until(lambda: bool(running.take()), "text comes")
        signalled(signal.SIGTERM)
        finish(client, running)
        assert running.error_code == "draining"

    client = Client(pki, act, monkeypatch)
    assert service.run(settings(HELIX_POOL_DRAIN_TIMEOUT_S="0.05")) == 0
    client.check()


def test_a_failing_engine_ends_the_process_with_status_70(
    settings: Callable[..., config.Config], pki: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, ScriptedEngine(Capacity(2, 64, VOCAB), repeat([120]), fail_at_step=1))

    def act(client: core_rs.PoolClient) -> None:
        call = client.complete(request("a", 9), completion_id="c", created=0, stream=True)
        finish(client, call)
        assert call.error_code == "engine_failed"

    client = Client(pki, act, monkeypatch)
    assert service.run(settings()) == EX_SOFTWARE
    client.check()


HOLDS_THE_GIL = """
import ctypes, sys
from helixflow import config
from helixflow.engine.base import Capacity
from helixflow.engine.scripted import ScriptedEngine, repeat
from helixflow.pool import service

class Engine(ScriptedEngine):
    def step(self, batch):
        if self.steps == 2:
            ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the GIL
        return super().step(batch)

service.load_engine = lambda *_, **__: Engine(Capacity(2, 64, 257), repeat([120]))
sys.exit(service.run(config.load(None, dict(line.split("=", 1) for line in sys.argv[1:]))))
"""


def test_an_engine_that_holds_the_interpreter_is_ended_too(settings: Callable[..., config.Config], pki: Layout) -> None:
    loaded = settings(HELIX_POOL_STEP_TIMEOUT_S="1")
    environ = {
        "HELIX_HOME": str(loaded.home),
        "HELIX_CERTS": str(pki.directory),
        "HELIX_MODEL": str(loaded.pool.model),
        "HELIX_POOL_LISTEN": "127.0.0.1:0",
        "HELIX_POOL_ENGINE": "scripted",
        "HELIX_POOL_STEP_TIMEOUT_S": "1",
    }
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_GIL, *(f"{name}={value}" for name, value in environ.items())],
        env={**os.environ, READY_FD: str(writer)},
        pass_fds=(writer,),
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as ready:
            address = ready.readline().decode().strip()
        client = connect(address, gateway_files(pki))
        call = client.complete(request("a", 9), completion_id="c", created=0, stream=True)
        finish(client, call)
        assert call.error_code == "engine_failed"
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGABRT
    assert b"in step" in said, "the stack of the engine thread"


class LostEngine(ScriptedEngine):
    """Its GPU is lost in the first step."""

    def step(self, batch: Any) -> Candidates:
        raise DeviceError("lost", "cudaErrorIllegalAddress: the context is broken")


def test_the_log_says_what_of_a_gpu_failed(
    settings: Callable[..., config.Config], pki: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, LostEngine(Capacity(2, 64, VOCAB), repeat([120])))

    def act(client: core_rs.PoolClient) -> None:
        call = client.complete(request("a", 9), completion_id="c", created=0, stream=True)
        with pytest.raises(core_rs.EngineFailed, match="try again"):
            finish(client, call)

    client = Client(pki, act, monkeypatch)
    with structlog.testing.capture_logs() as logs:
        assert service.run(settings()) == EX_SOFTWARE
    client.check()
    [line] = [entry for entry in logs if entry["log_level"] == "error"]
    assert (line["event"], line["kind"]) == ("the engine failed", "lost")
    assert "cudaErrorIllegalAddress" in str(line["exc_info"])


def test_an_engine_is_loaded_as_configured(
    settings: Callable[..., config.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(path: Path, kind: str, **options: Any) -> ScriptedEngine:
        asked.append((kind, options))
        raise EngineError("nothing is loaded here")

    monkeypatch.setattr(service, "load_engine", load)
    for options in ({"ENGINE": "tensorrt-rtx", "CHUNK_TOKENS": "64"}, {"ENGINE": "onnx", "PROVIDER": "cuda"}):
        with pytest.raises(EngineError, match="nothing is loaded"):
            service.run(
                settings(HELIX_POOL_DEVICE="3", **{f"HELIX_POOL_{key}": value for key, value in options.items()})
            )
    (first, rtx), (second, onnx) = asked
    assert (first, rtx["chunk_tokens"], rtx["attention"], rtx["precision"]) == ("tensorrt-rtx", 64, "auto", "auto")
    assert (second, onnx["chunk_tokens"], onnx["provider"], onnx["device"]) == ("onnx", 0, "cuda", 3)


def test_it_does_not_start_without_certificates_or_model(
    settings: Callable[..., config.Config], tmp_path: Path, model: Path
) -> None:
    with pytest.raises(StartError, match=r"helixflow-ca\.pem"):
        service.run(settings(HELIX_CERTS=str(tmp_path / "none")))
    (model / "tokenizer.json").unlink()
    with pytest.raises(StartError, match=r"tokenizer\.json"):
        service.run(settings())
