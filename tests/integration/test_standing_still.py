"""An engine, a pool, a reader that stands still: who waits is not held, what stands gives way."""

import contextlib
import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h2.connection
import httpx
import pytest

from helixflow.errors import EX_SOFTWARE

from .stack import HEADERS, SCRIPTED, Stack, context, running, until
from .test_lifecycle import Observer

pytestmark = pytest.mark.long

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "gpt-4",
    "messages": [{"role": "user", "content": "go on"}],
    "ignore_eos": True,
    "max_tokens": 50,
}
HANG = {**SCRIPTED, "HELIX_POOL_SLOTS": "1", "HELIX_POOL_SCRIPT_HANG_STEP": "4"}


def last_error(answer: httpx.Response) -> str:
    """The code of the error at the end of a stream."""
    parts = [part.removeprefix("data: ") for part in answer.read().decode().split("\n\n") if part]
    assert parts[-1] == "[DONE]"
    code: str = json.loads(parts[-2])["error"]["code"]
    return code


def test_a_step_that_never_ends_is_found_told_and_replaced(certs: Path, tmp_path: Path) -> None:
    with (
        running(certs, tmp_path, **HANG, HELIX_POOL_STEP_TIMEOUT_S="1.5") as stack,
        ThreadPoolExecutor(1) as others,
        stack.client() as client,
        stack.client() as other,
        client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer,
    ):
        assert answer.status_code == 200
        waiting = others.submit(other.post, CHAT, json=BODY)
        assert last_error(answer) == "engine_failed"
        refused = waiting.result()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] in ("engine_failed", "unavailable")
        until(lambda: client.get("/ready").status_code == 503, "not ready")
        assert client.get("/ready").json()["reasons"] == ["engine_stuck"]
        assert client.get("/health").status_code == 200
        assert stack.pool.wait() == EX_SOFTWARE
        lines = [json.loads(line) for line in stack.pool.text().splitlines() if line.startswith("{")]
    [line] = [line for line in lines if "stands still" in line["event"]]
    assert line["level"] == "error"
    assert "in _hang" in line["stack"], "it says where"
    assert (line["limit_s"], line["tokens"]) == (1.5, 1)


def test_a_pool_whose_engine_stands_can_be_stopped(certs: Path, tmp_path: Path) -> None:
    with (
        running(certs, tmp_path, **HANG, HELIX_POOL_STEP_TIMEOUT_S="3") as stack,
        stack.client() as client,
        client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer,
    ):
        assert answer.status_code == 200
        assert stack.pool.stop(timeout_s=15) == EX_SOFTWARE
        assert last_error(answer) == "engine_failed"


def test_deadlines_pass_while_the_engine_stands(certs: Path, tmp_path: Path) -> None:
    with (
        running(certs, tmp_path, **HANG) as stack,
        stack.client() as client,
        stack.client() as other,
        client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer,
    ):
        assert answer.status_code == 200
        for stream in (True, False):
            began = time.monotonic()
            late = other.post(CHAT, json={**BODY, "stream": stream}, headers={"x-request-timeout-ms": "300"})
            assert time.monotonic() - began < 2
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert 1 <= int(late.headers["retry-after"]) <= 60
        stack.pool.popen.kill()
        stack.pool.popen.wait()


