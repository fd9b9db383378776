"""The hash chain of each day: whoever changes, removes, adds or moves a row without the key is found out.

Row n of a day holds HMAC-SHA256(key, hash of row n-1 | n | the row), row 1 that over the day's own start. The day's
head holds the last n and hash under a seal, so that rows cannot be cut off the end. Checkpoints (`seals`) hold the days
together; `verify` reads all of it.
"""

import hmac
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from helixflow.ledger.record import Row, encode

LABEL: Final = b"ledger"
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def chain_key(pepper: bytes) -> bytes:
    """The key of the chains. Whoever has it can forge them: it is derived from the secret behind the API keys."""
    return HKDF(SHA256(), 32, salt=None, info=LABEL).derive(pepper)


def start(key: bytes, day: date) -> bytes:
    """What the first row of a day is chained to."""
    return hmac.digest(key, b"day " + day.isoformat().encode(), "sha256")


def link(key: bytes, previous: bytes, sequence: int, row: Row) -> bytes:
    """The hash of a row behind `previous`."""
    return hmac.digest(key, previous + sequence.to_bytes(8) + encode(row), "sha256")


@dataclass(slots=True)
class Head:
    """The end of a day's chain."""

    day: date
    sequence: int = 0
    hash: bytes = b""
    dropped_sequence: int = 0
    dropped_hash: bytes = b""
    lost_sequence: int = 0
    """Rows up to this one were chained with a pepper that is lost."""

    def seal(self, key: bytes) -> bytes:
        """What shows that nobody else changed it."""
        lost = f"lost {self.lost_sequence} " if self.lost_sequence else ""
        numbers = f"{lost}head {self.day.isoformat()} {self.sequence} {self.dropped_sequence} {len(self.hash)} "
        return hmac.digest(key, numbers.encode() + self.hash + self.dropped_hash, "sha256")


def midnight(day: date) -> datetime:
    """The first moment of a day of UTC."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
