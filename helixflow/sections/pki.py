"""Section `[pki]`: the certificates of the services."""

from dataclasses import dataclass
from pathlib import Path

from helixflow.options import between, option


@dataclass(frozen=True, slots=True)
class PkiConfig:
    """The certificates that `helixflow serve` makes and renews."""

    leaf_days: int = option(90, "how long certificates of services are valid (days)", check=between(1, 3650))
    renew: bool = option(True, "renew what is due while serving: needs the CA's private key")
    ca_key: Path = option(
        Path(), "private key of the CA, when it is kept elsewhere; empty: helixflow-ca-key.pem beside the certificates"
    )
    ca_passphrase_file: Path = option(Path(), "file with the passphrase of that key, when it is encrypted")
