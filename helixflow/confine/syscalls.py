"""A seccomp filter: system calls that no service needs and that most attacks on a kernel begin with fail as EPERM.

A deny-list: what the libraries below us call changes with their releases. Once a kernel (5.11 or newer) has seen that a
call is always allowed, the filter costs that call nothing; SPEC_ALLOW keeps older ones from slowing down the whole
process for it.
"""

import ctypes
import errno
import platform
import struct

from helixflow.confine.kernel import checked, libc

_X86_64 = {
    "ptrace": 101, "syslog": 103, "personality": 135, "pivot_root": 155, "acct": 163, "settimeofday": 164, "mount": 165,
    "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172,
    "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212,
    "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
    "perf_event_open": 298, "fanotify_init": 300, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320,
    "bpf": 321, "userfaultfd": 323,
}  # fmt: skip
_AARCH64 = {
    "umount2": 39, "mount": 40, "pivot_root": 41, "quotactl": 60, "acct": 89, "personality": 92, "unshare": 97,
    "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112, "syslog": 116, "ptrace": 117,
    "reboot": 142, "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "add_key": 217, "request_key": 218,
    "keyctl": 219, "swapon": 224, "swapoff": 225, "perf_event_open": 241, "fanotify_init": 262,
    "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271,
    "kcmp": 272, "finit_module": 273, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
}  # fmt: skip
_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "quotactl_fd": 443,
    "mount_setattr": 442,
}  # fmt: skip
"""Newer calls have one number on all machines."""

_MACHINES = {"x86_64": (0xC000003E, _X86_64, 56), "aarch64": (0xC00000B7, _AARCH64, 220)}
"""AUDIT_ARCH of seccomp(2), numbers, and the number of clone."""

_CLONE3 = 435
"""Answered as not implemented: its flags lie in memory that no filter sees, and C libraries take clone instead then."""
_NAMESPACES = 0x7E020080
"""CLONE_NEW*: namespaces give a process rights, in them, to much more of the kernel."""
_X32_BIT = 0x40000000
_LD_ABS, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER, _TSYNC, _SPEC_ALLOW = 1, 1, 4
_NUMBER_AT, _ARCHITECTURE_AT, _FLAGS_AT = 0, 4, 16
"""Places in `struct seccomp_data`."""


def denied(machine: str) -> dict[str, int]:
    """Names and numbers of the calls that are refused; empty for a machine whose numbers are not known here."""
    return {**_MACHINES[machine][1], **_EVERYWHERE} if machine in _MACHINES else {}


def program(machine: str) -> bytes:
    """The filter, as an array of `struct sock_filter`. Calls of another architecture, and of x32, are refused."""
    architecture, _numbers, clone = _MACHINES[machine]
    numbers = sorted(denied(machine).values())
    head = [
        (_LD_ABS, 0, 0, _ARCHITECTURE_AT),
        (_JEQ, 0, "refuse", architecture),
        (_LD_ABS, 0, 0, _NUMBER_AT),
        (_JGE, "refuse", 0, _X32_BIT),
    ]
    tail = [
        (_JEQ, "unknown", 0, _CLONE3),
        (_JEQ, 0, "allow", clone),
        (_LD_ABS, 0, 0, _FLAGS_AT),
        (_JSET, "refuse", "allow", _NAMESPACES),
    ]
    ends = {"allow": _ALLOW, "refuse": _ERRNO | errno.EPERM, "unknown": _ERRNO | errno.ENOSYS}
    steps = [*head, *((_JEQ, "refuse", 0, number) for number in numbers), *tail]
    place = {name: len(steps) + order for order, name in enumerate(ends)}
    lines = [
        (code, *(place[to] - here - 1 if isinstance(to, str) else to for to in (yes, no)), value)
        for here, (code, yes, no, value) in enumerate(steps)
    ]
    lines += [(_RET, 0, 0, value) for value in ends.values()]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def install() -> bool:
    """Puts the filter over all threads of this process and what it runs; False where there is none for the machine.

    Needs no_new_privs, or rights. Raises OSError.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        return False
    code = program(machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    filled = ctypes.create_string_buffer(header, len(header))
    number = ctypes.c_long(_SECCOMP[machine])
    flags = ctypes.c_ulong(_TSYNC | _SPEC_ALLOW)
    result = libc.syscall(number, ctypes.c_ulong(_SET_MODE_FILTER), flags, ctypes.byref(filled))
    if result > 0:
        raise OSError(errno.ESRCH, f"seccomp: thread {result} cannot take the filter over")
    checked(result, "seccomp")
    return True
