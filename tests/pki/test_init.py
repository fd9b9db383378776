"""What `init` and `issue` make, and what they leave alone."""

import os
import re
import stat
import threading
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from helixflow.pki import files, issue, keys, names, pairs, rotate
from helixflow.pki.authority import Authority
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import SERVICES, Layout, Role, is_service_name
from helixflow.pki.verify import verify

EXPECTED = {
    "helixflow-ca.pem",
    "helixflow-ca-key.pem",
    "jwt-private.pem",
    "jwt-public.pem",
    *(
        f"{service}{suffix}"
        for service in ("api-gateway", "auth-service", "inference-pool", "monitoring")
        for suffix in (".crt", "-key.pem", "-client.crt", "-client-key.pem")
    ),
}


def content(layout: Layout) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in layout.directory.iterdir()}


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.timeout(120)
def test_the_default_is_rsa_4096_with_exactly_these_files(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a" / "certs")
    seen: list[tuple[int, int]] = []
    umask = os.umask(0o277)
    try:
        made = issue.init(layout, progress=lambda finished, total: seen.append((finished, total)))
    finally:
        os.umask(umask)
    expected = EXPECTED | {"api-gateway-ecdsa.crt", "api-gateway-ecdsa-key.pem"}
    assert {path.name for path in layout.directory.iterdir()} == expected
    assert {path.name for path in made} == expected
    assert seen == [(n, 11) for n in range(1, 12)]
    assert layout.directory.stat().st_mode & 0o077 == 0
    for path in layout.directory.iterdir():
        private = path.name.endswith("-key.pem") or path.name == "jwt-private.pem"
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if private else 0o644), path
        if private and "ecdsa" not in path.name:
            key = keys.load_private(path)
            assert isinstance(key, rsa.RSAPrivateKey)
            assert key.key_size == 4096
            assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert verify(layout).findings == []


def test_a_second_init_changes_nothing(layout: Layout) -> None:
    before = content(layout)
    assert set(before) == EXPECTED
    assert issue.init(layout) == []
    assert issue.init(layout, key_type=KeyType.RSA_4096, san=["x.example"]) == []
    assert content(layout) == before


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("service", SERVICES)
def test_a_certificate_is_right_for_its_role(layout: Layout, service: str, role: Role) -> None:
    cert, _key = pairs.read(layout.pair(service, role))
    ca = load(layout.ca_cert)
    cert.verify_directly_issued_by(ca)
    found = {type(extension.value): extension for extension in cert.extensions}
    eku = ExtendedKeyUsageOID.SERVER_AUTH if role is Role.SERVER else ExtendedKeyUsageOID.CLIENT_AUTH
    assert found[x509.ExtendedKeyUsage].value == x509.ExtendedKeyUsage([eku])
    assert found[x509.BasicConstraints].value == x509.BasicConstraints(ca=False, path_length=None)
    usage = cert.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = san.get_values_for_type(x509.DNSName)
    assert {service, f"{service}.helixflow.local", "localhost"} <= set(dns)
    assert san.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]
    assert san.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://helixflow.local/{service}"]
    own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert cert.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == own.digest
    assert x509.SubjectKeyIdentifier in found
    assert (cert.not_valid_after_utc - cert.not_valid_before_utc).days == 90
    assert cert.not_valid_before_utc <= datetime.now(UTC)


def test_the_ca_signs_leaves_only_and_lasts_ten_years(layout: Layout) -> None:
    ca = load(layout.ca_cert)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints) == x509.Extension(
        x509.BasicConstraints.oid, critical=True, value=x509.BasicConstraints(ca=True, path_length=0)
    )
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature
    assert (ca.not_valid_after_utc - ca.not_valid_before_utc).days == 3650


def test_serials_and_keys_are_all_different(layout: Layout) -> None:
    certs = [load(path) for path in layout.directory.glob("*.crt")]
    assert len({cert.serial_number for cert in certs}) == len(certs) == 8
    assert len({keys.public_der(cert.public_key()) for cert in certs}) == 8


def rsa_ca(tmp_path: Path) -> Layout:
    """An installation from before the second pair, whose CA has an RSA key."""
    layout = Layout(tmp_path / "certs")
    layout.directory.mkdir()
    files.write(layout.ca_key, keys.to_pem(keys.generate(KeyType.RSA_4096)), private=True, replace=False)
    issue.init(layout, key_type=KeyType.ECDSA_P256, san=["llm.lan"])
    assert not layout.endpoint_ecdsa.cert.exists(), "of two pairs of one kind the second is of no use"
    rotate.renew(layout, ["api-gateway"], key_type=KeyType.RSA_4096)
    return layout


