"""A certificate with its key on disk: written as one, read as one."""

import time

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from helixflow.pki import files, keys
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import PrivateKey
from helixflow.pki.layout import Pair

_READ_ATTEMPTS = 50
_READ_PAUSE_S = 0.005
"""A writer is between the two files for microseconds; a machine under load may stretch that."""


def publish(pairs: list[tuple[Pair, x509.Certificate, PrivateKey]]) -> None:
    """Replaces pairs of files. Everything is written and flushed before the first file changes.

    The key comes first, the certificate last: whoever is woken by the new certificate finds its key in place. In the
    moment between the two a reader sees a key that does not match, so readers check that before they use a pair
    (`read` here, `helix-tls` in Rust), and what they had before stays in use. Raises PkiError.
    """
    staged = [
        (
            files.Change(pair.key, keys.to_pem(key), private=True),
            files.Change(pair.cert, cert.public_bytes(serialization.Encoding.PEM), private=False),
        )
        for pair, cert, key in pairs
    ]
    for key_change, cert_change in staged:
        key_change.publish(replace=True)
        cert_change.publish(replace=True)
    for directory in {pair.cert.parent for pair, _cert, _key in pairs}:
        files.flush(directory)


def load_cert(pair: Pair) -> x509.Certificate:
    """The certificate of a pair. Raises PkiError."""
    return parse_cert(pair, files.read(pair.cert))


def parse_cert(pair: Pair, content: bytes) -> x509.Certificate:
    """The first certificate in `content`. Raises PkiError."""
    try:
        return x509.load_pem_x509_certificates(content)[0]
    except ValueError as error:
        raise PkiError(pair.cert, "is not a PEM certificate", f"Run: helixflow pki renew {pair.name}") from error


def read(pair: Pair) -> tuple[x509.Certificate, PrivateKey]:
    """A certificate and the key that belongs to it, read again when a writer came between.

    Raises PkiError when they do not match and stay so.
    """
    for _attempt in range(_READ_ATTEMPTS):
        before = files.read(pair.cert)
        key = keys.load_private(pair.key)
        cert = parse_cert(pair, before)
        if keys.public_der(cert.public_key()) == keys.public_der(key.public_key()):
            return cert, key
        time.sleep(_READ_PAUSE_S)
    raise PkiError(
        pair.key,
        f"does not belong to the certificate in {pair.cert.name}",
        f"Run: helixflow pki renew {pair.name}",
    )
