"""What is in a certificate, for people and machines."""

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from helixflow.pki import keys, names, pairs
from helixflow.pki.authority import load_roots
from helixflow.pki.layout import Layout, check_service_name

_PURPOSES = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
}


@dataclass(frozen=True)
class Described:
    """One certificate. Times are RFC 3339 in UTC; `serial` and `sha256` lower-case hex."""

    file: str
    subject: str
    issuer: str
    serial: str
    sha256: str
    not_before: str
    not_after: str
    days_left: int
    key_type: str
    names: list[str]
    purposes: list[str]


def show(layout: Layout, name: str | None = None, now: datetime | None = None) -> list[Described]:
    """The certificates of service `name`, or the CA's and all services'. Raises PkiError when one cannot be read."""
    instant = now or datetime.now(UTC)
    if name is not None:
        check_service_name(name)
        return [_describe(pair.cert.name, pairs.load_cert(pair), instant) for pair in layout.all_pairs(name)]
    found = [_describe(layout.ca_cert.name, cert, instant) for cert in load_roots(layout)]
    for each in layout.names():
        found += [_describe(pair.cert.name, pairs.load_cert(pair), instant) for pair in layout.all_pairs(each)]
    return found


def hex_serial(serial: int) -> str:
    """As OpenSSL and `helix-tls` write it, without leading zeros."""
    return f"{serial:x}"


def _describe(file: str, cert: x509.Certificate, now: datetime) -> Described:
    return Described(
        file=file,
        subject=cert.subject.rfc4514_string(),
        issuer=cert.issuer.rfc4514_string(),
        serial=hex_serial(cert.serial_number),
        sha256=cert.fingerprint(hashes.SHA256()).hex(),
        not_before=_time(cert.not_valid_before_utc),
        not_after=_time(cert.not_valid_after_utc),
        days_left=(cert.not_valid_after_utc - now).days,
        key_type=keys.describe(cert.public_key()),
        names=[names.text(name) for name in names.of(cert)],
        purposes=_purposes(cert),
    )


def _purposes(cert: x509.Certificate) -> list[str]:
    try:
        usages = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return []
    return [_PURPOSES.get(usage, usage.dotted_string) for usage in usages]


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
