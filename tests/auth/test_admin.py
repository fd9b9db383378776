"""AdminService: who may do what, over the handlers that gateways and the command line reach."""

import pytest

from helixflow.auth import sessions
from helixflow.auth.roles import METHODS
from helixflow.core_rs import (
    Conflict,
    CoreError,
    InvalidApiKey,
    InvalidRequest,
    InvalidToken,
    NotFound,
    PermissionDenied,
)
from helixflow.db.target import Target
from helixflow.pki.layout import Layout
from helixflow.rpc import messages
from helixflow.rpc.server import Caller

from .office import COMMAND, GATEWAY, ROLES, arguments, office
from .support import run


def test_every_method_has_a_rule_and_a_handler(shared: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(shared, pki) as o:
            names = {name.partition("/")[2] for name in messages.service("AdminService")}
            assert names == set(METHODS) == {name.partition("/")[2] for name in o.handlers}

    run(test())


# --- who may call what -----------------------------------------------------------


ALLOWED = {
    "viewer": {
        "ListOrganisations",
        "ListKeys",
        "ListLimits",
        "ListPrices",
        "QueryUsage",
        "ListSessions",
        "EndSession",
        "EndSessions",
    },
    "member": {"CreateKey", "UpdateKey", "RotateKey", "RevokeKey"},
    "admin": {
        "CreateUser",
        "ListUsers",
        "UpdateUser",
        "ResetPassword",
        "ResetFactor",
        "UnlockUser",
        "DeleteUser",
        "SetLimits",
        "ListRequests",
        "GetTexts",
        "ListAudit",
    },
    "owner": {
        "RequireFactor",
        "CreateOrganisation",
        "UpdateOrganisation",
        "SetPrice",
        "DeletePrice",
        "VerifyLedger",
        "AnchorLedger",
    },
}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_call_what_the_table_says(target: Target, pki: Layout, role: str) -> None:
    async def test() -> None:
        allowed = set().union(*(ALLOWED[lower] for lower in ROLES[: ROLES.index(role) + 1]))
        async with office(target, pki) as o:
            wanted = arguments(o)
            for method in METHODS:
                try:
                    await o.call(role, method, **wanted.get(method, {}))
                    reached = True
                except (NotFound, Conflict):
                    reached = True
                except PermissionDenied as error:
                    reached = "this needs the role" not in str(error)
                assert reached == (method in allowed), method

    run(test())


def test_a_method_outside_the_table_is_nobodys() -> None:
    from .support import OPERATOR

    with pytest.raises(PermissionDenied, match="nobody may call Explode"):
        OPERATOR.allow("Explode")


def test_only_owners_of_the_first_organisation_administer_the_installation(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            wanted = arguments(o)
            for method in (
                "CreateOrganisation",
                "UpdateOrganisation",
                "SetPrice",
                "DeletePrice",
                "VerifyLedger",
                "AnchorLedger",
            ):
                with pytest.raises(PermissionDenied, match="first organisation"):
                    await o.call("other-owner", method, **wanted.get(method, {}))
            made = await o.call("owner", "CreateOrganisation", name="third")
            await o.call("owner", "UpdateOrganisation", organisation=made.id, suspended=True)
            listed = await o.call("owner", "ListOrganisations")
            assert [item.name for item in listed.data] == ["default", "other", "third"]
            assert [item.name for item in (await o.call("other-owner", "ListOrganisations")).data] == ["other"]
            with pytest.raises(NotFound):
                await o.call("other-owner", "ListOrganisations", organisation="default")
            # The name gives no rights.
            await o.operator("UpdateOrganisation", organisation="default", name="main")
            await o.operator("UpdateOrganisation", organisation="other", name="default")
            with pytest.raises(PermissionDenied, match="first organisation"):
                await o.call("other-owner", "SetPrice", price={"model": "m"})
            with pytest.raises(InvalidRequest, match="their own organisation"):
                await o.call("owner", "UpdateOrganisation", organisation="main", suspended=True)

    run(test())


# --- who acts --------------------------------------------------------------------


def test_a_gateway_acts_by_the_credential_of_its_caller_alone(target: Target, pki: Layout) -> None:
    """A gateway's certificate is nobody: what it says of the caller beside the credential changes nothing."""

    async def test() -> None:
        async with office(target, pki) as o:
            for method in METHODS:
                kind = messages.method(f"AdminService/{method}").request
                request = messages.parse(kind, {"actor": {"name": "root"}, **arguments(o).get(method, {})})
                with pytest.raises(PermissionDenied, match="no credential"):
                    await o.handlers[f"AdminService/{method}"](request, GATEWAY)
            lies = {"access_token": await o.token("member"), "name": "root"}
            with pytest.raises(PermissionDenied, match="yours is member"):
                await o._call("ListUsers", GATEWAY, lies, {})
            keys = await o._call("CreateKey", GATEWAY, lies, {"name": "k"})
            assert keys.key.user == "member@example.com"
            (row,) = await o.w.audited("key.create")
            assert (row["actor"], row["actor_user_id"]) == ("member@example.com", o.people["member"])
            assert row["request_id"] == "call-1"

    run(test())


def test_a_release_that_names_the_actor_is_refused(target: Target, pki: Layout) -> None:
    """Fields 1 to 4 of the actor said who acts, and were believed."""

    async def test() -> None:
        async with office(target, pki) as o:
            user = str(o.people["owner"]).encode()
            old = messages.Actor.FromString(b"\x0a" + bytes([len(user)]) + user + b"\x22\x05owner")
            with pytest.raises(PermissionDenied, match="no credential"):
                await o.handlers["AdminService/ListUsers"](messages.ListRequest(actor=old), GATEWAY)

    run(test())


@pytest.mark.parametrize(
    ("caller", "actor", "error"),
    [
        (GATEWAY, {}, PermissionDenied),
        (GATEWAY, {"name": "root"}, PermissionDenied),
        (GATEWAY, {"access_token": "'; DROP TABLE users; --"}, InvalidToken),
        (GATEWAY, {"access_token": "a.b.c"}, InvalidToken),
        (GATEWAY, {"key_digest": ""}, InvalidApiKey),
        (GATEWAY, {"key_digest": "00" * 32}, InvalidApiKey),
        (COMMAND, {"key_digest": "00" * 32}, InvalidRequest),
        (COMMAND, {"access_token": "a.b.c", "name": "root"}, InvalidRequest),
        (Caller("monitoring", "127.0.0.1:1", ""), {}, PermissionDenied),
        (Caller("inference-pool", "127.0.0.1:1", ""), {"name": "root"}, PermissionDenied),
        (Caller(None, "127.0.0.1:1", ""), {"name": "root"}, PermissionDenied),
    ],
)
def test_nobody_acts_without_a_credential(
    shared: Target, pki: Layout, caller: Caller, actor: dict[str, str], error: type[CoreError]
) -> None:
    async def test() -> None:
        async with office(shared, pki) as o:
            for method in METHODS:
                kind = messages.method(f"AdminService/{method}").request
                values = arguments(o).get(method, {})
                request = messages.parse(kind, {"actor": actor, **values})
                with pytest.raises(error):
                    await o.handlers[f"AdminService/{method}"](request, caller)

    run(test())


def test_a_role_that_was_taken_away_is_gone_at_once(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            await o.call("admin", "ListUsers")
            await o.operator("UpdateUser", user="admin@example.com", role="viewer")
            with pytest.raises(PermissionDenied):
                await o.call("admin", "ListUsers")
            await o.operator("UpdateUser", user="admin@example.com", disabled=True)
            with pytest.raises(InvalidToken):
                await o.call("admin", "ListKeys")
            await o.call("other-owner", "ListKeys")
            await o.operator("UpdateOrganisation", organisation="other", suspended=True)
            with pytest.raises(InvalidToken):
                await o.call("other-owner", "ListKeys")
            await o.call("member", "ListKeys")
            await o.operator("DeleteUser", user="member@example.com")
            with pytest.raises(InvalidToken):
                await o.call("member", "ListKeys")

    run(test())


def test_a_session_that_is_over_acts_no_more(target: Target, pki: Layout) -> None:
    """Whatever a gateway still remembers of it."""

    async def test() -> None:
        async with office(target, pki) as o:
            await o.call("owner", "ListUsers")
            await o.w.do(sessions.end_all, o.people["owner"])
            with pytest.raises(InvalidToken, match="log in again"):
                await o.call("owner", "ListUsers")

    run(test())


def test_acting_by_a_key(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            key, secret = await o.w.key(o.people["admin"], "bot", admin=True)
            await o.call("", "UpdateUser", by=secret, user="member@example.com", disabled=True)
            row = (await o.w.audited("user.update"))[-1]
            assert (row["actor"], row["actor_key_id"], row["address"]) == (
                "admin@example.com (key bot)",
                key,
                "10.0.0.1",
            )
            (shown,) = [row for row in (await o.call("owner", "ListAudit")).data if row.action == "user.update"]
            assert (shown.actor_user_id, shown.actor_key_id) == (str(o.people["admin"]), str(key))
            # One of the development profile, and one that has ended.
            await o.w.value("UPDATE api_keys SET development = true")
            with pytest.raises(InvalidApiKey):
                await o.call("", "ListUsers", by=secret)
            await o.w.value("UPDATE api_keys SET development = false, revoked_at = now()")
            with pytest.raises(InvalidApiKey):
                await o.call("", "ListUsers", by=secret)
            await o.w.value("UPDATE api_keys SET revoked_at = NULL, expires_at = now()")
            with pytest.raises(InvalidApiKey):
                await o.call("", "ListUsers", by=secret)
        async with office(target, pki, development=True) as o:
            await o.w.value("UPDATE api_keys SET development = true, expires_at = NULL")
            await o.call("", "ListUsers", by=secret)

    run(test())
