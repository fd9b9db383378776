"""Name constraints: what a CA may certify, by our own rule and by what OpenSSL and the extension make of it."""

import ipaddress
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from helixflow.pki import issue, keys, names, pairs, rotate, scope
from helixflow.pki.authority import Authority, load_roots
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout, Role
from helixflow.pki.verify import verify

LABEL = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=12)
DOMAIN = st.lists(LABEL, min_size=1, max_size=4).map(".".join)
ADDRESS = st.ip_addresses().map(x509.IPAddress)
NAME = st.one_of(DOMAIN.map(x509.DNSName), ADDRESS)


def forged(authority: Authority, *alternatives: x509.GeneralName) -> bytes:
    """A server certificate that somebody with the CA's key, and without our rules, makes."""
    key = keys.generate(KeyType.ECDSA_P256)
    start = datetime.now(UTC) - timedelta(minutes=1)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    return (
        x509.CertificateBuilder()
        .issuer_name(authority.cert.subject)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def openssl_accepts(layout: Layout, content: bytes, place: Path) -> bool:
    place.write_bytes(content)
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", layout.ca_cert, place],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or "permitted subtree violation" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("localhost", True),
        ("api-gateway", True),
        ("llm.corp", True),
        ("10.1.2.3", True),
        ("fd00::7", True),
        ("example.com", False),
        ("xlocalhost", False),
        ("203.0.113.7", False),
        ("2001:db8::1", False),
    ],
)
def test_the_ca_speaks_for_private_names_only(layout: Layout, tmp_path: Path, name: str, fine: bool) -> None:
    authority, alternatives = Authority.load(layout), names.parse([name])
    assert openssl_accepts(layout, forged(authority, *alternatives), tmp_path / "forged.pem") is fine
    assert scope.permits(scope.of(authority.cert), alternatives[0]) is fine


def test_a_name_beyond_it_is_refused_with_the_command_that_permits_it(layout: Layout) -> None:
    with pytest.raises(PkiError, match=r"may not certify DNS:llm\.example\.com") as caught:
        rotate.renew(layout, ["api-gateway"], san=["llm.example.com"])
    assert "helixflow pki permit DNS:llm.example.com" in caught.value.hint
    assert verify(layout).findings == []


def test_permitting_a_name_leaves_what_was_issued_valid_under_both_files(layout: Layout, tmp_path: Path) -> None:
    old = Layout(tmp_path / "old")
    old.directory.mkdir()
    old.ca_cert.write_bytes(layout.ca_cert.read_bytes())
    assert rotate.permit(layout, ["example.com", "203.0.113.0/24", "llm.corp"]) == [
        "DNS:example.com",
        "IP:203.0.113.0/24",
    ]
    assert rotate.permit(layout, ["deep.example.com"]) == []
    assert verify(layout).findings == []
    before = pairs.load_cert(layout.pair("monitoring", Role.SERVER)).public_bytes(serialization.Encoding.PEM)
    rotate.renew(layout, ["api-gateway"], san=["llm.example.com", "203.0.113.9"])
    after = pairs.load_cert(layout.pair("api-gateway", Role.SERVER)).public_bytes(serialization.Encoding.PEM)
    assert openssl_accepts(layout, before, tmp_path / "a.pem")
    assert openssl_accepts(layout, after, tmp_path / "b.pem")
    assert openssl_accepts(old, before, tmp_path / "c.pem")
    assert not openssl_accepts(old, after, tmp_path / "d.pem")


def test_names_given_at_the_first_start_are_permitted(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "certs")
    issue.init(layout, key_type=KeyType.ECDSA_P256, san=["*.example.com", "203.0.113.9"], permit=["example.org"])
    assert verify(layout).findings == []
    assert rotate.permit(layout, ["a.example.com", "203.0.113.9", "b.example.org"]) == []


def test_a_ca_without_constraints_is_reported_and_gets_them(layout: Layout) -> None:
    authority = Authority.load(layout)
    unconstrained = _without_constraints(authority)
    layout.ca_cert.write_bytes(unconstrained.public_bytes(serialization.Encoding.PEM))
    rotate.renew(layout, ["api-gateway"], san=["llm.example.com"])
    report = verify(layout)
    assert report.ok
    assert [(each.file, each.hint) for each in report.findings] == [(layout.ca_cert, "Run: helixflow pki permit")]
    assert "DNS:llm.example.com" in rotate.permit(layout)
    assert verify(layout).findings == []
    assert scope.of(load_roots(layout)[0]) is not None


def test_a_service_added_later_lives_without_its_plain_name(layout: Layout) -> None:
    issue.issue(layout, "batch-runner")
    present = names.of(pairs.load_cert(layout.pair("batch-runner", Role.SERVER)))
    assert x509.DNSName("batch-runner") not in present
    assert x509.DNSName("batch-runner.helixflow.local") in present
    assert verify(layout).findings == []
    rotate.permit(layout, ["batch-runner"])
    rotate.renew(layout, ["batch-runner"])
    assert x509.DNSName("batch-runner") in names.of(pairs.load_cert(layout.pair("batch-runner", Role.SERVER)))


def test_what_is_not_a_network_is_refused(layout: Layout) -> None:
    with pytest.raises(PkiError, match="is not a network"):
        rotate.permit(layout, ["10.0.0.1/8"])


@given(permitted=st.lists(NAME, max_size=4), extra=st.lists(NAME, max_size=4), other=NAME)
def test_widening_permits_what_was_asked_for_and_takes_nothing_away(
    permitted: list[x509.GeneralName], extra: list[x509.GeneralName], other: x509.GeneralName
) -> None:
    before = scope.extended([], permitted)
    after = scope.extended(before, extra)
    assert all(scope.permits(after, name) for name in (*permitted, *extra))
    assert scope.permits(after, other) or not scope.permits(before, other)
    assert after[: len(before)] == before
    if scope.permits(after, other) and not scope.permits(before, other):
        assert any(scope.permits([scope.subtree(name)], other) for name in extra)


@given(DOMAIN, LABEL)
def test_a_domain_holds_what_is_below_it_and_not_what_merely_ends_like_it(domain: str, label: str) -> None:
    permitted = [x509.DNSName(domain)]
    assert scope.permits(permitted, x509.DNSName(f"{label}.{domain}"))
    assert scope.permits(permitted, x509.DNSName(f"*.{domain}"))
    assert not scope.permits(permitted, x509.DNSName(f"{label}{domain}"))
    assert not scope.permits(permitted, x509.IPAddress(ipaddress.ip_address("10.0.0.1")))


def _without_constraints(authority: Authority) -> x509.Certificate:
    cert = authority.cert
    builder = (
        x509.CertificateBuilder(issuer_name=cert.subject, subject_name=cert.subject, public_key=cert.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(cert.not_valid_before_utc)
        .not_valid_after(cert.not_valid_after_utc)
    )
    for extension in cert.extensions:
        if not isinstance(extension.value, x509.NameConstraints):
            builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(authority.key, hashes.SHA256())
