"""The gateway's certificate files: verified before anything reads them, watched afterwards, kept in memory."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helixflow.config import UNSET, Config
from helixflow.core_rs import TlsFiles
from helixflow.pki.errors import PkiError
from helixflow.pki.layout import Layout, Role
from helixflow.pki.verify import verify

SERVICE = "api-gateway"

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Modification time (ns), size and inode of every file; None for one that does not exist."""


_kept: dict[Path, Path] = {}
"""In a worker that was started while the files could not be used: where their last good contents are in its memory."""


def keep(contents: Mapping[Path, bytes]) -> dict[str, int]:
    """Files in memory with these contents, to be handed down: descriptors by path. Raises OSError."""
    kept = {}
    with contextlib.ExitStack() as undo:
        for path, content in contents.items():
            number = kept[str(path)] = os.memfd_create("helixflow-certificate")
            undo.callback(os.close, number)
            os.fchmod(number, 0o600)
            os.write(number, content)
        undo.pop_all()
    return kept


def use_kept(kept: Mapping[str, int]) -> None:
    """From now on this process reads what it was handed down instead of the files."""
    for path, number in kept.items():
        _kept[Path(path)] = Path(f"/proc/self/fd/{number}")


@dataclass(frozen=True, slots=True)
class GatewayFiles:
    """Where the gateway's certificates are."""

    layout: Layout
    plain_http: bool
    client_ca: Path | None = None
    """Authorities of API clients that may show a certificate."""
    client_crl: Path | None = None

    @classmethod
    def of(cls, config: Config) -> "GatewayFiles":
        """The files of this configuration."""
        gateway = config.gateway
        known = [None if path == UNSET else path for path in (gateway.client_ca, gateway.client_crl)]
        return cls(Layout(config.certs), gateway.plain_http, *known)

    def outside(self) -> list[tuple[str, str]]:
        """Certificates and keys of the endpoint, the preferred first; none when it serves without TLS."""
        if self.plain_http:
            return []
        found = [self.layout.endpoint_ecdsa, self.layout.pair(SERVICE, Role.SERVER)]
        return [(str(pair.cert), str(pair.key)) for pair in found if pair.cert.exists() and pair.key.exists()]

    def paths(self) -> list[Path]:
        """Every file that the gateway reads; the revocation list need not exist."""
        client = self.layout.pair(SERVICE, Role.CLIENT)
        server, ecdsa = self.layout.pair(SERVICE, Role.SERVER), self.layout.endpoint_ecdsa
        outside = [] if self.plain_http else [ecdsa.cert, ecdsa.key, server.cert, server.key]
        clients = [path for path in (self.client_ca, self.client_crl) if path is not None]
        return [self.layout.ca_cert, client.cert, client.key, self.layout.crl, *outside, *clients]

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
