"""With the rights of the services nobody changes what is chained; with those of a reader, nothing at all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from helixflow import cli
from helixflow.auth import actors, audit
from helixflow.auth import service as auth_service
from helixflow.db import migrate, roles
from helixflow.db.embedded import READER_ROLE, ROLE, SERVICE_ROLE, Embedded
from helixflow.db.errors import DatabaseUnavailableError, MigrationError
from helixflow.db.place import Account, find_binaries
from helixflow.db.pool import Pool
from helixflow.db.target import Target, connect
from helixflow.ledger import maintenance
from helixflow.ledger.faults import Report
from helixflow.ledger.record import encode
from helixflow.ledger.sealer import Sealer
from helixflow.ledger.seals import SealKeys
from helixflow.ledger.verify import verify
from helixflow.ledger.writer import Writer
from tests.ledger.support import DAY_US, NOON_US, PEPPER_KEY, ledger_options, row

from .support import OPERATOR, Loop, Server, folder, options

ADA = actors.operator("ada", "10.0.0.1", "r-1")
OLD_US = NOON_US - 100 * DAY_US
NOW = date(2026, 3, 17)

ATTACKS = (
    "UPDATE requests SET cost = 0",
    "DELETE FROM requests",
    "DELETE FROM requests_2026_03",
    "INSERT INTO requests_2026_03 SELECT * FROM requests LIMIT 1",
    "TRUNCATE requests",
    "DROP TABLE requests_2026_03",
    "DROP TABLE requests",
    "ALTER TABLE requests DETACH PARTITION requests_2026_03",
    "ALTER TABLE requests ADD COLUMN x int",
    "CREATE TABLE helixflow.mine PARTITION OF requests DEFAULT",
    "UPDATE audit_log SET target = ''",
    "DELETE FROM audit_log",
    "TRUNCATE audit_log",
    "ALTER TABLE audit_log DISABLE TRIGGER USER",
    "ALTER TABLE audit_log DISABLE TRIGGER ALL",
    "DROP TRIGGER audit_log_is_append_only ON audit_log",
    "ALTER TABLE audit_log OWNER TO helixflow_service",
    "UPDATE audit_chain SET hash = ''",
    "DELETE FROM audit_chain",
    "TRUNCATE audit_chain",
    "DELETE FROM audit_head",
    "TRUNCATE audit_head",
    "DELETE FROM ledger_days",
    "TRUNCATE ledger_days",
    "DELETE FROM ledger_sealed",
    "TRUNCATE ledger_sealed",
    "DELETE FROM ledger_checkpoint",
    "TRUNCATE usage_daily",
    "DROP TABLE usage_daily",
    "UPDATE meta SET audit_legacy = 1000000",
    "UPDATE meta SET installation = gen_random_uuid()",
    "DELETE FROM meta",
    "INSERT INTO migrations (number, name, sha256, duration_ms) VALUES (99, 'x', repeat('0', 64), 0)",
    "CREATE TABLE helixflow.mine (x int)",
    "CREATE FUNCTION helixflow.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION helixflow.refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'",
    "ALTER FUNCTION helixflow.requests_drop SECURITY INVOKER",
    "DROP SCHEMA helixflow CASCADE",
    "ALTER SCHEMA helixflow RENAME TO gone",
    "GRANT ALL ON audit_log TO helixflow_service; DELETE FROM audit_log",
    "SET ROLE helixflow",
    "SET session_replication_role = replica",
    "SELECT helixflow.requests_drop(date_trunc('month', now())::date)",
    "SELECT helixflow.requests_drop('2026-03-02')",
    "SELECT helixflow.requests_drop('2026-03-01')",  # its heads do not say so
    "SELECT helixflow.audit_prune(2)",
    "UPDATE audit_head SET dropped_sequence = 2; SELECT helixflow.audit_prune(2)",
    "SELECT set_config('helixflow.pruning', 'on', true); DELETE FROM audit_log",
    "COPY requests TO PROGRAM 'true'",
)


@asynccontextmanager
async def opened(target: Target) -> AsyncIterator[Pool]:
    pool = await Pool.open(options(), target, name="roles-test")
    try:
        yield pool
    finally:
        await pool.close()


async def refused(connection: Any, statements: str) -> bool:
    """Whether the role lacks the right."""
    try:
        await connection.execute(statements)
    except asyncpg.InsufficientPrivilegeError:
        return True
    return False


def prepared(server: Server) -> Target:
    """A new database, migrated by its owner; how to connect as the services."""
    target = server.database()

    async def work() -> None:
        connection = await connect(target)
        assert await roles.upgrade(connection, SERVICE_ROLE, READER_ROLE)
        assert await roles.upgrade(connection, SERVICE_ROLE, READER_ROLE) == [], "putting grants right again is safe"
        await connection.close()

    asyncio.run(work())
    audit.seal_with(SealKeys.of(PEPPER_KEY).audit)
    return replace(target, user=SERVICE_ROLE)


async def live(pool: Pool, connection: Any) -> None:
    """What the services do with ledger and audit log, retention included."""
    rows = [row(at + n) for at in (OLD_US, NOON_US, NOON_US + DAY_US) for n in range(4)]
    writer = Writer(pool, PEPPER_KEY)
    assert await writer.append("s", [encode(each) for each in rows]) == (12, 0)
    assert await writer.append("s", [encode(each) for each in rows]) == (0, 12)
    async with connection.transaction():
        for number in range(4):
            await audit.record(connection, ADA, "key.create", f"{number}", None)
    sealer = Sealer(pool, PEPPER_KEY)
    await sealer.round(whole=True)
    assert await verify(connection, PEPPER_KEY) == Report(3, 12, [], 4, [])
    assert await maintenance.once(pool, ledger_options(keep_months=2), PEPPER_KEY, now=NOW)
    assert await maintenance.prune_audit(pool, PEPPER_KEY, 90) == 0
    await sealer.round()
    found = await verify(connection, PEPPER_KEY)
    assert (found.rows, found.entries, found.faults) == (8, 4, [])
    assert found.dropped == ["2025-11-21: rows 1 to 4"]


def test_the_services_do_their_work_and_nothing_else(server: Server) -> None:
    target = prepared(server)

    async def work() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            await live(pool, connection)
            for attack in ATTACKS:
                transaction = connection.transaction()
                await transaction.start()
                assert await refused(connection, attack), attack
                await transaction.rollback()
            found = await verify(connection, PEPPER_KEY)
            assert (found.rows, found.entries, found.faults) == (8, 4, [])
            # What the services may write is found all the same, when another's hand did it.
            await connection.execute("UPDATE ledger_days SET dropped_sequence = sequence, dropped_hash = hash")
            await connection.execute("SELECT helixflow.requests_drop('2026-03-01')")
            assert len((await verify(connection, PEPPER_KEY)).faults) >= 2

    asyncio.run(work())


def test_what_the_owner_does_for_the_services_is_not_led_astray(server: Server) -> None:
    """Objects of the caller's own that come first on its search path, and arguments that are none."""
    target = prepared(server)

    async def work() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            await connection.execute("CREATE TEMP TABLE pg_inherits (inhparent oid, inhrelid oid)")
            await connection.execute("CREATE TEMP TABLE pg_class AS SELECT * FROM pg_catalog.pg_class")
            await connection.execute(
                "CREATE FUNCTION pg_temp.to_char(date, text) RETURNS text LANGUAGE sql AS 'SELECT ''x; DROP TABLE y'''"
            )
            await connection.execute("SET search_path = pg_temp, helixflow, pg_catalog")
            assert await connection.fetchval("SELECT helixflow.requests_partition('2031-05-01')") is True
            owner = "SELECT tableowner FROM pg_catalog.pg_tables WHERE tablename = 'requests_2031_05'"
            assert await connection.fetchval(owner) == ROLE
            for month in ("2031-05-02", "1999-01-01", "2101-01-01", "infinity"):
                with pytest.raises(asyncpg.PostgresError):
                    await connection.execute(f"SELECT helixflow.requests_partition('{month}')")
            assert await connection.fetchval("SELECT helixflow.requests_drop('2020-01-01')") is False

    asyncio.run(work())


