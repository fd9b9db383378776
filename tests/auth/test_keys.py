"""The format of API keys."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.auth import keys


def test_a_made_key_is_well_formed_and_new() -> None:
    made = {keys.make() for _ in range(200)}
    assert len(made) == 200
    for key in made:
        assert len(key) == keys.LENGTH == 52
        assert key.startswith("hf-")
        assert keys.well_formed(key.encode())
        assert keys.shown(key) == key[:9]


def crc_32(data: bytes) -> int:
    """By the definition (IEEE 802.3, reflected), bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_the_checksum_is_crc_32_of_all_before_it() -> None:
    text = "hf-" + "0" * 43
    rest, check = crc_32(text.encode()), ""
    while rest:
        rest, digit = divmod(rest, 62)
        check = keys.ALPHABET[digit] + check
    assert keys.well_formed((text + check.rjust(6, "0")).encode())


def test_256_bits_fit_into_43_characters_and_no_fewer() -> None:
    assert 62**42 < 2**256 < 62**43
    assert keys.base62(2**256 - 1, 43).lstrip("0") == keys.base62(2**256 - 1, 43)
    assert keys.base62(61, 2) == "0z"
    assert keys.base62(62, 2) == "10"


@given(position=st.integers(3, 51), character=st.sampled_from(keys.ALPHABET))
def test_one_changed_character_is_noticed(position: int, character: str) -> None:
    key = "hf-" + keys.base62(123456789, 43)
    key += keys._checksum(key.encode())
    changed = key[:position] + character + key[position + 1 :]
    assert keys.well_formed(changed.encode()) is (changed == key)


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"demo-key",
        b"hf-",
        b"hf-" + b"!" * 49,
        b"HF-" + b"0" * 49,
        keys.make().encode() + b"0",
        keys.make().encode()[:-1],
        keys.make().encode() + b"\n",
        "hf-é".encode() + b"0" * 47,
        b"\x00" * 52,
    ],
)
def test_everything_else_is_not(key: bytes) -> None:
    assert not keys.well_formed(key)


@given(st.binary(max_size=80))
def test_no_bytes_break_the_check(key: bytes) -> None:
    assert not keys.well_formed(key)


def test_a_gateway_sends_a_digest() -> None:
    assert keys.presented(b"hf-x") == hashlib.sha256(b"hf-x").digest()