def test_the_second_pair_of_the_endpoint_comes_later_too(tmp_path: Path) -> None:
    layout = rsa_ca(tmp_path)
    away = layout.ca_key.rename(tmp_path / "key")
    assert issue.init(layout) == [], "without the CA's key it stays as it is"
    away.rename(layout.ca_key)
    pair = layout.endpoint_ecdsa
    assert issue.init(layout) == [pair.cert, pair.key]
    cert = load(pair.cert)
    assert keys.describe(cert.public_key()) == "ECDSA secp256r1"
    assert names.of(cert) == names.of(load(layout.pair("api-gateway", Role.SERVER).cert)), "those of its twin"
    assert verify(layout).ok
    assert issue.init(layout) == []
    before = cert.serial_number
    assert pair in rotate.renew(layout, ["api-gateway"])
    assert load(pair.cert).serial_number != before
    assert len(rotate.serials_of(layout, "api-gateway")) == 3
    pair.key.chmod(0o644)
    assert [finding.file for finding in verify(layout).findings] == [pair.key]


def test_the_token_keys_are_a_pair_and_always_rsa(layout: Layout) -> None:
    private = keys.load_private(layout.jwt_private)
    assert isinstance(private, rsa.RSAPrivateKey)
    assert private.key_size == 4096
    public = serialization.load_pem_public_key(layout.jwt_public.read_bytes())
    assert public == private.public_key()


def test_what_is_missing_is_made_and_the_rest_stays(layout: Layout) -> None:
    before = content(layout)
    gone = ["monitoring.crt", "monitoring-key.pem", "auth-service-client-key.pem", "jwt-public.pem"]
    for name in gone:
        (layout.directory / name).unlink()
    made = {path.name for path in issue.init(layout)}
    # Half a pair is useless, so its other half is made again.
    assert made == {*gone, "auth-service-client.crt"}
    after = content(layout)
    assert {name for name in before if after[name] != before[name]} == made - {"jwt-public.pem"}
    assert verify(layout).findings == []


def test_a_new_identity_gets_the_kind_of_key_the_ca_has(layout: Layout) -> None:
    issue.issue(layout, "batch-runner")
    cert, _key = pairs.read(layout.pair("batch-runner", Role.CLIENT))
    assert keys.kind_of(cert.public_key()) is KeyType.ECDSA_P256
    assert "spiffe://helixflow.local/batch-runner" in [name.value for name in names.of(cert)]
    assert layout.others() == ["batch-runner"]
    assert verify(layout).findings == []
    with pytest.raises(PkiError, match="renew batch-runner"):
        issue.issue(layout, "batch-runner")


def test_extra_names_are_added(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "certs")
    extra = ["ai.example.com", "10.1.2.3,DNS:*.pods.example", "IP:fd00::1"]
    issue.init(layout, key_type=KeyType.ECDSA_P256, san=extra)
    for service in SERVICES:
        cert, _key = pairs.read(layout.pair(service, Role.SERVER))
        found = [names.text(name) for name in names.of(cert)]
        assert found[-4:] == ["DNS:ai.example.com", "IP:10.1.2.3", "DNS:*.pods.example", "IP:fd00::1"]
    assert verify(layout).findings == []


@pytest.mark.parametrize(
    "wrong", ["https://x", "URI:spiffe://helixflow.local/x", "a b", "späti.example", "IP:host", "x..y", "-x", "a" * 300]
)
def test_names_that_are_none_are_refused_before_anything_is_made(tmp_path: Path, wrong: str) -> None:
    layout = Layout(tmp_path / "certs")
    with pytest.raises(PkiError, match=re.escape(f"`{wrong}` is neither")):
        issue.init(layout, key_type=KeyType.ECDSA_P256, san=[wrong])
    assert not layout.directory.exists()


@pytest.mark.parametrize(
    "name", ["", "A", "a/b", "../a", "a.b", "-a", "a-", "a" * 64, "x-client", "x-key", "helixflow-ca", "a\n"]
)
def test_names_that_cannot_be_services(layout: Layout, name: str) -> None:
    assert not is_service_name(name)
    before = content(layout)
    with pytest.raises(PkiError, match="cannot name a service"):
        issue.issue(layout, name)
    assert content(layout) == before


# --- a CA that is not whole ---------------------------------------------------


