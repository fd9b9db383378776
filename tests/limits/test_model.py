"""Windows, and limits as messages."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core_rs import InvalidRequest
from helixflow.limits.model import FIELDS, MAX_LIMIT, Limits, Metric, Price, SubjectLimits, window_end, window_start
from helixflow.limits.refusals import duration
from helixflow.rpc import messages

from .support import KEY


@given(st.sampled_from(list(Metric)), st.floats(0, 4e9))
def test_windows_follow_each_other(metric: Metric, now: float) -> None:
    start = window_start(metric, now)
    end = window_end(metric, start)
    assert start <= now < end
    if metric is not Metric.CONCURRENT_REQUESTS:
        assert window_start(metric, end) == end
        assert window_start(metric, end - 0.001) == start


@pytest.mark.parametrize(
    ("moment", "start", "end"),
    [
        ((2028, 2, 29, 23, 59, 59), (2028, 2, 1), (2028, 3, 1)),
        ((2027, 12, 31, 12, 0, 0), (2027, 12, 1), (2028, 1, 1)),
        ((2027, 1, 1, 0, 0, 0), (2027, 1, 1), (2027, 2, 1)),
        ((2027, 11, 30, 1, 0, 0), (2027, 11, 1), (2027, 12, 1)),
    ],
)
def test_months(moment: tuple[int, ...], start: tuple[int, ...], end: tuple[int, ...]) -> None:
    now = datetime(*moment, tzinfo=UTC).timestamp()  # type: ignore[arg-type, misc]
    found = window_start(Metric.COST_PER_MONTH, now)
    assert datetime.fromtimestamp(found, UTC) == datetime(*start, tzinfo=UTC)  # type: ignore[arg-type, misc]
    assert datetime.fromtimestamp(window_end(Metric.COST_PER_MONTH, found), UTC) == datetime(*end, tzinfo=UTC)  # type: ignore[arg-type, misc]


def test_metrics_are_those_of_the_protocol() -> None:
    values = messages.LeaseItem.DESCRIPTOR.fields_by_name["metric"].enum_type.values_by_name
    assert {f"METRIC_{metric.name}": metric.value for metric in Metric} | {"METRIC_UNSPECIFIED": 0} == {
        name: value.number for name, value in values.items()
    }
    assert tuple(field.name for field in messages.Limits.DESCRIPTOR.fields) == FIELDS
    assert tuple(metric.name.lower() for metric in Metric) == FIELDS


@given(st.builds(Limits, **{name: st.none() | st.integers(0, MAX_LIMIT) for name in FIELDS}))
def test_limits_as_messages(limits: Limits) -> None:
    whole = SubjectLimits(KEY, limits.check())
    sent = messages.SubjectLimits.FromString(whole.message().SerializeToString())
    assert SubjectLimits.of(sent) == whole
    assert bool(limits) == bool(list(limits))
    assert (
        Limits.of_row({f"k_{name}": value for name, value in zip(FIELDS, limits.values(), strict=True)}, "k_") == limits
    )


def test_prices_as_messages() -> None:
    price = Price("gpt", 1, 2, 3)
    assert Price.of(price.message()) == price


@pytest.mark.parametrize("value", [-1, MAX_LIMIT + 1])
def test_limits_that_nobody_can_count(value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"cost_per_day must be from 0 to {MAX_LIMIT}") as caught:
        Limits(cost_per_day=value).check()
    assert caught.value.param == "limits.cost_per_day"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (1, 59, 60, 360, 7205)] == ["1s", "59s", "1m0s", "6m0s", "2h0m5s"]
