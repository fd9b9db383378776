"""What the supervisor does with services that stand still, fail for good, come too late, or leave orphans behind."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.db.support import folder

from .stack import HEADERS, SCRIPTED, context, environment, until
from .test_lifecycle import alive, descendants
from .test_serve import CHAT, Served, log

pytestmark = pytest.mark.long

FOUND_S = 10.0
"""A standstill is found within this time (seconds)."""

BLOCKING = """
import signal, time

def stands_here(*_):
    time.sleep(600)

signal.signal(signal.SIGUSR2, stands_here)
"""
"""Python runs this when it starts: a signal blocks the main thread, and with it the event loop."""

Start = Callable[..., Served]


@pytest.fixture
def serve(certs: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `helixflow serve`; what still runs at the end is killed, with everything below it."""
    started: list[Served] = []

    def start(**options: str) -> Served:
        environ = environment(certs, tmp_path, **{**SCRIPTED, **options})
        with (tmp_path / "serve.log").open("ab") as output:
            started.append(Served(environ, stderr=output))
        return started[-1]

    yield start
    for served in started:
        served.popen.kill()
        served.popen.communicate(timeout=20)


def lines(tmp_path: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log(tmp_path).splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def answers(served: Served, certs: Path) -> bool:
    try:
        return served.chat(certs) == 200
    except httpx.TransportError:
        return False


def worker_of(gateway: int) -> int:
    """The newest one."""
    return int(Path(f"/proc/{gateway}/task/{gateway}/children").read_text().split()[-1])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGUSR2], ids=["frozen", "blocked"])
def test_whatever_stands_still_is_found_and_replaced(
    serve: Start, certs: Path, tmp_path: Path, how: signal.Signals
) -> None:
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(BLOCKING, "utf-8")
    with folder() as place:
        served = serve(
            PYTHONPATH=str(patch),
            HELIX_GATEWAY_ACCOUNTS="true",
            HELIX_AUTH_LISTEN="127.0.0.1:0",
            HELIX_DATABASE_DIRECTORY=str(place / "postgres"),
        ).until_ready()
        until(lambda: answers(served, certs), "it serves", 30)
        gateway = served.child("gateway")
        struck = {name: served.child(name) for name in ("pool", "auth", "run")} | {"worker": worker_of(gateway)}
        for pid in struck.values():
            os.kill(pid, how)
        until(lambda: not any(alive(pid) for pid in struck.values()), "they are ended", 40)
        until(lambda: len(lines(tmp_path, "service is back")) >= 3, "the services are back", 40)
        until(lambda: answers(served, certs), "it serves again", 40)
        told = lines(tmp_path, "service stands still; it is ended and replaced")
        assert {line["name"] for line in told} == {"inference-pool", "auth-service", "database"}
        told += lines(tmp_path, "worker stands still; it is ended and replaced")
        assert len(told) == 4
        assert all(line["silent_s"] < FOUND_S for line in told)
        ended = [*lines(tmp_path, "service ended"), *lines(tmp_path, "worker ended by a fatal signal")]
        assert all("most recent call first" in line["stack"] for line in ended)
        if how == signal.SIGUSR2:
            assert all("stands_here" in line["stack"] for line in ended)
        assert served.child("gateway") == gateway, "its main process went on"

        os.kill(gateway, how)
        until(lambda: not alive(gateway), "the main process is ended", 40)
        until(lambda: answers(served, certs), "a new gateway serves", 40)
        served.popen.send_signal(signal.SIGTERM)
        assert served.popen.wait(30) == 0


@pytest.mark.timeout(120)
def test_calls_of_a_frozen_pool_end_with_an_error_that_invites_a_retry(
    serve: Start, certs: Path, tmp_path: Path
) -> None:
    served = serve(HELIX_POOL_SCRIPT_STEP_MS="4").until_ready()
    body = {**CHAT, "max_tokens": 4000, "stream": True}
    with (
        httpx.Client(base_url=served.url, verify=context(certs), headers=HEADERS, timeout=40) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as stream,
    ):
        events = stream.iter_lines()
        assert next(events).startswith("data: {")
        os.kill(served.child("pool"), signal.SIGSTOP)
        *_, error, done = [line for line in events if line.startswith("data:")]
        assert '"code":"unavailable"' in error
        assert done == "data: [DONE]"
    until(lambda: answers(served, certs), "a new pool serves", 40)


