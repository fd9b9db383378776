"""What the time to the first token tells of a guess at another's prompt: an attack by clock on the real engine."""

import random
import select
import time
from collections.abc import Sequence

from helixflow.core_rs import GenerateRequest, Owner, PoolClient, Prompt
from perf.crowd import MODEL

LENGTH = 256
"""Tokens of the secret: what a hit would save is far more than noise."""


def auc(hits: Sequence[float], misses: Sequence[float]) -> float:
    """The probability that a hit is faster than a miss. 0.5: the times tell nothing."""
    ordered = sorted([(value, 1) for value in hits] + [(value, 0) for value in misses])
    won = below = 0.0
    for _, hit in reversed(ordered):
        if hit:
            won += below
        else:
            below += 1
    return won / (len(hits) * len(misses))


class Guesser:
    """One client that sends as whom it likes, one request at a time."""

    def __init__(self, client: PoolClient, vocabulary: int) -> None:
        self._client = client
        self._draw = random.Random(17)
        self._vocabulary = vocabulary

    def auc(self, guesses: int, victim: int, attacker: int) -> float:
        """Half of the guesses are right; each secret is new, so that no guess helps the next one."""
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(guesses):
            secret = self._tokens()
            self._send(secret, victim)
            times[number % 2].append(self._send(secret if number % 2 else self._tokens(), attacker))
        return auc(times[1], times[0])

    def _tokens(self) -> list[int]:
        return [self._draw.randrange(300, self._vocabulary) for _ in range(LENGTH)]

    def _send(self, prompt: list[int], organisation: int) -> float:
        name = organisation.to_bytes(16)
        request = GenerateRequest(
            request_id="guess",
            model=MODEL,
            prompts=[Prompt.tokens(prompt)],
            max_tokens=1,
            ignore_eos=True,
            owner=Owner(prefixes=name, organisation=name, key=name),
        )
        began = time.perf_counter()
        call = self._client.complete(request, completion_id="guess", created=0, stream=False)
        while not call.done:
            select.select([self._client.fileno()], [], [], 1.0)
            self._client.ready()
        call.take()
        return time.perf_counter() - began
