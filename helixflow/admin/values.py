"""How people write and read values: counts, money, days, durations.

Money inside is whole nano units of the currency (a price: per token), outside a decimal number (a price: per million
tokens). Readers raise `argparse.ArgumentTypeError`, so that a typing error ends the command before anything is asked.
"""

import contextlib
import re
import time
from argparse import ArgumentTypeError
from datetime import UTC, date, datetime
from decimal import Decimal

NANO = 10**9
TOKENS_OF_PRICE = 10**6
"""Prices are read and written for so many tokens."""
MOST = 2**63 - 1
"""Largest number that the database keeps."""

_COUNT = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?)([kKmMgG]?)")
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_DECIMAL = re.compile(r"[0-9]{1,19}(\.[0-9]{1,12})?")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def count(text: str) -> int:
    """Reads `250`, `10k`, `1.5M` or `2G`."""
    match = _COUNT.fullmatch(text)
    number = Decimal(match[1]) * _SUFFIX[match[2].lower()] if match else Decimal(-1)
    if match is None or number != int(number):
        raise ArgumentTypeError(f"`{text}` is not a whole number; write for example 250, 10k or 2M")
    return _small(int(number), text)


def money(text: str) -> int:
    """Reads `1.25` as nano units."""
    return _scaled(text, NANO, 9, "an amount of money")


def token_price(text: str) -> int:
    """Reads the price of a million tokens as nano units per token."""
    return _scaled(text, NANO // TOKENS_OF_PRICE, 3, "a price per million tokens")


def _scaled(text: str, factor: int, decimals: int, what: str) -> int:
    if not _DECIMAL.fullmatch(text):
        raise ArgumentTypeError(f"`{text}` is not {what}; write for example 1.25")
    number = Decimal(text) * factor
    if number != int(number):
        raise ArgumentTypeError(f"`{text}` has more than {decimals} decimals")
    return _small(int(number), text)


def _small(number: int, text: str) -> int:
    if number > MOST:
        raise ArgumentTypeError(f"`{text}` is too large")
    return number


def day(text: str) -> str:
    """Checks a day, `YYYY-MM-DD`, and returns it."""
    with contextlib.suppress(ValueError):
        if _DAY.fullmatch(text):
            return date.fromisoformat(text).isoformat()
    raise ArgumentTypeError(f"`{text}` is not a day; write YYYY-MM-DD")


def duration(text: str) -> int:
    """Reads `45s`, `30m`, `12h`, `90d` or `2w` as seconds."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ArgumentTypeError(f"`{text}` is not a duration; write for example 30m, 12h or 90d")
    seconds = int(match[1]) * _SECONDS[match[2]]
    if seconds >= 2**32:
        raise ArgumentTypeError(f"`{text}` is too long")
    return seconds


def expiry(text: str) -> int:
    """Reads `never`, a duration from now, or the day (of UTC) at whose start something ends.

    Returns seconds since the epoch; 0 for never.
    """
    if text == "never":
        return 0
    if _DURATION.fullmatch(text):
        return int(time.time()) + max(duration(text), 1)
    ends = int(datetime.fromisoformat(day(text)).replace(tzinfo=UTC).timestamp())
    if ends <= time.time():
        raise ArgumentTypeError(f"`{text}` is not in the future")
    return ends


def money_text(nano: int) -> str:
    """`1.25`, with as many decimals as it takes and at least two."""
    return _decimal_text(Decimal(nano) / NANO)


def token_price_text(nano: int) -> str:
    """The price of a million tokens, from nano units per token."""
    return _decimal_text(Decimal(nano) * TOKENS_OF_PRICE / NANO)


def _decimal_text(number: Decimal) -> str:
    whole, _, fraction = f"{number:.9f}".partition(".")
    return f"{whole}.{fraction.rstrip('0').ljust(2, '0')}"


def count_text(number: int) -> str:
    """`1,234,567`."""
    return f"{number:,}"


def moment_text(seconds: int) -> str:
    """`2030-01-31 23:59` of UTC; `never` for 0."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M") if seconds else "never"


def day_text(seconds: int) -> str:
    """`2030-01-31` of UTC; `never` for 0."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d") if seconds else "never"


def precise_text(microseconds: int) -> str:
    """RFC 3339 with microseconds, from microseconds since the epoch."""
    whole, rest = divmod(microseconds, 10**6)
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{rest:06}Z"