def test_a_reader_verifies_and_changes_nothing(server: Server) -> None:
    target = prepared(server)

    async def work() -> None:
        async with opened(target) as pool, pool.acquire() as connection:
            await live(pool, connection)
            await connection.execute("INSERT INTO organisations (name) VALUES ('x')")
        reader = await connect(replace(target, user=READER_ROLE), search_path="helixflow")
        try:
            found = await verify(reader, PEPPER_KEY)
            assert (found.rows, found.entries, found.faults) == (8, 4, [])
            assert await reader.fetchval("SELECT count(*) FROM usage_daily") == 3
            statements = (
                "SELECT * FROM users", "SELECT digest FROM api_keys", "SELECT * FROM refresh_tokens",
                "SELECT prompt FROM contents", "INSERT INTO audit_log DEFAULT VALUES",
                "UPDATE ledger_days SET day = day",
                "SELECT helixflow.requests_drop('2020-01-01')", "SELECT helixflow.requests_partition('2031-06-01')",
                *ATTACKS,
            )  # fmt: skip
            for statement in statements:
                assert await refused(reader, statement), statement
        finally:
            await reader.close()

    asyncio.run(work())


def test_a_cluster_of_an_earlier_release_gets_the_roles(loop: Loop) -> None:
    async def work(place: Path) -> None:
        server = Embedded(place / "postgres", settings={"fsync": "off"})
        await server.start()
        await server.stop()
        account = Account.find("nobody")
        lines = "".join(
            f"REVOKE ALL ON DATABASE helixflow FROM {role}\nDROP ROLE {role}\n" for role in (SERVICE_ROLE, READER_ROLE)
        )
        await server._single(account, find_binaries(account, server.directory), server.directory / "data", lines)
        await server.start()
        try:
            for user in (ROLE, SERVICE_ROLE, READER_ROLE):
                connection = await connect(replace(server.target, user=user))
                assert await connection.fetchval("SELECT current_user") == user
                await connection.close()
        finally:
            await server.stop()

    with folder() as place:
        loop.run(work(place))


