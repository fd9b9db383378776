"""AdminService: users, keys, limits, prices, usage, and hostile text in every field."""

import asyncio
import contextlib
import time
from typing import Any
from uuid import uuid4

import pytest

from helixflow import config
from helixflow.auth import api_keys
from helixflow.auth.roles import Role
from helixflow.core_rs import (
    Conflict,
    CoreError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
)
from helixflow.db.target import Target
from helixflow.ledger.record import encode
from helixflow.ledger.writer import Writer
from helixflow.limits.model import Limits
from helixflow.limits.settings import of_new_keys
from helixflow.pki.layout import Layout
from helixflow.rpc import messages

from .office import COMMAND, ROLES, Office, arguments, office
from .support import INJECTIONS, OWNER, SECRET, row, run

# --- users -----------------------------------------------------------------------


def test_admins_reach_those_below_them_alone(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            for service, email in ((False, "new@example.com"), (True, "robot")):
                for role in ("admin", "owner"):
                    with pytest.raises(PermissionDenied, match="not below yours") as caught:
                        await o.call("admin", "CreateUser", role=role, email=email, service_account=service)
                    assert caught.value.param == "role"
            for who, role in (("member", "owner"), ("member", "admin"), ("admin", "owner")):
                with pytest.raises(PermissionDenied, match="not below yours"):
                    await o.call("admin", "UpdateUser", user=f"{who}@example.com", role=role)
            peer = await o.w.user("peer@example.com", "admin")
            for user, role in ((o.people["owner"], "owner"), (peer, "admin")):
                key, _ = await o.w.key(user, "k")
                them = {"user": str(user)}
                for method, values in (
                    ("UpdateUser", {**them, "role": "viewer"}),
                    ("UpdateUser", {**them, "disabled": True}),
                    ("ResetPassword", them),
                    ("UnlockUser", them),
                    ("DeleteUser", them),
                    ("CreateKey", {**them, "name": "k"}),
                    ("UpdateKey", {"key": str(key), "name": "k2"}),
                    ("RotateKey", {"key": str(key)}),
                    ("RevokeKey", {"key": str(key)}),
                    ("SetLimits", {"subject": f"user:{user}", "limits": {"tokens_per_day": 1}}),
                    ("SetLimits", {"subject": f"key:{key}", "limits": {"tokens_per_day": 1}}),
                ):
                    with pytest.raises(PermissionDenied, match=f"the role {role} is not below yours"):
                        await o.call("admin", method, **values)
            # Below is theirs, and an owner's is everybody.
            await o.call("admin", "CreateUser", email="new@example.com", role="member")
            await o.call("admin", "UpdateUser", user="new@example.com", role="viewer")
            await o.call("owner", "UpdateUser", user="peer@example.com", role="member")
            await o.call("owner", "CreateUser", email="boss@example.com", role="owner")
            await o.call("owner", "DeleteUser", user="owner@example.com")

    run(test())


def test_what_everybody_may_do_to_themselves(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            # A stolen session must not become a stolen account.
            for who in ("admin", "owner"):
                with pytest.raises(PermissionDenied, match="nobody resets their own"):
                    await o.call(who, "ResetPassword", user=f"{who}@example.com")
            await o.call("admin", "UpdateUser", user="admin@example.com", role="member")
            with pytest.raises(PermissionDenied, match="this needs the role admin"):
                await o.call("admin", "UpdateUser", user="admin@example.com", role="admin")

    run(test())


def test_other_organisations_do_not_exist(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            key, _ = await o.w.key(o.people["other-member"], "k")
            theirs = {"user": "other-member@example.com"}
            for method, values in (
                ("CreateUser", {"email": "x@example.com", "role": "member", "organisation": "other"}),
                ("ListUsers", {"organisation": "other"}),
                ("ListKeys", {"organisation": "other"}),
                ("ListLimits", {"organisation": "other"}),
                ("ListAudit", {"organisation": "other"}),
                ("ListRequests", {"organisation": "other"}),
                ("QueryUsage", {"organisation": "other"}),
                ("UpdateUser", {**theirs, "disabled": True}),
                ("UpdateUser", {"user": str(o.people["other-member"]), "disabled": True}),
                ("ResetPassword", theirs),
                ("UnlockUser", theirs),
                ("DeleteUser", theirs),
                ("CreateKey", {**theirs, "name": "k"}),
                ("UpdateKey", {"key": str(key), "name": "x"}),
                ("RotateKey", {"key": str(key)}),
                ("RevokeKey", {"key": str(key)}),
                ("SetLimits", {"subject": f"key:{key}", "limits": {}}),
                ("SetLimits", {"subject": f"user:{o.people['other-member']}", "limits": {}}),
                ("QueryUsage", theirs),
            ):
                for who in ("owner", "admin"):
                    with pytest.raises(NotFound):
                        await o.call(who, method, **values)
            # What is not named is never shown either.
            for method in ("ListUsers", "ListKeys", "ListAudit"):
                assert "other-" not in str(await o.call("owner", method))
            everything = await o.operator("ListUsers")
            assert len(everything.data) == 9
            assert len((await o.operator("ListUsers", organisation="other")).data) == 4

    run(test())


def test_a_new_user_logs_in_with_the_one_time_password(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            made = await o.call("admin", "CreateUser", email="New@example.com", role="member")
            assert (made.user.email, made.user.must_change_password) == ("new@example.com", True)
            await o.w.login.login("new@example.com", made.one_time_password, "a horse of my own", "")
            again = await o.call("admin", "ResetPassword", user="new@example.com")
            assert again.one_time_password != made.one_time_password
            await o.w.login.login("new@example.com", again.one_time_password, "another of my own", "")
            for row in await o.w.rows("SELECT detail FROM audit_log"):
                assert made.one_time_password not in row["detail"]
            robot = await o.call("admin", "CreateUser", email="robot", role="member", service_account=True)
            assert (robot.one_time_password, robot.user.service_account) == ("", True)
            changed = await o.call("admin", "UpdateUser", user="robot", disabled=True, role="viewer")
            assert (changed.disabled, changed.role) == (True, "viewer")
            gone = await o.call("admin", "DeleteUser", user="robot")
            assert gone.id == robot.user.id
            unlocked = await o.call("admin", "UnlockUser", user="new@example.com")
            assert not unlocked.locked

    run(test())


# --- keys ------------------------------------------------------------------------


def test_members_manage_their_own_keys_only(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            await o.w.user("second@example.com")
            theirs, _ = await o.w.key((await o.w.rows("SELECT id FROM users WHERE email LIKE 'second%'"))[0]["id"], "t")
            made = await o.call("member", "CreateKey", name="mine", limits={"tokens_per_day": 5, "cost_per_day": 0})
            assert made.secret.startswith("hf-")
            (row,) = await o.w.audited("limits.set")
            assert row["target"] == f"key:{made.key.id}"
            assert made.key.user_id == str(o.people["member"])
            listed = await o.call("member", "ListKeys")
            assert [key.id for key in listed.data] == [made.key.id]
            await o.call("member", "UpdateKey", key=made.key.id, name="renamed")
            rotated = await o.call("member", "RotateKey", key=made.key.id.upper(), overlap_s=60)
            # Limits go with the key.
            limits = await o.operator("ListLimits")
            assert {item.subject for item in limits.data} == {f"key:{made.key.id}", f"key:{rotated.key.id}"}
            assert {item.limits.tokens_per_day for item in limits.data} == {5}
            await o.call("member", "RevokeKey", key=rotated.key.id)
            for method in ("UpdateKey", "RotateKey", "RevokeKey"):
                with pytest.raises(NotFound):
                    await o.call("member", method, key=str(theirs))
            with pytest.raises(PermissionDenied, match="your own keys only"):
                await o.call("member", "CreateKey", name="k", user="second@example.com")
            # An admin manages them all, and a viewer sees them all, without secrets.
            assert len((await o.call("viewer", "ListKeys")).data) == 3
            await o.call("admin", "RevokeKey", key=str(theirs))
            by_admin = await o.call("admin", "CreateKey", name="given", user="member@example.com")
            assert by_admin.key.user == "member@example.com"
            assert made.secret not in str(await o.operator("ListKeys"))

    run(test())


def test_a_new_key_that_is_given_no_limits_gets_those_of_the_configuration(target: Target, pki: Layout) -> None:
    async def test() -> None:
        production = of_new_keys(config.load(None, {"HELIX_LIMITS_NEW_KEY_CONCURRENT_REQUESTS": "0"}))
        assert (production.requests_per_minute, production.tokens_per_minute) == (600, 1_000_000)
        async with office(target, pki, new_keys=production) as o:
            plain = await o.call("member", "CreateKey", name="plain")
            given = await o.call("member", "CreateKey", name="given", limits={"tokens_per_day": 5})
            await o.call("admin", "CreateKey", name="administers", admin=True)
            limits = {item.subject: item.limits for item in (await o.operator("ListLimits")).data}
            assert limits == {
                f"key:{plain.key.id}": production.message(),
                f"key:{given.key.id}": Limits(tokens_per_day=5).message(),
            }

    run(test())


def test_keys_of_the_development_profile_have_no_limits_of_their_own() -> None:
    assert not of_new_keys(config.load(None, {"HELIX_PROFILE": "development"}))


def test_pages_of_a_list(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            for number in range(5):
                await o.w.key(o.people["member"], f"k{number}")
            # All at one moment: the id decides.
            await o.w.value("UPDATE api_keys SET created_at = '2026-01-01 00:00:00.123457+00'")
            seen, after = [], ""
            while True:
                page = await o.operator("ListKeys", limit=2, after=after)
                seen += [key.id for key in page.data]
                after = page.next
                if not after:
                    break
            assert len(seen) == len(set(seen)) == 5
            for method in ("ListKeys", "ListUsers", "ListOrganisations", "ListAudit", "ListRequests", "ListLimits"):
                with pytest.raises(InvalidRequest, match="at most 1000") as caught:
                    await o.operator(method, limit=1001)
                assert caught.value.param == "limit"
                for wrong in ("x", "x" * 32, "é", "' OR 1=1 --", "\x00", "-1"):
                    with pytest.raises(InvalidRequest):
                        await o.operator(method, after=wrong)
            audit = await o.operator("ListAudit", limit=3)
            more = await o.operator("ListAudit", limit=3, after=audit.next)
            ids = [int(row.id) for row in [*audit.data, *more.data]]
            assert ids == sorted(ids, reverse=True)

    run(test())


# --- limits, prices, usage -------------------------------------------------------


def test_limits_are_set_by_who_stands_above(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            subject = f"user:{o.people['member']}"
            set_ = await o.call("admin", "SetLimits", subject=subject, limits={"requests_per_minute": 3})
            assert (set_.subject, set_.limits.requests_per_minute) == (subject, 3)
            (row,) = await o.w.audited("limits.set")
            assert (row["target"], row["detail"]) == (subject, '{"requests_per_minute": 3}')
            rows = await o.w.rows("SELECT id, name FROM organisations")
            homes = {row["name"]: f"organisation:{row['id']}" for row in rows}
            for who in ("admin", "other-owner"):
                home = homes["other" if who.startswith("other") else "default"]
                with pytest.raises(PermissionDenied, match="left to the operator"):
                    await o.call(who, "SetLimits", subject=home, limits={})
            await o.call("owner", "SetLimits", subject=homes["other"], limits={"tokens_per_month": 9})
            await o.operator("SetLimits", subject=homes["default"], limits={"tokens_per_month": 8})
            assert len((await o.call("member", "ListLimits")).data) == 2
            assert len((await o.call("other-viewer", "ListLimits")).data) == 1
            await o.operator("SetLimits", subject=homes["other"], limits={})
            assert not (await o.call("other-viewer", "ListLimits")).data
            for wrong in ("", "user:", "user:x", f"robot:{uuid4()}", "user:' OR '1'='1", homes["other"].upper()):
                with pytest.raises(InvalidRequest):
                    await o.operator("SetLimits", subject=wrong, limits={})
            for kind in ("user", "key", "organisation"):
                with pytest.raises(NotFound):
                    await o.operator("SetLimits", subject=f"{kind}:{uuid4()}", limits={})
            with pytest.raises(InvalidRequest):
                await o.operator("SetLimits", subject=subject, limits={"tokens_per_day": 1 << 60})

    run(test())


def test_prices(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            await o.operator("SetPrice", price={"model": "m", "prompt": 1, "cached": 2, "completion": 3})
            await o.call("owner", "SetPrice", price={"model": "a", "prompt": 4, "cached": 0, "completion": 0})
            listed = await o.call("other-viewer", "ListPrices")
            assert (listed.currency, [price.model for price in listed.prices]) == ("EUR", ["a", "m"])
            # Nothing becomes free by being forgotten.
            for missing in ("prompt", "cached", "completion"):
                price = {"model": "m", "prompt": 9, "cached": 9, "completion": 9}
                del price[missing]
                with pytest.raises(InvalidRequest, match="is required") as caught:
                    await o.operator("SetPrice", price=price)
                assert caught.value.param == f"price.{missing}"
            with pytest.raises(InvalidRequest):
                await o.operator("SetPrice", price={"model": "m"})
            assert [price.completion for price in (await o.operator("ListPrices")).prices] == [0, 3]
            assert (await o.operator("DeletePrice", model="m")).id == "m"
            with pytest.raises(NotFound, match="has no price"):
                await o.operator("DeletePrice", model="m")
            assert [row["target"] for row in await o.w.audited("price.set")] == ["m", "a"]
            assert len(await o.w.audited("price.delete")) == 1

    run(test())


async def _used(o: Office) -> None:
    home = await o.w.value("SELECT id FROM organisations WHERE first")
    at_us = int(time.time() * 1_000_000)
    for who, count in (("member", 1), ("admin", 10)):
        rows = [row(at_us + number, organisation=home, user=o.people[who]) for number in range(count)]
        await Writer(o.w.pool, SECRET.ledger_key()).append(str(uuid4()), [encode(each) for each in rows])


def test_usage_of_ones_own_and_of_the_organisation(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            await _used(o)

            async def requests(who: str, **values: Any) -> int:
                report = await o.call(who, "QueryUsage", group_by=["day", "user"], **values)
                assert report.currency == "EUR"
                return sum(row.requests for row in report.data)

            assert await requests("member") == 1
            assert await requests("member", user="member@example.com") == 1
            assert await requests("viewer") == 11
            assert await requests("admin", user="member@example.com") == 1
            assert await requests("other-owner") == 0
            with pytest.raises(PermissionDenied, match="your own usage only"):
                await o.call("member", "QueryUsage", user="admin@example.com")
            for wrong in ({"from": "yesterday"}, {"to": "2026-13-01"}, {"from": "2026-02-02", "to": "2026-01-01"}):
                for method in ("QueryUsage", "ListRequests", "ListAudit", "VerifyLedger"):
                    with pytest.raises(InvalidRequest):
                        await o.operator(method, **wrong)
            with pytest.raises(InvalidRequest):
                await o.operator("QueryUsage", group_by=["password"])

    run(test())


def test_requests_audit_and_the_chain(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            assert list((await o.call("admin", "ListRequests")).data) == []
            checked = await o.call("owner", "VerifyLedger")
            assert (checked.days, list(checked.faults)) == (0, [])
            seen = await o.call("other-admin", "ListAudit")
            assert {row.organisation_id for row in seen.data} == {
                str(await o.w.value("SELECT id FROM organisations WHERE name = 'other'"))
            }
            first = next(row for row in (await o.operator("ListAudit")).data if row.action != "login.succeeded")
            assert (first.actor, first.action, first.address) == ("root", "user.create", "127.0.0.1")

    run(test())


# --- injection -------------------------------------------------------------------


def _texts(kind: Any, path: str = "") -> list[str]:
    """Paths of all text fields of a message, those below it included."""
    found = []
    for entry in kind.DESCRIPTOR.fields:
        name = f"{path}{entry.name}"
        if entry.message_type is not None:
            found += _texts(messages.__getattr__(entry.message_type.name), f"{name}.")
        elif entry.type == entry.TYPE_STRING:
            found.append(name)
    return found


def _put(values: dict[str, Any], kind: Any, path: str, text: str) -> None:
    head, _, rest = path.partition(".")
    entry = kind.DESCRIPTOR.fields_by_name[head]
    if rest:
        below = messages.__getattr__(entry.message_type.name)
        inner: dict[str, Any] = {}
        _put(inner, below, rest, text)
        old = values.get(head, {})
        values[head] = [inner] if entry.is_repeated else {**old, **inner}
    else:
        values[head] = [text] if entry.is_repeated else text


@pytest.mark.timeout(240)
def test_injections_through_every_field(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'helixflow'"
            before = await o.w.value(tables), await o.w.value("SELECT count(*) FROM users")
            key, _ = await o.w.key(o.people["member"], "k")

            async def attempt(name: str, method: messages.Method, path: str, text: str) -> None:
                values = {**arguments(o).get(method.path.rpartition("/")[2], {})}
                if "key" in values:
                    values["key"] = str(key)
                values["actor"] = {"name": "root"}
                if name.endswith("/DeleteUser"):
                    values["user"] = "nobody@example.com"
                _put(values, method.request, path, text)
                with contextlib.suppress(InvalidRequest, NotFound, Conflict, PermissionDenied):
                    await o.handlers[name](messages.parse(method.request, values), COMMAND)

            tried = [
                (name, method, path)
                for name, method in messages.service("AdminService").items()
                for path in _texts(method.request)
            ]
            assert len(tried) * len(INJECTIONS) > 500
            for what in tried:
                await asyncio.gather(*(attempt(*what, text) for text in INJECTIONS))
            assert await o.w.value(tables) == before[0]
            # Names that look like SQL are names: some users and organisations were made, none was lost.
            assert await o.w.value("SELECT count(*) FROM users WHERE deleted_at IS NULL") >= before[1]
            assert await o.w.value("SELECT count(*) FROM users WHERE role = 'owner' AND email = $1", OWNER) == 1

    run(test(), seconds=200)  # a thousand calls


def test_the_roles_are_in_order() -> None:
    assert [role.word for role in sorted(Role)] == list(ROLES)
    assert Role.parse("admin") is Role.ADMIN
    assert Role.parse("root") is None
    assert api_keys.OVERLAP_S == 24 * 3600


def test_nothing_is_hashed_for_what_is_refused(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            hashed: list[str] = []
            compute = o.w.passwords.hash

            async def noted(password: str) -> str:
                hashed.append(password)
                return await compute(password)

            o.w.passwords.hash = noted  # type: ignore[method-assign]
            new: dict[str, Any] = {"email": "new@example.com", "role": "member"}
            refused: tuple[tuple[str, str, dict[str, Any]], ...] = (
                ("member", "CreateUser", new),
                ("admin", "CreateUser", {**new, "email": "nonsense"}),
                ("admin", "CreateUser", {**new, "email": "viewer@example.com"}),
                ("admin", "CreateUser", {**new, "role": "king"}),
                ("admin", "CreateUser", {**new, "role": "owner"}),
                ("admin", "CreateUser", {**new, "organisation": "other"}),
                ("admin", "ResetPassword", {"user": "nobody@example.com"}),
                ("admin", "ResetPassword", {"user": "owner@example.com"}),
                ("member", "ResetPassword", {"user": "viewer@example.com"}),
            )
            for who, method, values in refused:
                with pytest.raises(CoreError):
                    await o.call(who, method, **values)
            await o.call("admin", "CreateUser", email="robot", role="member", service_account=True)
            with pytest.raises(CoreError):
                await o.call("admin", "ResetPassword", user="robot")
            assert hashed == []
            made = await o.call("admin", "CreateUser", **new)
            assert hashed == [made.one_time_password]
            # The rehearsal left nothing behind.
            assert len(await o.w.audited("user.create")) == 11
            assert await o.w.value("SELECT count(*) FROM users WHERE password = '!'") == 0

    run(test())
