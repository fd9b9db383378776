"""Where the passphrase of an encrypted CA key comes from."""

import getpass
import sys
from collections.abc import Callable
from pathlib import Path

from helixflow.pki import files
from helixflow.pki.errors import PkiError

Passphrase = Callable[[Path], bytes]
"""Called with the key's file, and only when that is encrypted. Raises PkiError."""

SHORTEST = 12
"""Characters of a new passphrase. The file may be copied and tried at leisure, so it has to carry more than a login."""


def unattended(path: Path) -> bytes:
    """A service's key has none: nobody is there to ask when it starts. Raises PkiError."""
    raise PkiError(path, "is encrypted, and a service starts with nobody to ask", "Store it unencrypted, or renew it.")


def refuse(path: Path) -> bytes:
    """There is no passphrase. Raises PkiError."""
    raise PkiError(
        path,
        "is encrypted, and there is no passphrase",
        "Give it with --ca-passphrase-file FILE or HELIX_PKI_CA_PASSPHRASE_FILE, or run the command on a terminal.",
    )


def from_file(file: Path) -> Passphrase:
    """The first line of a file that only its owner may read."""

    def read(_path: Path) -> bytes:
        line = files.read_private(file, "a passphrase").split(b"\n", 1)[0].rstrip(b"\r")
        if not line:
            raise PkiError(file, "is empty", "Write the passphrase into its first line.")
        return line

    return read


def find(file: Path | None) -> Passphrase:
    """From `file`; without one from the terminal, when there is one."""
    if file is not None:
        return from_file(file)
    return _ask if sys.stdin.isatty() else refuse


def choose(file: Path | None) -> bytes:
    """A new passphrase: from `file`, else asked for twice. Raises PkiError."""
    if file is not None:
        value = from_file(file)(file)
    elif sys.stdin.isatty():
        value = getpass.getpass("New passphrase of the CA key: ").encode()
        if getpass.getpass("Once more: ").encode() != value:
            raise PkiError(None, "the two passphrases differ", "Run the command again.")
    else:
        raise PkiError(None, "there is no new passphrase", "Give --new-passphrase-file FILE, or run it on a terminal.")
    if len(value) < SHORTEST:
        raise PkiError(None, f"a passphrase of {len(value)} characters is too short", f"Use at least {SHORTEST}.")
    return value


def _ask(path: Path) -> bytes:
    return getpass.getpass(f"Passphrase of {path}: ").encode()
