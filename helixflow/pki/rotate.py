"""Replacing and withdrawing certificates."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from helixflow.pki import files, keys, names, pairs
from helixflow.pki.authority import LEAF_DAYS, Authority, load_roots
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import KeyType, Progress, quiet
from helixflow.pki.layout import Layout, Pair, check_service_name


def renew(
    layout: Layout,
    only: Sequence[str] = (),
    *,
    within_days: int | None = None,
    key_type: KeyType | None = None,
    san: Sequence[str] = (),
    days: int = LEAF_DAYS,
    progress: Progress = quiet,
    now: datetime | None = None,
) -> list[Pair]:
    """Gives services new keys and certificates; returns the replaced pairs. Signs the revocation list anew.

    `only`: services, none for all. `within_days`: only certificates that end within that many days, or cannot be read.
    Extra names stay, those of `san` are added. The key type stays unless given. Raises PkiError.
    """
    extra = names.parse(san)
    instant = now or datetime.now(UTC)
    with files.locked(layout.directory):
        due: list[tuple[Pair, x509.Certificate | None]] = []
        for name in only or layout.names():
            for pair in layout.pairs(check_service_name(name)):
                cert = _readable(pair)
                if within_days is None or cert is None or _ends(cert) <= instant + timedelta(days=within_days):
                    due.append((pair, cert))
        if not due and not layout.crl.exists():
            return []
        authority = Authority.load(layout, now)
        fallback = keys.kind_of(authority.key)
        kinds = [key_type or (keys.kind_of(cert.public_key()) if cert else fallback) for _pair, cert in due]
        fresh = keys.generate_all(kinds, progress)
        replaced = []
        for (pair, cert), key in zip(due, fresh, strict=True):
            kept = names.extras(pair.name, cert) if cert else []
            wanted = names.merge(names.standard(pair.name), kept, extra)
            replaced.append((pair, authority.issue(pair.name, pair.role, key, wanted, days, now), key))
        pairs.publish(replaced)
        if layout.crl.exists():
            _sign(layout, authority, load_crl(layout, [authority.cert]), {}, now)
    return [pair for pair, _cert in due]


def revoke(layout: Layout, serials: Sequence[int], *, now: datetime | None = None) -> list[int]:
    """Adds serial numbers to the revocation list, which is made when there is none. Returns those that were not in it.

    Raises PkiError when nothing can be signed, or the list is not this CA's.
    """
    instant = (now or datetime.now(UTC)).replace(microsecond=0)
    with files.locked(layout.directory):
        authority = Authority.load(layout, now)
        current = load_crl(layout, [authority.cert]) if layout.crl.exists() else None
        known = {entry.serial_number for entry in current} if current is not None else set()
        added = {serial: instant for serial in serials if serial not in known}
        _sign(layout, authority, current, added, now)
    return list(added)


def serials_of(layout: Layout, name: str) -> list[int]:
    """Serial numbers of a service's two certificates. Raises PkiError when one cannot be read."""
    return [pairs.load_cert(pair).serial_number for pair in layout.pairs(check_service_name(name))]


def load_crl(layout: Layout, issuers: Sequence[x509.Certificate] | None = None) -> x509.CertificateRevocationList:
    """Reads the revocation list and checks its signature against `issuers` (default: the CA). Raises PkiError."""
    try:
        crl = x509.load_pem_x509_crl(files.read(layout.crl))
    except ValueError as error:
        raise PkiError(layout.crl, "is not a PEM revocation list", "Put a copy of it back.") from error
    for issuer in issuers if issuers is not None else load_roots(layout):
        public = issuer.public_key()
        keys.public_der(public)
        if crl.issuer == issuer.subject and crl.is_signature_valid(public):  # type: ignore[arg-type]
            return crl
    raise PkiError(layout.crl, "was not signed by this CA", "Put the list of this CA back.")


def _sign(
    layout: Layout,
    authority: Authority,
    current: x509.CertificateRevocationList | None,
    added: dict[int, datetime],
    now: datetime | None,
) -> None:
    revoked = {entry.serial_number: entry.revocation_date_utc for entry in current} if current is not None else {}
    number = 1
    if current is not None:
        number += current.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    crl = authority.revocation_list({**revoked, **added}, number, now)
    files.write(layout.crl, crl.public_bytes(serialization.Encoding.PEM), private=False, replace=True)


def _readable(pair: Pair) -> x509.Certificate | None:
    """The certificate, or None when it is damaged. Raises PkiError when it does not exist."""
    if not pair.cert.exists():
        make = "helixflow pki init` or `helixflow pki issue NAME"
        raise PkiError(pair.cert, "does not exist, so it cannot be renewed", f"`{make}` makes a first one.")
    try:
        return pairs.load_cert(pair)
    except PkiError:
        return None


def _ends(cert: x509.Certificate) -> datetime:
    return cert.not_valid_after_utc
