"""Signed statements of where the ledger and the audit log were: checkpoints in the database, anchors outside of it.

A checkpoint names the end of every day's chain and of the audit log's. Whoever cuts a chain, or removes a day,
contradicts the last one; whoever puts an older state of the whole database back contradicts an anchor that lies
somewhere else.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import msgspec
import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

FORMAT: Final = 1
"""Of an anchor file."""
DAYS_MAX: Final = 40_000
"""Most days of an anchor: a century."""
ANCHOR_BYTES_MAX: Final = 3 << 20
"""Largest anchor: a message between services has 4 MiB."""
HASH_BYTES: Final = 32


class AnchorError(ValueError):
    """It is no anchor, or not one of this installation; the message says why."""


class AnotherKeyError(AnchorError):
    """It was signed with another pepper."""


@dataclass(frozen=True, slots=True)
class SealKeys:
    """The keys of all seals, derived from that of the chains: every auth-service of an installation has them."""

    chain: bytes = field(repr=False)
    """Of the days' chains (`chain.chain_key`)."""
    audit: bytes = field(repr=False)
    """Of the audit log's entries and chain."""
    signing: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def of(cls, chain_key: bytes) -> "SealKeys":
        """HKDF-SHA256 (RFC 5869) of the key of the chains."""
        return cls(
            chain_key,
            _derived(chain_key, b"audit"),
            Ed25519PrivateKey.from_private_bytes(_derived(chain_key, b"signature")),
        )

    @property
    def public(self) -> bytes:
        """The 32 bytes that anybody may check signatures with (RFC 8032)."""
        return self.signing.public_key().public_bytes_raw()


def _derived(secret: bytes, label: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=b"ledger " + label).derive(secret)


@dataclass(frozen=True, slots=True)
class End:
    """The end of one chain: number and hash of its last row."""

    sequence: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The ends of all chains at one moment."""

    installation: str
    """UUID of the database."""
    number: int
    """From 1, one more for each."""
    at: datetime
    days: dict[date, End]
    audit: End
    signature: bytes = b""

    def digest(self) -> bytes:
        """The days chained to each other: SHA-256 over the digest before, the day, and the end of its chain."""
        digest = hashlib.sha256(b"helixflow ledger").digest()
        for day in sorted(self.days):
            end = self.days[day]
            link = day.isoformat().encode() + end.sequence.to_bytes(8) + len(end.hash).to_bytes(1) + end.hash
            digest = hashlib.sha256(digest + link).digest()
        return digest

    def statement(self) -> bytes:
        """What is signed: lines of text, so that other programs can check it."""
        return (
            f"helixflow checkpoint {FORMAT}\n{self.installation}\n{self.number}\n"
            f"{self.at.astimezone(UTC).isoformat(timespec='microseconds')}\n"
            f"{len(self.days)} {self.digest().hex()}\n{self.audit.sequence} {self.audit.hash.hex()}\n"
        ).encode()

    def signed(self, keys: SealKeys) -> "Checkpoint":
        """The same with a signature (Ed25519, RFC 8032)."""
        signature = keys.signing.sign(self.statement())
        return Checkpoint(self.installation, self.number, self.at, self.days, self.audit, signature)

    def holds(self, public: bytes) -> bool:
        """Whether the signature is that of `public`."""
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(self.signature, self.statement())
        except InvalidSignature:
            return False
        return True


class _Anchor(msgspec.Struct, forbid_unknown_fields=True):
    """An anchor as a file has it: hashes in hexadecimal digits."""

    format: int
    installation: str
    number: int
    at: datetime
    days: list[tuple[date, int, str]]
    audit: tuple[int, str]
    public_key: str
    signature: str


def dump(checkpoint: Checkpoint, keys: SealKeys) -> bytes:
    """An anchor: a signed checkpoint as JSON, a line for each day."""
    days = [
        orjson.dumps([day.isoformat(), end.sequence, end.hash.hex()]).decode()
        for day, end in sorted(checkpoint.days.items())
    ]
    fields: dict[str, Any] = {
        "format": FORMAT,
        "installation": checkpoint.installation,
        "number": checkpoint.number,
        "at": checkpoint.at.astimezone(UTC).isoformat(timespec="microseconds"),
        "audit": [checkpoint.audit.sequence, checkpoint.audit.hash.hex()],
        "public_key": keys.public.hex(),
        "signature": checkpoint.signature.hex(),
    }
    lines = [f'"{name}": {orjson.dumps(value).decode()}' for name, value in fields.items()]
    listed = ",\n ".join(days)
    return ("{" + ",\n".join([*lines, f'"days": [\n {listed}]']) + "}\n").encode()


def parse(data: bytes, keys: SealKeys, installation: str) -> Checkpoint:
    """Reads an anchor of this installation. Raises AnchorError."""
    if len(data) > ANCHOR_BYTES_MAX:
        raise AnchorError(f"the anchor is larger than {ANCHOR_BYTES_MAX} bytes")
    try:
        found = msgspec.json.decode(data, type=_Anchor)
        checkpoint = Checkpoint(
            found.installation,
            found.number,
            found.at,
            {day: End(sequence, bytes.fromhex(digest)) for day, sequence, digest in found.days},
            End(found.audit[0], bytes.fromhex(found.audit[1])),
            bytes.fromhex(found.signature),
        )
    except (msgspec.MsgspecError, ValueError) as error:
        raise AnchorError(f"this is no anchor: {error}") from None
    if found.format != FORMAT:
        raise AnchorError(f"the anchor has format {found.format}; this release reads {FORMAT}")
    if found.installation != installation:
        raise AnchorError(f"the anchor belongs to the installation {found.installation}, this one is {installation}")
    if found.public_key != keys.public.hex():
        raise AnotherKeyError(
            "the anchor was signed with another key: is auth.pepper that of the installation, or was it given up since?"
        )
    try:
        holds = checkpoint.holds(keys.public)
    except (OverflowError, ValueError):  # a number that no statement has
        holds = False
    if not holds:
        raise AnchorError("the signature of the anchor is wrong: somebody changed it")
    return checkpoint


@dataclass(frozen=True, slots=True)
class Witness:
    """A checkpoint, and what it is called where it is contradicted."""

    name: str
    checkpoint: Checkpoint

    def __str__(self) -> str:
        moment = (self.checkpoint.at.astimezone(UTC) + timedelta(0)).isoformat(sep=" ", timespec="seconds")
        return f"{self.name} of {moment.removesuffix('+00:00')} UTC"


def of_day(witnesses: Sequence[Witness], day: date) -> list[tuple[End, Witness]]:
    """What is known of the end of a day's chain, the shortest first."""
    found = [(witness.checkpoint.days[day], witness) for witness in witnesses if day in witness.checkpoint.days]
    return sorted(found, key=lambda each: each[0].sequence)
