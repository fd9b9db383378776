"""Names and places: the services, their files, their identities."""

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from helixflow.pki.errors import PkiError
from helixflow.pki.passphrase import Passphrase, refuse

ENDPOINT = "api-gateway"
"""The service that clients outside see."""
SERVICES = (ENDPOINT, "auth-service", "inference-pool", "monitoring")
TRUST_DOMAIN = "helixflow.local"
"""Trust domain of the SPIFFE identities; the Rust side (`helix-tls`) checks the same."""

CA_NAME = "helixflow-ca"
_SERVICE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Role(Enum):
    """Which side of a connection a certificate is for."""

    SERVER = "server"
    CLIENT = "client"


@dataclass(frozen=True)
class Pair:
    """One certificate and its private key."""

    name: str
    role: Role
    cert: Path
    key: Path


@dataclass(frozen=True)
class Layout:
    """The certificate directory, and how to get at the CA's key: `ca_key_file` when it is kept elsewhere."""

    directory: Path
    ca_key_file: Path | None = None
    passphrase: Passphrase = field(default=refuse, repr=False, compare=False)

    @property
    def ca_cert(self) -> Path:
        """The CA certificate; clients outside trust this one file."""
        return self.directory / f"{CA_NAME}.pem"

    @property
    def ca_key(self) -> Path:
        """The CA's private key: needed to issue and revoke only, so it may be kept elsewhere."""
        return self.ca_key_file or self.directory / f"{CA_NAME}-key.pem"

    @property
    def crl(self) -> Path:
        """The revocation list; exists once something has been revoked."""
        return self.directory / "helixflow-crl.pem"

    @property
    def jwt_private(self) -> Path:
        """Key that signs access tokens."""
        return self.directory / "jwt-private.pem"

    @property
    def jwt_public(self) -> Path:
        """Key that checks access tokens."""
        return self.directory / "jwt-public.pem"

    def pair(self, name: str, role: Role) -> Pair:
        """The files of one certificate."""
        stem = name if role is Role.SERVER else f"{name}-client"
        return Pair(name, role, self.directory / f"{stem}.crt", self.directory / f"{stem}-key.pem")

    @property
    def endpoint_ecdsa(self) -> Pair:
        """A second pair of the HTTPS endpoint, for clients that know ECDSA: signing costs a fortieth of RSA-4096.

        It may be missing: an installation from before has none while its CA's key is elsewhere.
        """
        stem = f"{ENDPOINT}-ecdsa"
        return Pair(ENDPOINT, Role.SERVER, self.directory / f"{stem}.crt", self.directory / f"{stem}-key.pem")

    def pairs(self, name: str) -> tuple[Pair, Pair]:
        """The server's and the client's files of one service."""
        return self.pair(name, Role.SERVER), self.pair(name, Role.CLIENT)

    def all_pairs(self, name: str) -> tuple[Pair, ...]:
        """The same, and a further one that is there."""
        further = self.endpoint_ecdsa
        there = name == ENDPOINT and (further.cert.exists() or further.key.exists())
        return (*self.pairs(name), further) if there else self.pairs(name)

    def others(self) -> list[str]:
        """Services besides the four that have at least one file here."""
        found: set[str] = set()
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                stem = path.name.removesuffix(".crt").removesuffix("-key.pem")
                name = stem.removesuffix("-client").removesuffix("-ecdsa")
                if stem != path.name and is_service_name(name):
                    found.add(name)
        return sorted(found - set(SERVICES))

    def names(self) -> list[str]:
        """The four services, then the others."""
        return [*SERVICES, *self.others()]


def is_service_name(name: str) -> bool:
    """One DNS label whose files collide with no other file."""
    reserved = name.startswith("helixflow-") or name.endswith(("-client", "-key", "-ecdsa"))
    return _SERVICE.fullmatch(name) is not None and not reserved


def check_service_name(name: str) -> str:
    """Returns `name`. Raises PkiError when it cannot name a service."""
    if not is_service_name(name):
        raise PkiError(
            None,
            f"`{name}` cannot name a service",
            "Use lower-case letters, digits and `-`, at most 63; not starting with helixflow-, not ending in -client,"
            " -key or -ecdsa.",
        )
    return name


def identity(name: str) -> str:
    """The SPIFFE URI of a service."""
    return f"spiffe://{TRUST_DOMAIN}/{name}"
