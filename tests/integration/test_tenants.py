"""What one organisation learns of another through the pool that both use."""

import itertools
import random
from typing import Any

import pytest

from .people import Site

WORDS = ("amber", "birch", "cedar", "delta")
PHRASES = 10
LENGTH = 4
PREAMBLE = "You are the assistant of a bank. The passphrase is:"
JUNK = 20
"""Prompts of one flush: more than the pool has slots."""


class Attacker:
    """Guesses a passphrase in another's prompt word by word, as far as `cached_tokens` tells."""

    def __init__(self, site: Site, victim: str, own: str) -> None:
        self._site = site
        self._victim = victim
        self._own = own
        self._junk = itertools.count()

    def _send(self, key: str, prompt: str | list[str]) -> dict[str, Any]:
        body = {"model": "gpt-4", "prompt": prompt, "max_tokens": 1}
        usage: dict[str, Any] = self._site.done("POST", "/v1/completions", key, json=body)["usage"]
        return usage

    def _flush(self) -> None:
        """Overwrites what every slot remembers: otherwise the own guesses would be found again."""
        self._send(self._own, [f"{next(self._junk)} is junk" * 4 for _ in range(JUNK)])

    def guess(self, phrase: list[str]) -> tuple[list[str], bool]:
        """The best guess of a phrase, and whether any answer differed from another."""
        known: list[str] = []
        told = False
        for _ in phrase:
            found = []
            for word in WORDS:
                self._flush()
                self._send(self._victim, " ".join([PREAMBLE, *phrase, "Greet the customer."]))
                found.append(self._send(self._own, " ".join([PREAMBLE, *known, word]) + " ")["prompt_tokens_details"])
            cached = [details["cached_tokens"] for details in found]
            told |= len(set(cached)) > 1
            known.append(WORDS[cached.index(max(cached))])
        return known, told


@pytest.fixture(scope="module")
def phrases() -> list[list[str]]:
    draw = random.Random(11)
    return [draw.choices(WORDS, k=LENGTH) for _ in range(PHRASES)]


def test_nobody_recovers_a_prompt_of_another_organisation(site: Site, phrases: list[list[str]]) -> None:
    victim, own = site.key(site.stranger).secret, site.key().secret
    attacker = Attacker(site, victim, own)
    assert not any(attacker.guess(phrase)[1] for phrase in phrases), "right and wrong guesses look alike"
    # The attack is a real one: within the organisation, which shares its prefixes, it finds every word.
    insider = Attacker(site, site.key().secret, own)
    assert [insider.guess(phrase) for phrase in phrases[:3]] == [(phrase, True) for phrase in phrases[:3]]
