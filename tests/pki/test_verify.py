"""Every way a directory can be wrong, made for real, is found and named."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from helixflow.pki import issue, keys, names, pairs, rotate
from helixflow.pki.authority import Authority
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout, Pair, Role
from helixflow.pki.verify import Finding, verify

NOW = datetime.now(UTC)


def key() -> keys.PrivateKey:
    return keys.generate(KeyType.ECDSA_P256)


def gateway(layout: Layout) -> Pair:
    return layout.pair("api-gateway", Role.SERVER)


def put(
    layout: Layout,
    *,
    name: str = "api-gateway",
    role: Role = Role.SERVER,
    days: int = 365,
    now: datetime = NOW,
    authority: Authority | None = None,
    san: list[x509.GeneralName] | None = None,
) -> None:
    """Replaces the gateway's server certificate by another one."""
    fresh = key()
    cert = (authority or Authority.load(layout)).issue(
        name, role, fresh, san if san is not None else names.standard(name), days, now
    )
    pairs.publish([(gateway(layout), cert, fresh)])


def expired(layout: Layout) -> None:
    put(layout, now=NOW - timedelta(days=366))


def early(layout: Layout) -> None:
    put(layout, now=NOW + timedelta(days=2))


def foreign(layout: Layout) -> None:
    put(layout, authority=Authority.create(key()))


def other_service(layout: Layout) -> None:
    put(layout, name="monitoring")


def other_role(layout: Layout) -> None:
    put(layout, role=Role.CLIENT)


def no_loopback(layout: Layout) -> None:
    kept = [name for name in names.standard("api-gateway") if names.text(name) not in {"DNS:localhost", "IP:::1"}]
    put(layout, san=kept)


def two_identities(layout: Layout) -> None:
    extra = x509.UniformResourceIdentifier("spiffe://helixflow.local/monitoring")
    put(layout, san=[*names.standard("api-gateway"), extra])


def revoked(layout: Layout) -> None:
    rotate.revoke(layout, rotate.serials_of(layout, "api-gateway")[:1])


def a_ca(layout: Layout) -> None:
    # A certificate that could issue others, as a careless OpenSSL configuration makes it.
    authority, fresh = Authority.load(layout), key()
    cert = (
        x509.CertificateBuilder(
            issuer_name=authority.cert.subject, subject_name=authority.cert.subject, public_key=fresh.public_key()
        )
        .serial_number(77)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=100))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names.standard("api-gateway")), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(authority.key, hashes.SHA256())
    )
    pairs.publish([(gateway(layout), cert, fresh)])


WRONG_CERTS: dict[str, tuple[Callable[[Layout], None], list[str]]] = {
    "expired": (expired, ["expired on"]),
    "early": (early, ["is not valid before"]),
    "foreign": (foreign, ["was not issued by the CA"]),
    "other service": (other_service, ["its identity must be spiffe://helixflow.local/api-gateway", "DNS:api-gateway"]),
    "other role": (other_role, ["is not a server certificate"]),
    "names": (no_loopback, ["lacks the names DNS:localhost, IP:::1"]),
    "two identities": (two_identities, ["its identity must be"]),
    "no names": (
        lambda layout: put(layout, san=[x509.DNSName("x")]),
        ["may not certify: DNS:x", "its identity must be", "lacks the names"],
    ),
    "revoked": (revoked, ["was revoked on"]),
    "a CA": (a_ca, ["is a CA certificate", "has no key usage", "is not a server certificate"]),
    "garbage": (lambda layout: _write(gateway(layout).cert, b"garbage"), ["is not a PEM certificate"]),
    "missing": (lambda layout: gateway(layout).cert.unlink(), ["does not exist"]),
    "writable": (lambda layout: gateway(layout).cert.chmod(0o664), ["the group or others can change it"]),
}


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.warning]


@pytest.mark.parametrize("case", WRONG_CERTS)
def test_a_wrong_certificate_is_named_with_its_reason(layout: Layout, case: str) -> None:
    break_it, reasons = WRONG_CERTS[case]
    break_it(layout)
    report = verify(layout)
    assert not report.ok
    found = errors(report.findings)
    assert [finding.file for finding in found] == [gateway(layout).cert] * len(reasons)
    for finding, reason in zip(found, reasons, strict=True):
        assert reason in finding.reason
        assert finding.hint


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("swapped", "does not belong to the certificate in api-gateway.crt"),
        ("loose", "mode 0644"),
        ("group", "mode 0640"),
        ("garbage", "is not a PEM private key"),
        ("missing", "does not exist"),
    ],
)
def test_a_wrong_key_is_named_with_its_reason(layout: Layout, which: str, reason: str) -> None:
    path = gateway(layout).key
    if which == "swapped":
        path.write_bytes(layout.pair("monitoring", Role.SERVER).key.read_bytes())
    elif which == "garbage":
        path.write_bytes(b"garbage")
    elif which == "missing":
        path.unlink()
    else:
        path.chmod(0o644 if which == "loose" else 0o640)
    found = errors(verify(layout).findings)
    assert [finding.file for finding in found] == [path]
    assert reason in found[0].reason
    assert found[0].hint or which == "garbage"


def damaged(private: rsa.RSAPrivateKey) -> bytes:
    """The same key with one wrong bit in each of its exponents."""
    n = private.private_numbers()
    wrong = rsa.RSAPrivateNumbers(n.p, n.q, n.d ^ 16, n.dmp1 ^ 16, n.dmq1 ^ 16, n.iqmp, n.public_numbers)
    return keys.to_pem(wrong.private_key(unsafe_skip_rsa_key_validation=True))


