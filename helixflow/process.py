"""Ties between a supervisor and its processes: they die with it, and they tell it when they are ready."""

import ctypes
import os
import signal
import sys

READY_FD = "HELIXFLOW_READY_FD"
"""Environment variable: a descriptor on which a service writes one line once it serves."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent dies; exits when `parent` is gone already.

    `parent`: the expected parent's process id; default: the present one. The setting is lost by
    a set-uid exec and by a fork, so every process calls it for itself.
    """
    expected = os.getppid() if parent is None else parent
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:
        sys.exit("the parent process has ended")


def notify_ready(address: str) -> None:
    """Writes the bound address to the supervisor, once. Does nothing without a supervisor."""
    number = os.environ.pop(READY_FD, None)
    if number is None:
        return
    descriptor = int(number)
    try:
        os.write(descriptor, f"{address}\n".encode())
    finally:
        os.close(descriptor)
