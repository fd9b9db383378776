"""What a client is told about limits: refusals and headers."""

import math

from helixflow.core_rs import CoreError, InsufficientQuota, RateLimitExceeded
from helixflow.limits.counters import Counter, Plan, narrowest
from helixflow.limits.model import Metric
from helixflow.refusals import refusal

_SCOPES = {"key": "this API key", "user": "this user", "organisation": "this organisation"}
_UNITS = {
    Metric.REQUESTS_PER_MINUTE: "requests per minute",
    Metric.TOKENS_PER_MINUTE: "tokens per minute",
    Metric.CONCURRENT_REQUESTS: "requests at a time",
    Metric.TOKENS_PER_DAY: "tokens per day",
    Metric.TOKENS_PER_MONTH: "tokens per month",
    Metric.COST_PER_DAY: "per day (budget, in currency units)",
    Metric.COST_PER_MONTH: "per month (budget, in currency units)",
}
_TOKENS = (Metric.TOKENS_PER_MINUTE, Metric.TOKENS_PER_DAY, Metric.TOKENS_PER_MONTH)


def exhausted(counter: Counter, amount: int, now: float) -> CoreError:
    """The refusal when a limit leaves too little for `amount`."""
    seconds = 1 if counter.metric is Metric.CONCURRENT_REQUESTS else max(1, math.ceil(counter.end - now))
    left = counter.hand + max(0, counter.room)
    kind = InsufficientQuota if counter.metric.budget else RateLimitExceeded
    error = refusal(
        kind,
        f"the limit of {_limit(counter)} of {_scope(counter)} is reached: the request needs "
        f"{_amount(counter, amount)}, {_amount(counter, min(left, amount))} left; try again in {duration(seconds)}",
    )
    error.retry_after_s = seconds
    return error


def impossible(counter: Counter, amount: int) -> InsufficientQuota:
    """The refusal of a request that is larger than a limit."""
    advice = "ask for fewer tokens (max_tokens), or have the limit raised" if counter.limit else "have the limit raised"
    return refusal(
        InsufficientQuota,
        f"the request needs {_amount(counter, amount)}, but the limit of {_scope(counter)} is {_limit(counter)}: "
        f"it can never be admitted; {advice}",
        "max_tokens" if counter.metric in _TOKENS and counter.limit else None,
    )


def headers(plan: Plan, now: float) -> list[tuple[bytes, bytes]]:
    """The x-ratelimit-* headers of the OpenAI API, from the narrowest limits per minute. Empty without such limits."""
    found: list[tuple[bytes, bytes]] = []
    seconds = duration(max(1, math.ceil(plan.until - now))).encode()
    for name, counters in ((b"requests", plan.requests), (b"tokens", plan.tokens)):
        counter = narrowest(counters)
        if counter is not None:
            found += (
                (b"x-ratelimit-limit-" + name, b"%d" % counter.limit),
                (b"x-ratelimit-remaining-" + name, b"%d" % counter.left),
                (b"x-ratelimit-reset-" + name, seconds),
            )
    return found


def duration(seconds: int) -> str:
    """A span as the OpenAI API writes it: 1s, 6m0s, 2h0m0s."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _scope(counter: Counter) -> str:
    return _SCOPES.get(counter.subject.partition(":")[0], counter.subject)


def _limit(counter: Counter) -> str:
    return f"{_amount(counter, counter.limit)} {_UNITS[counter.metric]}"


def _amount(counter: Counter, amount: int) -> str:
    if counter.metric in (Metric.COST_PER_DAY, Metric.COST_PER_MONTH):
        return f"{amount / 1e9:,.9f}".rstrip("0").rstrip(".")
    return f"{amount:,}"
