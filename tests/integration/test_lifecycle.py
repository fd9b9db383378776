"""Clients that leave, readers that stall, pools that die, certificates that change, processes that stop."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from helixflow import core_rs

from .stack import HEADERS, SCRIPTED, Process, Stack, context, environment, ready, running, until

CHAT: dict[str, Any] = {"model": "gpt-4", "messages": [{"role": "user", "content": "go on"}], "ignore_eos": True}


class OpenStream(Protocol):
    """The type of the fixture `open_stream`."""

    def __call__(self, stack: Stack, body: dict[str, Any], receive_buffer: int = 0) -> ssl.SSLSocket: ...


class Observer:
    """Reads the pool's own state as a gateway does: over mutual TLS, through the watch stream."""

    def __init__(self, stack: Stack) -> None:
        files = core_rs.TlsFiles(
            str(stack.certs / "helixflow-ca.pem"),
            str(stack.certs / "api-gateway-client.crt"),
            str(stack.certs / "api-gateway-client-key.pem"),
        )
        self._client = core_rs.PoolClient([stack.pool.address], files)
        until(lambda: self._client.pools()[0].state == "ready", "the observer sees the pool")

    @property
    def busy(self) -> tuple[int, int]:
        """(running, queued) sequences."""
        pool = self._client.pools()[0]
        return pool.running, pool.queued

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def observer(scripted: Stack) -> Iterator[Observer]:
    observer = Observer(scripted)
    yield observer
    observer.close()


@pytest.fixture
def open_stream() -> Iterator[OpenStream]:
    """Sends one request over a socket of our own, so that the test decides what is read."""
    with ExitStack() as sockets:
        yield lambda stack, body, receive_buffer=0: sockets.enter_context(_open_stream(stack, body, receive_buffer))


