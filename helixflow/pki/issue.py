"""Making what is missing: the CA, the identities of services, the keys of access tokens."""

import contextlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from helixflow.pki import files, keys, names, pairs, scope
from helixflow.pki.authority import LEAF_DAYS, Authority, load_roots
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import KeyType, PrivateKey, Progress, quiet
from helixflow.pki.layout import ENDPOINT, SERVICES, Layout, Pair, Role, check_service_name


def init(
    layout: Layout,
    *,
    key_type: KeyType | None = None,
    san: Sequence[str] = (),
    days: int = LEAF_DAYS,
    permit: Sequence[str] = (),
    passphrase: bytes | None = None,
    progress: Progress = quiet,
    now: datetime | None = None,
) -> list[Path]:
    """Makes every file that is missing and returns those; a second run makes none.

    What exists is never overwritten, except one half of a certificate-and-key pair whose other half is gone, which is
    of no use. `key_type` None: that of the CA, RSA-4096 for a new one. `san` goes into each certificate made now; a CA
    made now may certify these names and those of `permit` beside the standard ones, and its key is encrypted with
    `passphrase`. Raises PkiError when the CA is not whole, and says what to do.
    """
    extra = names.parse(san)
    with files.locked(layout.directory):
        missing = [pair for name in SERVICES for pair in layout.pairs(name) if not _whole(pair)]
        new_ca = _needs_ca(layout, missing)
        authority = None if new_ca or not missing else Authority.load(layout, now)
        further = [] if _whole(layout.endpoint_ecdsa) else [layout.endpoint_ecdsa]
        if further and not new_ca and authority is None:
            # Nothing that has to be there is missing: without the CA's key it stays as it is.
            with contextlib.suppress(PkiError):
                authority = Authority.load(layout, now)
            further = [] if authority is None else further
        # An interrupted run leaves the key alone; a CA is then made with it.
        ca_key = keys.load_private(layout.ca_key, layout.passphrase) if new_ca and layout.ca_key.exists() else None
        kind = key_type or _kind(authority, ca_key)
        if _kind_of(layout.pair(ENDPOINT, Role.SERVER), kind) is KeyType.ECDSA_P256:
            further = []  # the first pair is one
        new_jwt = _needs_jwt(layout)

        wanted = [kind] * len(missing) + [KeyType.ECDSA_P256] * len(further)
        wanted += [kind] if new_ca and ca_key is None else []
        wanted += [KeyType.RSA_4096] if new_jwt else []
        fresh = keys.generate_all(wanted, progress)

        made: list[Path] = []
        jwt_key = fresh.pop() if new_jwt else None
        if new_ca:
            permitted = scope.extended(scope.STANDARD, [*extra, *names.parse_subtrees(permit)])
            authority = Authority.create(ca_key or fresh.pop(), permitted, now)
            _publish_ca(layout, authority, passphrase, made)
        if authority is not None:
            # One that comes later has the names of its twin.
            twins = names.merge(_extras(layout.pair(ENDPOINT, Role.SERVER)), extra) if further else []
            count = len(missing)
            _publish_pairs(authority, missing, fresh[:count], extra, days, now)
            _publish_pairs(authority, further, fresh[count:], twins, days, now)
            made += [path for pair in (*missing, *further) for path in (pair.cert, pair.key)]
        _publish_jwt(layout, jwt_key, made)
    return made


def issue(
    layout: Layout,
    name: str,
    *,
    key_type: KeyType | None = None,
    san: Sequence[str] = (),
    days: int = LEAF_DAYS,
    progress: Progress = quiet,
    now: datetime | None = None,
) -> list[Path]:
    """Makes the identity of one service (four files) and returns the files.

    Raises PkiError when there is one already, or nothing can be signed.
    """
    check_service_name(name)
    extra = names.parse(san)
    with files.locked(layout.directory):
        both = layout.pairs(name)
        for path in (path for pair in both for path in (pair.cert, pair.key)):
            if path.exists():
                raise PkiError(path, "exists already", f"To replace it, run: helixflow pki renew {name}")
        authority = Authority.load(layout, now)
        fresh = keys.generate_all([key_type or keys.kind_of(authority.key)] * len(both), progress)
        _publish_pairs(authority, list(both), fresh, extra, days, now)
    return [path for pair in both for path in (pair.cert, pair.key)]


