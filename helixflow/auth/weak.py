"""Passwords that are guessed first: common ones, what is expected of the user, patterns (NIST SP 800-63B-4, 3.1.1.2).

A password is taken apart into the fewest pieces that a guesser tries as one: common passwords, what belongs to the
account, keyboard rows, sequences, digits, repetitions. One of at least LEAST pieces is left to its owner; there are no
rules about kinds of characters.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable

LEAST = 3
LOOKED_AT = 64
"""Characters that are looked at: a password whose beginning is good is good."""

LONGEST_PIECE = 32
PRODUCT = "helixflow"
SHORTEST_CONTEXT = 3
"""Characters: shorter words of an address or a name stand in everything."""

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "1234567890", "qwertzuiop", "yxcvbnm", "azertyuiop", "qsdfghjklm")
_LEET = str.maketrans(
    {"4": "a", "@": "a", "3": "e", "1": "i", "!": "i", "0": "o", "$": "s", "5": "s", "7": "t", "8": "b"}
)
_RUNS = frozenset(
    text[start : start + length]
    for row in ROWS
    for text in (row, row[::-1])
    for length in range(3, len(row) + 1)
    for start in range(len(row) - length + 1)
)
_WORDS = re.compile(r"[^\W_]+")


def load() -> None:
    """Reads the lists, once; whoever is asked first would wait 0.2 s for them."""
    _common()


@functools.cache
def _common() -> tuple[frozenset[str], frozenset[str]]:
    """The common passwords, and all lists together: words, names. Both in lower case."""
    from zxcvbn.frequency_lists import FREQUENCY_LISTS  # noqa: PLC0415 - 100,000 words, for who sets a password

    passwords = frozenset(FREQUENCY_LISTS["passwords"])
    return passwords, passwords.union(*FREQUENCY_LISTS.values())


def expected(email: str, *names: str) -> frozenset[str]:
    """What a guesser tries of an account: its address, the parts of that, names of organisation and product."""
    words = {email, email.partition("@")[0], PRODUCT, *names}
    words |= {word for text in list(words) for word in _WORDS.findall(text)}
    return frozenset(folded for word in words if len(folded := _folded(word)) >= SHORTEST_CONTEXT)


def weak(password: str, context: Iterable[str] = ()) -> bool:
    """Whether a password is among those that are tried first. `context`: of `expected`."""
    text = _folded(password)[:LOOKED_AT]
    passwords, words = _common()
    known = {PRODUCT, *context}
    forms = (text, text.translate(_LEET), text.translate(_LEET).replace("i", "l"))
    if any(form in words or form in known for form in forms):
        return True
    return any(_pieces(text, form, passwords, known) < LEAST for form in forms)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _pieces(text: str, form: str, passwords: frozenset[str], context: set[str]) -> int:
    """The fewest pieces that `text` consists of, at most LEAST. `form`: it, with digits read as letters."""
    least = [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        least[end] = min(
            least[start] + _cost(text[start:end], form[start:end], text[:start], passwords, context)
            for start in range(max(0, end - LONGEST_PIECE), end)
        )
    return min(least[-1], LEAST)


def _cost(piece: str, form: str, before: str, passwords: frozenset[str], context: set[str]) -> int:
    """What a piece adds: nothing when it is expected, stands there before, or only separates."""
    if piece in context or form in context or piece in before or not any(map(str.isalnum, piece)):
        return 0
    if len(piece) == 1 or piece.isdecimal() or piece in _RUNS or piece in passwords or form in passwords:
        return 1
    return 1 if _sequence(piece) else len(piece)


def _sequence(piece: str) -> bool:
    """Whether the code points rise or fall by one: abc, 321."""
    steps = {ord(after) - ord(before) for before, after in itertools.pairwise(piece)}
    return len(piece) >= 3 and steps in ({1}, {-1})