def test_what_worked_once_is_tried_again_and_the_rest_stays_up(serve: Start, certs: Path, tmp_path: Path) -> None:
    """A checkpoint that is away while the pool restarts is a wrong configuration (64) for the pool alone."""
    model = tmp_path / "model"
    model.symlink_to(Path(__file__).resolve().parents[2] / "engines" / "demo")
    served = serve(HELIX_MODEL=str(model), HELIX_SUPERVISE_BACKOFF_MAX_S="0.5").until_ready()
    assert served.chat_with(certs, "demo") == 200
    pool, gateway = served.child("pool"), served.child("gateway")
    away = model.rename(tmp_path / "away")
    os.kill(pool, signal.SIGKILL)
    until(lambda: len(lines(tmp_path, "restart failed")) >= 2, "it is tried again and again", 25)
    assert "exit status 64" in lines(tmp_path, "restart failed")[0]["error"]
    with httpx.Client(base_url=served.url, verify=context(certs), headers=HEADERS, timeout=20) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
    assert served.child("gateway") == gateway
    away.rename(model)
    until(lambda: bool(lines(tmp_path, "service is back")), "the pool is back", 25)
    until(lambda: served.chat_with(certs, "demo") == 200, "it serves again")


def test_a_service_that_is_ready_too_late_says_so(serve: Start, tmp_path: Path) -> None:
    patch = tmp_path / "patch"
    patch.mkdir()
    # Slow enough for the limit, quick enough to find the pipe closed before it is killed.
    (patch / "sitecustomize.py").write_text(
        "import sys, time\nif sys.orig_argv[-1] == 'pool':\n    time.sleep(1.5)\n", "utf-8"
    )
    served = serve(PYTHONPATH=str(patch), HELIX_SUPERVISE_READY_TIMEOUT_S="1")
    assert served.popen.wait(25) == 69
    text = log(tmp_path)
    assert "not ready in time" in text
    assert "Traceback" not in text
    assert all(line.startswith("{") for line in text.splitlines())


def test_orphans_are_reaped(certs: Path, tmp_path: Path) -> None:
    """As process 1, or a sub-reaper: whoever is left by a dead parent becomes the supervisor's child."""
    libc = ctypes.CDLL(None, use_errno=True)

    def become_subreaper() -> None:
        assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER, which an exec keeps

    serving = subprocess.Popen(
        [sys.executable, "-m", "helixflow", "serve"],
        env=environment(certs, tmp_path, **SCRIPTED),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=become_subreaper,  # noqa: PLW1509
    )
    try:
        assert serving.stdout is not None
        assert any(line.startswith("Ctrl-C") for line in serving.stdout)
        gateway = next(
            pid
            for pid in descendants(serving.pid)
            if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"\0gateway\0")
        )
        worker = worker_of(gateway)
        os.kill(gateway, signal.SIGKILL)  # the worker dies with it, and nobody is left who waits for it
        until(lambda: not Path(f"/proc/{worker}").exists(), "the worker is no zombie", 20)
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(30) == 0
    finally:
        serving.kill()
        serving.communicate(timeout=20)


def test_systemd_is_told(certs: Path, tmp_path: Path) -> None:
    """READY=1 when all serve, beats, STOPPING=1; the services themselves tell it nothing."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        environ = environment(certs, tmp_path, **SCRIPTED, NOTIFY_SOCKET=str(tmp_path / "notify"))
        environ["WATCHDOG_USEC"] = "400000"
        served = Served(environ, stderr=subprocess.DEVNULL)
        try:
            heard: list[str] = []
            deadline = time.monotonic() + 25
            while "READY=1" not in heard or heard[-3:] != ["WATCHDOG=1"] * 3:
                heard.append(manager.recv(200).decode().splitlines()[0])
                assert time.monotonic() < deadline
            assert heard.count("READY=1") == 1
            served.popen.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in heard:
                heard.append(manager.recv(200).decode())
            assert served.popen.wait(20) == 0
        finally:
            served.popen.kill()
            served.popen.communicate(timeout=20)
