"""Migrations: each exactly once, and every refusal."""

import asyncio
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from helixflow.db import migrate
from helixflow.db.errors import MigrationError
from helixflow.db.migrate import FOLDER, LOCK, Applied, Migration
from helixflow.db.target import Target, connect

from .support import Server

FIRST = migrate.read()[0]


def _more(*statements: str) -> list[Migration]:
    """The shipped first migration and others after it."""
    made = [Migration(n, f"step{n}", f"{n:064x}", sql) for n, sql in enumerate(statements, 2)]
    return [FIRST, *made]


async def _migrate(target: Target, files: list[Migration]) -> list[int]:
    connection = await connect(target)
    try:
        return [each.number for each in await migrate.migrate(connection, files)]
    finally:
        await connection.close()


async def _value(target: Target, query: str) -> object:
    connection = await connect(target)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def test_four_at_once_apply_each_once(server: Server) -> None:
    target = server.database()
    files = _more("CREATE TABLE helixflow.a (x int)", "INSERT INTO helixflow.a SELECT 1 FROM pg_sleep(0.2)")

    async def four() -> list[list[int]]:
        return await asyncio.gather(*(_migrate(target, files) for _ in range(4)))

    done = asyncio.run(four())
    assert sorted(number for each in done for number in each) == [1, 2, 3]
    assert asyncio.run(_value(target, "SELECT count(*) FROM helixflow.a")) == 1
    rows = asyncio.run(_value(target, "SELECT count(*) FROM helixflow.migrations"))
    assert rows == 3
    assert asyncio.run(_migrate(target, files)) == []


def test_four_processes_at_once(wheel: Server) -> None:
    target = wheel.database()
    script = textwrap.dedent(
        f"""
        import asyncio
        from helixflow.db import migrate
        from helixflow.db.target import Target, connect
        async def main():
            connection = await connect(Target.parse({target.dsn()!r}))
            print(len(await migrate.migrate(connection)))
            await connection.close()
        asyncio.run(main())
        """
    )
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(process.communicate()[0].strip() for process in started) == ["0", "0", "0", str(len(migrate.read()))]


def test_the_installation_has_an_identity(server: Server) -> None:
    target = server.database()
    asyncio.run(_migrate(target, [FIRST]))
    first = asyncio.run(_value(target, "SELECT installation FROM helixflow.meta"))
    asyncio.run(_migrate(target, [FIRST]))
    assert asyncio.run(_value(target, "SELECT installation FROM helixflow.meta")) == first
    ledger = asyncio.run(_ledger(target))
    assert [(row.number, row.name, row.sha256) for row in ledger] == [(1, "installation", FIRST.sha256)]
    assert ledger[0].applied_at


async def _ledger(target: Target) -> list[Applied]:
    connection = await connect(target)
    try:
        return await migrate.ledger(connection)
    finally:
        await connection.close()


def test_a_failed_migration_leaves_nothing(wheel: Server) -> None:
    target = wheel.database()
    files = _more("CREATE TABLE helixflow.half (x int); SELECT 1/0")
    with pytest.raises(MigrationError, match="0002_step2 failed, nothing of it stays: division by zero"):
        asyncio.run(_migrate(target, files))
    assert asyncio.run(_value(target, "SELECT to_regclass('helixflow.half')")) is None
    assert [row.number for row in asyncio.run(_ledger(target))] == [1]
    assert asyncio.run(_migrate(target, _more("CREATE TABLE helixflow.half (x int)"))) == [2]


