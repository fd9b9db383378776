"""What can be limited, and the windows that limits hold in."""

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from helixflow.core_rs import InvalidRequest
from helixflow.refusals import refusal

MAX_LIMIT = 1 << 52
"""Largest limit: Redis computes with doubles, which are exact to 2^53. As money, 4.5 million currency units."""

MINUTE_S = 60
DAY_S = 86_400


class Metric(enum.IntEnum):
    """What is counted. The values are those of helixflow.v1.Metric."""

    REQUESTS_PER_MINUTE = 1
    TOKENS_PER_MINUTE = 2
    CONCURRENT_REQUESTS = 3
    TOKENS_PER_DAY = 4
    TOKENS_PER_MONTH = 5
    COST_PER_DAY = 6
    COST_PER_MONTH = 7

    @property
    def budget(self) -> bool:
        """A day's or a month's amount: it must outlive crashes, and running out of it is no matter of a moment."""
        return self >= Metric.TOKENS_PER_DAY


TOKENS = frozenset((Metric.TOKENS_PER_MINUTE, Metric.TOKENS_PER_DAY, Metric.TOKENS_PER_MONTH))
"""What counts tokens."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one subject; None: no such limit. Costs are in nano currency units."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    cost_per_day: int | None = None
    cost_per_month: int | None = None

    @classmethod
    def of(cls, message: Any) -> "Limits":
        """Reads a `helixflow.v1.Limits`."""
        return cls(**{name: getattr(message, name) for name in FIELDS if message.HasField(name)})

    @classmethod
    def of_row(cls, row: Mapping[str, Any], prefix: str = "") -> "Limits":
        """Reads columns named as the fields, each with `prefix` before its name."""
        return cls(**{name: row[prefix + name] for name in FIELDS})

    def message(self) -> Any:
        """A `helixflow.v1.Limits`."""
        from helixflow.rpc import messages  # noqa: PLC0415 - the counting itself needs no protobuf

        return messages.Limits(**dict(zip(FIELDS, self.values(), strict=True)))

    def values(self) -> tuple[int | None, ...]:
        """In the order of `FIELDS`."""
        return tuple(getattr(self, name) for name in FIELDS)

    def __iter__(self) -> Iterator[tuple[Metric, int]]:
        """What is limited, and to how much."""
        for metric in Metric:
            limit = getattr(self, metric.name.lower())
            if limit is not None:
                yield metric, limit

    def __bool__(self) -> bool:
        return any(value is not None for value in self.values())

    def wider_than(self, other: "Limits") -> str | None:
        """The first limit of `other` that these lift or raise, by its name."""
        for metric, limit in other:
            name = metric.name.lower()
            own: int | None = getattr(self, name)
            if own is None or own > limit:
                return name
        return None

    def check(self) -> "Limits":
        """These limits. Raises InvalidRequest for one that nobody can count."""
        for metric, limit in self:
            if not 0 <= limit <= MAX_LIMIT:
                name = metric.name.lower()
                raise refusal(InvalidRequest, f"{name} must be from 0 to {MAX_LIMIT}", f"limits.{name}")
        return self


FIELDS = tuple(field.name for field in dataclasses.fields(Limits))
"""Names of the limits: fields of the message, columns of the table, members of Metric in lower case."""


@dataclass(frozen=True, slots=True)
class SubjectLimits:
    """Whose limits they are: `key:UUID`, `user:UUID` or `organisation:UUID`."""

    subject: str
    limits: Limits

    @classmethod
    def of(cls, message: Any) -> "SubjectLimits":
        """Reads a `helixflow.v1.SubjectLimits`."""
        return cls(message.subject, Limits.of(message.limits))

    def message(self) -> Any:
        """A `helixflow.v1.SubjectLimits`."""
        from helixflow.rpc import messages  # noqa: PLC0415 - the counting itself needs no protobuf

        return messages.SubjectLimits(subject=self.subject, limits=self.limits.message())


@dataclass(frozen=True, slots=True)
class Price:
    """What a model's tokens cost, in nano currency units each."""

    model: str
    prompt: int
    cached: int
    completion: int

    @classmethod
    def of(cls, message: Any) -> "Price":
        """Reads a `helixflow.v1.Price`; what it leaves out is free."""
        return cls(message.model, message.prompt, message.cached, message.completion)

    @classmethod
    def whole(cls, message: Any) -> "Price":
        """As `of`. Raises InvalidRequest when something is left out: nothing becomes free by being forgotten."""
        for name in ("prompt", "cached", "completion"):
            if not message.HasField(name):
                raise refusal(InvalidRequest, f"price.{name} is required, in nano units per token", f"price.{name}")
        return cls.of(message)

    def message(self) -> Any:
        """A `helixflow.v1.Price`."""
        from helixflow.rpc import messages  # noqa: PLC0415 - the counting itself needs no protobuf

        return messages.Price(model=self.model, prompt=self.prompt, cached=self.cached, completion=self.completion)


def window_start(metric: Metric, now: float) -> int:
    """Start of the window that `now` lies in, both in seconds since the epoch; 0 for concurrent requests."""
    second = int(now)
    if metric <= Metric.TOKENS_PER_MINUTE:
        return second - second % MINUTE_S
    if metric is Metric.CONCURRENT_REQUESTS:
        return 0
    if metric in (Metric.TOKENS_PER_DAY, Metric.COST_PER_DAY):
        return second - second % DAY_S
    moment = datetime.fromtimestamp(second, UTC)
    return int(datetime(moment.year, moment.month, 1, tzinfo=UTC).timestamp())


def window_end(metric: Metric, start: int) -> float:
    """End of a window (seconds since the epoch), the first moment outside; infinity for concurrent requests."""
    if metric <= Metric.TOKENS_PER_MINUTE:
        return start + MINUTE_S
    if metric is Metric.CONCURRENT_REQUESTS:
        return float("inf")
    if metric in (Metric.TOKENS_PER_DAY, Metric.COST_PER_DAY):
        return start + DAY_S
    moment = datetime.fromtimestamp(start, UTC)
    year, month = divmod(moment.year * 12 + moment.month, 12)
    return int(datetime(year, month + 1, 1, tzinfo=UTC).timestamp())
