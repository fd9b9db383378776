"""Ties between a process and the world around it: its supervisor, and whoever reads what it prints."""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Iterable
from typing import IO, TextIO

from helixflow.errors import StartError
from helixflow.liveness import Systemd

READY_FD = "HELIXFLOW_READY_FD"
"""Environment variable: a descriptor on which a service writes one line once it serves."""
PARENT_PID = "HELIXFLOW_PARENT_PID"
"""Environment variable: the process that this one must not outlive."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies; exits when `parent` is gone already.

    `parent`: the expected parent's process id, as the parent knows it: after its death there would be no telling. The
    setting is lost by a set-uid exec and by a fork, so every process calls it for itself.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent process has ended")


def die_with_starter() -> None:
    """Ties this process to the one named in PARENT_PID; does nothing without it."""
    parent = os.environ.pop(PARENT_PID, None)
    if parent is not None:
        die_with_parent(int(parent))


def notify_ready(address: str) -> None:
    """Says, once, that this process serves: its bound address to the supervisor, READY=1 to systemd, if there are any.

    Raises StartError when the supervisor has given it up meanwhile.
    """
    Systemd().tell(f"READY=1\nSTATUS=serves on {address}")
    number = os.environ.pop(READY_FD, None)
    if number is None:
        return
    descriptor = int(number)
    try:
        os.write(descriptor, f"{address}\n".encode())
    except BrokenPipeError:
        raise StartError(
            "ready too late: the supervisor waits no longer; HELIX_SUPERVISE_READY_TIMEOUT_S (seconds) gives more time"
        ) from None
    finally:
        os.close(descriptor)


def has_terminal() -> bool:
    """Whether a terminal controls this process: not any more once it has been closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Output:
    """A text stream that outlives its reader: what nobody can read any more is dropped.

    A log that raises would fail requests, and end the process, because a pager was closed.
    """

    def __init__(self, stream: TextIO) -> None:
        """`stream`: standard output or standard error."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text; returns its length."""
        # Every log line comes through here: a context manager would cost more than the write.
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hands over what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        # A full disk may have room again; a closed pipe and a lost terminal do not come back.
        if error.errno in (errno.EPIPE, errno.EIO):
            discard(self._stream)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def discard(stream: IO[str]) -> None:
    """Points the stream's descriptor at /dev/null: for this process, its threads and its children."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


def outlive_readers() -> None:
    """From now on, standard output and standard error never fail because nobody reads them."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
