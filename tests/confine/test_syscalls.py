"""The filter of system calls: what it refuses, on a real kernel, and that ordinary work goes on under it."""

import errno
import platform
import struct
import subprocess
import sys

import pytest

from helixflow.confine import syscalls

HERE = platform.machine()

TRY = """
import ctypes, errno, json, os, platform, socket, subprocess, sys, threading
from helixflow.confine import harden, kernel, syscalls

def call(number, *arguments):
    ctypes.set_errno(0)
    result = kernel.libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(each) for each in arguments))
    return errno.errorcode.get(ctypes.get_errno(), "") if result < 0 else "done"

thread_says = []
ready, go = threading.Event(), threading.Event()

def another():
    ready.set()
    go.wait()
    thread_says.append(call(syscalls.denied(platform.machine())["keyctl"], 0, 0))

thread = threading.Thread(target=another)
thread.start()
ready.wait()
harden.harden()
go.set()
thread.join()
denied = {name: call(number, 0, 0, 0, 0, 0) for name, number in syscalls.denied(platform.machine()).items()}
clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid() > 0)"], capture_output=True, text=True)
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
import resource
print(json.dumps({
    "denied": denied,
    "thread": thread_says,
    "namespace": call(clone, 0x10000000 | 17, 0, 0, 0, 0),
    "clone3": call(435, 0, 0),
    "child": child.stdout,
    "socket": bool(socket.socket()),
    "seccomp": status["Seccomp"].strip(),
    "nnp": status["NoNewPrivs"].strip(),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "dumpable": kernel.prctl(3),
}))
"""


@pytest.mark.skipif(not syscalls.denied(HERE), reason="no filter for this machine")
def test_a_hardened_process_works_and_may_not_do_what_services_never_do() -> None:
    import json

    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, check=True, timeout=60)
    said = json.loads(done.stdout)
    assert said["denied"] == dict.fromkeys(syscalls.denied(HERE), "EPERM")
    assert said["thread"] == ["EPERM"], "threads that ran before are under it, too"
    assert (said["namespace"], said["clone3"]) == ("EPERM", "ENOSYS")
    assert said["child"] == "True\n"
    assert (said["seccomp"], said["nnp"]) == ("2", "1")
    assert (said["core"], said["dumpable"]) == ([0, 0], 0)


def run(machine: str, architecture: int, number: int, first: int = 0) -> int:
    """What the filter answers to a call: an interpreter of the few instructions that it has."""
    code = syscalls.program(machine)
    lines = [struct.unpack("=HBBI", code[at : at + 8]) for at in range(0, len(code), 8)]
    data = {0: number, 4: architecture, 16: first}
    place, value = 0, 0
    while True:
        operation, yes, no, operand = lines[place]
        place += 1
        match operation:
            case 0x20:
                value = data[operand]
            case 0x06:
                return int(operand)
            case 0x15:
                place += yes if value == operand else no
            case 0x35:
                place += yes if value >= operand else no
            case 0x45:
                place += yes if value & operand else no
            case _:
                raise AssertionError(f"an instruction that is not expected: {operation:#x}")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_number_gets_its_answer(machine: str) -> None:
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    allow, refuse, unknown = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    numbers = set(syscalls.denied(machine).values())
    clone = {"x86_64": 56, "aarch64": 220}[machine]
    for number in range(600):
        expected = refuse if number in numbers else unknown if number == 435 else allow
        assert run(machine, architecture, number) == expected, number
    assert run(machine, architecture, clone, 0x003D0F00) == allow, "a thread"
    assert run(machine, architecture, clone, 0x10000011) == refuse, "a user namespace"
    assert run(machine, architecture, clone, 0x20000) == refuse, "a mount namespace"
    assert run(machine, 0x40000003, 20) == refuse, "32 bits"
    assert run(machine, architecture, 0x40000000 | 39) == refuse, "x32"
