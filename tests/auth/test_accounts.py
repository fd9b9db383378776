"""Organisations and users on the database, the audit log: the rules that do not depend on who calls."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from helixflow.auth import audit, keys, organisations, principals, purge, sessions, users
from helixflow.auth.pepper import Pepper
from helixflow.auth.records import Content
from helixflow.auth.touch import LastUses, touch
from helixflow.core_rs import Conflict, InvalidRequest, NotFound
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .support import OPERATOR, OWNER, SECRET, World, run, world

NOW = datetime.now(UTC)


async def verify(w: World, secret: str, *, pepper: Pepper = SECRET, development: bool = False) -> Any:
    async with w.pool.acquire() as connection:
        return await principals.by_key(connection, pepper, keys.presented(secret.encode()), development=development)


# --- users -----------------------------------------------------------------------


def test_users_are_made_found_and_listed(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            made = await w.do(
                users.create, OPERATOR, organisation="", email=" Ann@Example.COM", role="admin", password="hash"
            )
            assert (made.email, made.role, made.organisation) == ("ann@example.com", "admin", "default")
            assert (made.must_change_password, made.service_account, made.last_login_at) == (True, False, 0)
            robot = await w.service("robot.1")
            for name in (made.id, made.id.upper(), "ANN@example.com", "ann@example.com "):
                assert str((await w.do(users.find, OPERATOR, name))["id"]) == made.id
            assert (await w.do(users.find, OPERATOR, "robot.1"))["id"] == robot
            page = await w.do(users.listing, OPERATOR, "", 2, "")
            assert [user.email for user in page.data] == [OWNER, "ann@example.com"]
            last = await w.do(users.listing, OPERATOR, "DEFAULT", 2, page.next)
            assert ([user.email for user in last.data], last.next) == (["robot.1"], "")
            for wrong in ("nobody@example.com", str(uuid4()), "robot", "robot.1@example.com"):
                with pytest.raises(NotFound, match="there is no user"):
                    await w.do(users.find, OPERATOR, wrong)

    run(test())


def test_names_are_taken_once(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            await w.do(organisations.create, OPERATOR, "Other")
            await w.user("ann@example.com")
            with pytest.raises(Conflict, match="already") as caught:
                await w.user("ANN@example.com", organisation="other")
            assert caught.value.http_status == 409
            first = await w.service("robot")
            await w.service("robot", organisation="other")
            with pytest.raises(Conflict):
                await w.service("robot")
            with pytest.raises(InvalidRequest, match="give its UUID"):
                await w.do(users.find, OPERATOR, "robot")
            await w.do(users.delete, OPERATOR, str(first))
            await w.service("robot")
            with pytest.raises(InvalidRequest, match="there are several"):
                await w.service("x", organisation="")
            with pytest.raises(Conflict, match="already"):
                await w.do(organisations.create, OPERATOR, "oTHER")

    run(test())


@pytest.mark.parametrize("what", ["role", "disable", "delete"])
def test_the_last_owner_stays(each: Target, pki: Layout, what: str) -> None:
    async def leaving(connection: Any, email: str) -> Any:
        if what == "role":
            return await users.update(connection, OPERATOR, email, "admin", None)
        if what == "disable":
            return await users.update(connection, OPERATOR, email, None, True)
        return await users.delete(connection, OPERATOR, email)

    async def leave(w: World, email: str) -> Any:
        return await w.do(leaving, email)

    async def test() -> None:
        async with world(each, pki) as w:
            with pytest.raises(Conflict, match="is the last owner"):
                await leave(w, OWNER)
            # Neither a service account nor somebody disabled counts.
            await w.service("robot", "owner")
            await w.user("off@example.com", "owner")
            await w.do(users.update, OPERATOR, "off@example.com", None, True)
            with pytest.raises(Conflict, match="is the last owner"):
                await leave(w, OWNER)
            await w.user("ann@example.com", "owner")
            # Both leave at once: one stays.
            async with w.begin() as connection:
                await leaving(connection, OWNER)
                second = asyncio.create_task(leave(w, "ann@example.com"))
                await w.blocked()
            with pytest.raises(Conflict, match="is the last owner"):
                await second
            left = "SELECT count(*) FROM users WHERE role = 'owner' AND NOT disabled AND NOT service_account AND "
            assert await w.value(left + "deleted_at IS NULL") == 1

    run(test())


def test_deleting_ends_keys_and_sessions_and_keeps_the_name(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            user = await w.user("ann@example.com")
            await w.key(user)
            await w.do(w.sessions.begin, user, "password", "")
            assert await w.do(users.delete, OPERATOR, "ann@example.com") == str(user)
            (row,) = await w.rows("SELECT email, password, deleted_at FROM users WHERE id = $1", user)
            assert (row["email"], row["password"], row["deleted_at"] is None) == ("ann@example.com", None, False)
            assert await w.value("SELECT count(*) FROM api_keys WHERE revoked_at IS NULL") == 0
            assert await w.value("SELECT count(*) FROM sessions WHERE revoked_at IS NULL") == 0
            with pytest.raises(NotFound):
                await w.do(users.delete, OPERATOR, str(user))
            with pytest.raises(NotFound):
                await w.key(user)

    run(test())


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"email": "ann"}, "email"),
        ({"email": ""}, "email"),
        ({"email": "a b@example.com"}, "email"),
        ({"email": "a@b@c"}, "email"),
        ({"email": "x" * 65 + "@example.com"}, "email"),
        ({"email": "a@" + "x" * 255}, "email"),
        ({"email": "a\x00@example.com"}, "email"),
        ({"email": "a@example.com", "role": "root"}, "role"),
        ({"email": "a@example.com", "role": ""}, "role"),
        ({"email": "a@example.com", "role": "OWNER"}, "role"),
        ({"email": "ann@example.com", "password": None}, "email"),
        ({"email": "-x", "password": None}, "email"),
        ({"email": str(UUID(int=5)), "password": None}, "email"),
    ],
)
def test_wrong_users(shared: Target, pki: Layout, values: dict[str, Any], param: str) -> None:
    async def test() -> None:
        async with world(shared, pki) as w:
            wanted = {"organisation": "", "role": "member", "password": "hash", **values}
            with pytest.raises(InvalidRequest) as caught:
                await w.do(users.create, OPERATOR, **wanted)
            assert caught.value.param == param

    run(test())


def test_service_accounts_have_no_password(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.service("robot")
            with pytest.raises(InvalidRequest, match="is a service account"):
                await w.do(users.reset_password, OPERATOR, "robot", "hash")
            await w.do(users.unlock, OPERATOR, "robot")
            assert not await w.audited("user.unlock")

    run(test())


# --- organisations ---------------------------------------------------------------


def test_organisations_are_made_changed_and_listed(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            made = await w.do(organisations.create, OPERATOR, "Ünion & Co")
            policy = Content(True, 30, [r"\d{16}"])
            changed = await w.do(organisations.update, OPERATOR, made.id, "Union", True, policy)
            assert (changed.name, changed.suspended, changed.content) == ("Union", True, policy)
            same = await w.do(organisations.update, OPERATOR, "UNION", None, None, None)
            assert same == changed
            (row,) = await w.audited("organisation.update")
            assert '"from": "Ünion & Co"' in row["detail"]
            with pytest.raises(Conflict):
                await w.do(organisations.update, OPERATOR, "union", "DEFAULT", None, None)
            page = await w.do(organisations.listing, OPERATOR, "", 1, "")
            assert [item.name for item in page.data] == ["default"]
            page = await w.do(organisations.listing, OPERATOR, "", 1, page.next)
            assert ([item.name for item in page.data], page.next) == (["Union"], "")
            with pytest.raises(NotFound, match="there is no organisation"):
                await w.do(organisations.update, OPERATOR, "nowhere", None, None, None)

    run(test())


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (Content(True, 0, []), "content.retention_days"),
        (Content(True, 4000, []), "content.retention_days"),
        (Content(True, 1, ["("]), "content.redact[0]"),
        (Content(True, 1, ["a", "(a*)*b"]), "content.redact[1]"),
        (Content(True, 1, ["a\x00"]), "content.redact"),
    ],
)
def test_policies_that_cannot_be_followed(shared: Target, pki: Layout, content: Content, param: str) -> None:
    async def test() -> None:
        async with world(shared, pki) as w:
            with pytest.raises(InvalidRequest) as caught:
                await w.do(organisations.update, OPERATOR, "default", None, None, content)
            assert caught.value.param == param

    run(test())


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, str(UUID(int=3)), "a\nb", "a\x00"])
def test_wrong_names_of_organisations(shared: Target, pki: Layout, name: str) -> None:
    async def test() -> None:
        async with world(shared, pki) as w:
            with pytest.raises(InvalidRequest) as caught:
                await w.do(organisations.create, OPERATOR, name)
            assert caught.value.param == "name"

    run(test())


# --- audit, last use, purge ------------------------------------------------------


def test_the_audit_log_only_grows(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            for statement in ("UPDATE audit_log SET actor = 'nobody'", "DELETE FROM audit_log"):
                with pytest.raises(Exception, match="never changed or removed"):
                    await w.value(statement)
            assert await w.value("SELECT count(*) FROM audit_log") == 2

    run(test())


def test_an_act_that_fails_leaves_no_row(target: Target, pki: Layout) -> None:
    async def fails(connection: Any) -> None:
        await audit.record(connection, OPERATOR, "test", "x", None)
        raise RuntimeError

    async def test() -> None:
        async with world(target, pki) as w:
            with pytest.raises(RuntimeError):
                await w.do(fails)
            assert not await w.audited("test")

    run(test())


def test_the_audit_log_by_organisation_and_day(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            home = await w.value("SELECT id FROM organisations")
            today = datetime.now(UTC).date()
            await w.do(audit.record, OPERATOR, "test", "x" * 500, None, {"when": NOW})
            everything = await w.do(audit.entries, None, None, None, 10, None)
            assert [entry.action for entry in everything] == ["test", "user.create", "organisation.create"]
            assert len(everything[0].target) == 300
            assert (everything[0].actor, everything[0].address, everything[0].request_id) == (
                "root",
                "127.0.0.1",
                "request-1",
            )
            own = await w.do(audit.entries, home, today, today, 10, None)
            assert len(own) == 2
            assert len(await w.do(audit.entries, None, None, None, 1, int(everything[0].id))) == 1
            before = today - timedelta(days=1)
            assert await w.do(audit.entries, None, None, before, 10, None) == []
            assert await w.do(audit.entries, None, today + timedelta(days=1), None, 10, None) == []

    run(test())


def test_last_use_goes_forwards_in_steps_of_a_minute(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            key, _ = await w.key(await w.user("ann@example.com"))
            start = datetime(2026, 1, 1, tzinfo=UTC)

            async def used(seconds: int) -> datetime:
                await w.do(touch, {key: start + timedelta(seconds=seconds), uuid4(): start})
                found: datetime = await w.value("SELECT last_used_at FROM api_keys")
                return found - timedelta()

            assert await used(0) == start
            assert await used(59) == start
            assert await used(60) == start + timedelta(seconds=60)
            assert await used(-600) == start + timedelta(seconds=60)
            await w.do(touch, {})
            found = await asyncio.gather(*(used(60 * n) for n in range(2, 12)))
            assert max(found) == start + timedelta(seconds=660)

    run(test())


def test_most_uses_need_no_database(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            key, _ = await w.key(await w.user("ann@example.com"))
            uses, second = LastUses(w.pool), 1_000_000
            start = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) * second
            await uses.note([(key.bytes, start + 5), (key.bytes, start + 30 * second), (None, start + 99 * second)])
            assert await w.value("SELECT last_used_at = '2026-01-01 00:00:30+00' FROM api_keys")
            # What is not due does not even look for a connection.
            pool, uses._pool = uses._pool, None  # type: ignore[assignment]
            await uses.note([(key.bytes, start + 80 * second)])
            uses._pool = pool
            await uses.note([(key.bytes, start + 90 * second)])
            assert await w.value("SELECT last_used_at = '2026-01-01 00:01:30+00' FROM api_keys")
            await w.pool.close()
            await uses.note([(key.bytes, start + 900 * second)])

    run(test())


def test_purging_removes_what_ended_and_nothing_else(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            user = await w.user("ann@example.com")
            await w.do(w.sessions.begin, user, "password", "")
            await w.do(w.sessions.begin, user, "password", "")
            old = "now() - interval '2 days'"
            ended = "(SELECT id FROM sessions WHERE expires_at < now())"
            for statement in (
                f"INSERT INTO oidc_states VALUES (sha256('a'), 'x', {old}), (sha256('b'), 'x', now())",
                f"INSERT INTO login_attempts (account, address, failures, last_at) VALUES (sha256('a'), 'x', 1, {old})",
                "INSERT INTO login_attempts (account, address, failures) VALUES (sha256('b'), 'x', 1)",
                f"INSERT INTO known_addresses VALUES ('{user}', 'a', '2026-01-01'), ('{user}', 'b', {old})",
                f"INSERT INTO signing_keys VALUES ('old', '{{}}', now(), {old})",
                f"UPDATE sessions s SET expires_at = {old} WHERE id::text = (SELECT min(id::text) FROM sessions)",
                f"UPDATE refresh_tokens SET expires_at = {old} WHERE session_id = {ended}",
            ):
                await w.value(statement)
            assert await purge.purge(w.pool) == 6
            assert await purge.purge(w.pool) == 0
            for table in (
                "oidc_states",
                "login_attempts",
                "known_addresses",
                "signing_keys",
                "sessions",
                "refresh_tokens",
            ):
                assert await w.value(f"SELECT count(*) FROM {table}") == 1, table

    run(test())


def test_sessions_of_one_user_end_together(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            ann, bob = await w.user("ann@example.com"), await w.user("bob@example.com")
            for user in (ann, ann, bob):
                await w.do(w.sessions.begin, user, "password", "")
            assert await w.do(sessions.end_all, ann) == 2
            assert await w.value("SELECT count(*) FROM sessions WHERE revoked_at IS NULL") == 1

    run(test())
