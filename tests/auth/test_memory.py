"""What the auth-service remembers of keys for the time when its database is away."""

import time
import uuid
from dataclasses import replace
from typing import Any

import pytest

from helixflow.auth import memory as remembering
from helixflow.auth.events import RESYNC
from helixflow.auth.memory import Memory
from helixflow.auth.principals import Principal
from helixflow.auth.records import Content

KEY, USER, ORGANISATION = (uuid.UUID(int=number) for number in (1, 2, 3))
FOUND = Principal(
    organisation_id=ORGANISATION,
    organisation="default",
    user_id=USER,
    user="ada@example.com",
    role="member",
    expires_at=0,
    content=Content(False, 0, []),
    key_id=KEY,
    key="ci",
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def memory(**options: Any) -> tuple[Memory, Clock]:
    clock = Clock()
    return Memory(3600, clock=clock, **options), clock


def test_a_key_is_known_for_the_grace_time_and_its_age_is_told() -> None:
    made, clock = memory()
    made.keep(b"a", FOUND, made.generation)
    assert made.find(b"a") == (FOUND, 0.0)
    assert made.find(b"b") is None
    clock.now += 3600
    assert made.find(b"a") == (FOUND, 3600.0)
    clock.now += 1
    assert made.find(b"a") is None
    made.keep(b"a", FOUND, made.generation)
    assert made.find(b"a") == (FOUND, 0.0), "the database has confirmed it"


def test_an_expired_key_is_not_known() -> None:
    made, _ = memory()
    made.keep(b"a", replace(FOUND, expires_at=int(time.time()) - 1), made.generation)
    assert made.find(b"a") is None


PARENT, PARENTS_USER = f"key:{uuid.UUID(int=4)}", f"user:{uuid.UUID(int=5)}"


@pytest.mark.parametrize(
    "event", [f"key:{KEY}", f"user:{USER}", f"organisation:{ORGANISATION}", PARENT, PARENTS_USER, RESYNC]
)
def test_a_change_is_forgotten_at_once(event: str) -> None:
    made, _ = memory()
    made.keep(b"a", replace(FOUND, depends_on=(PARENT, PARENTS_USER)), made.generation)
    key, user, organisation = (uuid.UUID(int=number) for number in (7, 8, 9))
    other = replace(FOUND, key_id=key, user_id=user, organisation_id=organisation)
    made.keep(b"b", other, made.generation)
    made.hear(event)
    assert made.find(b"a") is None
    assert (made.find(b"b") is None) == (event == RESYNC)


def test_what_was_read_before_a_change_is_not_kept_after_it() -> None:
    made, _ = memory()
    before = made.generation
    made.hear(f"key:{KEY}")
    made.keep(b"a", FOUND, before)
    assert made.find(b"a") is None


def test_memory_is_bounded() -> None:
    made, _ = memory(size=3)
    for number in range(5):
        made.keep(bytes([number]), FOUND, made.generation)
    assert [number for number in range(5) if made.find(bytes([number]))] == [2, 3, 4]
    made.hear(f"key:{KEY}")
    assert not any(made.find(bytes([number])) for number in range(5))


def test_a_refusal_is_remembered_for_a_while_and_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, clock = memory()
    made.refuse(b"a", made.generation)
    assert made.refused(b"a")
    assert not made.refused(b"b")
    clock.now += 60
    assert not made.refused(b"a")
    for event in (f"key:{KEY}", f"user:{USER}", f"organisation:{ORGANISATION}", RESYNC):
        made.refuse(b"a", made.generation)
        before = made.generation
        made.hear(event)
        assert not made.refused(b"a")
        made.refuse(b"a", before)
        assert not made.refused(b"a"), "it was read before the change"
    monkeypatch.setattr(remembering, "REFUSED_SIZE", 3)
    made.keep(b"good", FOUND, made.generation)
    for number in range(10):
        made.refuse(bytes([number]), made.generation)
    assert [number for number in range(10) if made.refused(bytes([number]))] == [7, 8, 9]
    assert made.find(b"good") is not None
