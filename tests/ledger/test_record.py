"""Records: what is hashed must be the same bytes for ever."""

import hmac
import time
import uuid
from datetime import date

import msgspec
import pytest

from helixflow.ledger import record
from helixflow.ledger.chain import chain_key, link, start

from .support import GATEWAY, NOON_US, ORGANISATION, USER, row

ID = bytes.fromhex("019ca93e1c0070008000000000000001")


def fixed() -> record.Row:
    return record.Row(
        id=ID,
        at_us=NOON_US,
        organisation=ORGANISATION.bytes,
        user=USER.bytes,
        key=None,
        model="demo",
        endpoint="/v1/completions",
        prompt_tokens=300,
        cached_tokens=0,
        completion_tokens=70_000,
        queue_us=12,
        first_token_us=1 << 20,
        total_us=1 << 33,
        finish="stop",
        error="",
        status=200,
        client="2001:db8::1",
        cost=10**15,
        request_id="größe",
        gateway=GATEWAY.bytes,
    )


BYTES = b"".join(  # by hand, from the specification of msgpack
    (
        b"\xdc\x00\x15\x01",
        b"\xc4\x10" + ID,
        b"\xcf" + NOON_US.to_bytes(8),
        b"\xc4\x10" + ORGANISATION.bytes,
        b"\xc4\x10" + USER.bytes,
        b"\xc0",
        b"\xa4demo",
        b"\xaf/v1/completions",
        b"\xcd\x01\x2c",
        b"\x00",
        b"\xce" + (70_000).to_bytes(4),
        b"\x0c",
        b"\xce" + (1 << 20).to_bytes(4),
        b"\xcf" + (1 << 33).to_bytes(8),
        b"\xa4stop",
        b"\xa0",
        b"\xcc\xc8",
        b"\xab2001:db8::1",
        b"\xcf" + (10**15).to_bytes(8),
        b"\xa7gr\xc3\xb6\xc3\x9fe",
        b"\xc4\x10" + GATEWAY.bytes,
    )
)


def test_the_encoding_never_changes() -> None:
    assert record.encode(fixed()) == BYTES
    assert record.decode(BYTES) == fixed()


def test_the_chain_never_changes() -> None:
    pepper = b"p" * 32
    extracted = hmac.digest(bytes(32), pepper, "sha256")  # HKDF, RFC 5869
    key = hmac.digest(extracted, b"ledger\x01", "sha256")
    assert chain_key(pepper) == key
    first = hmac.digest(key, b"day 2026-03-01", "sha256")
    assert start(key, date(2026, 3, 1)) == first
    assert link(key, first, 258, fixed()) == hmac.digest(key, first + bytes(6) + b"\x01\x02" + BYTES, "sha256")


def test_ids_tell_their_time() -> None:
    now = time.time_ns() // 1000
    ids = [record.new_id(now + n * 7) for n in range(1000)]
    assert ids == sorted(ids)
    assert len({record.new_id(now) for _ in range(1000)}) == 1000
    for n, each in enumerate(ids):
        parsed = uuid.UUID(bytes=each)
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert parsed.int >> 80 == (now + n * 7) // 1000
        assert record.id_bound(now + n * 7) <= each
        assert each < record.id_bound(now + n * 7 + 1000)


def test_days_of_utc() -> None:
    day = record.day_of(NOON_US)
    assert day.isoformat() == "2026-03-01"
    midnight = record.midnight_us(day)
    assert record.day_of(midnight) == day
    assert record.day_of(midnight - 1).isoformat() == "2026-02-28"


def test_a_broken_surrogate_costs_no_row() -> None:
    broken = row(NOON_US, {"model": "a\ud800b"})
    decoded = record.decode(record.encode(broken))
    assert isinstance(decoded, record.Row)
    assert decoded == msgspec.structs.replace(broken, model="a?b")


@pytest.mark.parametrize(
    "change",
    [{"id": b"short"}, {"at_us": 1}, {"model": "x" * 513}, {"cost": -1}, {"cost": 10**15 + 1}, {"status": 1000}],
)
def test_what_no_row_can_be(change: dict[str, object]) -> None:
    data = record.encode(msgspec.structs.replace(fixed(), **change))
    with pytest.raises(msgspec.ValidationError):
        record.decode(data)


def test_a_later_release_may_add_fields() -> None:
    longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(record.encode(fixed())), "new"])
    assert record.decode(longer) == fixed()


def test_ids_of_anything() -> None:
    assert record.id_of(record.encode(fixed())) == ID
    assert record.id_of(msgspec.msgpack.encode([9, ID])) == ID
    for data in (
        b"",
        b"\xc1",
        msgspec.msgpack.encode("text"),
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode([1, 2]),
    ):
        assert record.id_of(data) == b""
