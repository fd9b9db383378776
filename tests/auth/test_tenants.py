"""Whose account an address is: nobody captures another organisation's people, or learns who they are."""

import asyncio
from typing import Any

import pytest

from helixflow.auth import organisations, sessions, users
from helixflow.core_rs import Conflict, CoreError, InvalidRequest, InvalidToken, NotFound, PermissionDenied
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .office import Office, office
from .provider import CALLBACK
from .support import OPERATOR, World, run
from .test_oidc import Flow, flow

ANN = "ann@example.com"


async def declare(w: World, organisation: str, *domains: str) -> None:
    await w.do(organisations.update, OPERATOR, organisation, None, None, None, domains)


async def two(f: Flow, home: str) -> Any:
    """Another organisation, and Ann in one of the two: her UUID."""
    await f.w.do(organisations.create, OPERATOR, "other")
    return await f.w.user(ANN, "member", home)


# --- login through a provider --------------------------------------------------------------


@pytest.mark.parametrize("home", ["default", "other"])
def test_a_first_login_lands_in_no_account_that_anybody_may_have_made(target: Target, pki: Layout, home: str) -> None:
    """The attack: another organisation's admin made the victim's account first; the victim's login landed there."""

    async def test() -> None:
        async with flow(target, pki) as f:
            user = await two(f, home)
            with pytest.raises(PermissionDenied, match="there is no account for this login"):
                await f.enter()
            assert await f.w.value("SELECT count(*) FROM oidc_identities") == 0
            await declare(f.w, "default" if home == "other" else "other", "elsewhere.example")
            with pytest.raises(PermissionDenied, match="there is no account for this login"):
                await f.enter()
            # At a domain that the installation declares, and from then on by subject.
            await declare(f.w, home, "more.example", "EXAMPLE.com")
            assert (await f.who(await f.enter())).user_id == user
            await declare(f.w, home)
            assert (await f.who(await f.enter())).user_id == user

    run(test())


def test_the_organisation_of_newcomers_takes_its_own_people(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki, oidc_organisation="Other") as f:
            user = await two(f, "other")
            assert (await f.who(await f.enter())).user_id == user

    run(test())


def test_nobody_joins_with_an_address_of_others(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki, oidc_organisation="default") as f:
            await f.w.do(organisations.create, OPERATOR, "other")
            await declare(f.w, "other", "example.com")
            with pytest.raises(PermissionDenied, match="there is no account"):
                await f.enter()
            assert await f.w.value("SELECT count(*) FROM users WHERE email = $1", ANN) == 0
            # An account that is somebody else's stays theirs.
            await f.w.user(ANN, "member", "other")
            await declare(f.w, "other")
            with pytest.raises(PermissionDenied, match="there is no account"):
                await f.enter()
            assert await f.w.value("SELECT count(*) FROM oidc_identities") == 0

    run(test())


async def tie(f: Flow, session: Any) -> Any:
    url, state = await f.login.start(CALLBACK, session)
    code, _ = f.provider.authorize(url)
    return await f.login.finish(code, state, CALLBACK, "10.0.0.1")


async def begun(f: Flow, user: Any) -> Any:
    await f.w.do(f.w.sessions.begin, user, "password", "")
    return await f.w.value("SELECT id FROM sessions WHERE user_id = $1 ORDER BY created_at DESC LIMIT 1", user)