# --- external servers ----------------------------------------------------------------


@pytest.fixture
def external(server: Server, monkeypatch: pytest.MonkeyPatch, pki: Any) -> Server:
    """With the environment of an operator, but for the URLs of services and owner."""
    monkeypatch.setenv("HELIX_DATABASE_ADMIN_URL", server.url(OPERATOR, "postgres"))
    if server.tls:
        monkeypatch.setenv("HELIX_DATABASE_TLS_CA", str(pki.ca_cert))
    else:
        monkeypatch.setenv("HELIX_DATABASE_TLS", "disable")
    return server


def _names(server: Server, name: str) -> tuple[str, str, str]:
    kind = "d" if server.tls else "w"
    return f"{name}_{kind}_service", f"{name}_{kind}_owner", f"{name}_{kind}"


async def _as(server: Server, user: str, database: str, pki: Any) -> Any:
    from helixflow.db.pool import tls_of

    target = server.tcp(user, database)
    chosen = options(tls_ca=pki.ca_cert) if server.tls else options(tls="disable")
    return await connect(target, tls=tls_of(chosen, target), search_path="helixflow")


def test_setup_with_an_owner(
    external: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pki: Any
) -> None:
    service, owner, database = _names(external, "apart")
    monkeypatch.setenv("HELIX_DATABASE_URL", external.url(service, database))
    monkeypatch.setenv("HELIX_DATABASE_OWNER_URL", external.url(owner, database))
    for _ in range(2):
        assert cli.main(["db", "setup"]) == 0
        assert "warning" not in capsys.readouterr().out

    async def early() -> None:
        connection = await _as(external, service, database, pki)
        with pytest.raises(MigrationError, match="helixflow db migrate"):
            await auth_service._bring_up_to_date(connection, embedded=False)
        with pytest.raises(DatabaseUnavailableError, match="helixflow db run"):
            await auth_service._bring_up_to_date(connection, embedded=True)
        await connection.close()

    asyncio.run(early())
    for _ in range(2):
        assert cli.main(["db", "migrate"]) == 0
    assert cli.main(["db", "status"]) == 0

    async def work() -> None:
        connection = await _as(external, service, database, pki)
        await auth_service._bring_up_to_date(connection, embedded=False)
        assert await roles.owned(connection) is False
        await connection.execute("INSERT INTO organisations (name) VALUES ('x')")
        for attack in ("DELETE FROM audit_log", "TRUNCATE requests", "CREATE TABLE helixflow.x ()", "CREATE SCHEMA x",
                       "CREATE TEMP TABLE x ()"):  # fmt: skip
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(attack)
        await connection.close()

    asyncio.run(work())


def test_one_role_becomes_two(
    external: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pki: Any
) -> None:
    service, owner, database = _names(external, "split")
    monkeypatch.setenv("HELIX_DATABASE_URL", external.url(service, database))
    assert cli.main(["db", "setup"]) == 0
    assert "HELIX_DATABASE_OWNER_URL" in capsys.readouterr().out

    async def alone() -> None:
        connection = await _as(external, service, database, pki)
        await auth_service._bring_up_to_date(connection, embedded=False)  # migrates, as it always did
        assert migrate.pending(migrate.read(), await migrate.ledger(connection)) == []
        assert await roles.owned(connection) is True
        await connection.execute("SELECT requests_partition('2026-03-01')")
        await connection.close()

    asyncio.run(alone())
    monkeypatch.setenv("HELIX_DATABASE_OWNER_URL", external.url(owner, database))
    for _ in range(2):
        assert cli.main(["db", "setup"]) == 0
        assert cli.main(["db", "migrate"]) == 0

    async def apart() -> None:
        connection = await _as(external, service, database, pki)
        assert await roles.owned(connection) is False
        owners = await connection.fetch(
            "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'helixflow'::regnamespace"
        )
        assert [each[0] for each in owners] == [owner]
        await connection.execute("INSERT INTO audit_log (actor, action, target, address, request_id, detail) "
                                 "VALUES ('a', 'b', '', '', '', '{}')")  # fmt: skip
        assert await connection.fetchval("SELECT requests_partition('2026-04-01')") is True
        for attack in ("DELETE FROM audit_log", "DROP TABLE requests_2026_03", "CREATE SCHEMA x"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(attack)
        await connection.close()

    asyncio.run(apart())


def test_the_clock_of_the_tests_is_right() -> None:
    assert datetime.now(UTC).date() > NOW, "the month of the tests must be old enough to be dropped"
