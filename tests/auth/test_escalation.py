"""No sequence of calls gives anybody more than they had who began it: over the handlers, and over the rules alone."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.auth import principals, roles
from helixflow.auth.keys import presented
from helixflow.auth.principals import Principal
from helixflow.auth.roles import METHODS, Ceiling, Power, Role, Setter
from helixflow.core_rs import Conflict, InvalidApiKey, InvalidRequest, InvalidToken, NotFound, PermissionDenied
from helixflow.db.target import Target
from helixflow.limits.model import Limits
from helixflow.pki.layout import Layout

from .office import GATEWAY, Office, office
from .support import PASSWORD, SECRET, run

REFUSED = (Conflict, InvalidApiKey, InvalidRequest, InvalidToken, NotFound, PermissionDenied)
SOON_S = 3600

# --- over the handlers -------------------------------------------------------------------


@dataclass
class Attack:
    """Credentials that somebody has, and what they try with them."""

    o: Office
    shown: list[dict[str, str]]
    """Each as an Actor carries it."""
    secrets: list[str] = field(default_factory=list)
    """Of keys among them, in the order in which they were got."""
    people: list[str] = field(default_factory=list)
    """UUIDs of users whose password they got."""

    async def act(self, who: int, what: int, about: int, how: int) -> None:
        users = [str(row["id"]) for row in await self.o.w.rows("SELECT id FROM users ORDER BY created_at, id")]
        keys = [str(row["id"]) for row in await self.o.w.rows("SELECT id FROM api_keys ORDER BY created_at, id")]
        user, key = users[about % len(users)], keys[about % len(keys)]
        later = (0, int(time.time()) + 10 * SOON_S)[how % 2]
        calls: list[tuple[str, dict[str, Any]]] = [
            ("CreateUser", {"email": f"{uuid4()}@example.com", "role": list(Role)[how % 4].word}),
            ("CreateUser", {"email": f"s{uuid4().hex}", "role": list(Role)[how % 4].word, "service_account": True}),
            ("UpdateUser", {"user": user, "role": list(Role)[how % 4].word}),
            ("UpdateUser", {"user": user, "disabled": False}),
            ("ResetPassword", {"user": user}),
            ("CreateKey", {"user": user, "name": "k", "expires_at": later, "admin": how % 4 > 1}),
            ("CreateKey", {"name": "k", "models": ["m", "other"][: how % 3]}),
            ("UpdateKey", {"key": key, "expires_at": later}),
            ("UpdateKey", {"key": key, "models": {}, "endpoints": {}}),
            ("UpdateKey", {"key": key, "admin": True}),
            ("RotateKey", {"key": key, "overlap_s": 60}),
            ("SetLimits", {"subject": f"key:{key}", "limits": [{}, {"tokens_per_day": 10**9}][how % 2]}),
            ("SetLimits", {"subject": f"user:{user}", "limits": [{}, {"tokens_per_day": 10**9}][how % 2]}),
            ("SetPrice", {"price": {"model": "m", "prompt": 0, "cached": 0, "completion": 0}}),
        ]
        method, values = calls[what % len(calls)]
        with contextlib.suppress(*REFUSED):
            self.take(await self.o._call(method, GATEWAY, self.shown[who % len(self.shown)], values))

    def take(self, answer: Any) -> None:
        """Keeps what an answer gives away."""
        if secret := getattr(answer, "secret", ""):
            self.secrets.append(secret)
            self.shown.append({"key_digest": presented(secret.encode()).hex()})
        if getattr(answer, "one_time_password", ""):
            self.people.append(answer.user.id)


async def _alive(o: Office, secret: str) -> Principal | None:
    async with o.w.pool.acquire() as connection:
        try:
            return await principals.by_key(connection, SECRET, presented(secret.encode()), development=False)
        except InvalidApiKey:
            return None


@dataclass(frozen=True)
class Others:
    """What there is, by UUID: role and whether it rests of a user, what a key may, limits of a subject."""

    users: dict[UUID, tuple[Role, bool]]
    keys: dict[UUID, Ceiling]
    limits: dict[str, Limits]
    password: dict[UUID, str | None]


async def others(o: Office) -> Others:
    return Others(
        {r["id"]: (Role[r["role"].upper()], r["disabled"]) for r in await o.w.rows("SELECT * FROM users")},
        {
            r["id"]: Ceiling.of(
                r["models"],
                r["endpoints"],
                int(r["expires_at"].timestamp()) if r["expires_at"] else 0,
                administers=r["role"] is not None,
            )
            for r in await o.w.rows("SELECT * FROM api_keys")
        },
        {r["subject"]: Limits.of_row(r) for r in await o.w.rows("SELECT * FROM limits")},
        {r["id"]: r["password"] for r in await o.w.rows("SELECT * FROM users")},
    )


def nobody_got_more(before: Others, after: Others, *, but: set[UUID] = frozenset()) -> None:  # type: ignore[assignment]
    """Nothing that was there has become more."""
    for user, (role, resting) in before.users.items():
        assert after.users[user][0] <= role or user in but
        assert after.users[user][1] >= resting or user in but
        assert after.password[user] == before.password[user] or user in but
    for key, ceiling in before.keys.items():
        # A rotation ends the old key sooner.
        assert ceiling.exceeded(after.keys[key]) is None, key
    for subject, limits in before.limits.items():
        assert after.limits.get(subject, Limits()).wider_than(limits) is None, subject


ACTS = st.lists(st.tuples(*[st.integers(0, 60)] * 4), min_size=4, max_size=14)
FEW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize(
    ("role", "wanted"),
    [
        ("owner", {"admin": True}),
        ("admin", {"admin": True, "expires_at": SOON_S}),
        ("member", {"admin": True, "expires_at": SOON_S}),
        ("owner", {"models": ("m",)}),
        ("admin", {}),
    ],
)
@FEW
@given(acts=ACTS)
def test_a_key_gets_nobody_more_and_all_it_got_ends_with_it(
    target: Target, pki: Layout, role: str, wanted: dict[str, Any], acts: list[tuple[int, int, int, int]]
) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            user = await o.w.user(f"{uuid4()}@example.com", role)
            values = {**wanted, **({"expires_at": int(time.time()) + SOON_S} if "expires_at" in wanted else {})}
            theirs, _ = await o.w.key(o.people["member"], "theirs", models=("m",))
            await o.operator("SetLimits", subject=f"key:{theirs}", limits={"tokens_per_day": 5})
            await o.operator("SetLimits", subject=f"user:{user}", limits={"tokens_per_day": 7})
            key, secret = await o.w.key(user, "stolen", **values)
            first = await _alive(o, secret)
            assert first is not None
            before = await others(o)
            attack = Attack(o, [{"key_digest": presented(secret.encode()).hex()}])
            for act in acts:
                await attack.act(*act)
            nobody_got_more(before, await others(o))
            assert not attack.people
            ceiling = Ceiling.of(first.models, first.endpoints, first.expires_at, administers=False)
            for found in filter(None, [await _alive(o, got) for got in attack.secrets]):
                assert found.administers == ""
                assert (
                    ceiling.exceeded(Ceiling.of(found.models, found.endpoints, found.expires_at, administers=False))
                    is None
                )
                assert {item.subject for item in found.limits} >= {item.subject for item in first.limits}
            await o.operator("RevokeKey", key=str(key))
            assert not any([await _alive(o, got) for got in attack.secrets])

    run(test())


@pytest.mark.parametrize("role", ["member", "admin"])
@FEW
@given(acts=ACTS)
def test_people_reach_those_below_them_alone(
    target: Target, pki: Layout, role: str, acts: list[tuple[int, int, int, int]]
) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            name = f"{uuid4()}@example.com"
            user = o.people[name] = await o.w.user(name, role)
            mine = await o.call(name, "CreateKey", name="mine")
            for subject in (f"user:{user}", f"key:{mine.key.id}"):
                await o.operator("SetLimits", subject=subject, limits={"tokens_per_day": 7})
            await o.w.key(o.people["owner"], "owner's")
            before = await others(o)
            attack = Attack(o, [{"access_token": await o.token(name)}])
            for act in acts:
                await attack.act(*act)
            after = await others(o)
            below = {each for each, (known, _) in before.users.items() if known < Role[role.upper()]}
            assert {UUID(person) for person in attack.people} & set(before.users) <= below
            for each, (known, _) in after.users.items():
                assert known < Role[role.upper()] or after.users[each] == before.users[each]
                assert each in below or each not in before.users or after.password[each] == before.password[each]
            held = {r["id"]: r["user_id"] for r in await o.w.rows("SELECT id, user_id FROM api_keys")}
            for key, ceiling in before.keys.items():
                assert held[key] in below | {user} or after.keys[key] == ceiling
            for found in filter(None, [await _alive(o, got) for got in attack.secrets]):
                assert found.user_id == user or found.user_id in below | (set(after.users) - set(before.users))
                assert not found.administers or Role[found.administers.upper()] <= Role[role.upper()]
            for subject in (f"user:{user}", f"key:{mine.key.id}"):
                assert after.limits[subject].wider_than(Limits(tokens_per_day=7)) is None
            assert PASSWORD not in str(attack.shown)

    run(test())


# --- over the rules alone ----------------------------------------------------------------

RANKS = st.sampled_from(Role)
CEILINGS = st.builds(
    Ceiling,
    st.frozensets(st.sampled_from("abc")),
    st.frozensets(st.sampled_from(["/x", "/y"])),
    st.integers(0, 3),
    st.booleans(),
)
LIMITS = st.builds(Limits, st.none() | st.integers(0, 3), st.none() | st.integers(0, 3))


@given(CEILINGS, CEILINGS, CEILINGS)
def test_ceilings_are_in_order(low: Ceiling, middle: Ceiling, high: Ceiling) -> None:
    assert low.exceeded(low) is None
    assert Ceiling(administers=True).exceeded(low) is None
    if high.exceeded(middle) is None and middle.exceeded(low) is None:
        assert high.exceeded(low) is None
    if low.exceeded(high) is None and high.exceeded(low) is None:
        assert low == high


@given(RANKS, RANKS, st.sampled_from(sorted(METHODS)), st.booleans(), st.booleans())
def test_a_higher_role_may_call_no_less_and_a_key_no_more(
    low: Role, high: Role, method: str, installation: bool, administers: bool
) -> None:
    low, high = sorted((low, high))
    person = Power(role=low, installation=installation)
    if roles.call(person, method) is None:
        assert roles.call(Power(role=high, installation=installation), method) is None
    key = Power(role=low, installation=installation, by_key=True, administers=administers)
    if roles.call(key, method) is None:
        assert roles.call(person, method) is None


@given(RANKS, RANKS, st.booleans(), CEILINGS, st.integers(0, 3))
def test_keys_do_no_more_than_their_holders(
    role: Role, other: Role, own: bool, wanted: Ceiling, expires_at: int
) -> None:
    person, key = Power(role=role), Power(role=role, by_key=True, expires_at=expires_at)
    rules: tuple[Callable[[Power], str | None], ...] = (
        lambda power: roles.person(power, other, own=own),
        lambda power: roles.secret(power, other, own=own),
        lambda power: roles.grant(power, other),
        lambda power: roles.joins(power, other, service=True),
        lambda power: roles.makes_key(power, other, wanted, own=own),
    )
    for rule in rules:
        if rule(key) is None:
            assert rule(person) is None
    if roles.makes_key(key, other, wanted, own=own) is None:
        assert not wanted.administers
        assert Ceiling(expires_at=expires_at).exceeded(wanted) is None
    if roles.person(key, other, own=own) is None:
        assert other < role


@given(
    st.sampled_from(["", "member", "admin", "owner", roles.OPERATOR]),
    LIMITS,
    st.lists(st.tuples(RANKS, st.booleans(), LIMITS), max_size=6),
)
def test_no_sequence_lifts_a_limit_that_was_set_above(
    rank: str, first: Limits, wishes: list[tuple[Role, bool, Limits]]
) -> None:
    """As SetLimits applies the rule: what may not be lifted stays its setter's when it is tightened."""
    highest = Role.parse(rank) or (Role.ADMIN if not rank else None)
    now, setter = first, Setter(rank)
    for role, by_key, wish in wishes:
        power = Power(role=role, by_key=by_key)
        if roles.sets_limits(power, setter, now, wish, own=False) is not None:
            continue
        if roles.sets_limits(power, setter, now, Limits(), own=False) is None:
            setter = Setter(role.word)
        now = wish
        if highest is not None and role >= highest and not by_key:
            return
    assert now.wider_than(first) is None