def test_a_person_ties_an_account_to_the_provider(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            user = await two(f, "other")
            session = await begun(f, user)
            # Whatever address the provider knows them by.
            f.provider.claims |= {"email": "private@elsewhere.example", "email_verified": False}
            assert (await f.who(await tie(f, session))).user_id == user
            assert await f.w.value("SELECT revoked_at IS NOT NULL FROM sessions WHERE id = $1", session)
            (row,) = await f.w.audited("user.identity")
            assert row["target"] == ANN
            assert (await f.who(await f.enter())).user_id == user
            # Again is fine, another account is not.
            assert (await f.who(await tie(f, await begun(f, user)))).user_id == user
            with pytest.raises(Conflict, match="tied to another account"):
                await tie(f, await begun(f, await f.w.user("bob@example.com")))
            assert (await f.who(await f.enter())).user_id == user

    run(test())


@pytest.mark.parametrize("how", ["ended", "disabled", "deleted"])
def test_a_session_that_is_over_ties_nothing(target: Target, pki: Layout, how: str) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            user = await two(f, "other")
            session = await begun(f, user)
            url, state = await f.login.start(CALLBACK, session)
            if how == "ended":
                await f.w.do(sessions.end, session)
            elif how == "disabled":
                await f.w.do(users.update, OPERATOR, ANN, None, True)
            else:
                await f.w.do(users.delete, OPERATOR, ANN)
            code, _ = f.provider.authorize(url)
            with pytest.raises(InvalidToken, match="log in again"):
                await f.login.finish(code, state, CALLBACK, "")
            assert await f.w.value("SELECT count(*) FROM oidc_identities") == 0

    run(test())


def test_a_provider_sends_browsers_to_the_public_url_alone(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki, public_url="https://gateway.example") as f:
            await f.login.start(CALLBACK)
            for wrong in ("https://evil.example/auth/v1/oidc/callback", f"{CALLBACK}/x", "https://gateway.example/"):
                with pytest.raises(InvalidRequest, match=r"auth\.public_url"):
                    await f.login.start(wrong)

    run(test())


# --- who an address belongs to ---------------------------------------------------------------


async def answer(o: Office, who: str, email: str) -> tuple[type[CoreError] | None, str]:
    try:
        await o.call(who, "CreateUser", email=email, role="viewer")
    except CoreError as error:
        return type(error), str(error.args[0]).replace(email, "…")
    return None, ""


def test_whether_others_have_an_address_does_not_show(target: Target, pki: Layout) -> None:
    """The attack: an admin learnt from a conflict that another organisation has somebody."""

    async def test() -> None:
        async with office(target, pki) as o:
            await o.w.value("UPDATE organisations SET domains = '{}'")
            await o.w.user("known@free.example", "member", "other")
            await o.w.user("theirs@other.example", "member", "other")
            await o.operator("UpdateOrganisation", organisation="other", domains={"values": ["other.example"]})
            for who in ("admin", "other-admin", "other-owner"):
                for domain, names in (("free.example", "known"), ("example.com", "member")):
                    there, nobody = await answer(o, who, f"{names}@{domain}"), await answer(o, who, f"new@{domain}")
                    assert there == nobody
                    assert there[0] is PermissionDenied
            assert await answer(o, "admin", "theirs@other.example") == await answer(o, "admin", "new@other.example")
            # At home a name that is taken is said to be.
            assert (await answer(o, "other-admin", "theirs@other.example"))[0] is Conflict
            assert await answer(o, "other-admin", "new@other.example") == (None, "")
            # The owners of the installation see all of it anyway, but what is declared is others'.
            assert await answer(o, "owner", "new@free.example") == (None, "")
            assert (await answer(o, "owner", "more@other.example"))[0] is PermissionDenied
            with pytest.raises(PermissionDenied, match="not a domain of this organisation"):
                await o.operator("CreateUser", email="x@other.example", role="viewer", organisation="default")
            # Service accounts have names, which are the organisation's own.
            await o.call("other-admin", "CreateUser", email="robot", role="viewer", service_account=True)

    run(test())


def test_domains_are_declared_where_their_people_are(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            await o.w.value("UPDATE organisations SET domains = '{}'")
            for who in ("admin", "other-owner"):
                with pytest.raises(PermissionDenied):
                    await o.call(who, "UpdateOrganisation", organisation="other", domains={"values": ["x.example"]})
            with pytest.raises(Conflict, match=r"'default' has people at example\.com"):
                await o.call("owner", "UpdateOrganisation", organisation="other", domains={"values": ["example.com"]})
            for wrong in ("", "com", "@example.com", "a b.example", "exämple.com", "-x.example", "x..example", "*.com"):
                with pytest.raises(InvalidRequest) as caught:
                    await o.operator("UpdateOrganisation", organisation="other", domains={"values": [wrong]})
                assert str(caught.value.param).startswith("domains")
            values = {"values": ["One.Example", "two.example", "one.example"]}
            changed = await o.call("owner", "UpdateOrganisation", organisation="other", domains=values)
            assert list(changed.domains) == ["one.example", "two.example"]
            # Departments of one company share theirs.
            shared = await o.operator("UpdateOrganisation", organisation="default", domains=values)
            assert shared.domains == changed.domains
            row = (await o.w.audited("organisation.update"))[-1]
            assert '"domains"' in row["detail"]
            same = await o.operator("UpdateOrganisation", organisation="default", name="main")
            assert same.domains == changed.domains
            gone = await o.operator("UpdateOrganisation", organisation="main", domains={})
            assert list(gone.domains) == []

    run(test())


def test_of_a_declaration_and_a_new_address_at_once_one_waits(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            async with o.w.begin() as connection:
                await organisations.update(connection, OPERATOR, "other", None, None, None, ["late.example"])
                making = asyncio.create_task(answer(o, "owner", "new@late.example"))
                await o.w.blocked()
            assert (await making)[0] is PermissionDenied

    run(test())


def test_the_log_of_an_organisation_names_nobody_of_another(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            await o.call("owner", "UpdateOrganisation", organisation="other", domains={"values": ["x.example"]})
            await o.call("other-admin", "CreateUser", email="robot", role="viewer", service_account=True)
            seen = {row.action: row for row in reversed((await o.call("other-admin", "ListAudit")).data)}
            changed, made = seen["organisation.update"], seen["user.create"]
            assert (changed.actor, changed.address) == ("an owner of the installation", "")
            assert (changed.actor_user_id, changed.actor_key_id) == ("", "")
            assert (made.actor, made.actor_user_id) == ("other-admin@example.com", str(o.people["other-admin"]))
            whole = {row.action: row for row in (await o.operator("ListAudit", organisation="other")).data}
            assert whole["organisation.update"].actor == "owner@example.com"

    run(test())


def test_one_organisation_alone_needs_no_domains(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with flow(target, pki) as f:
            user = await f.w.user(ANN)
            assert (await f.who(await f.enter())).user_id == user
            with pytest.raises(NotFound):
                await declare(f.w, "nowhere", "x.example")

    run(test())
