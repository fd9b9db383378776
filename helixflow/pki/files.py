"""Reading and writing the files of the certificate directory safely."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from helixflow.pki.errors import PkiError

MAX_BYTES = 16 << 20
"""No file here comes near this; a mistaken path to something huge must not be read whole."""


def read(path: Path) -> bytes:
    """The content of a public file. Raises PkiError."""
    return _read(path)[0]


def read_private(path: Path, what: str = "a private key") -> bytes:
    """The content of a secret's file. Raises PkiError, also when the group or others may read it."""
    # The mode is that of the open file: what was checked is what was read.
    content, mode = _read(path)
    if mode & 0o077:
        raise PkiError(
            path,
            f"{what} that the group or others can get at (mode {mode & 0o7777:04o}) is not used",
            f"Run: chmod 600 {path}. If others may have read it, renew it as well.",
        )
    return content


def _read(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise PkiError(path, "does not exist", "`helixflow pki init` makes what is missing.") from None
    except OSError as error:
        raise PkiError(path, f"cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise PkiError(path, f"is larger than {MAX_BYTES} bytes: not a file of this kind")
    return content, mode


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory, made with mode 0700 when it is missing, against other writers.

    Removes what an interrupted writer left. Raises PkiError when the directory cannot be made or opened.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise PkiError(directory, f"cannot be used as the certificate directory: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in directory.glob(".*.new"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


class Change:
    """One new file, written beside its place and not yet visible there.

    Several are staged first and published after: what can fail has then failed before anything changed.
    """

    def __init__(self, path: Path, content: bytes, *, private: bool) -> None:
        """Writes the content and flushes it to disk. Raises PkiError."""
        self.path = path
        self._fresh = path.with_name(f".{path.name}.new")
        mode = 0o600 if private else 0o644
        try:
            handle = os.open(self._fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            with open(handle, "wb") as file:  # noqa: PTH123  (a descriptor, not a path)
                # The umask may have taken more away than it should.
                os.fchmod(handle, mode)
                file.write(content)
                file.flush()
                os.fsync(handle)
        except OSError as error:
            raise PkiError(path, f"cannot be written: {error.strerror}") from error

    def publish(self, *, replace: bool) -> None:
        """Puts the file in its place at once, for readers either the old one or all of the new one.

        Raises PkiError; with `replace` False also when there is a file already.
        """
        try:
            if replace:
                self._fresh.replace(self.path)
            else:
                self.path.hardlink_to(self._fresh)
                self._fresh.unlink()
        except FileExistsError:
            raise PkiError(self.path, "exists already and is not overwritten") from None
        except OSError as error:
            raise PkiError(self.path, f"cannot be written: {error.strerror}") from error
        finally:
            with suppress(OSError):
                self._fresh.unlink(missing_ok=True)


def write(path: Path, content: bytes, *, private: bool, replace: bool) -> None:
    """Writes one file completely or not at all: mode 0600 when `private`, else 0644. Raises PkiError."""
    Change(path, content, private=private).publish(replace=replace)
    flush(path.parent)


def flush(directory: Path) -> None:
    """Makes what was published survive a power failure."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
