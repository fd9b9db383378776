"""Who counts as one client, and what each may ask in vain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.addresses import Budget, network


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("no address", "no address"),
        ("x" * 5000, "x" * 100),
    ],
)
def test_what_stands_for_a_client(address: str, client: str) -> None:
    assert network(address) == client


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.integers(1, 10), st.floats(0.1, 20))
def test_no_client_takes_more_than_burst_and_rate_allow(pauses: list[float], burst: int, per_s: float) -> None:
    clock = Clock()
    budget = Budget(burst, per_s, clock=clock)
    began, taken = clock.now, 0
    for pause in pauses:
        clock.now += pause
        wait_s = budget.take("192.0.2.1")
        taken += not wait_s
        if wait_s:
            clock.now += wait_s + 1e-6
            assert not budget.take("192.0.2.1"), "the time that was named is enough"
            taken += 1
    assert taken <= burst + (clock.now - began) * per_s + 1e-3


def test_what_was_not_in_vain_is_given_back() -> None:
    clock = Clock()
    budget = Budget(2, 1, clock=clock)
    for _ in range(10):
        assert not budget.take("192.0.2.1")
        budget.give_back("192.0.2.1")
    assert [bool(budget.take("192.0.2.1")) for _ in range(3)] == [False, False, True]
    assert not budget.take("192.0.2.2")


def test_memory_is_bounded() -> None:
    budget = Budget(5, 0.001, size=100, clock=Clock())
    for number in range(10_000):
        budget.take(f"10.0.{number // 256}.{number % 256}")
    assert len(budget._spent) == 100
