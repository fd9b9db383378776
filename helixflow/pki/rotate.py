"""Replacing and withdrawing certificates."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from helixflow.pki import files, keys, names, pairs, scope
from helixflow.pki.authority import CRL_DAYS, LEAF_DAYS, Authority, due_at, load_roots
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
    end = None if within_days is None else instant + timedelta(days=within_days)
    with files.locked(layout.directory):
        chosen = _chosen(layout, only, lambda cert: end is None or cert.not_valid_after_utc <= end)
        if not chosen and not layout.crl.exists():
            return []
        authority = Authority.load(layout, now)
        _replace(authority, chosen, key_type, extra, days, progress, now)
        if layout.crl.exists():
            _sign(layout, authority, load_crl(layout, [authority.cert]), {}, now)
    return [pair for pair, _cert in chosen]


def renew_due(
    layout: Layout, *, days: int = LEAF_DAYS, progress: Progress = quiet, now: datetime | None = None
) -> list[Pair]:
    """Renews what is due (`authority.due_at`), and the revocation list when half of its life is over.

    With nothing to do the CA's key is not needed. Raises PkiError.
    """
    instant = now or datetime.now(UTC)
    with files.locked(layout.directory):
        chosen = _chosen(layout, (), lambda cert: instant >= due_at(cert))
        sign = layout.crl.exists() and _list_is_due(layout, instant)
        if chosen or sign:
            authority = Authority.load(layout, now)
            _replace(authority, chosen, None, [], days, progress, now)
            if sign:
                _sign(layout, authority, load_crl(layout, [authority.cert]), {}, now)
    return [pair for pair, _cert in chosen]


def permit(layout: Layout, extra: Sequence[str] = (), *, now: datetime | None = None) -> list[str]:
    """Signs the CA certificate anew, so that it may certify `extra` domains, addresses and networks too.

    Returns what was added; a CA without name constraints gets the standard ones as well, and all names in use. Its key,
    name and end stay, and so does all that was issued. Raises PkiError.
    """
    wanted = names.parse_subtrees(extra)
    with files.locked(layout.directory):
        authority = Authority.load(layout, now)
        before = scope.of(authority.cert)
        if before is None:
            used = [cert for name in layout.names() for pair in layout.all_pairs(name) if (cert := _existing(pair))]
            wanted = [*wanted, *(item for cert in used for item in names.of(cert))]
        constrained = [item for item in wanted if not isinstance(item, x509.UniformResourceIdentifier)]
        after = scope.extended(before or scope.STANDARD, constrained)
        if before is not None and len(after) == len(before):
            return []
        fresh = authority.permitting(after, now).cert
        roots = [fresh if root == authority.cert else root for root in load_roots(layout)]
        content = b"".join(root.public_bytes(serialization.Encoding.PEM) for root in roots)
        files.write(layout.ca_cert, content, private=False, replace=True)
    return [names.text(item) for item in after[len(before or ()) :]]


def encrypt_ca_key(layout: Layout, passphrase: bytes | None) -> None:
    """Stores the CA's key encrypted with `passphrase`; None: unencrypted. Raises PkiError."""
    with files.locked(layout.directory):
        key = keys.load_private(layout.ca_key, layout.passphrase)
        files.write(layout.ca_key, keys.to_pem(key, passphrase), private=True, replace=True)


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
    """Serial numbers of a service's certificates. Raises PkiError when one cannot be read."""
    return [pairs.load_cert(pair).serial_number for pair in layout.all_pairs(check_service_name(name))]


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


def _chosen(
    layout: Layout, only: Sequence[str], wanted: Callable[[x509.Certificate], bool]
) -> list[tuple[Pair, x509.Certificate | None]]:
    """Pairs to renew with their certificates (None: damaged), of the services `only`, of all without."""
    found = []
    for name in only or layout.names():
        for pair in layout.all_pairs(check_service_name(name)):
            cert = _readable(pair)
            if cert is None or wanted(cert):
                found.append((pair, cert))
    return found


def _replace(
    authority: Authority,
    chosen: Sequence[tuple[Pair, x509.Certificate | None]],
    key_type: KeyType | None,
    extra: Sequence[x509.GeneralName],
    days: int,
    progress: Progress,
    now: datetime | None,
) -> None:
    fallback = keys.kind_of(authority.key)
    kinds = [key_type or (keys.kind_of(cert.public_key()) if cert else fallback) for _pair, cert in chosen]
    replaced = []
    for (pair, cert), key in zip(chosen, keys.generate_all(kinds, progress), strict=True):
        kept = names.extras(pair.name, cert) if cert else []
        alternatives = authority.alternatives(pair.name, names.merge(kept, extra))
        replaced.append((pair, authority.issue(pair.name, pair.role, key, alternatives, days, now), key))
    pairs.publish(replaced)


def _list_is_due(layout: Layout, now: datetime) -> bool:
    """Whether half of the revocation list's life is over, or it cannot be read."""
    try:
        end = load_crl(layout).next_update_utc
    except PkiError:
        return True
    return end is None or end - now < timedelta(days=CRL_DAYS) / 2


def _existing(pair: Pair) -> x509.Certificate | None:
    return _readable(pair) if pair.cert.exists() else None


def _readable(pair: Pair) -> x509.Certificate | None:
    """The certificate, or None when it is damaged. Raises PkiError when it does not exist."""
    if not pair.cert.exists():
        make = "helixflow pki init` or `helixflow pki issue NAME"
        raise PkiError(pair.cert, "does not exist, so it cannot be renewed", f"`{make}` makes a first one.")
    try:
        return pairs.load_cert(pair)
    except PkiError:
        return None
