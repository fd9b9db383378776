"""Keys under a ceiling: what a key may administer, what it makes, and what stays when something above it changes."""

import time
from typing import Any
from uuid import UUID

import pytest

from helixflow.auth import principals
from helixflow.auth.keys import presented
from helixflow.auth.roles import METHODS, Keys
from helixflow.core_rs import InvalidApiKey, InvalidRequest, NotFound, PermissionDenied
from helixflow.db.target import Target
from helixflow.limits.model import Limits
from helixflow.pki.layout import Layout

from .office import Office, arguments, office
from .support import SECRET, run

DAY_S = 86_400


async def seen(o: Office, secret: str) -> principals.Principal:
    async with o.w.pool.acquire() as connection:
        return await principals.by_key(connection, SECRET, presented(secret.encode()), development=False)


async def works(o: Office, secret: str) -> bool:
    try:
        await seen(o, secret)
    except InvalidApiKey:
        return False
    return True


# --- what is no key's --------------------------------------------------------------


@pytest.mark.parametrize("role", ["member", "admin", "owner"])
def test_a_new_key_is_for_inference_only(target: Target, pki: Layout, role: str) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            made = await o.call(role, "CreateKey", name="k")
            assert made.key.role == ""
            assert (await seen(o, made.secret)).administers == ""
            for method, rule in METHODS.items():
                if rule.keys is Keys.ITSELF:
                    continue
                with pytest.raises(PermissionDenied, match=r"administers nothing|no key may"):
                    await o.call("", method, by=made.secret, **arguments(o).get(method, {}))

    run(test())