def _open_stream(stack: Stack, body: dict[str, Any], receive_buffer: int) -> ssl.SSLSocket:
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(20)
    raw.connect(("127.0.0.1", int(stack.gateway.address.rpartition(":")[2])))
    secure: ssl.SSLSocket = context(stack.certs).wrap_socket(raw, server_hostname="localhost")
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: {HEADERS['Authorization']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    secure.sendall(head.encode() + payload)
    return secure


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(
    open_stream: OpenStream, scripted: Stack, observer: Observer, stream: bool
) -> None:
    secure = open_stream(scripted, {**CHAT, "stream": stream, "max_tokens": 1900})
    until(lambda: observer.busy == (1, 0), "the request runs")
    secure.close()
    left = time.monotonic()
    until(lambda: observer.busy == (0, 0), "the slot is free", 2.0)
    assert time.monotonic() - left < 1.0


def test_a_client_that_leaves_the_queue(open_stream: OpenStream, certs: Path, tmp_path: Path) -> None:
    with running(certs, tmp_path, **SCRIPTED, HELIX_POOL_SLOTS="1", HELIX_POOL_SCRIPT_STEP_MS="5") as stack:
        observer = Observer(stack)
        first = open_stream(stack, {**CHAT, "stream": True, "max_tokens": 1900})
        until(lambda: observer.busy == (1, 0), "the first runs")
        second = open_stream(stack, {**CHAT, "stream": False, "max_tokens": 5})
        until(lambda: observer.busy == (1, 1), "the second waits")
        second.close()
        until(lambda: observer.busy == (1, 0), "the second has left the queue", 2.0)
        first.close()
        until(lambda: observer.busy == (0, 0), "all is free", 2.0)
        observer.close()


def test_a_full_queue_is_a_429_and_a_late_request_a_504(open_stream: OpenStream, certs: Path, tmp_path: Path) -> None:
    options = {"HELIX_POOL_SLOTS": "1", "HELIX_POOL_SCRIPT_STEP_MS": "5", "HELIX_POOL_QUEUE_REQUESTS": "1"}
    with running(certs, tmp_path, **SCRIPTED, **options) as stack, stack.client() as client:
        observer = Observer(stack)
        first = open_stream(stack, {**CHAT, "stream": True, "max_tokens": 1900})
        until(lambda: observer.busy == (1, 0), "the first runs")
        late = client.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout-ms": "50"})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        second = open_stream(stack, {**CHAT, "stream": True, "max_tokens": 5})
        until(lambda: observer.busy == (1, 1), "the second waits")
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        first.close()
        second.close()
        observer.close()


def rss_mib(pid: int) -> float:
    """Resident memory of a process and everything below it (MiB)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(own.split()[1]) / 1024 + sum(rss_mib(int(child)) for child in children)


def test_unread_streams_cost_bounded_memory_and_no_neighbours(
    open_stream: OpenStream, scripted: Stack, observer: Observer
) -> None:
    with scripted.client() as client:
        client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 50})
        before = rss_mib(scripted.gateway.popen.pid)
        logprobs = {"logprobs": True, "top_logprobs": 5}
        unread = [
            open_stream(scripted, {**CHAT, **logprobs, "stream": True, "max_tokens": 1900}, 4096) for _ in range(8)
        ]
        until(lambda: observer.busy[0] == 8, "all of them run")
        for _ in range(5):
            answer = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 200})
            assert answer.json()["usage"]["completion_tokens"] == 200
        assert rss_mib(scripted.gateway.popen.pid) - before < 48
        for secure in unread:
            secure.close()
    until(lambda: observer.busy == (0, 0), "the slots are free")


def test_a_killed_pool_is_a_503_and_comes_back(open_stream: OpenStream, certs: Path, tmp_path: Path) -> None:
    options = {**SCRIPTED, "HELIX_POOL_SCRIPT_STEP_MS": "2"}
    with running(certs, tmp_path, **options) as stack, stack.client() as client:
        statuses: list[int] = []
        errors: list[str] = []
        stop = threading.Event()

        def load() -> None:
            with stack.client() as own:
                while not stop.is_set():
                    answer = own.post("/v1/chat/completions", json={**CHAT, "max_tokens": 20})
                    statuses.append(answer.status_code)
                    if answer.status_code != 200:
                        errors.append(answer.json()["error"]["code"])

        stream = open_stream(stack, {**CHAT, "stream": True, "max_tokens": 1900})
        stream.recv(4096)
        with ThreadPoolExecutor(4) as threads:
            jobs = [threads.submit(load) for _ in range(4)]
            until(lambda: len(statuses) > 20, "the load runs")
            stack.pool.popen.kill()
            stack.pool.popen.wait()
            until(lambda: client.get("/ready").status_code == 503, "not ready without a pool")
            until(lambda: 503 in statuses, "requests are refused")
            environ = {**stack.pool.environ, "HELIX_POOL_LISTEN": stack.pool.address}
            stack.pool = Process(("pool",), environ, stack.pool.log).start()
            until(lambda: ready(stack), "the gateway finds the pool again")
            count = len(statuses)
            until(lambda: 200 in statuses[count:], "requests are served again")
            stop.set()
            for job in jobs:
                job.result(timeout=20)
        assert set(statuses) == {200, 503}
        assert set(errors) <= {"unavailable", "engine_failed"}
        rest = read_to_end(stream)
        assert b'"code":"unavailable"' in rest
        assert b"data: [DONE]" in rest
        stack.pool.stop()


def read_to_end(secure: ssl.SSLSocket) -> bytes:
    """Reads until the answer's last chunk, or the end of the connection."""
    received = b""
    with suppress(ssl.SSLError):
        while not received.endswith(b"0\r\n\r\n"):
            piece = secure.recv(65536)
            if not piece:
                break
            received += piece
    return received


@pytest.mark.parametrize("told", [True, False], ids=["SIGHUP", "files watched"])
def test_certificates_change_under_open_streams(open_stream: OpenStream, tmp_path: Path, told: bool) -> None:
    certs = tmp_path / "certs"

    def pki(*arguments: str) -> None:
        command = [sys.executable, "-m", "helixflow", "pki", *arguments, "--dir", str(certs)]
        subprocess.run(command, check=True, capture_output=True)

    pki("init", "--key-type", "ecdsa-p256")
    options = {**SCRIPTED, "HELIX_POOL_SCRIPT_STEP_MS": "4"}
    with running(certs, tmp_path / "state", **options) as stack:
        stream = open_stream(stack, {**CHAT, "stream": True, "max_tokens": 1500})
        assert stream.recv(4096)
        old = serial(stack)
        pki("renew", "--all", "--key-type", "ecdsa-p256")
        for process in (stack.pool, stack.gateway) if told else ():
            process.popen.send_signal(signal.SIGHUP)
        until(lambda: serial(stack) != old, "new connections see the new certificate")
        until(lambda: "certificates re" in stack.pool.text(), "the pool has the new ones, too")
        with stack.client() as client:
            until(lambda: ready(stack), "the gateway still reaches the pool")
            assert client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 5}).status_code == 200
        assert b"data: [DONE]" in read_to_end(stream), "the open stream went on to its end"
        renewed = serial(stack)
        (certs / "api-gateway.crt").write_bytes(b"not a certificate")
        if told:
            stack.gateway.popen.send_signal(signal.SIGHUP)
        until(lambda: "api-gateway.crt" in stack.gateway.text(), "the bad certificate is logged")
        assert serial(stack) == renewed, "the old one stays"


