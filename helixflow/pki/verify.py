"""Checking a certificate directory: every file, with the reason when one fails."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from helixflow.pki import files, keys, names, pairs, rotate, scope
from helixflow.pki.authority import EKU, due_at, load_roots
from helixflow.pki.errors import PkiError
from helixflow.pki.layout import Layout, Pair, Role, identity
from helixflow.pki.passphrase import refuse

T = TypeVar("T", bound=x509.ExtensionType)

CRL_WARN_DAYS = 7


@dataclass(frozen=True)
class Finding:
    """Something wrong with one file. A warning does not make the directory unusable yet."""

    file: Path
    reason: str
    hint: str = ""
    warning: bool = False


@dataclass
class Report:
    """What was checked and what was found."""

    checked: list[Path] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No finding is more than a warning."""
        return all(finding.warning for finding in self.findings)

    def run(self, file: Path, check: Callable[[], Iterator[Finding]]) -> None:
        """Runs one check of `file`; a PkiError ends that check and is a finding."""
        if file not in self.checked:
            self.checked.append(file)
        try:
            self.findings.extend(check())
        except PkiError as error:
            self.findings.append(Finding(error.file or file, error.reason, error.hint))


def verify(layout: Layout, now: datetime | None = None) -> Report:
    """Checks the CA, every service's certificates and keys, the revocation list and the token keys.

    Raises PkiError only when there is no such directory.
    """
    if not layout.directory.is_dir():
        raise PkiError(layout.directory, "is not a directory", "`helixflow pki init` makes it.")
    instant = now or datetime.now(UTC)
    report = Report()
    roots: list[x509.Certificate] = []
    report.run(layout.directory, lambda: _directory(layout.directory))
    report.run(layout.ca_cert, lambda: _roots(layout, instant, roots))
    report.run(layout.ca_key, lambda: _ca_key(layout, roots))
    revoked: dict[int, datetime] = {}
    if layout.crl.exists():
        report.run(layout.crl, lambda: _crl(layout, roots, instant, revoked))
    for name in layout.names():
        for pair in layout.all_pairs(name):
            report.run(pair.cert, lambda pair=pair: _cert(pair, roots, revoked, instant))  # type: ignore[misc]
            report.run(pair.key, lambda pair=pair: _key(pair))  # type: ignore[misc]
    report.run(layout.jwt_private, lambda: _jwt_private(layout))
    report.run(layout.jwt_public, lambda: _jwt_public(layout))
    return report


def _directory(path: Path) -> Iterator[Finding]:
    mode = path.stat().st_mode
    if mode & 0o002 and not mode & 0o1000:
        yield Finding(path, "everybody can replace files in it", f"Run: chmod o-w {path}")


def _public(path: Path) -> Iterator[Finding]:
    if path.stat().st_mode & 0o022:
        yield Finding(path, "the group or others can change it", f"Run: chmod 644 {path}")


def _dates(path: Path, cert: x509.Certificate, now: datetime, hint: str) -> Iterator[Finding]:
    start, end = cert.not_valid_before_utc, cert.not_valid_after_utc
    if now < start:
        yield Finding(path, f"is not valid before {start:%Y-%m-%d %H:%M} UTC", "Is the clock right?")
    elif now > end:
        yield Finding(path, f"expired on {end:%Y-%m-%d %H:%M} UTC", hint)
    elif now >= due_at(cert):
        yield Finding(path, f"expires in {(end - now).days} days, on {end:%Y-%m-%d}", hint, warning=True)


def _roots(layout: Layout, now: datetime, roots: list[x509.Certificate]) -> Iterator[Finding]:
    path = layout.ca_cert
    roots.extend(load_roots(layout))
    yield from _public(path)
    for cert in roots:
        yield from _dates(path, cert, now, "Make a new CA in another directory and give it to every service.")
        if not _signed_by(cert, cert):
            yield Finding(path, "is not self-signed: it cannot be the root of trust")
        constraints = _extension(cert, x509.BasicConstraints)
        usage = _extension(cert, x509.KeyUsage)
        if constraints is None or not constraints.ca:
            yield Finding(path, "is not a CA certificate (basic constraints)")
        if usage is None or not (usage.key_cert_sign and usage.crl_sign):
            yield Finding(path, "may not sign certificates and revocation lists (key usage)")
        if scope.of(cert) is None:
            reason = "has no name constraints: its key could make certificates for any name of the world"
            yield Finding(path, reason, "Run: helixflow pki permit", warning=True)


def _ca_key(layout: Layout, roots: list[x509.Certificate]) -> Iterator[Finding]:
    if not layout.ca_key.exists():
        reason = "is not here: nothing can be issued, renewed or revoked"
        yield Finding(layout.ca_key, reason, "Right if you keep it elsewhere.", warning=True)
        return
    if keys.is_encrypted(files.read_private(layout.ca_key)) and layout.passphrase is refuse:
        return  # Right so, and nothing more can be said of it without the passphrase.
    public = keys.public_der(keys.load_private(layout.ca_key, layout.passphrase).public_key())
    if roots and all(_public_der(cert) != public for cert in roots):
        yield Finding(layout.ca_key, f"does not belong to the certificate in {layout.ca_cert.name}")


