"""What the pool's port refuses: everybody but the gateway, over anything but TLS 1.3."""

import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from .stack import SCRIPTED, Stack, ready, running, until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
CHAT = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
SETTINGS = 4
"""Frame type of HTTP/2 that a server sends first."""


def pki(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "helixflow", "pki", *arguments], check=True, capture_output=True)


def handshake(
    address: str,
    certs: Path,
    identity: str | None,
    ca: Path | None = None,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> str:
    """Connects and reads the first HTTP/2 frame: with TLS 1.3 the server's refusal of a client comes only then."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca or certs / "helixflow-ca.pem")
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if identity:
        context.load_cert_chain(certs / f"{identity}.crt", certs / f"{identity}-key.pem")
    host, _, port = address.rpartition(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    try:
        secure = context.wrap_socket(raw)
    except BaseException:
        raw.close()
        raise
    with secure:
        secure.sendall(PREFACE)
        first = secure.recv(9)
        if not first:
            raise ConnectionResetError("closed by the server")
        assert first[3] == SETTINGS
        return secure.version() or ""


def expired_copy(certs: Path, folder: Path, name: str) -> None:
    """Writes to `folder` an identity like `name`'s, signed by the same CA, that ended yesterday."""
    ca = x509.load_pem_x509_certificate((certs / "helixflow-ca.pem").read_bytes())
    ca_key = serialization.load_pem_private_key((certs / "helixflow-ca-key.pem").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    model = x509.load_pem_x509_certificate((certs / f"{name}.crt").read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(model.issuer, model.subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=10))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in model.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    certificate = builder.sign(ca_key, hashes.SHA256())
    assert ca.subject == certificate.issuer
    pem = serialization.Encoding.PEM
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}-key.pem").write_bytes(private)
    shutil.copy(certs / "helixflow-ca.pem", folder)


@pytest.fixture
def pool(scripted: Stack) -> str:
    return scripted.pool.address


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "certs"
    pki("init", "--dir", str(folder), "--key-type", "ecdsa-p256")
    return folder


def test_the_gateway_is_let_in(pool: str, certs: Path) -> None:
    assert handshake(pool, certs, "api-gateway-client") == "TLSv1.3"


@pytest.mark.parametrize(
    "identity", [None, "monitoring-client", "auth-service-client", "inference-pool-client", "api-gateway"]
)
def test_others_are_refused(pool: str, certs: Path, identity: str | None) -> None:
    """No certificate, another service's, and the gateway's server certificate (wrong key usage)."""
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(pool, certs, identity)


def test_tls_1_2_is_refused(pool: str, certs: Path) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(pool, certs, "api-gateway-client", version=ssl.TLSVersion.TLSv1_2)


def test_another_ca_is_refused_in_both_directions(pool: str, certs: Path, foreign: Path) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(pool, foreign, "api-gateway-client", ca=certs / "helixflow-ca.pem")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pool, certs, "api-gateway-client", ca=foreign / "helixflow-ca.pem")


def test_an_expired_certificate_is_refused(pool: str, certs: Path, tmp_path: Path) -> None:
    expired_copy(certs, tmp_path, "api-gateway-client")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(pool, tmp_path, "api-gateway-client")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    """A stack with a PKI of its own, for tests that revoke."""
    folder = tmp_path / "certs"
    pki("init", "--dir", str(folder), "--key-type", "ecdsa-p256")
    with running(folder, tmp_path / "state", **SCRIPTED) as stack:
        yield stack


def test_a_revoked_certificate_is_refused(own: Stack) -> None:
    handshake(own.pool.address, own.certs, "api-gateway-client")
    pki("revoke", "api-gateway", "--dir", str(own.certs))
    own.pool.popen.send_signal(signal.SIGHUP)

    def refused() -> bool:
        try:
            handshake(own.pool.address, own.certs, "api-gateway-client")
        except (ssl.SSLError, ConnectionError):
            return True
        return False

    until(refused, "the revoked certificate is refused")


def test_revocation_reaches_running_services(own: Stack) -> None:
    """By the files alone; and a renewed certificate brings each service back."""

    def answers(status: int) -> bool:
        with own.client() as client:
            try:
                return client.post("/v1/chat/completions", json=CHAT).status_code == status
            except httpx.TransportError:
                return False

    until(lambda: answers(200), "it answers")
    for services in (["api-gateway"], ["inference-pool"], ["api-gateway", "inference-pool"]):
        for service in services:
            pki("revoke", service, "--dir", str(own.certs))
        until(lambda: answers(503), "revoked services refuse each other")
        pki("renew", *services, "--dir", str(own.certs))
        until(lambda: answers(200), "renewed ones do not")


def test_a_revocation_list_does_not_just_vanish(own: Stack) -> None:
    pki("revoke", "monitoring", "--dir", str(own.certs))
    until(lambda: "new certificates in use" in own.gateway.text(), "the gateway has the list")
    until(lambda: "certificates replaced" in own.pool.text(), "the pool has the list")
    (own.certs / "helixflow-crl.pem").unlink()
    for process in (own.gateway, own.pool):
        until(lambda process=process: "was in use and is gone" in process.text(), "it is missed")
    assert ready(own)
