"""What a worker remembers of credentials: fresh, stale, doubtful, refused, and what makes it forget."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from helixflow.auth.keys import make, presented
from helixflow.config import Config, load
from helixflow.core_rs import CoreError, InvalidApiKey, InvalidToken, RateLimitExceeded, Unavailable
from helixflow.gateway import credentials
from helixflow.gateway.credentials import Credentials
from helixflow.refusals import refusal
from helixflow.rpc import messages

KEY = make().encode()
OTHER = make().encode()
ADDRESS = "192.0.2.1"
KEY_ID, USER_ID, ORGANISATION_ID = (str(uuid.UUID(int=number)) for number in (1, 2, 3))


@dataclass
class Script:
    """The auth-service as the test wants it."""

    known: dict[bytes, Any] = field(default_factory=dict)
    asked: list[bytes] = field(default_factory=list)
    away: bool = False
    gate: asyncio.Event | None = None
    events: "asyncio.Queue[Any]" = field(default_factory=asyncio.Queue)

    def add(self, secret: bytes, **values: Any) -> None:
        fields = {"key": "ci", "key_id": KEY_ID, "user_id": USER_ID, "organisation_id": ORGANISATION_ID}
        self.known[presented(secret)] = messages.Principal(**{**fields, **values})

    async def call(self, method: str, request: Any, **_options: Any) -> Any:
        assert method == "AuthService/Verify"
        asked = request.key_digest or request.access_token.encode()
        self.asked.append(asked)
        answer = self.known.get(asked)
        if self.gate is not None:
            await self.gate.wait()
        if self.away:
            raise refusal(Unavailable, "away")
        if answer is None:
            raise refusal(InvalidToken if request.access_token else InvalidApiKey, "no")
        return answer

    async def stream(self, _method: str, _request: Any) -> AsyncIterator[Any]:
        while True:
            event = await self.events.get()
            if isinstance(event, CoreError):
                raise event
            yield event


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Case = Callable[[Script, Credentials, Clock], Awaitable[None]]


def check(case: Case, **options: str) -> None:
    """Runs a case on a loop of its own."""

    async def run() -> None:
        script, clock = Script(), Clock()
        environ = {"HELIX_GATEWAY_KEY_CACHE_S": "60", "HELIX_GATEWAY_KEY_GRACE_S": "3600", **options}
        config: Config = load(None, environ)
        store = Credentials(script, config, str(uuid.uuid4()), clock)  # type: ignore[arg-type]
        await case(script, store, clock)

    asyncio.run(run())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_key_is_asked_for_once() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        assert store.known(KEY) is None
        assert (await store.verify(KEY, ADDRESS)).name == "ci"
        clock.now += 59
        known = store.known(KEY)
        assert known is not None
        assert known.key_id == KEY_ID
        assert script.asked == [presented(KEY)]

    check(case)


def test_many_at_once_share_one_question() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        script.gate = asyncio.Event()
        waiting = [asyncio.ensure_future(store.verify(KEY, ADDRESS)) for _ in range(20)]
        await settle()
        script.gate.set()
        assert {principal.name for principal in await asyncio.gather(*waiting)} == {"ci"}
        assert len(script.asked) == 1

    check(case)


def test_what_cannot_be_a_key_is_not_asked_for() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        for wrong in (
            b"demo-key",
            b"sk-123",
            b"hf-",
            KEY[:-1],
            KEY[:-1] + b"!",
            KEY + b"a",
            b"hf-" + b"0" * 49,
            b"\xff",
        ):
            with pytest.raises(InvalidApiKey):
                await store.verify(wrong, ADDRESS)
        assert script.asked == []

    check(case)


def test_an_unknown_key_is_refused_from_memory_for_a_while() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        for _ in range(3):
            with pytest.raises(InvalidApiKey):
                await store.verify(KEY, ADDRESS)
        assert len(script.asked) == 1
        clock.now += 5.1
        script.add(KEY)
        assert (await store.verify(KEY, ADDRESS)).name == "ci"

    check(case)


def test_refusals_do_not_crowd_out_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "UNKNOWN_SIZE", 10)

    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        await store.verify(KEY, ADDRESS)
        for number in range(200):
            with pytest.raises(InvalidApiKey):
                await store.verify(make().encode(), f"192.0.2.{number}")
        assert store.known(KEY) is not None
        assert store.remembered == 1
        assert len(store._unknown) == 10

    check(case, HELIX_GATEWAY_KEY_CACHE_SIZE="100")


def test_a_stale_key_is_served_while_it_is_asked_for_again() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        await store.verify(KEY, ADDRESS)
        clock.now += 61
        assert store.known(KEY) is None
        script.add(KEY, key="renamed")
        assert (await store.verify(KEY, ADDRESS)).name == "ci"
        await settle()
        known = store.known(KEY)
        assert known is not None
        assert known.name == "renamed"

    check(case)


def test_a_known_key_goes_on_within_the_grace_time_and_no_longer() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        await store.verify(KEY, ADDRESS)
        script.away = True
        clock.now += 3599
        assert (await store.verify(KEY, ADDRESS)).name == "ci"
        await settle()
        assert store.served_from_grace == 1
        clock.now += 2
        with pytest.raises(Unavailable):
            await store.verify(KEY, ADDRESS)

    check(case)


def test_an_unknown_key_is_not_served_while_nobody_can_tell() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        script.away = True
        with pytest.raises(Unavailable):
            await store.verify(KEY, ADDRESS)
        script.away = False
        assert (await store.verify(KEY, ADDRESS)).name == "ci", "the failure is not remembered as a refusal"

    check(case)


PARENT_ID, PARENTS_USER_ID = str(uuid.UUID(int=5)), str(uuid.UUID(int=6))


@pytest.mark.parametrize(
    ("kind", "identifier"),
    [
        *(("key", KEY_ID), ("user", USER_ID), ("organisation", ORGANISATION_ID)),
        # Of the key that made it.
        *(("key", PARENT_ID), ("user", PARENTS_USER_ID)),
    ],
)
def test_a_change_is_heard(kind: str, identifier: str) -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY, depends_on=[f"key:{PARENT_ID}", f"user:{PARENTS_USER_ID}"])
        script.add(
            OTHER, key_id=str(uuid.UUID(int=9)), user_id=str(uuid.UUID(int=8)), organisation_id=str(uuid.UUID(int=7))
        )
        watching = asyncio.ensure_future(store.watch())
        await script.events.put(messages.Event(resync=True))
        await settle()
        assert store.listening
        await store.verify(KEY, ADDRESS)
        await store.verify(OTHER, ADDRESS)
        script.known.clear()
        await script.events.put(messages.Event(**{kind: identifier}))
        await settle()
        assert store.known(KEY) is None
        assert store.known(OTHER) is not None
        with pytest.raises(InvalidApiKey):
            await store.verify(KEY, ADDRESS)
        watching.cancel()

    check(case)


def test_an_answer_from_before_a_change_is_not_remembered() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        script.gate = asyncio.Event()
        asking = asyncio.ensure_future(store.verify(KEY, ADDRESS))
        await settle()
        store.changed("key", KEY_ID)
        script.gate.set()
        await asking
        assert store.known(KEY) is None

    check(case)


def test_after_a_gap_everything_is_confirmed_before_it_is_served() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        script.add(OTHER)
        await store.verify(KEY, ADDRESS)
        await store.verify(OTHER, ADDRESS)
        del script.known[presented(KEY)]
        store.doubt()
        assert store.known(OTHER) is None
        with pytest.raises(InvalidApiKey):
            await store.verify(KEY, ADDRESS)
        assert (await store.verify(OTHER, ADDRESS)).name == "ci"
        assert store.known(OTHER) is not None

    check(case)


def test_after_a_gap_memory_counts_when_nobody_answers() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        await store.verify(KEY, ADDRESS)
        store.doubt()
        script.away = True
        for _ in range(5):
            assert (await store.verify(KEY, ADDRESS)).name == "ci"
        assert len(script.asked) == 2, "after a failure nobody waits for another question for a second"
        assert store.served_from_grace == 5

    check(case)


def test_one_request_waits_for_a_service_that_hangs_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "RECHECK_S", 0.01)

    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        await store.verify(KEY, ADDRESS)
        store.doubt()
        script.gate = asyncio.Event()
        assert (await store.verify(KEY, ADDRESS)).name == "ci"
        monkeypatch.setattr(credentials, "RECHECK_S", 1000.0)
        for _ in range(3):
            clock.now += 1.1
            assert (await store.verify(KEY, ADDRESS)).name == "ci"
        script.gate.set()
        await settle()
        assert store.known(KEY) is not None, "the answer came at last"

    check(case)


def test_prices_are_asked_for_after_gaps_and_changes() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        told = []
        store.on_prices = lambda: told.append(True)
        watching = asyncio.ensure_future(store.watch())
        await script.events.put(messages.Event(resync=True))
        await script.events.put(messages.Event(prices=True))
        await settle()
        assert len(told) == 2
        watching.cancel()

    check(case)


def test_an_expired_credential_is_refused_without_a_question() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY, expires_at=1)
        with pytest.raises(InvalidApiKey):
            await store.verify(KEY, ADDRESS)
        assert store.known(KEY) is None

    check(case)


def test_access_tokens_are_told_from_keys() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.known[b"a.b.c"] = messages.Principal(user="ada@example.com", session_id=KEY_ID)
        assert (await store.verify(b"a.b.c", ADDRESS)).name == "ada@example.com"
        store.changed("session", KEY_ID)
        assert store.known(b"a.b.c") is None
        with pytest.raises(InvalidToken):
            await store.verify(b"a.b.d", ADDRESS)

    check(case)


def test_the_public_key_is_asked_for_in_development_only() -> None:
    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(b"demo-key")
        assert (await store.verify(b"demo-key", ADDRESS)).name == "ci"

    check(case, HELIX_PROFILE="development")


def test_an_address_cannot_have_more_unknown_keys_checked_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "UNKNOWN_BURST", 20)

    async def junk(store: Credentials, address: str, count: int) -> list[str]:
        """Keys that nobody issued, with right checksums, and tokens under invented names of keys."""
        made = [make().encode() if number % 2 else f"a.{number}.c".encode() for number in range(count)]
        outcomes = await asyncio.gather(*(store.verify(key, address) for key in made), return_exceptions=True)
        return [type(outcome).__name__ for outcome in outcomes]

    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        script.add(KEY)
        script.add(OTHER)
        await store.verify(KEY, ADDRESS)
        refused = make().encode()
        with pytest.raises(InvalidApiKey):
            await store.verify(refused, "192.0.2.2")
        script.asked.clear()
        found = await junk(store, ADDRESS, 1000)
        assert len(script.asked) == 20
        assert (found.count("RateLimitExceeded"), found.count("InvalidApiKey")) == (980, 10)
        # Who is known is served from there, others are served and remembered as before.
        assert (await store.verify(KEY, ADDRESS)).name == "ci"
        assert (await store.verify(OTHER, "192.0.2.2")).name == "ci"
        with pytest.raises(InvalidApiKey):
            await store.verify(refused, "192.0.2.2")
        assert len(script.asked) == 21
        # The rest of the budget comes back, a key at a time: 600 a minute are 10 a second.
        clock.now += 0.5
        script.asked.clear()
        for _ in range(5):
            with pytest.raises(InvalidApiKey):
                await store.verify(make().encode(), ADDRESS)
        with pytest.raises(RateLimitExceeded) as caught:
            await store.verify(make().encode(), ADDRESS)
        assert (caught.value.http_status, caught.value.retry_after_s, len(script.asked)) == (429, 1, 5)

    check(case)


def test_one_ipv6_network_is_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "UNKNOWN_BURST", 3)

    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        for number in range(3):
            with pytest.raises(InvalidApiKey):
                await store.verify(make().encode(), f"2001:db8:0:1:{number}::1")
        with pytest.raises(RateLimitExceeded):
            await store.verify(make().encode(), "2001:db8:0:1::ffff")
        with pytest.raises(InvalidApiKey):
            await store.verify(make().encode(), "2001:db8:0:2::1")

    check(case)


def test_keys_that_exist_cost_nothing_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "UNKNOWN_BURST", 2)

    async def case(script: Script, store: Credentials, clock: Clock) -> None:
        keys = [make().encode() for _ in range(20)]
        for key in keys:
            script.add(key)
            assert (await store.verify(key, ADDRESS)).name == "ci"
        # Nor does a question that nobody answers.
        script.away = True
        for _ in range(5):
            with pytest.raises(Unavailable):
                await store.verify(make().encode(), ADDRESS)

    check(case)
