"""What the ledger knows of a request, and how it travels: msgpack arrays whose first element tells the kind.

A field is only ever added at the end, with a default: older readers ignore it, newer ones do without it.
"""

import random
from datetime import UTC, date, datetime
from typing import Annotated, Final

import msgspec
from msgspec import Meta

COUNT_MAX: Final = 10**15
"""Largest number of one row: sums of thousands of the largest still fit into 64 bits."""
CANCELLED: Final = "cancelled"
"""`finish` of a request whose client went away."""
INTERRUPTED: Final = "interrupted"
"""`finish` of a request that never ended: its worker died."""

UNKNOWN_ERROR: Final = "model_not_found"
"""`error` of a request whose model nobody has; its row keeps the name."""
UNKNOWN: Final = "(unknown)"
"""What such requests are counted under: clients can invent any number of names."""

TEXT_MAX: Final = 512
"""Most characters of a text column."""
CONTENT_MAX: Final = 65_536
"""Most characters that are kept of a prompt, and of an answer."""

Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
Text = Annotated[str, Meta(max_length=TEXT_MAX)]
Long = Annotated[str, Meta(max_length=CONTENT_MAX)]
# From 2020 to 2100: a clock that is off by more makes partitions that nobody wants.
Instant = Annotated[int, Meta(ge=1_577_836_800_000_000, lt=4_102_444_800_000_000)]


class Row(msgspec.Struct, array_like=True, tag=1, frozen=True, gc=False):
    """One request that has ended. Ids are the 16 bytes of UUIDs, times microseconds."""

    id: Id
    """UUIDv7 made of `at_us` (`new_id`)."""
    at_us: Instant
    """Admission, since the epoch."""
    organisation: Id | None
    user: Id | None
    key: Id | None
    model: Text
    endpoint: Text
    """Path."""
    prompt_tokens: Count
    cached_tokens: Count
    completion_tokens: Count
    queue_us: Count
    first_token_us: Count
    total_us: Count
    finish: Text
    """Finish reason of the first choice; empty: refused or failed before it ran."""
    error: Text
    """Code of the error; empty: none."""
    status: Annotated[int, Meta(ge=0, le=999)]
    """Of HTTP, as the client saw it; 0: none."""
    client: Text
    """Address."""
    cost: Count
    """Nano currency units."""
    request_id: Text
    """As the client sees it."""
    gateway: Id
    """The worker."""


class Begin(msgspec.Struct, array_like=True, tag=2, frozen=True, gc=False):
    """What is known of a request when it is admitted; the fields of `Row`."""

    id: Id
    at_us: Instant
    organisation: Id | None
    user: Id | None
    key: Id | None
    model: Text
    endpoint: Text
    client: Text
    request_id: Text
    gateway: Id

    def interrupted(self) -> Row:
        """The row of a request whose end nobody wrote."""
        return self.row(finish=INTERRUPTED)

    def row(  # noqa: PLR0913 - one for each column that the end of a request knows
        self,
        *,
        finish: str,
        error: str = "",
        status: int = 0,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        completion_tokens: int = 0,
        queue_us: int = 0,
        first_token_us: int = 0,
        total_us: int = 0,
        cost: int = 0,
    ) -> Row:
        """The row of this request, with how it ended."""
        return Row(
            self.id,
            self.at_us,
            self.organisation,
            self.user,
            self.key,
            self.model,
            self.endpoint,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            queue_us,
            first_token_us,
            total_us,
            finish,
            error,
            status,
            self.client,
            cost,
            self.request_id,
            self.gateway,
        )


class Content(msgspec.Struct, array_like=True, tag=3, frozen=True, gc=False):
    """Texts of a request, redacted already, for an organisation that wants them kept."""

    id: Id
    at_us: Instant
    organisation: Id | None
    prompt: Long
    answer: Long
    expires_us: Instant
    """Since the epoch."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Row | Content] = msgspec.msgpack.Decoder(Row | Content)
_begin_decoder = msgspec.msgpack.Decoder(Begin)
_plain_decoder = msgspec.msgpack.Decoder()


def encode(record: Row | Begin | Content) -> bytes:
    """The bytes of a record: always the same ones for the same values."""
    try:
        return _encoder.encode(record)
    except UnicodeEncodeError:
        # Half of a surrogate pair, which is no text for anybody else.
        return _encoder.encode(msgspec.structs.replace(record, **_sound(record)))


def _sound(record: Row | Begin | Content) -> dict[str, str]:
    values = msgspec.structs.asdict(record).items()
    return {name: text.encode(errors="replace").decode() for name, text in values if isinstance(text, str)}


def decode(data: bytes) -> Row | Content:
    """The record. Raises msgspec.ValidationError or msgspec.DecodeError."""
    return _decoder.decode(data)


def decode_begin(data: bytes) -> Begin:
    """The record. Raises msgspec.ValidationError or msgspec.DecodeError."""
    return _begin_decoder.decode(data)


def id_of(data: bytes) -> bytes:
    """The request's id, even of a record that is wrong in other ways; empty when there is none."""
    try:
        record = _plain_decoder.decode(data)
    except msgspec.MsgspecError:
        return b""
    found = record[1] if isinstance(record, list) and len(record) > 1 else b""
    return found if isinstance(found, bytes) else b""


def new_id(at_us: int) -> bytes:
    """A UUIDv7 (RFC 9562) whose time, to 1/4096 of a millisecond, is `at_us`; the other 62 bits are random."""
    milliseconds, rest = divmod(at_us, 1000)
    # No secret, and reading the kernel's random numbers lets go of the GIL.
    head = milliseconds << 16 | 0x7000 | rest * 4096 // 1000
    return (head << 64 | 1 << 63 | random.getrandbits(62)).to_bytes(16)


def id_bound(at_us: int) -> bytes:
    """The lowest id of the millisecond of `at_us`."""
    return (at_us // 1000).to_bytes(6) + bytes(10)


def fits(row: Row) -> bool:
    """Whether the id was made of the row's time, which is what finds it by id."""
    return int.from_bytes(row.id[:6]) == row.at_us // 1000


def midnight_us(day: date) -> int:
    """The first microsecond of a day of UTC, since the epoch."""
    return (day.toordinal() - _EPOCH) * DAY_US


def day_of(at_us: int) -> date:
    """The day of UTC."""
    return date.fromordinal(at_us // DAY_US + _EPOCH)


def today() -> date:
    """The day of UTC."""
    return datetime.now(UTC).date()


DAY_US: Final = 86_400_000_000
_EPOCH: Final = date(1970, 1, 1).toordinal()