def test_a_table_in_use_does_not_block_for_long(wheel: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    target = wheel.database()
    asyncio.run(_migrate(target, _more("CREATE TABLE helixflow.busy (x int)")))
    monkeypatch.setattr(migrate, "DDL_LOCK_MS", 50)

    async def attempt() -> None:
        reader = await connect(target)
        async with reader.transaction():
            await reader.execute("LOCK TABLE helixflow.busy IN ACCESS SHARE MODE")
            with pytest.raises(MigrationError, match="waited 50 ms for a table in use"):
                await _migrate(
                    target, _more("CREATE TABLE helixflow.busy (x int)", "ALTER TABLE helixflow.busy ADD y int")
                )
        await reader.close()

    asyncio.run(attempt())


def test_waiting_for_another_migrator_ends(wheel: Server) -> None:
    target = wheel.database()

    async def attempt() -> None:
        other, connection = await connect(target), await connect(target)
        await other.execute("SELECT pg_advisory_lock($1)", LOCK)
        with pytest.raises(MigrationError, match=r"has been migrating for 0.05 s"):
            await migrate.migrate(connection, wait_s=0.05)
        await other.close()
        assert await migrate.migrate(connection, wait_s=5)
        await connection.close()

    asyncio.run(attempt())


def test_a_role_without_rights_is_sent_to_setup(wheel: Server) -> None:
    target = wheel.database()
    asyncio.run(wheel.execute(f"ALTER DATABASE {target.database} OWNER TO helixflow_admin"))
    asyncio.run(wheel.execute(f"GRANT CONNECT ON DATABASE {target.database} TO helixflow"))
    with pytest.raises(MigrationError, match="helixflow db setup"):
        asyncio.run(_migrate(target, [FIRST]))


def test_a_changed_file_is_refused() -> None:
    applied = [Applied(1, "installation", "0" * 64)]
    with pytest.raises(MigrationError, match="0001_installation was changed after it had been applied"):
        migrate.pending([FIRST], applied)


def _newer(*readers: int | None) -> list[Applied]:
    later = [Applied(n, "later", "2" * 64, min_reader=reader) for n, reader in enumerate(readers, 2)]
    return [Applied(1, FIRST.name, FIRST.sha256), *later]


def test_a_newer_database_that_only_has_more_is_run_on() -> None:
    assert migrate.pending([FIRST], _newer(1, 1)) == []


@pytest.mark.parametrize("readers", [(None,), (2,), (1, 2), (1, None, 1)])
def test_a_newer_database_is_refused(readers: tuple[int | None, ...]) -> None:
    with pytest.raises(MigrationError, match=r"0[0-9]+_later, which this release does not know and cannot run beside"):
        migrate.pending([FIRST], _newer(*readers))


def test_a_newer_database_of_which_something_known_was_changed_is_refused() -> None:
    applied = [Applied(1, "installation", "0" * 64), Applied(2, "later", "2" * 64, min_reader=1)]
    with pytest.raises(MigrationError, match="was changed after it had been applied"):
        migrate.pending([FIRST], applied)
    with pytest.raises(MigrationError, match="lacks migration 0002"):
        migrate.pending([FIRST], [*_newer(1)[:1], Applied(3, "later", "2" * 64, min_reader=1)])


@pytest.mark.parametrize(
    "line", ["-- min-reader: 0000", "-- min-reader: 0002", "-- min-reader: 0001\n-- min-reader: 0001"]
)
def test_a_file_names_its_readers_once_and_among_those_before_it(tmp_path: Path, line: str) -> None:
    (tmp_path / "0001_a.sql").write_text(f"{line}\nCREATE TABLE t (x int);\n")
    with pytest.raises(MigrationError, match=r"0001_a\.sql: `-- min-reader: NNNN` names, once"):
        migrate.read(tmp_path)


def test_every_migration_says_which_releases_it_leaves_running() -> None:
    """The last release had four. See the first lines of `helixflow/db/migrate.py`."""
    assert [each.name for each in migrate.read() if each.number > 4 and each.min_reader is None] == []


def test_an_old_release_runs_on_what_a_new_one_has_made(server: Server) -> None:
    target, files = server.database(), migrate.read()
    reader = len(files)
    more = "CREATE TABLE helixflow.future (x int)"
    future = [
        Migration(reader + 1, "future", "f" * 64, more, min_reader=reader),
        Migration(reader + 2, "contract", "e" * 64, "DROP TABLE helixflow.future", min_reader=reader + 1),
    ]
    assert asyncio.run(_migrate(target, [*files, future[0]]))[-1] == reader + 1
    assert asyncio.run(_migrate(target, files)) == []
    assert asyncio.run(_ledger(target))[-1].min_reader == reader
    assert asyncio.run(_migrate(target, [*files, *future])) == [reader + 2]
    with pytest.raises(MigrationError, match="_contract, which this release does not know"):
        asyncio.run(_migrate(target, files))
    assert asyncio.run(_migrate(target, [*files, future[0]])) == [], "the release that knew of the table's end"


def test_a_hole_in_the_ledger_is_refused() -> None:
    with pytest.raises(MigrationError, match="lacks migration 0001 but holds 0002_step2"):
        migrate.pending(_more(""), [Applied(2, "step2", f"{2:064x}")])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0002_a.sql"], "0002_a stands where 0001 should"),
        (["0001_a.sql", "0003_b.sql"], "0003_b stands where 0002 should"),
        (["0001_a.sql", "0001_b.sql"], "0001_b stands where 0002 should"),
        (["1_a.sql"], "1_a.sql is not the name of a migration"),
    ],
)
def test_wrong_names_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("SELECT 1;")
    with pytest.raises(MigrationError, match=message):
        migrate.read(tmp_path)


