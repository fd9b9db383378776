"""The gateway's processes: start, drain, cut, certificate swap, crashes, nothing left behind."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from helixflow.pki import rotate
from helixflow.pki.layout import Layout, Role
from helixflow.process import READY_FD
from tests.gateway.conftest import KEY

ROOT = Path(__file__).resolve().parents[2]
SLOW = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "stream": True}
STUCK = {**SLOW, "model": "stuck"}


class Gateway:
    """`tests.gateway.fake_server` in its own session."""

    def __init__(self, layout: Layout, log: Path, **options: str) -> None:
        self.layout = layout
        self._log = log
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HELIX_")}
        environ |= {
            "HELIX_PROFILE": "development",
            "HELIX_GATEWAY_ACCOUNTS": "false",
            "HELIX_CERTS": str(layout.directory),
            "HELIX_GATEWAY_LISTEN": "127.0.0.1:0",
            "HELIX_LOG_FORMAT": "json",
            **options,
        }
        reader, writer = os.pipe()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.gateway.fake_server"],
                cwd=ROOT,
                env={**environ, READY_FD: str(writer)},
                pass_fds=(writer,),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            self.address = pipe.readline().decode().strip()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.address.rpartition(':')[2]}"

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.layout.ca_cert))
        return httpx.Client(base_url=self.url, verify=context, headers=KEY, timeout=20)

    def events(self) -> list[dict[str, Any]]:
        lines = self._log.read_bytes().splitlines()
        return [orjson.loads(line) for line in lines if line.startswith(b"{")]

    def logged(self, event: str) -> Callable[[], bool]:
        return lambda: any(line["event"] == event for line in self.events())

    def count(self, event: str) -> int:
        return sum(line["event"] == event for line in self.events())

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text("ascii")
        return [int(number) for number in children.split()]

    def serial(self) -> str:
        """Serial number of the certificate that a new connection gets."""
        context = ssl.create_default_context(cafile=str(self.layout.ca_cert))
        plain = socket.create_connection(("127.0.0.1", int(self.address.rpartition(":")[2])), 5)
        with context.wrap_socket(plain, server_hostname="localhost") as wrapped:
            return str((wrapped.getpeercert() or {})["serialNumber"])

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(15)
        finally:
            self.process.kill()


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Polls another process, which sends no events."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def certs(pki: Layout, tmp_path: Path) -> Layout:
    """Certificates that the test may change."""
    shutil.copytree(pki.directory, tmp_path / "certs")
    return Layout(tmp_path / "certs")


@pytest.fixture
def start(certs: Layout, tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Starts gateways and ends them with the test."""
    with contextlib.ExitStack() as exits:

        def make(**options: str) -> Gateway:
            made = Gateway(certs, tmp_path / "gateway.log", **options)
            exits.callback(made.end)
            assert made.address, made._log.read_text("utf-8")
            return made

        yield make


def test_ready_then_term(start: Callable[..., Gateway]) -> None:
    gateway = start(HELIX_GATEWAY_WORKERS="2")
    with gateway.client() as client:
        assert client.get("/health").status_code == 200
    assert len(gateway.workers()) == 2
    (ready,) = [line for line in gateway.events() if line["event"] == "gateway ready"]
    assert ready["url"] == f"https://{gateway.address}"
    began = time.monotonic()
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(10) == 0
    assert time.monotonic() - began < 3
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(gateway.address.rpartition(":")[2])), 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_lets_streams_finish(start: Callable[..., Gateway], number: signal.Signals) -> None:
    gateway = start()
    with gateway.client() as client, gateway.client() as other:
        assert other.get("/ready").status_code == 200
        with client.stream("POST", "/v1/chat/completions", json=SLOW) as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert next(lines) == 'data: {"word":0}'
            # The group, as a terminal does it: workers must leave the decision to the main process.
            os.killpg(gateway.process.pid, number)
            until(lambda: other.get("/ready").status_code == 503)
            assert other.get("/ready").json()["reason"] == "draining"
            assert other.get("/health").status_code == 200
            refused = other.post("/v1/chat/completions", json=SLOW)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["retry-after"] == "1"
            rest = list(lines)
    assert rest[-2:] == ['data: {"last":true}', "data: [DONE]"]
    assert len(rest) == 51
    assert gateway.process.wait(10) == 0


@pytest.mark.parametrize("second", [True, False])
def test_second_signal_or_time_limit_cuts(start: Callable[..., Gateway], second: bool) -> None:
    gateway = start(HELIX_GATEWAY_DRAIN_TIMEOUT_S="20" if second else "0.3", HELIX_GATEWAY_KEEPALIVE_S="0.05")
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=STUCK) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data"))
        waiting = gateway.client()
        gateway.process.send_signal(signal.SIGTERM)
        until(lambda: waiting.get("/ready").status_code == 503)
        waiting.close()
        if second:
            gateway.process.send_signal(signal.SIGTERM)
        error, done = list(lines)
    assert orjson.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
    assert done == "data: [DONE]"
    assert gateway.process.wait(10) == 0


def test_unread_stream_does_not_hold_up_the_end(start: Callable[..., Gateway]) -> None:
    gateway = start(HELIX_GATEWAY_DRAIN_TIMEOUT_S="0.2")
    flood = {**SLOW, "model": "flood"}
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=flood) as answer:
        next(answer.iter_raw())
        gateway.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert gateway.process.wait(10) == 0
        assert time.monotonic() - began < 6


