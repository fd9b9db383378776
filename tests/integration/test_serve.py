"""`helixflow serve` as an operator meets it: signals in every phase, ports in use, output that nobody reads."""

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.db.support import folder

from .stack import HEADERS, SCRIPTED, Process, context, environment, until
from .test_lifecycle import alive, descendants

CHAT: dict[str, Any] = {"model": "gpt-4", "messages": [{"role": "user", "content": "go on"}], "ignore_eos": True}
Start = Callable[..., "Served"]


class Served:
    """One `helixflow serve` in a session of its own."""

    def __init__(self, environ: dict[str, str], *arguments: str, stderr: Any, launcher: tuple[str, ...] = ()) -> None:
        self.url = ""
        self.popen = subprocess.Popen(
            [sys.executable, "-m", *launcher, "helixflow", "serve", *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def until_line(self, start: str) -> None:
        """Reads standard output up to a line that starts so; fails when it ends before."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.strip().startswith("URL"):
                self.url = line.split()[1].removesuffix("/v1")
            if line.startswith(start):
                return
        raise AssertionError(f"`helixflow serve` ended before it said {start!r}")

    def until_ready(self) -> "Served":
        self.until_line("Ctrl-C")
        return self

    def family(self) -> list[int]:
        """The processes below it."""
        return descendants(self.popen.pid)

    def child(self, command: str) -> int:
        """The process that runs one service."""
        ending = f"\0{command}\0".encode()
        return next(
            pid
            for pid in self.family()
            if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(ending)
            and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(self.popen.pid)
        )

    def chat(self, certs: Path) -> int:
        return self.chat_with(certs, CHAT["model"])

    def chat_with(self, certs: Path, model: str) -> int:
        with httpx.Client(base_url=self.url, verify=context(certs), headers=HEADERS, timeout=20) as client:
            return client.post("/v1/chat/completions", json={**CHAT, "model": model, "max_tokens": 3}).status_code


@pytest.fixture
def serve(certs: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `helixflow serve`; what still runs at the end is killed, with everything below it."""
    started: list[Served] = []

    def start(*arguments: str, stderr: Any = None, **options: str) -> Served:
        environ = environment(certs, tmp_path, **{**SCRIPTED, **options})
        with (tmp_path / "serve.log").open("ab") as log:
            started.append(Served(environ, *arguments, stderr=log if stderr is None else stderr))
        return started[-1]

    yield start
    for served in started:
        served.popen.kill()  # what it started dies with it
        served.popen.communicate(timeout=20)


def log(tmp_path: Path) -> str:
    return (tmp_path / "serve.log").read_text("utf-8")


@pytest.mark.parametrize("engine", ["onnx", "scripted"])
def test_a_model_that_is_not_there_is_a_wrong_configuration(serve: Start, tmp_path: Path, engine: str) -> None:
    served = serve("--model", str(tmp_path / "nope"), HELIX_POOL_ENGINE=engine, HELIX_CERTS=str(tmp_path / "certs"))
    assert served.popen.wait(20) == 64
    assert f"{tmp_path / 'nope'} is not a directory" in log(tmp_path)
    assert not (tmp_path / "certs").exists(), "nothing was made before"


@pytest.mark.parametrize("name", ["HELIX_GATEWAY_LISTEN", "HELIX_POOL_LISTEN"])
def test_a_port_in_use_is_named(serve: Start, tmp_path: Path, name: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        served = serve(**{name: address})
        assert served.popen.wait(20) == 69
    assert f"cannot listen on {address}" in log(tmp_path)
    assert all(line.startswith("{") for line in log(tmp_path).splitlines()), "every line of the log is JSON"


def test_a_second_one_on_the_same_ports_leaves_the_first_alone(serve: Start, certs: Path) -> None:
    first = serve().until_ready()
    second = serve(HELIX_GATEWAY_LISTEN=first.url.removeprefix("https://").replace("localhost", "127.0.0.1"))
    assert second.popen.wait(20) == 69
    assert first.chat(certs) == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_the_preparation_ends_all_of_it(serve: Start, tmp_path: Path, number: signal.Signals) -> None:
    # A CA with RSA-4096 keys takes seconds.
    served = serve(HELIX_CERTS=str(tmp_path / "certs"))
    served.until_line("certificates")
    until(served.family, "the certificates are being made")
    family = served.family()
    served.popen.send_signal(number)
    assert served.popen.wait(10) == (-9 if number == signal.SIGKILL else 0)
    until(lambda: not any(alive(pid) for pid in family), "nothing is left running", 5)
    assert "Traceback" not in log(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_during_the_start_ends_all_of_it(serve: Start, tmp_path: Path, number: signal.Signals) -> None:
    served = serve()
    until(lambda: any(b"\0pool\0" in _command(pid) for pid in served.family()), "the pool starts")
    family = served.family()
    served.popen.send_signal(number)
    assert served.popen.wait(10) == (-9 if number == signal.SIGKILL else 0)
    until(lambda: not any(alive(pid) for pid in family), "nothing is left running", 5)
    assert "Traceback" not in log(tmp_path)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_reload_during_the_start_disturbs_nothing(serve: Start, certs: Path) -> None:
    served = serve()
    done = threading.Event()

    def hang_up() -> None:
        # The first lines of Python come before any handler can.
        until(served.family, "it runs its own code")
        while not done.wait(0.01):
            served.popen.send_signal(signal.SIGHUP)

    with ThreadPoolExecutor(1) as pool:
        hanging_up = pool.submit(hang_up)
        try:
            served.until_ready()
        finally:
            done.set()
        hanging_up.result()
    assert served.chat(certs) == 200


def test_nobody_needs_to_read_what_it_prints(serve: Start, certs: Path) -> None:
    reader, writer = os.pipe()
    with ExitStack() as cleanup:
        cleanup.callback(os.close, writer)
        served = serve(stderr=writer).until_ready()
        os.close(reader)
        assert served.popen.stdout is not None
        served.popen.stdout.close()
        assert served.chat(certs) == 200
        for service in ("pool", "gateway"):
            process = served.child(service)
            os.kill(process, signal.SIGKILL)
            until(lambda process=process: not alive(process), "it is dead")
            until(lambda: _answers(served, certs), f"a new {service} serves", 20)
        served.popen.send_signal(signal.SIGTERM)
        assert served.popen.wait(20) == 0


def test_the_gateway_finds_the_services_of_its_own_machine(serve: Start, certs: Path) -> None:
    """Other ports for pool and auth-service are said once; production starts its own database and knows no key."""
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        closing(socket.create_server(("127.0.0.1", 0))) as two,
    ):
        port, other = taken.getsockname()[1], two.getsockname()[1]
    with folder() as place:
        served = serve(
            HELIX_POOL_LISTEN=f"0.0.0.0:{port}",
            HELIX_AUTH_LISTEN=f"127.0.0.1:{other}",
            HELIX_PROFILE="production",
            HELIX_GATEWAY_ACCOUNTS="true",
            HELIX_DATABASE_DIRECTORY=str(place / "postgres"),
        )
        served.until_ready()
        with httpx.Client(base_url=served.url, verify=context(certs), headers=HEADERS, timeout=20) as client:
            until(lambda: client.get("/ready").status_code == 200, "the gateway reaches the pool")
            assert client.get("/v1/models").status_code == 401, "demo-key is of the development profile alone"
            assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
            until(
                lambda: client.get("/.well-known/jwks.json").status_code == 200, "the gateway reaches the auth-service"
            )
        served.popen.send_signal(signal.SIGTERM)
        assert served.popen.wait(20) == 0


def test_on_a_terminal(certs: Path, tmp_path: Path) -> None:
    """Readable lines; Ctrl-C stops it."""
    with _on_terminal(environment(certs, tmp_path, **SCRIPTED)) as (pid, master):
        shown = _read_until(master, b"Ctrl-C stops everything.")
        assert b'{"' not in shown.replace(b'{"model"', b"").replace(b'[{"role"', b""), "no JSON for people"
        os.write(master, b"\x03")
        _read_until(master, b"stopped")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_closed_terminal_stops_it(certs: Path, tmp_path: Path) -> None:
    with _on_terminal(environment(certs, tmp_path, **SCRIPTED)) as (pid, master):
        _read_until(master, b"Ctrl-C stops everything.")
        family = descendants(pid)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not any(alive(process) for process in family)


@contextmanager
def _on_terminal(environ: dict[str, str]) -> Iterator[tuple[int, int]]:
    """`helixflow serve` as the leader of a terminal's session; closes the terminal at the end."""
    pid, master = pty.fork()
    if pid == 0:
        # Under nohup the tests are run with SIGHUP ignored, and so would be the end of this terminal.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(sys.executable, [sys.executable, "-m", "helixflow", "serve"], environ)
    try:
        yield pid, master
    finally:
        os.close(master)


def _read_until(master: int, end: bytes) -> bytes:
    shown = b""
    while end not in shown:
        shown += os.read(master, 65536)
    return shown


FAILING = """
import functools, pathlib, sys

mark = pathlib.Path(__file__).with_name("fails")
launching = "helixflow.confine.launch" in sys.orig_argv
if sys.orig_argv[-1] == "pool" and not launching and mark.exists():
    from helixflow.engine.scripted import ScriptedEngine

    mark.unlink()
    ScriptedEngine.__init__ = functools.partialmethod(ScriptedEngine.__init__, fail_at_step=150)
"""
"""Python runs this when it starts; the engine of the first pool raises in a step then."""


def test_a_pool_whose_engine_fails_is_started_again(serve: Start, certs: Path, tmp_path: Path) -> None:
    """Requests end with an error that invites a retry, the process with status 70, and a new one serves."""
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(FAILING, "utf-8")
    (patch / "fails").touch()
    patch.chmod(0o777)  # the pool may run under another account
    served = serve(PYTHONPATH=str(patch), HELIX_POOL_SCRIPT_STEP_MS="4").until_ready()
    body = {**CHAT, "max_tokens": 4000}
    with (
        httpx.Client(base_url=served.url, verify=context(certs), headers=HEADERS, timeout=20) as client,
        ThreadPoolExecutor(1) as other,
        client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        silent = other.submit(client.post, "/v1/chat/completions", json=body)
        *_, error, done = [line for line in lines if line]
        assert '"code":"engine_failed"' in error
        assert done == "data: [DONE]"
        assert silent.result().status_code == 503
        assert silent.result().json()["error"]["code"] in {"engine_failed", "unavailable"}  # The latter: it came late.
        until(lambda: client.get("/ready").status_code == 503, "the gateway has no pool")
        until(lambda: _answers(served, certs), "a new pool serves")
    told = log(tmp_path)
    assert "step 150 fails, as the script says" in told
    [ended] = [line for line in told.splitlines() if "service ended" in line]
    assert "inference-pool" in ended
    assert "70" in ended
    assert "service is back" in told


def _answers(served: Served, certs: Path) -> bool:
    try:
        return served.chat(certs) == 200
    except httpx.TransportError:
        return False


def test_a_pool_that_dies_costs_no_request_that_has_said_nothing(certs: Path, tmp_path: Path) -> None:
    """Two pools, one killed under load: whatever had emitted nothing is answered by the other one."""
    environ = environment(certs, tmp_path, **SCRIPTED, HELIX_POOL_SCRIPT_STEP_MS="5")
    with ExitStack() as cleanup:
        pools = [Process(("pool",), environ, tmp_path / f"pool{i}.log").start() for i in range(2)]
        for pool in pools:
            cleanup.callback(pool.stop)
        environ = {**environ, "HELIX_GATEWAY_POOLS": ",".join(pool.address for pool in pools)}
        gateway = Process(("gateway",), environ, tmp_path / "gateway.log").start()
        cleanup.callback(gateway.stop)
        url = f"https://localhost:{gateway.address.rpartition(':')[2]}"
        client = cleanup.enter_context(httpx.Client(base_url=url, verify=context(certs), headers=HEADERS, timeout=25))
        until(lambda: gateway.text().count('"state":"ready"') == 2, "both pools are ready")

        def chat(_number: int) -> int:
            return client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 30}).status_code

        with ThreadPoolExecutor(8) as callers:
            answers = callers.map(chat, range(64))
            first = next(answers)
            pools[0].popen.kill()
            assert [first, *answers] == [200] * 64