def _crl(
    layout: Layout, roots: list[x509.Certificate], now: datetime, revoked: dict[int, datetime]
) -> Iterator[Finding]:
    crl = rotate.load_crl(layout, roots)
    revoked.update((entry.serial_number, entry.revocation_date_utc) for entry in crl)
    yield from _public(layout.crl)
    hint = "Run: helixflow pki renew"
    if now < crl.last_update_utc:
        yield Finding(layout.crl, f"is not valid before {crl.last_update_utc:%Y-%m-%d %H:%M} UTC")
    end = crl.next_update_utc
    if end is None:
        yield Finding(layout.crl, "says no next update", hint)
    elif now >= end:
        yield Finding(layout.crl, f"expired on {end:%Y-%m-%d %H:%M} UTC, so every connection is refused", hint)
    elif end - now < timedelta(days=CRL_WARN_DAYS):
        yield Finding(layout.crl, f"expires in {(end - now).days} days", hint, warning=True)


def _cert(pair: Pair, roots: list[x509.Certificate], revoked: dict[int, datetime], now: datetime) -> Iterator[Finding]:
    cert = pairs.load_cert(pair)
    renew = f"Run: helixflow pki renew {pair.name}"
    yield from _public(pair.cert)
    yield from _dates(pair.cert, cert, now, renew)
    if roots and not any(_signed_by(cert, root) for root in roots):
        yield Finding(pair.cert, "was not issued by the CA in this directory", renew)
    if cert.serial_number in revoked:
        yield Finding(pair.cert, f"was revoked on {revoked[cert.serial_number]:%Y-%m-%d}", renew)
    constraints = _extension(cert, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        yield Finding(pair.cert, "is a CA certificate, not a service's", renew)
    usage = _extension(cert, x509.KeyUsage)
    if usage is None or not usage.digital_signature:
        yield Finding(pair.cert, "has no key usage digitalSignature", renew)
    purposes = _extension(cert, x509.ExtendedKeyUsage)
    if purposes is None or list(purposes) != [EKU[pair.role]]:
        kind = "serverAuth" if pair.role is Role.SERVER else "clientAuth"
        yield Finding(pair.cert, f"is not a {pair.role.value} certificate (extended key usage {kind} alone)", renew)
    yield from _names(pair, cert, roots, renew)


def _names(pair: Pair, cert: x509.Certificate, roots: list[x509.Certificate], renew: str) -> Iterator[Finding]:
    present = names.of(cert)
    issuer = next((root for root in roots if _signed_by(cert, root)), None)
    permitted = scope.of(issuer) if issuer is not None else None
    beyond = [names.text(name) for name in present if not scope.permits(permitted, name)]
    if beyond:
        yield Finding(pair.cert, f"has names that its CA may not certify: {', '.join(beyond)}", renew)
    uris = [name.value for name in present if isinstance(name, x509.UniformResourceIdentifier)]
    if uris != [identity(pair.name)]:
        found = ", ".join(uris) or "none"
        yield Finding(pair.cert, f"its identity must be {identity(pair.name)}, but it has: {found}", renew)
    required = [name for name in names.required(pair.name) if scope.permits(permitted, name)]
    lacking = [names.text(name) for name in required if name not in present]
    lacking = [text for text in lacking if not text.startswith("URI:")]
    if lacking:
        yield Finding(pair.cert, f"lacks the names {', '.join(lacking)}", renew)


def _key(pair: Pair) -> Iterator[Finding]:
    public = keys.public_der(keys.load_private(pair.key).public_key())
    try:
        cert = pairs.load_cert(pair)
    except PkiError:
        return  # reported with the certificate
    if _public_der(cert) != public:
        yield Finding(
            pair.key,
            f"does not belong to the certificate in {pair.cert.name}",
            f"Run: helixflow pki renew {pair.name}",
        )


def _jwt_private(layout: Layout) -> Iterator[Finding]:
    key = keys.load_private(layout.jwt_private)
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size < 4096:
        yield Finding(
            layout.jwt_private,
            f"is {keys.describe(key)}, not RSA-4096",
            "Run: helixflow pki rotate-tokens",
        )


def _jwt_public(layout: Layout) -> Iterator[Finding]:
    content = files.read(layout.jwt_public)
    yield from _public(layout.jwt_public)
    again = f"Remove it and run: helixflow pki init (it is made from {layout.jwt_private.name})"
    try:
        public = keys.public_der(serialization.load_pem_public_key(content))
    except ValueError:
        yield Finding(layout.jwt_public, "is not a PEM public key", again)
        return
    try:
        private = keys.load_private(layout.jwt_private)
    except PkiError:
        return  # reported with the private key
    if keys.public_der(private.public_key()) != public:
        yield Finding(layout.jwt_public, f"does not belong to {layout.jwt_private.name}", again)


def _signed_by(cert: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        cert.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _public_der(cert: x509.Certificate) -> bytes:
    try:
        return keys.public_der(cert.public_key())
    except ValueError:
        return b""


def _extension(cert: x509.Certificate, kind: type[T]) -> T | None:
    try:
        return cert.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, ValueError):
        return None
