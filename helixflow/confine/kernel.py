"""The system calls behind confinement that Python has no function for: prctl(2), capset(2), mount(2), unshare(2)."""

import ctypes
import os
import resource
from collections.abc import Iterable
from pathlib import Path

CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_NET_BIND = (
    *(0, 1, 3, 5, 6, 7, 8, 10),
)
"""Numbers of capabilities (capabilities(7))."""

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18

_CLONE_NEWNS = 0x20000
_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 4, 8, 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 38, 47
_PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 2, 4

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """The result of a call. Raises OSError, which names `what`, for a negative one."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int) -> int:
    """prctl(2). Raises OSError."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    return checked(libc.prctl(option, *(ctypes.c_ulong(each) for each in padded)), f"prctl({option})")


def forbid_core_dumps() -> None:
    """No core files, and no memory for other processes of the account: neither ptrace nor /proc/PID/mem."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl(_PR_SET_DUMPABLE, 0)


def forbid_new_privileges() -> None:
    """No program that this process runs gains rights any more: set-uid bits and file capabilities count for nothing."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def permitted() -> frozenset[int]:
    """The capabilities that this process can use."""
    lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    [mask] = [int(line.split()[1], 16) for line in lines if line.startswith("CapPrm:")]
    return frozenset(number for number in range(64) if mask >> number & 1)


def drop_bounding(keep: Iterable[int]) -> None:
    """Takes all capabilities but `keep` from what programs of this process can ever get. Raises OSError."""
    kept = frozenset(keep)
    for number in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text("ascii")) + 1):
        if number not in kept and prctl(_PR_CAPBSET_READ, number):
            prctl(_PR_CAPBSET_DROP, number)


def keep_over_setuid(keep: bool) -> None:
    """Whether capabilities survive the change from root to another account."""
    prctl(_PR_SET_KEEPCAPS, int(keep))


def set_capabilities(keep: Iterable[int]) -> None:
    """This thread has just these capabilities, and so have the programs it runs. Raises OSError."""
    kept = frozenset(keep)
    low = sum(1 << number for number in kept)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # Twice effective, permitted, inheritable: for the numbers below 32, and for those above.
    data = (ctypes.c_uint32 * 6)(low, low, low, 0, 0, 0)
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    checked(libc.capset(header, data), "capset")
    for number in kept:
        prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number)


def own_mounts() -> None:
    """From here on this process has mounts of its own, which nobody else sees. Raises OSError."""
    checked(libc.unshare(_CLONE_NEWNS), "unshare")
    mount("none", "/", flags=MS_REC | MS_PRIVATE)


def mount(source: str, target: str, kind: str = "", *, flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    encoded = [os.fsencode(each) if each else None for each in (source, target, kind)]
    checked(libc.mount(*encoded, ctypes.c_ulong(flags), os.fsencode(data) if data else None), f"mount on {target}")