@pytest.mark.parametrize("statement", ["COMMIT;", "  begin ;", "START TRANSACTION;", "rollback work;"])
def test_transactions_inside_a_file_are_refused(tmp_path: Path, statement: str) -> None:
    (tmp_path / "0001_a.sql").write_text(f"CREATE TABLE t (x int);\n{statement}\n")
    with pytest.raises(MigrationError, match="begins or ends a transaction"):
        migrate.read(tmp_path)


def test_shipped_files_are_whole() -> None:
    files = migrate.read()
    assert len(files) == len(list(FOLDER.glob("*.sql")))
    assert files[0].name == "installation"


# --- from every earlier release, with data in it -----------------------------------------

UPTO = {each.number: each.name for each in migrate.read()}
HEAD = max(UPTO)
DATA = {
    "installation": "SELECT 1",
    "accounts": """
        INSERT INTO organisations (id, name, first) VALUES ('00000000-0000-4000-8000-000000000001', 'default', true);
        INSERT INTO users (id, organisation_id, email, role, password) VALUES (
            '00000000-0000-4000-8000-000000000002', '00000000-0000-4000-8000-000000000001', 'a@b', 'owner', 'argon2');
        INSERT INTO api_keys (user_id, digest, prefix, name, models, expires_at) VALUES
            ('00000000-0000-4000-8000-000000000002', sha256('key'), 'hf-abc', 'ci', '{gpt-4}', '2999-01-01');
        INSERT INTO sessions (id, user_id, method, address, expires_at) VALUES ('00000000-0000-4000-8000-000000000003',
            '00000000-0000-4000-8000-000000000002', 'password', '127.0.0.1', '2999-01-01');
        INSERT INTO refresh_tokens (digest, session_id, expires_at) VALUES
            (sha256('token'), '00000000-0000-4000-8000-000000000003', '2999-01-01');
        INSERT INTO signing_keys (kid, jwk, expires_at) VALUES ('k', '{"kty": "RSA"}', '2999-01-01');
        INSERT INTO login_failures (subject, failures) VALUES (sha256('a@b'), 3);
        INSERT INTO oidc_identities (issuer, subject, user_id) VALUES
            ('https://idp', 's', '00000000-0000-4000-8000-000000000002');
        INSERT INTO oidc_states (digest, redirect_uri, expires_at) VALUES
            (sha256('state'), 'https://here', '2999-01-01');
        INSERT INTO audit_log (actor, action, target, address, request_id, detail) VALUES
            ('a@b', 'key.create', 'ci', '127.0.0.1', 'req-1', '{"models": ["gpt-4"]}');
    """,
    "limits": """
        INSERT INTO limits (subject, requests_per_minute) VALUES ('user:00000000-0000-4000-8000-000000000002', 60);
        INSERT INTO prices (model, prompt, cached, completion) VALUES ('gpt-4', 3, 1, 6);
        INSERT INTO limit_budgets (subject, metric, window_start, used, lapses_ms) VALUES
            ('user:00000000-0000-4000-8000-000000000002', 4, 1700000000, 42, 9999999999999);
    """,
    "readers": "SELECT 1",
    "ledger": """
        SELECT requests_partition('2026-11-01');
        INSERT INTO requests (id, at, sequence, status, hash, gateway, prompt_tokens, cached_tokens, completion_tokens,
            queue_us, first_token_us, total_us, cost, model, endpoint, finish, error, client, request_id) VALUES
            (gen_random_uuid(), '2026-11-25', 1, 200, sha256('row'), gen_random_uuid(), 1, 0, 2, 3, 4, 5, 6, 'gpt-4',
            '/v1/chat/completions', 'stop', '', '127.0.0.1', 'req-2');
        INSERT INTO ledger_days (day, sequence, hash, seal) VALUES ('2026-11-25', 1, sha256('row'), sha256('seal'));
    """,
    "new_keys": "SELECT 1",
    "oidc_ties": "SELECT 1",
    "second_factor": """
        INSERT INTO second_factors (user_id, secret, confirmed_at) VALUES
            ('00000000-0000-4000-8000-000000000002', 'sealed', now());
        INSERT INTO recovery_codes (digest, user_id) VALUES
            (sha256('code'), '00000000-0000-4000-8000-000000000002');
    """,
    "client_certificates": "UPDATE api_keys SET certificate = 'spiffe://a/b', certificate_digest = sha256('c')",
    "lost_pepper": "UPDATE ledger_days SET lost_sequence = 1; UPDATE audit_head SET lost_sequence = 1",
    "login": """
        INSERT INTO login_attempts (account, address, failures) VALUES (sha256('a@b'), '192.0.2.1', 3);
        INSERT INTO known_addresses (user_id, address) VALUES ('00000000-0000-4000-8000-000000000002', '192.0.2.1');
    """,
    "ceilings": """
        UPDATE api_keys SET role = 'viewer' WHERE revoked_at IS NULL AND NOT development;
        UPDATE limits SET set_rank = 'operator';
    """,
    "domains": "UPDATE organisations SET domains = '{example.com}'",
    "seals": """
        UPDATE meta SET audit_legacy = 1;
        INSERT INTO audit_chain VALUES (1, 1, sha256('entry'));
        INSERT INTO audit_head (sequence, hash, dropped_sequence, dropped_hash, seal)
            VALUES (1, sha256('entry'), 0, '', sha256('seal'));
        INSERT INTO ledger_sealed VALUES ('2026-11-25', 1, sha256('row'));
        INSERT INTO ledger_checkpoint (number, at, audit_sequence, audit_hash, signature)
            VALUES (1, now(), 1, sha256('entry'), 'x');
    """,
}
"""What a release with the migration of this name may have written. A new migration brings its own rows."""