@pytest.mark.parametrize("by_signal", [True, False])
def test_new_certificates_without_dropping_a_stream(start: Callable[..., Gateway], by_signal: bool) -> None:
    gateway = start()
    before = gateway.serial()
    old = gateway.workers()
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=SLOW) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert next(lines) == 'data: {"word":0}'
        rotate.renew(gateway.layout, ["api-gateway"])
        if by_signal:
            gateway.process.send_signal(signal.SIGHUP)
        until(lambda: gateway.serial() != before)
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    assert len(rest) == 51
    assert gateway.workers() == old
    with gateway.client() as client:
        assert client.get("/ready").status_code == 200
    until(gateway.logged("new certificates in use"))


def test_no_connection_fails_during_swaps(start: Callable[..., Gateway]) -> None:
    gateway = start()
    stop = threading.Event()
    answered = 0

    def hammer() -> None:
        nonlocal answered
        while not stop.is_set():
            with gateway.client() as client:
                assert client.get("/health").status_code == 200
            answered += 1

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    old = gateway.workers()
    for swaps in range(1, 11):
        gateway.process.send_signal(signal.SIGHUP)
        until(lambda due=swaps: gateway.count("new certificates in use") == due)  # type: ignore[misc]
    until(lambda: answered > 50)
    stop.set()
    for thread in threads:
        thread.join()
    assert gateway.workers() == old


def test_bad_certificates_are_refused_and_the_old_ones_stay(start: Callable[..., Gateway]) -> None:
    gateway = start()
    before = gateway.serial()
    workers = gateway.workers()
    pair = gateway.layout.pair("api-gateway", Role.SERVER)
    pair.cert.write_text("no certificate", "ascii")
    gateway.process.send_signal(signal.SIGHUP)
    until(gateway.logged("new certificates refused; the old ones stay in use"))
    assert gateway.serial() == before
    assert gateway.workers() == workers
    (line,) = [line for line in gateway.events() if line["event"].startswith("new certificates refused")]
    assert "api-gateway.crt" in line["error"]


@pytest.mark.parametrize("damage", ["missing", "mismatch", "readable"])
def test_does_not_start_with_bad_certificates(certs: Layout, tmp_path: Path, damage: str) -> None:
    pair = certs.pair("api-gateway", Role.SERVER)
    if damage == "missing":
        pair.cert.unlink()
    elif damage == "mismatch":
        shutil.copy(certs.pair("monitoring", Role.SERVER).key, pair.key)
    else:
        pair.key.chmod(0o644)
    gateway = Gateway(certs, tmp_path / "log")
    assert gateway.address == ""
    assert gateway.process.wait(10) != 0
    text = (tmp_path / "log").read_text("utf-8")
    assert "api-gateway" in text
    assert "Traceback" not in text


def test_does_not_start_on_a_used_address(start: Callable[..., Gateway], certs: Layout, tmp_path: Path) -> None:
    first = start()
    second = Gateway(certs, tmp_path / "second.log", HELIX_GATEWAY_LISTEN=first.address)
    assert second.process.wait(10) != 0
    assert f"cannot listen on {first.address}" in (tmp_path / "second.log").read_text("utf-8")


def test_a_worker_that_dies_is_replaced(start: Callable[..., Gateway]) -> None:
    gateway = start()
    (number,) = gateway.workers()
    os.kill(number, signal.SIGKILL)
    with gateway.client() as client:
        assert client.get("/health").status_code == 200, "the connection waits for the new worker"
    assert gateway.workers() != [number]
    assert gateway.logged("worker died")()


@pytest.mark.parametrize("damage", ["gone", "wrong"])
def test_without_certificate_files_a_new_worker_has_those_in_memory(start: Callable[..., Gateway], damage: str) -> None:
    """Not a listener that nobody answers on. When the files are back they are used."""
    gateway = start()
    directory, before = gateway.layout.directory, gateway.serial()
    context = ssl.create_default_context(cafile=str(gateway.layout.ca_cert))
    key = gateway.layout.pair("api-gateway", Role.SERVER).key
    if damage == "gone":
        away = directory.rename(directory.with_name("away"))
    else:
        away = key.rename(key.with_name("away"))
        key.write_text("no key", "ascii")
    (number,) = gateway.workers()
    os.kill(number, signal.SIGKILL)
    with httpx.Client(base_url=gateway.url, verify=context, headers=KEY, timeout=20) as client:
        assert client.get("/health").status_code == 200
    assert gateway.workers() != [number]
    assert gateway.logged("certificates cannot be used; a new worker takes those in memory")()
    away.rename(directory if damage == "gone" else key)
    assert gateway.serial() == before
    rotate.renew(gateway.layout, ["api-gateway"])
    until(lambda: gateway.serial() != before)


def test_no_orphan_after_kill_9(start: Callable[..., Gateway]) -> None:
    gateway = start(HELIX_GATEWAY_WORKERS="2")
    workers = gateway.workers()
    assert len(workers) == 2
    gateway.process.kill()
    gateway.process.wait(5)
    until(lambda: not any(_alive(number) for number in workers))


def _alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_log_lines_hold_neither_key_nor_prompt(start: Callable[..., Gateway]) -> None:
    gateway = start()
    with gateway.client() as client:
        body = {"model": "echo", "messages": [{"role": "user", "content": "private words"}]}
        client.post("/v1/chat/completions", json=body, headers={"x-request-id": "trace-1"})
        client.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer other-key"})
    gateway.end()
    text = gateway._log.read_text("utf-8")
    for secret in ("demo-key", "other-key", "private words"):
        assert secret not in text
    (line,) = [line for line in gateway.events() if line.get("request_id") == "trace-1"]
    assert line["event"] == "request"
    assert line["status"] == 200
    assert line["route"] == "/v1/chat/completions"
    assert line["principal"] == "development"
    assert line["model"] == "echo"
    assert line["completion_tokens"] == 5
    assert line["finish"] == "stop"
    assert line["service"] == "api-gateway"