def test_every_key_may_look_at_itself_and_end_itself(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            other = await o.call("member", "CreateKey", name="other")
            made = await o.call("member", "CreateKey", name="bound", models=["m"], limits={"tokens_per_day": 1})
            assert [key.id for key in (await o.call("", "ListKeys", by=made.secret)).data] == [made.key.id]
            await o.call("", "QueryUsage", by=made.secret, group_by=["key"])
            await o.call("", "ListPrices", by=made.secret)
            with pytest.raises(PermissionDenied, match="its own usage"):
                await o.call("", "QueryUsage", by=made.secret, key=other.key.id)
            with pytest.raises(PermissionDenied, match="your own usage"):
                await o.call("", "QueryUsage", by=made.secret, user="admin@example.com")
            with pytest.raises(NotFound):
                await o.call("", "RevokeKey", by=made.secret, key=other.key.id)
            await o.call("", "RevokeKey", by=made.secret, key=made.key.id)
            assert not await works(o, made.secret)
            assert await works(o, other.secret)

    run(test())


def test_administration_is_asked_for_and_is_no_more_than_the_holders(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            made = await o.call("admin", "CreateKey", name="k", admin=True)
            assert made.key.role == "admin"
            assert (await seen(o, made.secret)).administers == "admin"
            given = await o.call("admin", "CreateKey", name="k", user="member@example.com", admin=True)
            assert (await seen(o, given.secret)).administers == "member"
            # More of the holder is not more of the key; less is less.
            await o.operator("UpdateUser", user="member@example.com", role="owner")
            await o.operator("UpdateUser", user="admin@example.com", role="viewer")
            assert (await seen(o, given.secret)).administers == "member"
            assert (await seen(o, made.secret)).administers == "viewer"
            with pytest.raises(PermissionDenied, match="this needs the role admin"):
                await o.call("", "ListUsers", by=made.secret)
            changed = await o.operator("UpdateKey", key=given.key.id, admin=False)
            assert changed.role == ""
            assert (await seen(o, given.secret)).administers == ""
            assert (await o.operator("UpdateKey", key=given.key.id, admin=True)).role == "owner"

    run(test())


def test_a_bound_key_administers_nothing(target: Target, pki: Layout) -> None:
    bindings: tuple[dict[str, Any], ...] = (
        {"models": ["m"]},
        {"endpoints": ["/admin/v1/keys"]},
        {"limits": {"tokens_per_day": 1}},
    )

    async def test() -> None:
        async with office(target, pki) as o:
            for bound in bindings:
                with pytest.raises(InvalidRequest, match="bound to models") as caught:
                    await o.call("owner", "CreateKey", name="k", admin=True, **bound)
                assert caught.value.param == "admin"
                made = await o.call("owner", "CreateKey", name="k", **bound)
                with pytest.raises(InvalidRequest, match="bound to models"):
                    await o.call("owner", "UpdateKey", key=made.key.id, admin=True)
            # What is bound later rests until it is free again.
            made = await o.call("owner", "CreateKey", name="k", admin=True)
            about = {"UpdateKey": {"key": made.key.id}, "SetLimits": {"subject": f"key:{made.key.id}"}}
            changes: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
                ("UpdateKey", {"models": {"values": ["m"]}}, {"models": {}}),
                ("UpdateKey", {"endpoints": {"values": ["/admin/v1/users"]}}, {"endpoints": {}}),
                ("SetLimits", {"limits": {"tokens_per_day": 1}}, {"limits": {}}),
            )
            for method, bind, free in changes:
                await o.call("", "ListUsers", by=made.secret)
                await o.call("owner", method, **about[method], **bind)
                with pytest.raises(PermissionDenied, match="administers nothing"):
                    await o.call("", "ListUsers", by=made.secret)
                await o.call("owner", method, **about[method], **free)
            await o.call("", "ListUsers", by=made.secret)
            chat = await o.call("owner", "CreateKey", name="k", endpoints=["/v1/chat/completions"])
            with pytest.raises(PermissionDenied, match="leave administration out"):
                await o.call("", "ListKeys", by=chat.secret)

    run(test())


# --- what a key makes ----------------------------------------------------------------


def test_a_key_makes_keys_for_inference_that_end_with_it(target: Target, pki: Layout) -> None:
    """The attack: a key that expires made one that does not, and revoking it changed nothing."""

    async def test() -> None:
        async with office(target, pki) as o:
            ends = int(time.time()) + DAY_S
            parent = await o.call("admin", "CreateKey", name="parent", admin=True, expires_at=ends)
            child = await o.call("", "CreateKey", by=parent.secret, name="child", user="member@example.com")
            assert (child.key.parent_id, child.key.expires_at, child.key.role) == (parent.key.id, ends, "")
            for more in ({"admin": True}, {"expires_at": ends + 1}):
                with pytest.raises(PermissionDenied, match="more than it has"):
                    await o.call("", "CreateKey", by=parent.secret, name="more", **more)
            for key in (parent.key.id, child.key.id):
                for later in (0, ends + 1):
                    with pytest.raises(PermissionDenied, match="more than it has"):
                        await o.call("", "UpdateKey", by=parent.secret, key=key, expires_at=later)
                await o.call("", "UpdateKey", by=parent.secret, key=key, expires_at=ends - 60)
            with pytest.raises(PermissionDenied, match="more than it has"):
                await o.call("", "UpdateKey", by=parent.secret, key=child.key.id, admin=True)
            with pytest.raises(InvalidRequest, match="made by another"):
                await o.operator("UpdateKey", key=child.key.id, admin=True)
            # An end that comes sooner is the end of both, and one that goes away is not.
            await o.operator("UpdateKey", key=parent.key.id, expires_at=ends - 600)
            assert (await seen(o, child.secret)).expires_at == ends - 600
            listed = {key.id: key for key in (await o.operator("ListKeys")).data}
            assert listed[child.key.id].expires_at == ends - 600
            await o.operator("UpdateKey", key=parent.key.id, expires_at=0)
            assert (await seen(o, child.secret)).expires_at == ends - 60
            await o.operator("RevokeKey", key=parent.key.id)
            assert not await works(o, child.secret)
            listed = {key.id: key for key in (await o.operator("ListKeys")).data}
            assert listed[child.key.id].revoked_at > 0
            assert child.key.id in (await o.w.audited("key.revoke"))[-1]["detail"]

    run(test())


@pytest.mark.parametrize("how", ["disable", "delete", "expire"])
def test_a_child_ends_with_whoever_stands_behind_its_parent(target: Target, pki: Layout, how: str) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            parent = await o.call("admin", "CreateKey", name="parent", admin=True)
            child = await o.call("", "CreateKey", by=parent.secret, name="child", user="member@example.com")
            assert await works(o, child.secret)
            found = await seen(o, child.secret)
            assert set(found.depends_on) == {f"key:{parent.key.id}", f"user:{o.people['admin']}"}
            if how == "disable":
                await o.operator("UpdateUser", user="admin@example.com", disabled=True)
            elif how == "delete":
                await o.operator("DeleteUser", user="admin@example.com")
                assert await o.w.value("SELECT revoked_at IS NOT NULL FROM api_keys WHERE id = $1", UUID(child.key.id))
            else:
                await o.w.value("UPDATE api_keys SET expires_at = now() WHERE id = $1", UUID(parent.key.id))
            assert not await works(o, child.secret)

    run(test())


def test_what_binds_the_parent_binds_the_child(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            parent = await o.call("admin", "CreateKey", name="parent", admin=True)
            values: dict[str, Any] = {"name": "child", "user": "member@example.com", "models": ["a", "b"]}
            child = await o.call("", "CreateKey", by=parent.secret, **values)
            await o.operator("SetLimits", subject=f"key:{parent.key.id}", limits={"requests_per_minute": 1})
            await o.operator("SetLimits", subject=f"user:{o.people['admin']}", limits={"tokens_per_day": 2})
            await o.operator("SetLimits", subject=f"key:{child.key.id}", limits={"requests_per_minute": 9})
            await o.operator("SetLimits", subject=f"user:{o.people['member']}", limits={"tokens_per_day": 8})
            assert [(item.subject, item.limits) for item in (await seen(o, child.secret)).limits] == [
                (f"key:{child.key.id}", Limits(requests_per_minute=9)),
                (f"key:{parent.key.id}", Limits(requests_per_minute=1)),
                (f"user:{o.people['member']}", Limits(tokens_per_day=8)),
                (f"user:{o.people['admin']}", Limits(tokens_per_day=2)),
            ]
            await o.operator("UpdateKey", key=parent.key.id, models={"values": ["b", "c"]})
            assert (await seen(o, child.secret)).models == ["b"]
            await o.operator("UpdateKey", key=parent.key.id, endpoints={"values": ["/v1/x"]})
            assert (await seen(o, child.secret)).endpoints == ["/v1/x"]
            # Nothing in common: an empty list would be everything.
            await o.operator("UpdateKey", key=parent.key.id, models={"values": ["c"]})
            assert not await works(o, child.secret)

    run(test())


def test_rotation_keeps_the_family_together(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            ends = int(time.time()) + DAY_S
            old = await o.call("admin", "CreateKey", name="parent", admin=True, expires_at=ends)
            child = await o.call("", "CreateKey", by=old.secret, name="child", user="member@example.com")
            # A key replaces what it has made, not itself or others: whoever stole it would outlive it.
            person = await o.call("member", "CreateKey", name="person's")
            for key in (old.key.id, person.key.id):
                with pytest.raises(PermissionDenied, match="only keys that it has made"):
                    await o.call("", "RotateKey", by=old.secret, key=key)
            fresh = await o.call("", "RotateKey", by=old.secret, key=child.key.id, overlap_s=0)
            assert (fresh.key.parent_id, fresh.key.expires_at) == (old.key.id, child.key.expires_at)
            # By a person: the children go over to the new one.
            new = await o.call("admin", "RotateKey", key=old.key.id, overlap_s=0)
            assert new.key.role == "admin"
            assert not await works(o, old.secret)
            assert await works(o, fresh.secret)
            listed = {key.id: key for key in (await o.operator("ListKeys")).data}
            assert listed[fresh.key.id].parent_id == new.key.id
            await o.call("admin", "RevokeKey", key=new.key.id)
            assert not await works(o, fresh.secret)

    run(test())


# --- what a key only takes away --------------------------------------------------------


def test_a_key_gives_nobody_anything(target: Target, pki: Layout) -> None:
    """The attack: an admin's key made admins, and reset its owner's password."""

    async def test() -> None:
        async with office(target, pki) as o:
            admin = (await o.call("admin", "CreateKey", name="k", admin=True)).secret
            boss = (await o.call("owner", "CreateKey", name="k", admin=True)).secret
            await o.operator("UpdateUser", user="viewer@example.com", disabled=True)
            theirs = await o.call("member", "CreateKey", name="k", models=["m"], limits={"tokens_per_day": 5})
            wide = await o.call("member", "CreateKey", name="k", admin=True)
            refused: list[tuple[str, dict[str, Any]]] = [
                ("CreateUser", {"email": "p@example.com", "role": "viewer"}),
                ("CreateUser", {"email": "robot", "role": "owner", "service_account": True}),
                ("ResetPassword", {"user": "member@example.com"}),
                ("UnlockUser", {"user": "member@example.com"}),
                ("UpdateUser", {"user": "viewer@example.com", "role": "member"}),
                ("UpdateUser", {"user": "viewer@example.com", "disabled": False}),
                ("UpdateKey", {"key": theirs.key.id, "models": {}}),
                ("UpdateKey", {"key": theirs.key.id, "models": {"values": ["m", "n"]}}),
                ("UpdateKey", {"key": theirs.key.id, "admin": True}),
                ("UpdateKey", {"key": wide.key.id, "name": "x"}),
                ("RevokeKey", {"key": wide.key.id}),
                ("RotateKey", {"key": theirs.key.id}),
                ("SetLimits", {"subject": f"key:{theirs.key.id}", "limits": {}}),
                ("SetLimits", {"subject": f"key:{theirs.key.id}", "limits": {"tokens_per_day": 6}}),
                ("SetPrice", {"price": {"model": "m", "prompt": 0, "cached": 0, "completion": 0}}),
                ("DeletePrice", {"model": "m"}),
                ("CreateOrganisation", {"name": "n"}),
                ("UpdateOrganisation", {"organisation": "default", "content": {"store": True, "retention_days": 1}}),
            ]
            for secret, own in ((admin, "admin"), (boss, "owner")):
                themselves: list[tuple[str, dict[str, Any]]] = [
                    ("UpdateUser", {"user": f"{own}@example.com", "role": "viewer"}),
                    ("DeleteUser", {"user": f"{own}@example.com"}),
                    ("SetLimits", {"subject": f"user:{o.people[own]}", "limits": {"tokens_per_day": 1}}),
                    ("DeleteUser", {"user": "owner@localhost"}),
                ]
                for method, values in refused + themselves:
                    with pytest.raises(PermissionDenied):
                        await o.call("", method, by=secret, **values)
                made = await o.call("", "CreateUser", by=secret, email=own, role="member", service_account=True)
                assert made.one_time_password == ""
                await o.call("", "UpdateKey", by=secret, key=theirs.key.id, expires_at=int(time.time()) + 60)
                limits = {"tokens_per_day": 5, "requests_per_minute": 1}
                await o.call("", "SetLimits", by=secret, subject=f"key:{theirs.key.id}", limits=limits)
            await o.call("", "UpdateUser", by=admin, user="member@example.com", role="viewer", disabled=True)
            await o.call("", "RevokeKey", by=admin, key=theirs.key.id)
            await o.call("", "DeleteUser", by=boss, user="admin@example.com")
            with pytest.raises(InvalidApiKey):
                await o.call("", "ListUsers", by=admin)

    run(test())


def test_a_members_key_keeps_to_its_holder(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            key = (await o.call("member", "CreateKey", name="k", admin=True)).secret
            child = await o.call("", "CreateKey", by=key, name="child")
            assert child.key.user == "member@example.com"
            person = await o.call("member", "CreateKey", name="person's")
            listed = (await o.call("", "ListKeys", by=key)).data
            assert {item.name for item in listed} == {"k", "child", "person's"}
            await o.call("", "RevokeKey", by=key, key=person.key.id)
            with pytest.raises(PermissionDenied, match="your own keys only"):
                await o.call("", "CreateKey", by=key, name="x", user="viewer@example.com")
            theirs = await o.call("admin", "CreateKey", name="a")
            with pytest.raises(NotFound):
                await o.call("", "RevokeKey", by=key, key=theirs.key.id)

    run(test())


# --- limits --------------------------------------------------------------------------


def test_nobody_lifts_what_somebody_above_has_set_on_them(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            mine, first = f"user:{o.people['admin']}", f"user:{o.people['owner']}"
            key = f"key:{(await o.call('admin', 'CreateKey', name='k')).key.id}"
            wider: list[dict[str, Any]] = [{}, {"tokens_per_day": 11}, {"requests_per_minute": 1}]
            for subject in (mine, key):
                await o.call("owner", "SetLimits", subject=subject, limits={"tokens_per_day": 10})
                for limits in wider:
                    with pytest.raises(PermissionDenied, match="set by an owner") as caught:
                        await o.call("admin", "SetLimits", subject=subject, limits=limits)
                    assert caught.value.param == "limits"
                # Tighter is fine, and stays: who tightened what an owner set cannot undo it either.
                await o.call("admin", "SetLimits", subject=subject, limits={"tokens_per_day": 9})
                with pytest.raises(PermissionDenied):
                    await o.call("admin", "SetLimits", subject=subject, limits={"tokens_per_day": 10})
                await o.call("owner", "SetLimits", subject=subject, limits={})
                # What one has set oneself, one may lift.
                await o.call("admin", "SetLimits", subject=subject, limits={"tokens_per_day": 10})
                await o.call("admin", "SetLimits", subject=subject, limits={})
                # What was set before it was written down who did.
                await o.operator("SetLimits", subject=subject, limits={"tokens_per_day": 10})
                await o.w.value("UPDATE limits SET set_by = NULL, set_rank = NULL")
                with pytest.raises(PermissionDenied, match="somebody else has set"):
                    await o.call("admin", "SetLimits", subject=subject, limits={})
            await o.operator("SetLimits", subject=first, limits={"tokens_per_day": 10})
            with pytest.raises(PermissionDenied, match="set by the operator"):
                await o.call("owner", "SetLimits", subject=first, limits={})
            member = f"user:{o.people['member']}"
            await o.call("owner", "SetLimits", subject=member, limits={"tokens_per_day": 10})
            with pytest.raises(PermissionDenied, match="set by an owner"):
                await o.call("admin", "SetLimits", subject=member, limits={})
            await o.w.value("UPDATE limits SET set_by = NULL, set_rank = NULL")
            await o.call("admin", "SetLimits", subject=member, limits={})

    run(test())


# --- keys of the release before ----------------------------------------------------------


def test_keys_from_before_keep_working_and_those_that_administered_go_on(target: Target, pki: Layout) -> None:
    """The statement of the migration, over rows as the release before wrote them."""
    from helixflow.db import migrate

    (migration,) = [each for each in migrate.read() if each.name == "ceilings"]
    begin = migration.sql.index("UPDATE helixflow.api_keys k SET role")
    statement = migration.sql[begin : migration.sql.index(";", begin)]

    async def test() -> None:
        async with office(target, pki) as o:
            made: dict[str, tuple[UUID, str]] = {}
            for name, bound in (("used", {}), ("quiet", {}), ("bound", {"models": ("m",)}), ("limited", {})):
                made[name] = await o.w.key(o.people["admin"], name, **bound)
                if name != "quiet":
                    await o.w.value(
                        "INSERT INTO audit_log (actor, actor_key_id, action, target, address, request_id, detail) "
                        "VALUES ('x', $1, 'key.create', 'x', '', '', '{}')",
                        made[name][0],
                    )
            limited = f"key:{made['limited'][0]}"
            await o.operator("SetLimits", subject=limited, limits={"tokens_per_day": 1})
            await o.w.value(statement)
            administers = {name: (await seen(o, secret)).administers for name, (_, secret) in made.items()}
            assert administers == {"used": "admin", "quiet": "", "bound": "", "limited": ""}

    run(test())


def test_the_release_before_writes_keys_that_are_for_inference(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            secret = "hf-" + "0" * 49
            made = await o.w.value(
                "INSERT INTO api_keys (user_id, digest, prefix, name, models, endpoints, expires_at) "
                "VALUES ($1, $2, 'hf-', 'old', '{}', '{}', NULL) RETURNING id",
                o.people["owner"],
                SECRET.key_digest(presented(secret.encode())),
            )
            assert (await seen(o, secret)).administers == ""
            await o.w.value(
                "INSERT INTO limits (subject, tokens_per_day) VALUES ($1, 5) ON CONFLICT (subject) DO UPDATE SET "
                "tokens_per_day = EXCLUDED.tokens_per_day",
                f"key:{made}",
            )
            assert (await seen(o, secret)).limits[0].limits == Limits(tokens_per_day=5)

    run(test())
