"""Prompts and answers, for organisations that want them kept: redacted before they touch a disk, gone after their time.

Python's engine tries every way in which a pattern could match. So a pattern must have an end (no `*`, no `+`) and few
ways, the text is walked through in windows, and a time limit stands above it all: what an organisation writes into its
patterns cannot hold up the others of the worker.
"""

import importlib
import re
import time
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from helixflow import log
from helixflow.core_rs import InvalidRequest
from helixflow.ledger.record import CONTENT_MAX, DAY_US, Begin, Content
from helixflow.refusals import refusal

REDACTED: Final = "[redacted]"
PATTERNS_MAX: Final = 32
PATTERN_LENGTH: Final = 512
"""Most patterns of an organisation, and characters of one."""
PATTERN_SPAN: Final = 256
"""Most characters that a pattern may match."""
PATTERN_WAYS: Final = 5000
"""Most ways in which a pattern may try to match at one place."""
WINDOW: Final = 512
"""Characters between two looks at the clock: at worst 10 ms."""
REDACT_S: Final = 0.05
"""Processor time for one text (seconds); an ordinary pattern takes 1.5 ms for the longest text."""
RETENTION_DAYS_MAX: Final = 3650
PURGE_ROWS: Final = 1000

_PURGE: Final = """
DELETE FROM helixflow.contents WHERE id IN (
    SELECT id FROM helixflow.contents WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED
)
"""
_FIND: Final = """
SELECT (extract(epoch FROM at) * 1000000)::bigint AS at_us, prompt, answer, organisation_id,
    extract(epoch FROM expires_at)::bigint AS expires
FROM helixflow.contents WHERE id = $1 AND ($2::uuid IS NULL OR organisation_id = $2) AND expires_at > now()
"""
_parser: Final = importlib.import_module("re._parser")
_UNSUPPORTED: Final = {"GROUPREF": "a back reference", "ASSERT": "a look-around", "ASSERT_NOT": "a look-around"}

logger = log.get("ledger")


class Redactor:
    """Replaces what any of the patterns matches."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises InvalidRequest for a pattern that is wrong or could take too long, as `check` does."""
        check(patterns)
        self._patterns = [re.compile(pattern) for pattern in patterns]
        self.slow = False
        """A text took too long: nothing is redacted with these patterns any more."""

    def __call__(self, text: str) -> str | None:
        """The text, at most CONTENT_MAX characters of it; None when it took too long, now or before."""
        # A match that the end would cut in two must be seen whole.
        text = text[: CONTENT_MAX + PATTERN_SPAN]
        limit = time.thread_time() + REDACT_S
        for pattern in self._patterns:
            redacted = None if self.slow else _replaced(pattern, text, limit)
            if redacted is None:
                self.slow = True
                return None
            text = redacted
        return text[:CONTENT_MAX].replace("\0", "\N{REPLACEMENT CHARACTER}")


def _replaced(pattern: re.Pattern[str], text: str, limit: float) -> str | None:
    pieces: list[str] = []
    done = start = 0  # what is in `pieces`; where the window begins
    while start < len(text):
        stop = start + WINDOW
        for match in pattern.finditer(text, start, stop + PATTERN_SPAN + 1):
            if match.start() >= stop:
                break
            pieces += text[done : match.start()], REDACTED
            done = match.end()
        start = max(stop, done)
        if time.thread_time() > limit:
            return None
    return "".join((*pieces, text[done:]))


@lru_cache(maxsize=1024)
def redactor(patterns: tuple[str, ...]) -> Redactor:
    """The redactor of an organisation's patterns; remembered. Raises InvalidRequest."""
    return Redactor(patterns)


