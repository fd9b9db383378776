"""Sessions listed and ended; API keys when a password changes."""

import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from helixflow.auth import api_keys, session_desk, users
from helixflow.core_rs import InvalidRequest, InvalidToken, NotFound, PermissionDenied
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .office import office
from .support import OPERATOR, PASSWORD, World, run, world

ANN, HOME = "ann@example.com", "192.0.2.1"
NEW = "another horse battery"


async def alive(w: World, token: str) -> bool:
    async with w.pool.acquire() as connection:
        try:
            await w.sessions.refresh(connection, token, HOME)
        except InvalidToken:
            return False
    return True


def test_people_see_and_end_their_own_sessions(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            user = await w.user(ANN, "viewer")
            await w.user("bob@example.com")
            ann = await w.acting(user)
            tokens = [
                (await w.login.login(ANN, PASSWORD, "", f"192.0.2.{number}")).refresh_token for number in range(3)
            ]
            theirs = (await w.login.login("bob@example.com", PASSWORD, "", HOME)).refresh_token
            page = await w.do(session_desk.listing, ann, "", 2, "")
            assert [(row.user, row.method, row.address) for row in page.data] == [
                (ANN, "password", "192.0.2.2"),
                (ANN, "password", "192.0.2.1"),
            ]
            rest = await w.do(session_desk.listing, ann, "", 2, page.next)
            assert ([row.address for row in rest.data], rest.next) == (["192.0.2.0"], "")
            ended = await w.do(session_desk.end, ann, page.data[1].id)
            assert ended == page.data[1].id
            assert [row.address for row in (await w.do(session_desk.listing, ann, ANN, 0, "")).data] == [
                "192.0.2.2",
                "192.0.2.0",
            ]
            assert [await alive(w, token) for token in tokens] == [True, False, True]
            with pytest.raises(NotFound):
                await w.do(session_desk.end, ann, page.data[1].id)
            assert await w.do(session_desk.end_all, ann, ANN) == 2
            assert [await alive(w, token) for token in (*tokens, theirs)] == [False, False, False, True]
            details = [json.loads(row["detail"]) for row in await w.audited("session.end")]
            assert details == [{"session": ended, "user": ANN}, {"sessions_ended": 2}]

    run(test())


def test_sessions_of_others_need_a_higher_role(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:

            async def begun(user: str = "") -> list[Any]:
                """Those of logins: who acts here has one too."""
                rows = (await o.operator("ListSessions", user=user)).data
                return [row for row in rows if row.address == HOME]

            sessions: dict[str, str] = {}
            for name in ("member", "admin", "owner", "other-member"):
                await o.w.login.login(f"{name}@example.com", PASSWORD, "", HOME)
                (row,) = await begun(f"{name}@example.com")
                sessions[name] = row.id
            assert len(await begun()) == 4
            for who in ("viewer", "member"):
                with pytest.raises(PermissionDenied, match="own sessions"):
                    await o.call(who, "ListSessions", user="admin@example.com")
                with pytest.raises(PermissionDenied, match="own sessions"):
                    await o.call(who, "EndSessions", user="admin@example.com")
                with pytest.raises(NotFound):
                    await o.call(who, "EndSession", session=sessions["admin"])
            with pytest.raises(NotFound):
                await o.call("admin", "EndSession", session=sessions["other-member"])
            with pytest.raises(NotFound):
                await o.call("admin", "ListSessions", user="other-member@example.com")
            for method, values in (
                ("EndSession", {"session": sessions["owner"]}),
                ("EndSessions", {"user": "owner@example.com"}),
            ):
                with pytest.raises(PermissionDenied):
                    await o.call("admin", method, **values)
            listed = (await o.call("admin", "ListSessions", user="member@example.com")).data
            assert sessions["member"] in [row.id for row in listed]
            assert (await o.call("admin", "EndSession", session=sessions["member"])).id == sessions["member"]
            assert (await o.call("owner", "EndSessions", user="admin@example.com")).ended == 2
            with pytest.raises(InvalidToken):
                await o.call("admin", "ListSessions")
            assert (await o.operator("EndSession", session=sessions["other-member"])).id
            with pytest.raises(NotFound):
                await o.operator("EndSession", session=str(uuid4()))
            assert [row.user for row in await begun()] == ["owner@example.com"]
            # No key ends sessions, or shows them.
            key = (await o.operator("CreateKey", user="owner@example.com", name="k", admin=True)).secret
            for method in ("ListSessions", "EndSessions"):
                with pytest.raises(PermissionDenied, match="no key may do this"):
                    await o.call("owner", method, by=key, user="owner@example.com")

    run(test())


def test_logout_is_audited(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user(ANN)
            issued = await w.login.login(ANN, PASSWORD, "", HOME)
            async with w.pool.acquire() as connection:
                for _ in range(2):
                    await w.sessions.end_by_refresh(connection, issued.refresh_token, HOME)
                await w.sessions.end_by_refresh(connection, "hr-nonsense", HOME)
            (row,) = await w.audited("session.end")
            assert (row["actor"], row["address"], json.loads(row["detail"])["reason"]) == (ANN, HOME, "logout")

    run(test())


# --- keys when a password changes ---------------------------------------------------


def test_a_new_password_asks_what_to_do_with_keys(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            user = await w.user(ANN)
            await w.key(user, "one")
            await w.key(user, "two")
            gone, _ = await w.key(user, "gone")
            await w.do(api_keys.revoke, OPERATOR, str(gone))
            await w.value("UPDATE api_keys SET development = true WHERE name = 'two'")
            for choice in ("", "delete"):
                with pytest.raises(InvalidRequest, match="1 API key") as caught:
                    await w.login.login(ANN, PASSWORD, NEW, HOME, keys=choice)
                assert caught.value.param == "keys"
            # Nothing has changed, and nobody has to wait for that.
            for _ in range(8):
                await w.login.login(ANN, PASSWORD, "", HOME)
            issued = await w.login.login(ANN, PASSWORD, NEW, HOME, keys="keep")
            assert (issued.sessions_ended, issued.keys_revoked, issued.keys_kept) == (8, 0, 1)
            issued = await w.login.login(ANN, NEW, PASSWORD, HOME, keys="revoke")
            assert (issued.sessions_ended, issued.keys_revoked, issued.keys_kept) == (1, 1, 0)
            assert await w.value("SELECT count(*) FROM api_keys WHERE revoked_at IS NULL AND NOT development") == 0
            issued = await w.login.login(ANN, PASSWORD, NEW, HOME)
            assert (issued.keys_revoked, issued.keys_kept) == (0, 0)
            assert (await w.login.login(ANN, NEW, "", HOME)).keys_kept is None
            details = [json.loads(row["detail"]) for row in await w.audited("user.password")]
            assert [detail["keys_revoked"] for detail in details] == [0, 1, 0]

    run(test())


def test_a_reset_asks_as_well(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            member = o.people["member"]
            await o.w.key(UUID(str(member)))
            with pytest.raises(InvalidRequest, match="keep or revoke"):
                await o.call("admin", "ResetPassword", user="member@example.com")
            assert await o.w.value("SELECT must_change_password FROM users WHERE id = $1", member) is False
            await o.call("admin", "ResetPassword", user="member@example.com", keys="revoke")
            assert await o.w.value("SELECT count(*) FROM api_keys WHERE revoked_at IS NULL") == 0
            made = await o.call("admin", "ResetPassword", user="member@example.com")
            # After a one-time password, keys that were made meanwhile are asked about too.
            await o.w.key(UUID(str(member)))
            with pytest.raises(InvalidRequest, match="keep or revoke"):
                await o.w.login.login("member@example.com", made.one_time_password, NEW, HOME)
            await o.w.login.login("member@example.com", made.one_time_password, NEW, HOME, keys="keep")

    run(test())


# --- one-time passwords -----------------------------------------------------------------


def test_one_time_passwords_expire(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with office(target, pki) as o:
            made = await o.call("admin", "CreateUser", email="new@example.com", role="member")
            now = await o.w.value("SELECT extract(epoch FROM now())::bigint")
            assert 0 <= made.user.password_expires_at - now - users.ONE_TIME_S + 60 < 120
            await o.w.value("UPDATE users SET password_expires_at = now() WHERE email = 'new@example.com'")
            with pytest.raises(PermissionDenied, match="this one-time password has expired; ask an administrator"):
                await o.w.login.login("new@example.com", made.one_time_password, NEW, HOME)
            again = await o.call("admin", "ResetPassword", user="new@example.com")
            assert again.user.password_expires_at > now
            await o.w.login.login("new@example.com", again.one_time_password, NEW, HOME)
            # What was chosen does not expire.
            assert (await o.w.do(users.by_id, UUID(made.user.id))).password_expires_at == 0
            await o.w.value("UPDATE users SET password_expires_at = now() WHERE email = 'new@example.com'")
            await o.w.login.login("new@example.com", NEW, "", HOME)

    run(test())


def test_a_new_password_must_not_be_guessed_first(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.user("ann.smith@example.com")
            for password in ("Password123456!!", "ann.smith@example.com", "smith-ann-example", "default default 1"):
                with pytest.raises(InvalidRequest, match="guessed first") as caught:
                    await w.login.login("ann.smith@example.com", PASSWORD, password, HOME)
                assert caught.value.param == "new_password"
            await w.login.login("ann.smith@example.com", PASSWORD, NEW, HOME)

    run(test())
