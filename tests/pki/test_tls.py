"""What others make of the files: OpenSSL's verifier, and TLS handshakes with Python's ssl."""

import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from helixflow.pki import issue, rotate
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import SERVICES, Layout, Pair, Role


def context(layout: Layout, pair: Pair | None, side: int) -> ssl.SSLContext:
    tls = ssl.SSLContext(side)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.load_verify_locations(layout.ca_cert)
    tls.verify_mode = ssl.CERT_REQUIRED
    # As Python 3.13 does by default: RFC 5280 to the letter.
    tls.verify_flags |= ssl.VERIFY_X509_STRICT
    if layout.crl.exists():
        tls.load_verify_locations(layout.crl)
        tls.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if pair is not None:
        tls.load_cert_chain(pair.cert, pair.key)
    return tls


def meet(layout: Layout, server: Pair, client: Pair | None, name: str) -> tuple[str | None, str]:
    """A handshake and one byte each way. Returns the protocol and what the server saw; raises what the client saw."""
    left, right = socket.socketpair()
    left.settimeout(10)
    right.settimeout(10)
    outcome: list[str] = []

    def serve() -> None:
        try:
            with context(layout, server, ssl.PROTOCOL_TLS_SERVER).wrap_socket(right, server_side=True) as tls:
                tls.sendall(tls.recv(1))
                outcome.append("served")
        except OSError as error:
            right.close()
            outcome.append(str(error))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with context(layout, client, ssl.PROTOCOL_TLS_CLIENT).wrap_socket(left, server_hostname=name) as tls:
            tls.sendall(b"x")
            assert tls.recv(1) == b"x"
            version = tls.version()
    finally:
        left.close()
        thread.join()
    return version, outcome[0]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "inference-pool", "inference-pool.helixflow.local"])
def test_tls13_with_both_sides_authenticated(layout: Layout, name: str) -> None:
    server, client = layout.pair("inference-pool", Role.SERVER), layout.pair("api-gateway", Role.CLIENT)
    assert meet(layout, server, client, name) == ("TLSv1.3", "served")


def test_every_service_with_every_other(layout: Layout) -> None:
    for one in SERVICES:
        for other in SERVICES:
            server, client = layout.pair(one, Role.SERVER), layout.pair(other, Role.CLIENT)
            assert meet(layout, server, client, one) == ("TLSv1.3", "served")


@pytest.mark.parametrize(("server", "client"), [(Role.CLIENT, Role.CLIENT), (Role.SERVER, Role.SERVER)])
def test_a_certificate_of_the_wrong_role_is_refused(layout: Layout, server: Role, client: Role) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError), match=r"purpose|unsupported certificate|reset|EOF"):
        meet(layout, layout.pair("inference-pool", server), layout.pair("api-gateway", client), "localhost")


def test_a_foreign_name_and_a_missing_certificate_are_refused(layout: Layout) -> None:
    server = layout.pair("inference-pool", Role.SERVER)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        meet(layout, server, layout.pair("api-gateway", Role.CLIENT), "api-gateway")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        meet(layout, server, None, "localhost")


def test_an_extra_name_and_a_revocation_are_seen(layout: Layout) -> None:
    client = layout.pair("api-gateway", Role.CLIENT)
    rotate.permit(layout, ["gpu.example"])
    issue.issue(layout, "pool-2", san=["gpu.example", "10.9.8.7"])
    server = layout.pair("pool-2", Role.SERVER)
    assert meet(layout, server, client, "gpu.example") == ("TLSv1.3", "served")
    assert meet(layout, server, client, "10.9.8.7") == ("TLSv1.3", "served")
    rotate.revoke(layout, rotate.serials_of(layout, "pool-2"))
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        meet(layout, server, client, "gpu.example")
    rotate.renew(layout, ["pool-2"])
    assert meet(layout, server, client, "gpu.example") == ("TLSv1.3", "served")


OPENSSL = shutil.which("openssl")


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert OPENSSL is not None
    return subprocess.run([OPENSSL, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=20)


@pytest.mark.skipif(OPENSSL is None, reason="no openssl command")
def test_openssl_agrees(layout: Layout) -> None:
    for name in SERVICES:
        for pair in layout.pairs(name):
            purpose = "sslserver" if pair.role is Role.SERVER else "sslclient"
            other = "sslclient" if pair.role is Role.SERVER else "sslserver"
            strict: list[str | Path] = ["verify", "-x509_strict", "-check_ss_sig", "-CAfile", layout.ca_cert]
            good = openssl(*strict, "-purpose", purpose, "-verify_hostname", name, pair.cert)
            assert good.returncode == 0, good.stderr
            assert openssl(*strict, "-purpose", other, pair.cert).returncode != 0
    rotate.revoke(layout, rotate.serials_of(layout, "monitoring"))
    with_list: list[str | Path] = [
        "verify",
        "-x509_strict",
        "-crl_check",
        "-CAfile",
        layout.ca_cert,
        "-CRLfile",
        layout.crl,
    ]
    assert openssl(*with_list, layout.pair("api-gateway", Role.SERVER).cert).returncode == 0
    bad = openssl(*with_list, layout.pair("monitoring", Role.SERVER).cert)
    assert bad.returncode != 0
    assert "revoked" in bad.stderr


@pytest.mark.skipif(OPENSSL is None, reason="no openssl command")
def test_openssl_reads_the_keys(layout: Layout) -> None:
    issue.issue(layout, "rsa-service", key_type=KeyType.RSA_4096)
    for path in (layout.pair("api-gateway", Role.SERVER).key, layout.pair("rsa-service", Role.SERVER).key):
        assert openssl("pkey", "-in", path, "-check", "-noout").returncode == 0
    again = openssl("pkey", "-in", layout.jwt_private, "-pubout")
    assert again.stdout == layout.jwt_public.read_text()
