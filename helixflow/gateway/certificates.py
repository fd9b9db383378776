"""The gateway's certificate files: verified before anything reads them, watched afterwards, kept in memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helixflow.config import Config
from helixflow.core_rs import TlsFiles
from helixflow.pki.errors import PkiError
from helixflow.pki.layout import Layout, Role
from helixflow.pki.verify import verify

SERVICE = "api-gateway"

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Modification time (ns), size and inode of every file; None for one that does not exist."""


_kept: dict[Path, Path] = {}
"""In a worker that was started while the files could not be used: where their last good contents are in its memory."""


def use_kept(contents: Mapping[Path, bytes]) -> None:
    """From now on this process reads these contents instead of the files. Raises OSError."""
    for path, content in contents.items():
        number = os.memfd_create("helixflow-certificate")
        os.fchmod(number, 0o600)
        os.write(number, content)
        _kept[path] = Path(f"/proc/self/fd/{number}")


@dataclass(frozen=True, slots=True)
class GatewayFiles:
    """Where the gateway's certificates are."""

    layout: Layout
    plain_http: bool

    @classmethod
    def of(cls, config: Config) -> "GatewayFiles":
        """The files of this configuration."""
        return cls(Layout(config.certs), config.gateway.plain_http)

    @property
    def cert(self) -> Path:
        """Certificate of the HTTPS endpoint."""
        return _now(self.layout.pair(SERVICE, Role.SERVER).cert)

    @property
    def key(self) -> Path:
        """Private key of the HTTPS endpoint."""
        return _now(self.layout.pair(SERVICE, Role.SERVER).key)

    def paths(self) -> list[Path]:
        """Every file that the gateway reads; the revocation list need not exist."""
        client = self.layout.pair(SERVICE, Role.CLIENT)
        server = self.layout.pair(SERVICE, Role.SERVER)
        outside = [] if self.plain_http else [server.cert, server.key]
        return [self.layout.ca_cert, client.cert, client.key, self.layout.crl, *outside]

    def contents(self) -> dict[Path, bytes]:
        """What is in the files now, as far as they are there."""
        return {path: path.read_bytes() for path in self.paths() if path.exists()}

    def to_pools(self) -> TlsFiles:
        """The gateway's own identity, towards the inference pools."""
        client = self.layout.pair(SERVICE, Role.CLIENT)
        # The list may come later: whoever finishes streams then must hear of it too.
        return TlsFiles(*(str(_now(path)) for path in (self.layout.ca_cert, client.cert, client.key, self.layout.crl)))

    def stamp(self) -> Stamp:
        """Changes whenever one of the files does."""
        return tuple(_stamp(path) for path in self.paths())

    def verify(self, *, had_crl: bool = False) -> None:
        """Raises PkiError with the first of the gateway's own files that cannot be used, and why.

        `had_crl`: a revocation list is in use, so it may not be missing now.
        """
        if had_crl and not self.layout.crl.exists():
            reason = "was in use and is gone: what it revoked would be trusted again"
            raise PkiError(self.layout.crl, reason, "Put it back, or restart to run without one.")
        mine = {self.layout.directory, *self.paths()}
        for finding in verify(self.layout).findings:
            if finding.file in mine and not finding.warning:
                raise PkiError(finding.file, finding.reason, finding.hint)


def _now(path: Path) -> Path:
    """Where this process reads a file."""
    return _kept.get(path, path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
