"""What this process may use of the machine."""

import contextlib
import math
import mmap
import os
from pathlib import Path

import numpy as np

from helixflow.engine.base import Float32


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def available_bytes(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can still be taken: what the kernel calls available, and what the control group leaves.

    Cached files, such as an engine that was just built, are given back when memory is asked for.
    """
    found = []
    for line in proc.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            used = int((cgroup / "memory.current").read_text())
            parts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            used -= int(parts["active_file"]) + int(parts["inactive_file"])
            found.append(max(int(limit) - max(used, 0), 0))
    except OSError:  # no control group of version 2: the kernel's figure stands alone
        pass
    return min(found)


def lazy_zeros(shape: tuple[int, ...]) -> Float32:
    """Zeros, float32, that take memory page by page as they are written.

    Huge pages would make a cache resident as a whole with the first position of each head; attention over small pages
    was measured to be as fast. Raises OSError when the address space is refused.
    """
    block = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages refuses the advice
        block.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(block, np.float32).reshape(shape)