async def _rows(target: Target) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table of data."""
    connection = await connect(target)
    try:
        tables = await connection.fetch(
            "SELECT relname FROM pg_class WHERE relnamespace = 'helixflow'::regnamespace AND relkind IN ('r', 'p') "
            "AND NOT relispartition AND relname <> 'migrations'"
        )
        query = "SELECT coalesce(jsonb_agg(t ORDER BY t::text), '[]') FROM helixflow.{} t"
        return {name: json.loads(await connection.fetchval(query.format(name))) for (name,) in tables}
    finally:
        await connection.close()


async def _schema(target: Target) -> list[str]:
    """Columns, constraints, indexes, triggers and functions; without partitions: the service makes them."""
    connection = await connect(target)
    try:
        rows = await connection.fetch(
            """
            WITH tables AS (
                SELECT oid, relname FROM pg_class WHERE relnamespace = 'helixflow'::regnamespace AND NOT relispartition
            )
            SELECT format('%s.%s %s %s %s', table_name, column_name, data_type, is_nullable, column_default)
                FROM information_schema.columns JOIN tables ON relname = table_name WHERE table_schema = 'helixflow'
            UNION ALL SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(c.oid)
                FROM pg_constraint c JOIN tables t ON t.oid = conrelid
            UNION ALL SELECT indexdef FROM pg_indexes JOIN tables ON relname = tablename WHERE schemaname = 'helixflow'
            UNION ALL SELECT pg_get_triggerdef(g.oid) FROM pg_trigger g JOIN tables t ON t.oid = tgrelid
                WHERE NOT tgisinternal
            UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'helixflow'::regnamespace
            ORDER BY 1
            """
        )
        return [text for (text,) in rows]
    finally:
        await connection.close()


async def _fill(target: Target, number: int) -> None:
    connection = await connect(target)
    try:
        await connection.execute("SET search_path = helixflow")
        await connection.execute(DATA[UPTO[number]])
    finally:
        await connection.close()


@pytest.mark.parametrize("number", range(1, HEAD))
def test_from_every_earlier_release_with_its_data(server: Server, number: int) -> None:
    target, fresh = server.database(), server.database()
    files = migrate.read()

    async def old_release() -> None:
        assert await _migrate(target, files[:number]) == list(range(1, number + 1))
        for each in range(1, number + 1):
            await _fill(target, each)

    asyncio.run(old_release())
    before = asyncio.run(_rows(target))
    assert all(before.values()) or number >= 3, "no table of this release is empty"
    assert asyncio.run(_migrate(target, files)) == list(range(number + 1, HEAD + 1))
    after = asyncio.run(_rows(target))
    for table, rows in before.items():
        kept = [{name: row[name] for name in old} for old, row in zip(rows, after[table], strict=True)]
        assert kept == rows, table
    # What comes of it is what a fresh installation has, and takes the rows of today's release.
    assert asyncio.run(_migrate(fresh, files)) == list(range(1, HEAD + 1))
    assert asyncio.run(_schema(target)) == asyncio.run(_schema(fresh))
    for each in range(number + 1, HEAD + 1):
        asyncio.run(_fill(target, each))