def rotate_tokens(layout: Layout, *, progress: Progress = quiet) -> list[Path]:
    """Replaces the key pair of access tokens; returns both files. A running auth-service takes it up within a second.

    What it replaces stays known to the auth-services until the last token signed with it has ended. Raises PkiError.
    """
    with files.locked(layout.directory):
        if not layout.jwt_private.exists():
            raise PkiError(layout.jwt_private, "does not exist", "`helixflow pki init` makes what is missing.")
        fresh = keys.generate_all([KeyType.RSA_4096], progress)[0]
        changes = [
            files.Change(layout.jwt_private, keys.to_pem(fresh), private=True),
            files.Change(layout.jwt_public, keys.public_pem(fresh), private=False),
        ]
        for change in changes:
            change.publish(replace=True)
        files.flush(layout.directory)
    return [layout.jwt_private, layout.jwt_public]


def _extras(pair: Pair) -> list[x509.GeneralName]:
    """Names of a certificate that is there, beside the standard ones."""
    return names.extras(pair.name, pairs.load_cert(pair)) if pair.cert.exists() else []


def _kind_of(pair: Pair, otherwise: KeyType) -> KeyType:
    """The kind of a pair that is there."""
    return keys.kind_of(pairs.load_cert(pair).public_key()) if _whole(pair) else otherwise


def _whole(pair: Pair) -> bool:
    return pair.cert.exists() and pair.key.exists()


def _kind(authority: Authority | None, ca_key: PrivateKey | None) -> KeyType:
    key = authority.key if authority is not None else ca_key
    return keys.kind_of(key) if key is not None else KeyType.RSA_4096


def _needs_ca(layout: Layout, missing: list[Pair]) -> bool:
    """Whether a CA has to be made. Raises PkiError when one seems to be lost."""
    if layout.ca_cert.exists():
        load_roots(layout)
        return False
    issued = [pair.cert for name in layout.names() for pair in layout.pairs(name) if pair.cert.exists()]
    if issued:
        raise PkiError(
            layout.ca_cert,
            f"is missing, but certificates that a CA issued are here ({issued[0].name}, {len(issued)} in all)",
            f"Put {layout.ca_cert.name} and {layout.ca_key.name} back, or move the certificates away to start anew with"
            " another CA.",
        )
    return bool(missing)


def _needs_jwt(layout: Layout) -> bool:
    if layout.jwt_private.exists():
        return False
    if layout.jwt_public.exists():
        raise PkiError(
            layout.jwt_private,
            f"is missing, but {layout.jwt_public.name} is here",
            f"Put it back, or remove {layout.jwt_public.name} to make a new pair: tokens signed with the old key end.",
        )
    return True


def _publish_ca(layout: Layout, authority: Authority, passphrase: bytes | None, made: list[Path]) -> None:
    if not layout.ca_key.exists():
        files.write(layout.ca_key, keys.to_pem(authority.key, passphrase), private=True, replace=False)
        made.append(layout.ca_key)
    content = authority.cert.public_bytes(serialization.Encoding.PEM)
    files.write(layout.ca_cert, content, private=False, replace=False)
    made.append(layout.ca_cert)


def _publish_pairs(
    authority: Authority,
    wanted: list[Pair],
    fresh: list[PrivateKey],
    extra: list[x509.GeneralName],
    days: int,
    now: datetime | None,
) -> None:
    pairs.publish(
        [
            (
                pair,
                authority.issue(pair.name, pair.role, key, authority.alternatives(pair.name, extra), days, now),
                key,
            )
            for pair, key in zip(wanted, fresh, strict=True)
        ]
    )


def _publish_jwt(layout: Layout, fresh: PrivateKey | None, made: list[Path]) -> None:
    if fresh is not None:
        files.write(layout.jwt_private, keys.to_pem(fresh), private=True, replace=False)
        made.append(layout.jwt_private)
    if not layout.jwt_public.exists():
        key = fresh or keys.load_private(layout.jwt_private)
        files.write(layout.jwt_public, keys.public_pem(key), private=False, replace=False)
        made.append(layout.jwt_public)