def test_a_damaged_rsa_key_is_found(layout: Layout) -> None:
    private = keys.load_private(layout.jwt_private)
    assert isinstance(private, rsa.RSAPrivateKey)
    layout.jwt_private.write_bytes(damaged(private))
    found = verify(layout).findings
    assert [f.file for f in found] == [layout.jwt_private]
    assert "is damaged" in found[0].reason


def test_every_failing_file_is_reported_not_only_the_first(layout: Layout) -> None:
    expired(layout)
    layout.jwt_private.chmod(0o604)
    layout.pair("monitoring", Role.CLIENT).key.unlink()
    failing = {finding.file.name for finding in verify(layout).findings}
    assert failing == {"api-gateway.crt", "jwt-private.pem", "monitoring-client-key.pem"}


def test_the_ca_is_checked(layout: Layout) -> None:
    leaf = gateway(layout).cert.read_bytes()
    original = layout.ca_cert.read_bytes()
    layout.ca_cert.write_bytes(leaf)
    reasons = [f.reason for f in verify(layout).findings if f.file == layout.ca_cert]
    assert any("not self-signed" in reason for reason in reasons)
    assert any("basic constraints" in reason for reason in reasons)
    assert any("key usage" in reason for reason in reasons)
    layout.ca_cert.write_bytes(original)
    layout.ca_cert.chmod(0o666)
    assert [f.file for f in verify(layout).findings] == [layout.ca_cert]
    layout.ca_cert.unlink()
    found = verify(layout).findings
    assert [f.file for f in found] == [layout.ca_cert]
    assert "does not exist" in found[0].reason


def test_the_ca_key_is_checked_and_may_be_elsewhere(layout: Layout) -> None:
    layout.ca_key.write_bytes(keys.to_pem(key()))
    found = verify(layout).findings
    assert [f.file for f in found] == [layout.ca_key]
    assert "does not belong" in found[0].reason
    layout.ca_key.unlink()
    report = verify(layout)
    assert report.ok
    assert [f.file for f in report.findings] == [layout.ca_key]


def test_an_expired_ca_is_found(layout: Layout) -> None:
    later = NOW + timedelta(days=3651)
    found = verify(layout, later).findings
    assert layout.ca_cert in {f.file for f in found}
    assert all("expired on" in f.reason for f in found)


@pytest.mark.parametrize(("days", "left"), [(365, 29), (90, 29), (9, 2)])
def test_what_ends_soon_is_a_warning(layout: Layout, days: int, left: int) -> None:
    put(layout, days=days)
    assert verify(layout).findings == []
    report = verify(layout, NOW + timedelta(days=days - left, hours=-1))
    assert gateway(layout).cert in [f.file for f in report.findings if f.warning]
    assert any(f"expires in {left} days" in finding.reason for finding in report.findings)


def test_the_revocation_list_is_checked(layout: Layout) -> None:
    rotate.revoke(layout, [1234])
    assert verify(layout).findings == []
    soon = verify(layout, NOW + timedelta(days=25))
    assert soon.ok
    assert [f.file for f in soon.findings] == [layout.crl]
    late = verify(layout, NOW + timedelta(days=31))
    assert not late.ok
    assert "every connection is refused" in late.findings[0].reason
    other = Authority.create(key()).revocation_list({}, 1)
    layout.crl.write_bytes(other.public_bytes(serialization.Encoding.PEM))
    assert "was not signed by this CA" in verify(layout).findings[0].reason
    layout.crl.write_bytes(b"garbage")
    assert "is not a PEM revocation list" in verify(layout).findings[0].reason


def test_a_list_forged_in_the_name_of_the_ca_is_found(layout: Layout) -> None:
    real = Authority.load(layout)
    forged = Authority(real.cert, key()).revocation_list({}, 1)
    layout.crl.write_bytes(forged.public_bytes(serialization.Encoding.PEM))
    assert "was not signed by this CA" in verify(layout).findings[0].reason


def test_the_token_keys_are_checked(layout: Layout) -> None:
    layout.jwt_public.write_bytes(keys.public_pem(key()))
    found = verify(layout).findings
    assert [f.file for f in found] == [layout.jwt_public]
    assert "does not belong to jwt-private.pem" in found[0].reason
    layout.jwt_public.write_bytes(b"garbage")
    assert "is not a PEM public key" in verify(layout).findings[0].reason
    fresh = key()
    layout.jwt_private.write_bytes(keys.to_pem(fresh))
    layout.jwt_public.write_bytes(keys.public_pem(fresh))
    assert "not RSA-4096" in verify(layout).findings[0].reason


def test_other_services_are_checked_too(layout: Layout) -> None:
    issue.issue(layout, "batch-runner")
    layout.pair("batch-runner", Role.CLIENT).key.unlink()
    found = verify(layout).findings
    assert [f.file.name for f in found] == ["batch-runner-client-key.pem"]


def test_a_directory_that_everybody_can_write_to_is_found(layout: Layout) -> None:
    layout.directory.chmod(0o777)
    found = verify(layout).findings
    assert [f.file for f in found] == [layout.directory]


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PkiError, match="is not a directory"):
        verify(Layout(tmp_path / "nowhere"))
