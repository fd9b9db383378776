"""The certificate authority: making one, loading it, signing certificates and revocation lists."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from helixflow.pki import files, keys, names, scope
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import PrivateKey
from helixflow.pki.layout import Layout, Role

CA_DAYS = 3650
LEAF_DAYS = 90
DUE_DAYS = 30
"""A certificate is due for renewal when less than this, or than a third of its life, is left."""
CRL_DAYS = 30
"""A list that nobody signs anew for this long is not believed any more, and then nobody is."""
BACKDATE = timedelta(minutes=5)
"""Clocks of the machines may differ by this much."""

EKU = {Role.SERVER: ExtendedKeyUsageOID.SERVER_AUTH, Role.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True)
class Authority:
    """A CA that can sign."""

    cert: x509.Certificate
    key: PrivateKey

    @classmethod
    def create(
        cls, key: PrivateKey, permitted: Iterable[x509.GeneralName] = scope.STANDARD, now: datetime | None = None
    ) -> "Authority":
        """A new self-signed CA, valid for ten years, that signs end-entity certificates only (path length 0).

        `permitted`: subtrees of the names that it may certify (RFC 5280, section 4.2.1.10).
        """
        start = now or _now()
        # The date tells successive CAs apart: webpki and OpenSSL find an issuer by its name.
        name = _name(f"HelixFlow CA {start:%Y-%m-%d}")
        return cls(_self_signed(key, name, permitted, start, start + timedelta(days=CA_DAYS)), key)

    def permitting(self, permitted: Iterable[x509.GeneralName], now: datetime | None = None) -> "Authority":
        """The same CA (name, key, end) with other name constraints: what it signed stays valid under both."""
        end = self.cert.not_valid_after_utc
        return Authority(_self_signed(self.key, self.cert.subject, permitted, now or _now(), end), self.key)

    @classmethod
    def load(cls, layout: Layout, now: datetime | None = None) -> "Authority":
        """Reads the CA. Raises PkiError when it is not whole, does not match, or is outside its dates."""
        roots = load_roots(layout)
        if not layout.ca_key.exists():
            raise PkiError(
                layout.ca_key,
                "the CA's private key is not here, so nothing can be signed",
                "Put it back from where you keep it, or run this on the machine that has it.",
            )
        key = keys.load_private(layout.ca_key, layout.passphrase)
        public = keys.public_der(key.public_key())
        for cert in roots:
            if keys.public_der(cert.public_key()) == public:
                check_dates(layout, cert, now or _now())
                return cls(cert, key)
        raise PkiError(
            layout.ca_key,
            f"does not belong to the CA certificate in {layout.ca_cert.name}",
            "One of the two was replaced: put the matching file back.",
        )

    def issue(
        self,
        name: str,
        role: Role,
        key: PrivateKey,
        alternatives: Iterable[x509.GeneralName],
        days: int = LEAF_DAYS,
        now: datetime | None = None,
    ) -> x509.Certificate:
        """A certificate of service `name` for one side of a connection, never valid for longer than the CA.

        `alternatives`: its names, see `alternatives`.
        """
        start = now or _now()
        public = key.public_key()
        return (
            x509.CertificateBuilder(issuer_name=self.cert.subject, subject_name=_name(name), public_key=public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - BACKDATE)
            .not_valid_after(min(start + timedelta(days=days), self.cert.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            # TLS 1.3 only signs: no key is ever encrypted to a certificate.
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([EKU[role]]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(self._identifier(), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def alternatives(self, name: str, extra: Iterable[x509.GeneralName] = ()) -> list[x509.GeneralName]:
        """The standard names of service `name`, as far as this CA may certify them, and all of `extra`.

        Raises PkiError when it may not certify one of these.
        """
        permitted = scope.of(self.cert)
        wanted = names.merge(extra)
        for item in wanted:
            if not scope.permits(permitted, item):
                raise PkiError(
                    None,
                    f"this CA may not certify {names.text(item)}",
                    f"Run: helixflow pki permit {names.text(item)}. It signs the CA certificate anew, with the same "
                    "key: what was issued stays valid; give the new file to clients that use this name.",
                )
        # The plain name of a service that was added later: `permit` is for those who want it.
        return names.merge((item for item in names.standard(name) if scope.permits(permitted, item)), wanted)

    def revocation_list(
        self, revoked: Mapping[int, datetime], number: int, now: datetime | None = None
    ) -> x509.CertificateRevocationList:
        """A list of revoked serial numbers with the time of each revocation."""
        start = now or _now()
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.cert.subject)
            .last_update(start - BACKDATE)
            .next_update(start + timedelta(days=CRL_DAYS))
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(self._identifier(), critical=False)
        )
        for serial, when in revoked.items():
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256())

    def _identifier(self) -> x509.AuthorityKeyIdentifier:
        ski = self.cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)


def load_roots(layout: Layout) -> list[x509.Certificate]:
    """The CA certificates (several while one replaces another). Raises PkiError."""
    content = files.read(layout.ca_cert)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise PkiError(layout.ca_cert, "is not a PEM certificate", "Put the CA certificate back.") from error


def check_dates(layout: Layout, cert: x509.Certificate, now: datetime) -> None:
    """Raises PkiError when the CA certificate is outside its dates."""
    if now < cert.not_valid_before_utc:
        raise PkiError(layout.ca_cert, f"is not valid before {cert.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    if now > cert.not_valid_after_utc:
        raise PkiError(
            layout.ca_cert,
            f"the CA expired on {cert.not_valid_after_utc:%Y-%m-%d}",
            "Make a new one in an empty directory (`helixflow pki init --dir …`) and give it to every service.",
        )


def due_at(cert: x509.Certificate) -> datetime:
    """When a certificate is to be renewed."""
    start, end = cert.not_valid_before_utc, cert.not_valid_after_utc
    return end - min(timedelta(days=DUE_DAYS), (end - start) / 3)


def _now() -> datetime:
    return datetime.now(UTC)


def _self_signed(
    key: PrivateKey, name: x509.Name, permitted: Iterable[x509.GeneralName], start: datetime, end: datetime
) -> x509.Certificate:
    public = key.public_key()
    return (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.NameConstraints(list(permitted), None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "HelixFlow"), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
