"""The gateway's certificate files: verified before anything reads them, watched afterwards."""

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
        return self.layout.pair(SERVICE, Role.SERVER).cert

    @property
    def key(self) -> Path:
        """Private key of the HTTPS endpoint."""
        return self.layout.pair(SERVICE, Role.SERVER).key

    def paths(self) -> list[Path]:
        """Every file that the gateway reads; the revocation list need not exist."""
        client = self.layout.pair(SERVICE, Role.CLIENT)
        outside = [] if self.plain_http else [self.cert, self.key]
        return [self.layout.ca_cert, client.cert, client.key, self.layout.crl, *outside]

    def to_pools(self) -> TlsFiles:
        """The gateway's own identity, towards the inference pools."""
        client = self.layout.pair(SERVICE, Role.CLIENT)
        # The list may come later: whoever finishes streams then must hear of it too.
        return TlsFiles(str(self.layout.ca_cert), str(client.cert), str(client.key), str(self.layout.crl))

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


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
