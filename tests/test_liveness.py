"""Signs of life: who beats, who is silent, where a process stood that had to be ended."""

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from helixflow.liveness import (
    BEAT_FD,
    LOOK_S,
    STACK_FD,
    Pulse,
    Stacks,
    Systemd,
    Watch,
    ask_for_stacks,
    is_traced,
    write_stacks_at_the_end,
)


class Clock:
    """Seconds, by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_silence_is_counted_from_the_last_beat() -> None:
    clock = Clock()
    watch = Watch(3.0, clock)
    for _ in range(20):
        clock.now += LOOK_S
        assert not watch.look()
        watch.heard()
    looks = 0
    while not watch.look():
        clock.now += LOOK_S
        looks += 1
    assert looks == 6
    watch.heard()
    assert not watch.look()


def test_no_limit_means_never() -> None:
    clock = Clock()
    watch = Watch(0, clock)
    for _ in range(10_000):
        clock.now += LOOK_S
        assert not watch.look()


@hypothesis.given(st.lists(st.floats(-1e7, 1e7), max_size=20))
def test_time_in_which_nobody_looked_is_not_silence(jumps: list[float]) -> None:
    """A suspended machine, a stopped watcher, a clock that jumps: each gap counts as one look."""
    clock = Clock()
    watch = Watch(1e9, clock)
    for jump in jumps:
        clock.now += jump
        watch.look()
    assert 0 <= watch.silent_s <= 2 * LOOK_S * len(jumps)


def test_a_beat_reaches_the_supervisor_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(BEAT_FD, str(writer))
    pulse = Pulse()
    assert BEAT_FD not in os.environ
    pulse.beat()
    assert os.read(reader, 16) == b"."
    for _ in range(70_000):  # more than a pipe holds: nobody reads
        pulse.beat()
    os.close(reader)
    pulse.beat()
    pulse.close()
    pulse.beat()


def test_systemd_hears_of_readiness_and_of_every_beat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "600000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        pulse = Pulse()
        assert pulse.interval_s == 0.3
        pulse.beat()
        assert manager.recv(100) == b"WATCHDOG=1"
        Systemd().tell("READY=1")
        assert manager.recv(100) == b"READY=1"
        monkeypatch.setenv("WATCHDOG_PID", "1")
        assert Pulse().interval_s == 1.0, "somebody else is watched"
    Systemd().tell("STOPPING=1")  # nobody listens


def test_an_abstract_socket_of_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"helixflow-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        Systemd().tell("READY=1")
        assert manager.recv(100) == b"READY=1"


STANDING = """
import os, threading, time
from helixflow.liveness import write_stacks_at_the_end

def stands_here():
    os.write(1, b"x")
    time.sleep(600)

def another_thread():
    time.sleep(600)

write_stacks_at_the_end()
threading.Thread(target=another_thread, daemon=True).start()
stands_here()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_that_stands_still_says_where(stopped: bool) -> None:
    stacks = Stacks()
    with subprocess.Popen(
        [sys.executable, "-c", STANDING],
        env={**os.environ, STACK_FD: str(stacks.fileno())},
        pass_fds=[stacks.fileno()],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        if stopped:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert not is_traced(process.pid)
        ask_for_stacks(process.pid)
        assert process.wait(10) == -signal.SIGABRT
    text = stacks.take()
    assert "stands_here" in text
    assert "another_thread" in text


def test_without_a_supervisor_the_stacks_go_to_standard_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STANDING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == "x"
    ask_for_stacks(process.pid)
    assert "stands_here" in process.communicate(timeout=10)[1]


def test_a_process_under_a_debugger_is_known() -> None:
    tracer = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "pid = int(sys.argv[1])\n"
        "assert libc.ptrace(0x4206, pid, None, None) == 0\n"  # PTRACE_SEIZE
        "print('seized', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            with subprocess.Popen(
                [sys.executable, "-c", tracer, str(child.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as debugger:
                assert debugger.stdout is not None
                assert debugger.stdin is not None
                assert select.select([debugger.stdout], [], [], 10)[0]
                if debugger.stdout.readline() != b"seized\n":
                    pytest.skip("this machine allows no ptrace")
                assert is_traced(child.pid)
                debugger.stdin.close()
                debugger.wait(10)
            assert not is_traced(child.pid)
            assert not is_traced(2**22 + 1), "a process that is not there"
        finally:
            child.kill()


def test_stacks_are_written_on_any_fatal_signal() -> None:
    stacks = Stacks()
    process = subprocess.run(
        [sys.executable, "-c", f"{STANDING[: STANDING.rindex('threading.Thread')]}\nos.kill(os.getpid(), 11)"],
        env={**os.environ, STACK_FD: str(stacks.fileno())},
        pass_fds=[stacks.fileno()],
        check=False,
    )
    assert process.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in stacks.take()


def test_a_worker_gets_a_file_of_its_own() -> None:
    stacks = Stacks()
    pid = os.fork()
    if pid == 0:
        write_stacks_at_the_end(stacks.fileno())
        os.abort()
    os.waitpid(pid, 0)
    assert "test_a_worker_gets_a_file_of_its_own" in stacks.take()