def test_a_ca_is_never_overwritten(layout: Layout) -> None:
    for path in layout.directory.iterdir():
        if path not in {layout.ca_cert, layout.ca_key}:
            path.unlink()
    before = content(layout)
    issue.init(layout)
    after = content(layout)
    assert set(after) == EXPECTED
    assert {name: after[name] for name in before} == before


def test_without_the_ca_key_a_complete_directory_is_fine_and_an_incomplete_one_is_refused(layout: Layout) -> None:
    layout.ca_key.unlink()
    assert issue.init(layout) == []
    layout.pair("monitoring", Role.SERVER).cert.unlink()
    before = content(layout)
    with pytest.raises(PkiError, match="Put it back") as caught:
        issue.init(layout)
    assert caught.value.file == layout.ca_key
    assert content(layout) == before


@pytest.mark.parametrize("with_key", [True, False])
def test_without_the_ca_certificate_nothing_is_made(layout: Layout, with_key: bool) -> None:
    layout.ca_cert.unlink()
    if not with_key:
        layout.ca_key.unlink()
    before = content(layout)
    with pytest.raises(PkiError, match="8 in all") as caught:
        issue.init(layout)
    assert caught.value.file == layout.ca_cert
    assert "move the certificates away" in caught.value.hint
    assert content(layout) == before


def test_an_interrupted_first_run_is_completed_with_its_key(layout: Layout) -> None:
    key = layout.ca_key.read_bytes()
    for path in layout.directory.iterdir():
        if path != layout.ca_key:
            path.unlink()
    (layout.directory / ".helixflow-ca.pem.new").write_bytes(b"half")
    issue.init(layout)
    assert set(content(layout)) == EXPECTED
    assert layout.ca_key.read_bytes() == key
    assert verify(layout).findings == []


def test_a_ca_whose_halves_do_not_match_signs_nothing(layout: Layout) -> None:
    layout.ca_key.write_bytes(keys.to_pem(keys.generate(KeyType.ECDSA_P256)))
    with pytest.raises(PkiError, match="does not belong to the CA"):
        issue.issue(layout, "another")


def test_an_expired_ca_signs_nothing(layout: Layout) -> None:
    with pytest.raises(PkiError, match="the CA expired"):
        issue.issue(layout, "another", now=datetime.now(UTC) + timedelta(days=3651))


def test_a_certificate_does_not_outlive_the_ca(layout: Layout) -> None:
    late = datetime.now(UTC) + timedelta(days=3600)
    issue.issue(layout, "another", now=late)
    cert, _key = pairs.read(layout.pair("another", Role.SERVER))
    assert cert.not_valid_after_utc == load(layout.ca_cert).not_valid_after_utc


def test_a_loose_ca_key_is_refused(layout: Layout) -> None:
    layout.ca_key.chmod(0o640)
    with pytest.raises(PkiError, match="chmod 600"):
        issue.issue(layout, "another")


def test_a_lost_token_key_is_not_replaced_silently(layout: Layout) -> None:
    layout.jwt_private.unlink()
    with pytest.raises(PkiError, match="tokens signed with the old key end"):
        issue.init(layout)


# --- writing ------------------------------------------------------------------


def test_creating_never_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write(path, b"one", private=True, replace=False)
    with pytest.raises(PkiError, match="not overwritten"):
        files.write(path, b"two", private=True, replace=False)
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / ".key.pem.new").symlink_to(victim)
    with pytest.raises(PkiError, match="cannot be written"):
        files.write(tmp_path / "key.pem", b"secret", private=True, replace=True)
    assert victim.read_bytes() == b"precious"


def test_a_place_that_is_no_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PkiError, match="cannot be used as the certificate directory"):
        issue.init(Layout(tmp_path / "file" / "certs"), key_type=KeyType.ECDSA_P256)


def test_two_runs_at_once_make_one_ca(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "certs")
    made: list[int] = []
    runs = [
        threading.Thread(target=lambda: made.append(len(issue.init(layout, key_type=KeyType.ECDSA_P256))))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(made) == [0, len(EXPECTED)]
    assert verify(layout).findings == []


def test_several_ca_certificates_are_told_apart_by_key(layout: Layout) -> None:
    other = Authority.create(keys.generate(KeyType.ECDSA_P256))
    pem = other.cert.public_bytes(serialization.Encoding.PEM)
    layout.ca_cert.write_bytes(pem + layout.ca_cert.read_bytes())
    issue.issue(layout, "another")
    assert verify(layout).findings == []
