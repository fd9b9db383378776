"""A service's own copy of its own certificates: it can read no other's keys, and cannot lose its own."""

import os
from pathlib import Path

from helixflow import log
from helixflow.confine.account import Account
from helixflow.pki.layout import Layout

COPY_S = 0.5
"""The originals are looked at this often (seconds); services look at their copies every second."""

NAMES = {"gateway": "api-gateway", "auth": "auth-service", "pool": "inference-pool"}
"""Names of services in certificates."""

logger = log.get("supervisor")

Stamp = tuple[int, int, int]


class Copies:
    """Follows the certificate directory for one service. A file that goes away there stays here while we run."""

    def __init__(self, service: str, source: Layout, target: Path, account: Account) -> None:
        """`target`: the folder for the copies, in a folder that only root can change."""
        self.target = target
        self._source = source.directory
        self._account = account
        # Keys come first: whoever sees a new certificate finds its key.
        pairs = [*source.pairs(NAMES[service]), *([source.endpoint_ecdsa] if service == "gateway" else [])]
        paths = [*(pair.key for pair in pairs), *(pair.cert for pair in pairs), source.ca_cert, source.crl]
        if service == "auth":
            paths += [source.jwt_private, source.jwt_public]
        self._names = [path.name for path in paths]
        self._copied: dict[str, Stamp] = {}
        self._failed = ""

    def begin(self) -> None:
        """Makes the folder and brings it up to date; what is not there any more goes here, too. Raises OSError."""
        self.target.mkdir(mode=0o750, exist_ok=True)
        os.chown(self.target, 0, self._account.gid)
        self.target.chmod(0o750)
        for left in self.target.iterdir():
            if not (self._source / left.name).exists() or left.name not in self._names:
                left.unlink()
        self._copied.clear()
        self._copy()

    def follow(self) -> None:
        """Copies what has changed since the last look. What cannot be read is tried again, and said once."""
        try:
            self._copy()
        except OSError as error:
            if str(error) != self._failed:
                logger.error("certificates cannot be copied; the service keeps its own", error=str(error))
            self._failed = str(error)
        else:
            self._failed = ""

    def _copy(self) -> None:
        for name in self._names:
            try:
                info = (self._source / name).stat()
                stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
                if self._copied.get(name) == stamp:
                    continue
                content = (self._source / name).read_bytes()
            except FileNotFoundError:
                continue
            # With the mode of the original: a key that others may read is refused, and a copy must not hide that.
            self._write(name, content, info.st_mode & 0o777)
            self._copied[name] = stamp

    def _write(self, name: str, content: bytes, mode: int) -> None:
        fresh = self.target / f".{name}.new"
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(content)
            os.fchown(file.fileno(), self._account.uid, self._account.gid)
            os.fchmod(file.fileno(), mode)
        fresh.replace(self.target / name)
