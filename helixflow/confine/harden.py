"""What every service gives up by itself, whoever started it."""

from helixflow import log
from helixflow.confine import kernel, syscalls

logger = log.get("confine")


def harden() -> None:
    """No core dumps, no new rights, and none of the system calls of `syscalls`, for all threads and children.

    A kernel or a container that refuses a step is named in the log; the service runs all the same.
    """
    for step in (kernel.forbid_core_dumps, kernel.forbid_new_privileges, syscalls.install):
        try:
            step()
        except OSError as error:
            logger.warning("the process cannot be confined further", step=step.__name__, error=str(error))
