"""`python -m helixflow.confine.launch MODULE ARGUMENT…`: confines this process, then runs the module in it.

A program of its own and no code between fork and exec: what fails here has a message, and a test.
"""

import os
import sys
from pathlib import Path

from helixflow.confine import kernel
from helixflow.confine.account import Account
from helixflow.confine.plan import PLAN, Plan
from helixflow.process import PARENT_PID, die_with_parent


def main() -> None:
    """Never returns. A step that fails ends the process: nothing runs with more than it should have."""
    die_with_parent(int(os.environ[PARENT_PID]))
    plan = Plan.loads(os.environ.pop(PLAN))
    if plan.uid:
        open_ways(plan)
        os.chdir("/")
    become(plan)
    os.execve(sys.executable, [sys.executable, "-m", *sys.argv[1:]], os.environ)  # noqa: S606


def become(plan: Plan) -> None:
    """Gives up what the plan does not leave. Raises OSError."""
    had = kernel.permitted()
    keep = had.intersection(plan.capabilities)
    if kernel.CAP_SETPCAP in had:
        # Without it, in a container of few rights, these few stay possible for root's programs, and for nobody else's.
        kernel.drop_bounding(keep)
    if plan.uid:
        kernel.keep_over_setuid(bool(keep))
        os.setgroups(plan.groups)
        os.setresgid(plan.gid, plan.gid, plan.gid)
        os.setresuid(plan.uid, plan.uid, plan.uid)
    kernel.set_capabilities(keep)
    kernel.forbid_new_privileges()


def open_ways(plan: Plan) -> None:
    """Lets the account reach what it needs behind closed folders, and there nothing else. Raises OSError."""
    closed = ways(plan.account, plan.shown)
    if closed:
        kernel.own_mounts()
        os.umask(0o022)
        for folder, paths in closed.items():
            _cover(folder, paths)


def ways(account: Account, shown: tuple[str, ...]) -> dict[Path, list[Path]]:
    """The closed folders, and what is needed below each: nothing that lies in another of them."""
    closed: dict[Path, list[Path]] = {}
    for path in sorted({Path(text).resolve() for text in shown if Path(text).exists()}):
        folder = account.closed(path)
        if folder is not None:
            found = closed.setdefault(folder, [])
            if not any(path.is_relative_to(other) for other in found):
                found.append(path)
    return closed


def _cover(folder: Path, paths: list[Path]) -> None:
    held = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths]
    hidden = kernel.MS_NOSUID | kernel.MS_NODEV
    directories = [path.is_dir() for path in paths]
    kernel.mount("tmpfs", str(folder), "tmpfs", flags=hidden, data="mode=0755,size=1m")
    for number, path, directory in zip(held, paths, directories, strict=True):
        if directory:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        kernel.mount(f"/proc/self/fd/{number}", str(path), flags=kernel.MS_BIND | kernel.MS_REC)
        os.close(number)
    kernel.mount("tmpfs", str(folder), "tmpfs", flags=kernel.MS_REMOUNT | kernel.MS_RDONLY | hidden, data="mode=0755")


if __name__ == "__main__":
    main()
