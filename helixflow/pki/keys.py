"""Private keys: kinds, generation in parallel, PEM."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from enum import Enum
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from helixflow.pki import files
from helixflow.pki.errors import PkiError
from helixflow.pki.passphrase import Passphrase, unattended

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
Progress = Callable[[int, int], None]
"""Called with the number of finished and of all keys."""


class KeyType(Enum):
    """The kinds of key that are issued."""

    RSA_4096 = "rsa-4096"
    ECDSA_P256 = "ecdsa-p256"


def quiet(_finished: int, _total: int) -> None:
    """No progress shown."""


def generate(kind: KeyType) -> PrivateKey:
    """A new key. RSA-4096 takes 0.1 to 3 seconds of one core."""
    if kind is KeyType.RSA_4096:
        return rsa.generate_private_key(public_exponent=65537, key_size=4096)
    return ec.generate_private_key(ec.SECP256R1())


def generate_all(kinds: Sequence[KeyType], progress: Progress = quiet) -> list[PrivateKey]:
    """New keys in the order of `kinds`, on all cores (cryptography releases the GIL)."""
    if not kinds:
        return []
    with ThreadPoolExecutor(max_workers=min(len(kinds), len(os.sched_getaffinity(0)))) as workers:
        jobs = [workers.submit(generate, kind) for kind in kinds]
        for finished, _job in enumerate(as_completed(jobs), start=1):
            progress(finished, len(jobs))
    return [job.result() for job in jobs]


def to_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """PKCS#8; with a passphrase encrypted (PBES2, AES-256)."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def public_pem(key: PrivateKey) -> bytes:
    """SubjectPublicKeyInfo."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_der(key: object) -> bytes:
    """SubjectPublicKeyInfo of a public key, to compare keys with. Raises ValueError for other objects."""
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise ValueError("neither RSA nor ECDSA")
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_private(path: Path, passphrase: Passphrase = unattended) -> PrivateKey:
    """Reads a private key and tries it. Raises PkiError, also when others may read it.

    `passphrase` is asked when the key is encrypted.
    """
    content = files.read_private(path)
    password = passphrase(path) if is_encrypted(content) else None
    try:
        # OpenSSL's own check of an RSA key tests its primes for 0.2 s; a signature proves as much in 2 ms.
        key = serialization.load_pem_private_key(content, password, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError) as error:
        if password is not None:
            raise PkiError(path, "does not open with this passphrase", "Or the file is damaged.") from error
        raise PkiError(path, "is not a PEM private key") from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise PkiError(path, "is neither an RSA nor an ECDSA key")
    if not _works(key):
        raise PkiError(path, "is damaged: what it signs does not verify", "Put a copy back, or renew it.")
    return key


def is_encrypted(content: bytes) -> bool:
    """Whether a PEM private key needs a passphrase (RFC 7468 section 11, RFC 1421 section 4.6.1.1)."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in content or b"Proc-Type: 4,ENCRYPTED" in content


def _works(key: PrivateKey) -> bool:
    probe = b"HelixFlow"
    try:
        if isinstance(key, rsa.RSAPrivateKey):
            signature = key.sign(probe, padding.PKCS1v15(), hashes.SHA256())
            key.public_key().verify(signature, probe, padding.PKCS1v15(), hashes.SHA256())
        else:
            signature = key.sign(probe, ec.ECDSA(hashes.SHA256()))
            key.public_key().verify(signature, probe, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def describe(key: object) -> str:
    """`RSA-4096`, `ECDSA secp256r1`, or the class of something else."""
    if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey):
        return f"RSA-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        return f"ECDSA {key.curve.name}"
    return type(key).__name__


def kind_of(key: object) -> KeyType:
    """The kind to issue next to an existing key."""
    return (
        KeyType.ECDSA_P256
        if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey)
        else (KeyType.RSA_4096)
    )