def serial(stack: Stack) -> int:
    """Serial number of the certificate that a new connection is shown."""
    from cryptography import x509

    port = int(stack.gateway.address.rpartition(":")[2])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context(stack.certs).wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        der = secure.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


@pytest.mark.parametrize("twice", [False, True])
def test_drain(open_stream: OpenStream, certs: Path, tmp_path: Path, twice: bool) -> None:
    options = {**SCRIPTED, "HELIX_POOL_SCRIPT_STEP_MS": "4"}
    with running(certs, tmp_path, **options) as stack, stack.client() as client:
        stream = open_stream(stack, {**CHAT, "stream": True, "max_tokens": 400 if not twice else 1900})
        assert stream.recv(4096)
        assert client.get("/ready").status_code == 200
        stack.gateway.popen.send_signal(signal.SIGTERM)
        if twice:
            until(lambda: "drain" in stack.gateway.text(), "the gateway drains")
            stack.gateway.popen.send_signal(signal.SIGTERM)
        rest = read_to_end(stream)
        assert b"data: [DONE]" in rest
        assert (b'"code":"draining"' in rest) == twice
        assert (b'"finish_reason":"length"' in rest) == (not twice)
        assert stack.gateway.wait(20) == 0


def test_a_draining_gateway_says_so(open_stream: OpenStream, certs: Path, tmp_path: Path) -> None:
    options = {**SCRIPTED, "HELIX_POOL_SCRIPT_STEP_MS": "4"}
    with running(certs, tmp_path, **options) as stack, stack.client() as client:
        stream = open_stream(stack, {**CHAT, "stream": True, "max_tokens": 1500})
        assert stream.recv(4096)
        assert client.get("/ready").status_code == 200
        stack.gateway.popen.send_signal(signal.SIGTERM)
        until(lambda: "drain" in stack.gateway.text(), "the gateway drains")
        with suppress(httpx.TransportError):
            assert client.get("/ready").status_code == 503
            refused = client.post("/v1/chat/completions", json=CHAT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert b'"finish_reason":"length"' in read_to_end(stream)
        assert stack.gateway.wait(20) == 0


# --- helixflow serve ----------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []  # it has just ended
    return children + [below for child in children for below in descendants(child)]


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def served(certs: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`helixflow serve` with the scripted engine, once it has printed that it is ready."""
    environ = environment(certs, tmp_path, **SCRIPTED)
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "helixflow", "serve"],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    for line in process.stdout:
        if "Ctrl-C" in line:
            break
        if line.strip().startswith("URL"):
            process.url = line.split()[1].removesuffix("/v1")  # type: ignore[attr-defined]
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)


def test_serve_stops_all_of_it_on_ctrl_c(served: subprocess.Popen[str]) -> None:
    family = descendants(served.pid)
    assert len(family) >= 3
    served.send_signal(signal.SIGINT)
    assert served.wait(25) == 0
    assert not [pid for pid in family if alive(pid)]


def test_serve_leaves_no_orphan_when_it_is_killed(served: subprocess.Popen[str]) -> None:
    family = descendants(served.pid)
    served.kill()
    served.wait(10)
    until(lambda: not [pid for pid in family if alive(pid)], "every process has ended")


def test_serve_restarts_a_killed_pool(served: subprocess.Popen[str], certs: Path) -> None:
    url: str = served.url  # type: ignore[attr-defined]
    with httpx.Client(base_url=url, verify=context(certs), headers=HEADERS, timeout=20) as client:
        assert client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3}).status_code == 200
        pool = next(
            pid for pid in descendants(served.pid) if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"\0pool\0")
        )
        os.kill(pool, signal.SIGKILL)
        until(lambda: not alive(pool), "the pool has ended")
        until(
            lambda: client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3}).status_code == 200,
            "a new pool serves",
            20,
        )