def content(begin: Begin, prompt: str, answer: str, patterns: tuple[str, ...], retention_days: int) -> Content | None:
    """What is kept of a request's texts. Call it only when the organisation's policy says `store`.

    None when the patterns cannot be used or took too long, which the log says: then nothing may be kept.
    """
    try:
        redact = redactor(patterns)
    except InvalidRequest as error:
        logger.error("texts are not kept: a pattern cannot be used", organisation=_name(begin), reason=str(error))
        return None
    known = redact.slow
    texts = redact(prompt), redact(answer)
    if texts[0] is None or texts[1] is None:
        if not known:
            logger.error("texts are not kept: the patterns take too long", organisation=_name(begin), patterns=patterns)
        return None
    days = min(max(retention_days, 1), RETENTION_DAYS_MAX)
    return Content(begin.id, begin.at_us, begin.organisation, texts[0], texts[1], begin.at_us + days * DAY_US)


def _name(begin: Begin) -> str:
    return str(uuid.UUID(bytes=begin.organisation)) if begin.organisation else ""


def check(patterns: Sequence[str], param: str = "content.redact") -> None:
    """Raises InvalidRequest, which names the pattern, unless all of them can be used."""
    if len(patterns) > PATTERNS_MAX:
        raise refusal(InvalidRequest, f"There may be at most {PATTERNS_MAX} patterns.", param)
    for number, pattern in enumerate(patterns):
        if problem := _problem(pattern):
            raise refusal(InvalidRequest, f"The pattern {pattern[:80]!r} {problem}.", f"{param}[{number}]")


def _problem(pattern: str) -> str | None:
    if len(pattern) > PATTERN_LENGTH:
        return f"is longer than {PATTERN_LENGTH} characters"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern)
            parsed = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        return f"is no regular expression: {error}"
    shortest, longest = parsed.getwidth()
    if shortest == 0:
        return "matches the empty text"
    if longest > PATTERN_SPAN:
        return f"can match more than {PATTERN_SPAN} characters: write {{1,64}} instead of + or *"
    try:
        ways = _ways(parsed)
    except _UnboundedError as error:
        return f"uses {error}, which is not supported here"
    return "can match in too many ways: shorten its repetitions" if ways > PATTERN_WAYS else None


class _UnboundedError(Exception):
    """A part of a pattern whose effort has no simple bound."""


def _ways(parsed: Any) -> int:
    """At most so many paths does the engine try from one place: the product over the parts, the sum over branches."""
    ways = 1
    for operation, argument in parsed:
        ways *= min(_ways_of(str(operation), argument), PATTERN_WAYS + 1)
        if ways > PATTERN_WAYS:
            return PATTERN_WAYS + 1
    return ways


def _ways_of(operation: str, argument: Any) -> int:
    if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
        return 1
    if operation == "SUBPATTERN":
        return _ways(argument[-1])
    if operation == "BRANCH":
        return sum(_ways(branch) for branch in argument[1])
    if operation in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, body = argument
        inner = _ways(body)
        if inner == 1:
            return int(high) - int(low) + 1
        return int(sum(min(inner**count, PATTERN_WAYS + 1) for count in range(int(low), int(high) + 1)))
    raise _UnboundedError(_UNSUPPORTED.get(operation, operation.lower()))


@dataclass(frozen=True, slots=True)
class Texts:
    """What is kept of one request."""

    id: str
    at_us: int
    prompt: str = field(repr=False)
    answer: str = field(repr=False)
    expires_at: int
    """Seconds since the epoch."""


async def find(
    connection: Any, request_id: uuid.UUID, organisation_id: uuid.UUID | None
) -> tuple[Texts, uuid.UUID | None] | None:
    """The texts of one request of an organisation (None: of any), and whose they are; None when nothing is kept."""
    row = await connection.fetchrow(_FIND, request_id, organisation_id)
    if row is None:
        return None
    texts = Texts(str(request_id), row["at_us"], row["prompt"], row["answer"], row["expires"])
    return texts, row["organisation_id"]


async def purge(connection: Any, now: datetime | None = None) -> int:
    """Removes texts whose time is over; returns how many. Several may do it at once."""
    total = 0
    while True:
        status = await connection.execute(_PURGE, now or datetime.now(UTC), PURGE_ROWS)
        removed = int(status.split()[-1])
        total += removed
        if removed < PURGE_ROWS:
            return total