@contextlib.contextmanager
def standing(stack: Stack) -> Iterator[None]:
    """A pool that is stopped as a debugger stops it."""
    os.kill(stack.pool.popen.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(stack.pool.popen.pid, signal.SIGCONT)


@pytest.mark.parametrize("route", [CHAT, "/tokenize"])
def test_deadlines_pass_while_the_pool_stands(certs: Path, tmp_path: Path, route: str) -> None:
    body = BODY if route == CHAT else {"model": "gpt-4", "prompt": "x"}
    with running(certs, tmp_path, **SCRIPTED) as stack, stack.client() as client:
        assert client.post(route, json=body).status_code == 200
        with standing(stack):
            began = time.monotonic()
            late = client.post(route, json=body, headers={"x-request-timeout-ms": "300"})
            assert time.monotonic() - began < 2
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            # Nobody asks for an end of this one: the connection is given up.
            began = time.monotonic()
            refused = client.post(route, json=body)
            assert time.monotonic() - began < 10
            assert refused.status_code == 503
            assert client.get("/ready").json()["reasons"] == ["no_pool"]
        until(lambda: client.get("/ready").status_code == 200, "it is back")


def test_what_has_no_slot_has_no_status(certs: Path, tmp_path: Path) -> None:
    slow = {"HELIX_POOL_SLOTS": "1", "HELIX_POOL_SCRIPT_STEP_MS": "5"}
    with (
        running(certs, tmp_path, **SCRIPTED, **slow) as stack,
        stack.client() as client,
        stack.client() as other,
        client.stream("POST", CHAT, json={**BODY, "stream": True, "max_tokens": 2000}) as first,
    ):
        assert first.status_code == 200
        late = other.post(CHAT, json={**BODY, "stream": True}, headers={"x-request-timeout-ms": "200"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert int(late.headers["retry-after"]) >= 1
        with pytest.raises(httpx.ReadTimeout):  # not even the head comes while it waits
            other.post(CHAT, json={**BODY, "stream": True}, timeout=0.5)
        first.close()
        answer = other.post(CHAT, json={**BODY, "stream": True, "max_tokens": 2})
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")


@contextlib.contextmanager
def unread(stack: Stack, body: dict[str, Any]) -> Iterator[ssl.SSLSocket]:
    """A stream over HTTP/2 whose client never opens the window again."""
    tls = context(stack.certs)
    tls.set_alpn_protocols(["h2"])
    raw = socket.create_connection(("127.0.0.1", int(stack.gateway.address.rpartition(":")[2])), 20)
    with contextlib.closing(tls.wrap_socket(raw, server_hostname="localhost")) as wire:
        connection = h2.connection.H2Connection()
        connection.initiate_connection()
        headers = {
            ":method": "POST",
            ":path": CHAT,
            ":scheme": "https",
            ":authority": "localhost",
            "authorization": HEADERS["Authorization"],
            "content-type": "application/json",
        }
        connection.send_headers(1, list(headers.items()))
        connection.send_data(1, json.dumps(body).encode(), end_stream=True)
        wire.sendall(connection.data_to_send())
        yield wire


def test_streams_that_nobody_reads_give_their_slots_up(certs: Path, tmp_path: Path) -> None:
    options = {"HELIX_POOL_SLOTS": "2", "HELIX_POOL_SCRIPT_STEP_MS": "2", "HELIX_POOL_STALL_YIELD_MS": "100"}
    endless = {**BODY, "stream": True, "max_tokens": 3900}
    with running(certs, tmp_path, **SCRIPTED, **options) as stack, stack.client() as client:
        with unread(stack, endless), unread(stack, endless):
            observer = Observer(stack)
            until(lambda: observer.busy == (2, 0), "both run")
            observer.close()
            answers = [client.post(CHAT, json={**BODY, "max_tokens": 3}) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200] * 3
        until(lambda: len(requests(stack.gateway.text())) == 5, "the gateway has heard of all ends")
        stack.pool.stop()
        at_pool, at_gateway = requests(stack.pool.text()), requests(stack.gateway.text())
    cut = [line for line in at_pool.values() if line["outcome"] == "deadline_exceeded"]
    assert 1 <= len(cut) <= 2
    assert all(line["completion_tokens"] < 1500 for line in cut), "the pool runs not far ahead of a reader"
    for name, line in at_pool.items():
        assert at_gateway[name]["completion_tokens"] == line["completion_tokens"], "what was generated is what counts"


def requests(log: str) -> dict[str, dict[str, Any]]:
    """The lines of inference requests that have ended, by their ids."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return {line["request_id"]: line for line in lines if line["event"] == "request" and "completion_tokens" in line}
