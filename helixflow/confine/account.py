"""Under which account a service runs when `serve` is started by root, and what it can reach there."""

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from helixflow.errors import HelixError

SERVICES = ("gateway", "auth", "pool", "monitoring")
"""Each has an account of its own: `helixflow-<service>` where that exists, else a number."""


class ConfinementError(HelixError):
    """A service cannot run under an account of its own; the message says why, and what would let it."""


@dataclass(frozen=True, slots=True)
class Account:
    """Numbers of one account; it need not be in /etc/passwd."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, service: str, first_uid: int) -> "Account":
        """The account of a service. Raises ConfinementError when the number is somebody else's."""
        name = f"helixflow-{service}"
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            pass
        else:
            return cls(name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)))
        uid = first_uid + SERVICES.index(service)
        try:
            other = pwd.getpwuid(uid).pw_name
        except KeyError:
            return cls(f"uid {uid}", uid, uid)
        raise ConfinementError(f"uid {uid} belongs to {other}: make an account {name}, or set supervise.first_uid")

    def closed(self, path: Path) -> Path | None:
        """The first folder on the way to `path` that the account may not pass, going by modes; None: it may."""
        for folder in reversed(path.parents):
            info = folder.stat()
            own, group = info.st_uid == self.uid, info.st_gid in (self.gid, *self.groups)
            bit = stat.S_IXUSR if own else stat.S_IXGRP if group else stat.S_IXOTH
            if not info.st_mode & bit:
                return folder
        return None


ROOT = Account("root, without capabilities", 0, 0)
"""For what cannot have an account of its own."""
