"""API keys on the database: their life, their refusals, their rotation."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from helixflow.auth import api_keys, keys, organisations, principals, users
from helixflow.auth.api_keys import Changes, Wanted
from helixflow.auth.pepper import Pepper
from helixflow.core_rs import Conflict, InvalidApiKey, InvalidRequest
from helixflow.db.target import Target
from helixflow.limits import settings
from helixflow.limits.model import Limits
from helixflow.pki.layout import Layout

from .support import OPERATOR, OWNER, SECRET, World, run, world

NOW = datetime.now(UTC)


async def verify(w: World, secret: str, *, pepper: Pepper = SECRET, development: bool = False) -> Any:
    async with w.pool.acquire() as connection:
        return await principals.by_key(connection, pepper, keys.presented(secret.encode()), development=development)


def test_the_life_of_a_key(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            user = await w.user("ann@example.com", "viewer")
            expires = int((NOW + timedelta(days=30)).timestamp())
            key, secret = await w.key(user, "laptop", expires_at=expires, models=("a", "b", "a"), endpoints=("/v1/x",))
            seen = await verify(w, secret)
            assert (seen.key, seen.key_id, seen.user, seen.role) == ("laptop", key, "ann@example.com", "viewer")
            assert (seen.models, seen.endpoints, seen.expires_at) == (["a", "b"], ["/v1/x"], expires)
            assert (seen.organisation, seen.session_id, seen.limits) == ("default", None, ())
            (row,) = await w.rows("SELECT * FROM api_keys")
            assert row["digest"] == SECRET.key_digest(keys.presented(secret.encode()))
            assert row["prefix"] == secret[:9]
            everything = str(await w.rows("SELECT * FROM api_keys")) + str(await w.rows("SELECT * FROM audit_log"))
            assert secret not in everything
            changed = await w.do(
                api_keys.update,
                OPERATOR,
                SECRET,
                str(key),
                Changes(name="desk", expires_at=0, models=(), endpoints=("/v1/y",)),
            )
            assert (changed.name, changed.expires_at, changed.models, changed.endpoints) == ("desk", 0, [], ["/v1/y"])
            assert (await verify(w, secret)).expires_at == 0
            revoked = await w.do(api_keys.revoke, OPERATOR, str(key))
            assert revoked.revoked_at > 0
            assert await w.do(api_keys.revoke, OPERATOR, str(key)) == revoked
            with pytest.raises(InvalidApiKey, match="is not valid"):
                await verify(w, secret)
            with pytest.raises(Conflict, match="for good"):
                await w.do(api_keys.update, OPERATOR, SECRET, str(key), Changes(name="x"))
            with pytest.raises(Conflict, match="for good"):
                await w.do(api_keys.rotate, OPERATOR, SECRET, str(key), None)
            actions = [row["action"] for row in await w.rows("SELECT action FROM audit_log ORDER BY id")]
            assert actions[2:] == ["user.create", "key.create", "key.update", "key.revoke"]

    run(test())


@pytest.mark.parametrize("why", ["expired", "disabled", "deleted", "suspended", "pepper", "unknown", "development"])
def test_keys_that_are_refused(target: Target, pki: Layout, why: str) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            user = await w.user("ann@example.com")
            key, secret = await w.key(user)
            await verify(w, secret)
            pepper = SECRET
            if why == "expired":
                await w.value("UPDATE api_keys SET expires_at = now() WHERE id = $1", key)
            elif why == "disabled":
                await w.do(users.update, OPERATOR, "ann@example.com", None, True)
            elif why == "deleted":
                await w.do(users.delete, OPERATOR, "ann@example.com")
            elif why == "suspended":
                await w.do(organisations.update, OPERATOR, "default", None, True, None)
            elif why == "pepper":
                pepper = Pepper(b"\1" * 32)
            elif why == "unknown":
                secret = keys.make()
            else:
                await w.value("UPDATE api_keys SET development = true")
            with pytest.raises(InvalidApiKey) as caught:
                await verify(w, secret, pepper=pepper)
            assert str(caught.value.args[0]) == "the API key is not valid"
            if why == "development":
                await verify(w, secret, development=True)
            if why == "disabled":
                await w.do(users.update, OPERATOR, "ann@example.com", None, False)
                await verify(w, secret)

    run(test())


@pytest.mark.parametrize("presented", [b"", b"x" * 31, b"x" * 33, b"' OR '1'='1' --", b"\x00" * 32])
def test_digests_that_are_none(shared: Target, pki: Layout, presented: bytes) -> None:
    async def test() -> None:
        async with world(shared, pki) as w, w.pool.acquire() as connection:
            with pytest.raises(InvalidApiKey):
                await principals.by_key(connection, SECRET, presented, development=True)

    run(test())


def test_a_principal_has_the_limits_of_key_user_and_organisation(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            user = await w.user("ann@example.com")
            key, secret = await w.key(user)
            home = await w.value("SELECT id FROM organisations")
            for subject, limits in (
                (f"organisation:{home}", Limits(cost_per_month=1 << 52)),
                (f"key:{key}", Limits(requests_per_minute=5, tokens_per_day=0)),
                (f"user:{user}", Limits(concurrent_requests=2)),
                (f"user:{uuid4()}", Limits(concurrent_requests=3)),
            ):
                await w.do(settings.set_limits, subject, limits)
            seen = await verify(w, secret)
            assert [(item.subject, item.limits) for item in seen.limits] == [
                (f"key:{key}", Limits(requests_per_minute=5, tokens_per_day=0)),
                (f"user:{user}", Limits(concurrent_requests=2)),
                (f"organisation:{home}", Limits(cost_per_month=1 << 52)),
            ]
            issued = await w.do(w.sessions.begin, user, "password", "")
            async with w.pool.acquire() as connection:
                by_token = await principals.by_token(connection, w.signer, issued.access_token)
            assert [item.subject for item in by_token.limits] == [f"user:{user}", f"organisation:{home}"]

    run(test())


def test_rotation_with_an_overlap(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            user = await w.user("ann@example.com")
            key, old = await w.key(user, "bot", models=("m",), endpoints=("/v1/x",))
            await w.value(
                "UPDATE api_keys SET created_at = now() - interval '10 days', expires_at = now() + interval '20 days'"
            )
            made = await w.do(api_keys.rotate, OPERATOR, SECRET, str(key), 60)
            new = await verify(w, made.secret)
            assert (new.key, new.models, new.endpoints) == ("bot", ["m"], ["/v1/x"])
            # Another thirty days, as the old one had.
            assert new.expires_at == pytest.approx((datetime.now(UTC) + timedelta(days=30)).timestamp(), abs=30)
            both = await verify(w, old)
            assert both.expires_at == pytest.approx(datetime.now(UTC).timestamp() + 60, abs=30)
            assert await w.value("SELECT replaced_by FROM api_keys WHERE id = $1", key) == UUID(made.key.id)
            with pytest.raises(Conflict, match="was rotated before"):
                await w.do(api_keys.rotate, OPERATOR, SECRET, str(key), 60)
            # An overlap never makes a key live longer.
            await w.value("UPDATE api_keys SET expires_at = now() + interval '1 h' WHERE id = $1", UUID(made.key.id))
            await w.do(api_keys.rotate, OPERATOR, SECRET, made.key.id, 7200)
            assert await w.value(
                "SELECT expires_at < now() + interval '61 min' FROM api_keys WHERE id = $1", UUID(made.key.id)
            )

    run(test())


def test_rotation_without_an_overlap(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            key, old = await w.key(await w.user("ann@example.com"))
            made = await w.do(api_keys.rotate, OPERATOR, SECRET, str(key), 0)
            await verify(w, made.secret)
            with pytest.raises(InvalidApiKey):
                await verify(w, old)
            assert made.key.expires_at == 0
            with pytest.raises(InvalidRequest, match="overlap_s"):
                await w.do(api_keys.rotate, OPERATOR, SECRET, made.key.id, 10_000_000)
            await w.value("UPDATE api_keys SET expires_at = now() - interval '1 s'")
            with pytest.raises(Conflict, match="has expired"):
                await w.do(api_keys.rotate, OPERATOR, SECRET, made.key.id, None)
            await w.value("UPDATE api_keys SET expires_at = NULL, development = true")
            with pytest.raises(Conflict, match="is a fixed one"):
                await w.do(api_keys.rotate, OPERATOR, SECRET, made.key.id, None)

    run(test())


def test_of_rotations_at_once_one_makes_a_key(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            key, _ = await w.key(await w.user("ann@example.com"))
            rotations = (w.do(api_keys.rotate, OPERATOR, SECRET, str(key), 60) for _ in range(6))
            found = await asyncio.gather(*rotations, return_exceptions=True)
            assert sum(isinstance(item, api_keys.Created) for item in found) == 1
            assert sum(isinstance(item, Conflict) for item in found) == 5
            assert await w.value("SELECT count(*) FROM api_keys") == 2

    run(test())


def test_a_user_has_only_so_many_keys(target: Target, pki: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "MOST_KEYS", 3)

    async def test() -> None:
        async with world(target, pki) as w:
            user = await w.user("ann@example.com")
            found = await asyncio.gather(*(w.key(user) for _ in range(6)), return_exceptions=True)
            assert sum(isinstance(item, Conflict) for item in found) == 3
            (key, *_) = await w.rows("SELECT id FROM api_keys")
            await w.do(api_keys.revoke, OPERATOR, str(key["id"]))
            await w.key(user)

    run(test())


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": " \t "}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "line\nbreak"}, "name"),
        ({"name": "k", "expires_at": 1}, "expires_at"),
        ({"name": "k", "expires_at": 1 << 62}, "expires_at"),
        ({"name": "k", "models": ("",)}, "models[0]"),
        ({"name": "k", "models": tuple(map(str, range(101)))}, "models"),
        ({"name": "k", "endpoints": ("/v1", "v1")}, "endpoints[1]"),
        ({"name": "k", "models": ("a", "b\x00")}, "models[1]"),
    ],
)
def test_wrong_wishes_for_a_key(shared: Target, pki: Layout, wanted: dict[str, Any], param: str) -> None:
    async def test() -> None:
        async with world(shared, pki) as w:
            with pytest.raises(InvalidRequest) as caught:
                await w.do(api_keys.create, OPERATOR, SECRET, OWNER, Wanted(**wanted))
            assert caught.value.param == param
            with pytest.raises(InvalidRequest, match="name whose key"):
                await w.do(api_keys.create, OPERATOR, SECRET, "", Wanted("k"))

    run(test())
