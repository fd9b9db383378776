"""The embedded server: who may connect, as whom it runs, and what is left when somebody is killed."""

import asyncio
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from helixflow import config
from helixflow.config import SuperviseConfig
from helixflow.db import place
from helixflow.db.embedded import ADMIN, READER_ROLE, SERVICE_ROLE, BoundedLog, Embedded
from helixflow.db.errors import (
    AlreadyRunningError,
    DatabaseRefusedError,
    DatabaseUnavailableError,
    EmbeddedError,
)
from helixflow.db.migrate import read
from helixflow.db.place import Account
from helixflow.db.target import Target, connect
from helixflow.secret import Secret
from helixflow.service import Service

from .support import ROOT, Loop, as_user, folder, wait_gone

needs_root = pytest.mark.skipif(not ROOT, reason="only root can give up its uid")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with folder() as path:
        yield path


@pytest.fixture(scope="module")
def embedded(loop: Loop, home: Path) -> Iterator[Embedded]:
    server = Embedded(home / "postgres")
    loop.run(server.start())
    yield server
    loop.run(server.stop())


@pytest.fixture(scope="module")
def environ(home: Path) -> dict[str, str]:
    """For `helixflow db ...` on a cluster of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HELIX_")}
    return {**clean, "HELIX_HOME": str(home / "state"), "HELIX_LOG_FORMAT": "json"}


def _run(environ: dict[str, str]) -> "tuple[subprocess.Popen[str], Target, int]":
    """`helixflow db run`: its process, how to connect, and the server's process id."""
    process = subprocess.Popen(
        [sys.executable, "-m", "helixflow", "db", "run"], env=environ, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    line = process.stdout.readline().strip()
    assert line.startswith("postgresql://helixflow@/helixflow?host="), line
    data = Path(environ["HELIX_HOME"]) / "postgres" / "data"
    return process, Target.parse(line), int((data / "postmaster.pid").read_text().splitlines()[0])


def _end(process: "subprocess.Popen[str]", number: signal.Signals) -> int:
    process.send_signal(number)
    status = process.wait(timeout=20)
    assert process.stdout
    process.stdout.close()
    return status


async def _query(target: Target, *statements: str) -> list[object]:
    connection = await connect(target)
    try:
        return [await connection.fetchval(statement) for statement in statements]
    finally:
        await connection.close()


@needs_root
def test_root_gives_up_its_uid_and_touches_only_the_data(embedded: Embedded, home: Path) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid
    status = Path(f"/proc/{embedded.pid}/status").read_text()
    assert f"Uid:\t{nobody}\t{nobody}\t{nobody}\t{nobody}" in status
    assert "Groups:\t \n" in status
    owners = {name: (embedded.directory / name).stat().st_uid for name in ("data", "run", "conf", "postgres.log")}
    assert owners == {"data": nobody, "run": nobody, "conf": 0, "postgres.log": 0}
    assert (home.stat().st_uid, home.stat().st_mode & 0o777) == (0, 0o711)
    assert (embedded.directory / "data").stat().st_mode & 0o777 == 0o700


def test_the_service_is_no_superuser_and_nobody_is_trusted(embedded: Embedded) -> None:
    rows = asyncio.run(
        _query(
            embedded.target,
            "SELECT rolsuper OR rolcreatedb OR rolcreaterole FROM pg_roles WHERE rolname = current_user",
            "SHOW listen_addresses",
            "SHOW password_encryption",
            "SHOW data_checksums",
            "SHOW server_encoding",
        )
    )
    assert rows == [False, "", "scram-sha-256", "on", "UTF8"]
    lines = (embedded.directory / "conf" / "pg_hba.conf").read_text().splitlines()[1:]
    assert [line.split()[-1] for line in lines] == ["map=helixflow", "scram-sha-256"]
    inside = (embedded.directory / "data" / "pg_hba.conf").read_text()
    assert not [line for line in inside.splitlines() if "trust" in line and not line.startswith("#")]


def test_no_tcp_port_is_open(embedded: Embedded) -> None:
    links = [str(link.readlink()) for link in Path(f"/proc/{embedded.pid}/fd").iterdir()]
    held = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    assert held
    assert not [row for row in rows if row[9] in held and row[3] == "0A"]


def test_the_superuser_cannot_connect(embedded: Embedded) -> None:
    with pytest.raises(DatabaseRefusedError, match=r"pg_hba\.conf"):
        asyncio.run(connect(replace(embedded.target, user=ADMIN)))


@needs_root
def test_other_accounts_are_refused(embedded: Embedded) -> None:
    async def attempt() -> None:
        await connect(embedded.target)

    with as_user("nobody"), pytest.raises(DatabaseRefusedError, match="Peer authentication failed"):
        asyncio.run(attempt())
    with as_user(54321), pytest.raises(DatabaseUnavailableError, match="Permission denied"):
        asyncio.run(attempt())


def test_a_second_starter_is_told_who_has_it(embedded: Embedded) -> None:
    with pytest.raises(AlreadyRunningError, match=rf"belongs to process {os.getpid()}"):
        asyncio.run(Embedded(embedded.directory).start())
    assert asyncio.run(_query(embedded.target, "SELECT 1")) == [1]


def test_two_starters_at_once(home: Path) -> None:
    async def both() -> None:
        servers = [Embedded(home / "race") for _ in range(2)]
        results = await asyncio.gather(*(server.start() for server in servers), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["AlreadyRunningError", "str"]
        for server in servers:
            await server.stop()

    asyncio.run(both())


def test_killed_server_recovers(environ: dict[str, str]) -> None:
    process, target, pid = _run(environ)
    asyncio.run(_query(target, "CREATE TABLE kept (x int)", "INSERT INTO kept VALUES (7)"))
    os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=20) == 70
    assert process.stdout
    process.stdout.close()
    process, target, _ = _run(environ)
    assert asyncio.run(_query(target, "SELECT x FROM kept", "DROP TABLE kept")) == [7, None]
    assert _end(process, signal.SIGTERM) == 0


def test_no_orphan_when_the_owner_is_killed(environ: dict[str, str]) -> None:
    process, _, pid = _run(environ)
    _end(process, signal.SIGKILL)
    # The next owner need not wait: it waits for the leftovers itself.
    process, _, second = _run(environ)
    assert wait_gone(pid)
    assert second != pid
    assert _end(process, signal.SIGINT) == 0
    assert wait_gone(second)


def test_a_stale_pid_file_with_a_live_pid_is_not_believed(environ: dict[str, str]) -> None:
    process, target, pid = _run(environ)
    file = Path(environ["HELIX_HOME"]) / "postgres" / "data" / "postmaster.pid"
    text = file.read_text()
    sockets = Path(target.host)
    assert _end(process, signal.SIGTERM) == 0
    with subprocess.Popen(["sleep", "60"]) as stranger:
        file.write_text(text.replace(str(pid), str(stranger.pid), 1))
        (sockets / ".s.PGSQL.5432.lock").write_text(f"{stranger.pid}\n")
        process, _, _ = _run(environ)
        assert stranger.poll() is None
        assert _end(process, signal.SIGTERM) == 0
        stranger.kill()


def test_a_server_started_by_hand_is_not_disturbed(embedded: Embedded) -> None:
    data = embedded.directory / "data"
    with pytest.raises(EmbeddedError, match=rf"process {embedded.pid} is a PostgreSQL on .* kill -INT"):
        place.clear_stale_pid(data, embedded.directory / "run")
    assert (data / "postmaster.pid").exists()


def test_an_interrupted_initdb_is_made_again(home: Path) -> None:
    directory = home / "interrupted"
    (directory / "data.new" / "base").mkdir(parents=True)
    if ROOT:
        directory.chmod(0o711)

    async def life() -> None:
        server = Embedded(directory)
        await server.start()
        assert await _query(server.target, "SELECT current_user") == ["helixflow"]
        await server.stop()

    asyncio.run(life())
    assert not (directory / "data.new").exists()


def test_a_long_path_gets_a_short_socket(home: Path) -> None:
    directory = home / ("long" * 30)

    async def life() -> str:
        server = Embedded(directory)
        await server.start()
        try:
            assert await _query(server.target, "SELECT 1") == [1]
            return server.target.host
        finally:
            await server.stop()

    host = Path(asyncio.run(life()))
    assert len(str(host)) < 60
    assert host.stat().st_mode & 0o777 == 0o700
    host.rmdir()


@needs_root
def test_a_folder_in_the_way_is_named() -> None:
    with folder() as outer:
        (outer / "shut").mkdir(mode=0o700)
        with pytest.raises(EmbeddedError, match=rf"may not pass {outer}/shut,.*chmod o\+x"):
            asyncio.run(Embedded(outer / "shut" / "postgres").start())
        assert (outer / "shut").stat().st_mode & 0o777 == 0o700


@needs_root
def test_root_and_unknown_accounts_are_refused() -> None:
    with pytest.raises(EmbeddedError, match="refuses to run as root"):
        Account.find("root")
    with pytest.raises(EmbeddedError, match="no account 'no-such-account'"):
        Account.find("no-such-account")


@needs_root
def test_data_of_another_account_are_refused(home: Path) -> None:
    (home / "foreign" / "data").mkdir(parents=True)
    with pytest.raises(EmbeddedError, match="belongs to uid 0, but PostgreSQL runs as nobody"):
        asyncio.run(Embedded(home / "foreign").start())


def test_data_of_another_version_are_refused(home: Path) -> None:
    directory = home / "older"
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "PG_VERSION").write_text("12\n")
    if ROOT:
        Account.find("nobody").own(directory / "data")
    with pytest.raises(EmbeddedError, match="made by PostgreSQL 12, and the binaries are PostgreSQL 18"):
        asyncio.run(Embedded(directory).start())


def test_a_failed_start_says_what_the_server_said(home: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"(?s)ended \(status 1\).*no_such_parameter"):
        asyncio.run(Embedded(home / "wrong", settings={"no_such_parameter": "1"}).start())


def test_unreachable_binaries_are_copied(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = replace(Account.find("nobody"), drop=True)
    monkeypatch.setattr(Account, "closed_parent", lambda self, path: Path("/root"))
    binaries = place.find_binaries(account, home / "copied")
    assert binaries.is_relative_to(home / "copied" / "binaries")
    answer = subprocess.run([binaries / "initdb", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("initdb (PostgreSQL) 18")
    monkeypatch.undo()

    async def life() -> None:
        server = Embedded(home / "copied", binaries=binaries)
        await server.start()
        await server.stop()

    (home / "copied").chmod(0o711 if ROOT else 0o700)
    asyncio.run(life())


def test_the_log_is_bounded(tmp_path: Path) -> None:
    sink = BoundedLog(tmp_path / "log", limit=1000)
    for _ in range(100):
        sink.write(b"x" * 99 + b"\n")
    sink.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())


def test_a_port_with_passwords_only(loop: Loop, home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def life() -> None:
        server = Embedded(home / "race", settings={"listen_addresses": "127.0.0.1", "port": str(port)})
        await server.start()
        try:
            with pytest.raises(DatabaseRefusedError, match="password authentication failed"):
                await connect(Target("127.0.0.1", port, "helixflow", "helixflow", Secret("guess")))
        finally:
            await server.stop()

    asyncio.run(life())


def test_where_the_data_are(tmp_path: Path) -> None:
    given = config.load(None, {"HELIX_HOME": str(tmp_path)})
    assert given.database.directory == tmp_path / "postgres"
    named = config.load(None, {"HELIX_HOME": str(tmp_path), "HELIX_DATABASE_DIRECTORY": "/srv/pg"})
    assert named.database.directory == Path("/srv/pg")
    expected = Path("/var/lib/helixflow/postgres") if ROOT else config.default_home({}) / "postgres"
    assert config.load(None, {}).database.directory == expected


def test_a_supervisor_can_keep_it(environ: dict[str, str]) -> None:
    async def life() -> None:
        service = Service("database", "db run", SuperviseConfig())
        service.environ = environ
        target = Target.parse(await service.start())
        assert await _query(target, "SELECT current_database()") == ["helixflow"]
        await service.stop(20)

    asyncio.run(life())


def test_commands_start_it_when_it_does_not_run(environ: dict[str, str], home: Path) -> None:
    environ = {**environ, "HELIX_HOME": str(home / "commands")}

    def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-m", "helixflow", "db", *arguments]
        return subprocess.run(words, env=environ, capture_output=True, text=True, check=False)

    before = command("status", "--json")
    names = [f"{each.number:04}_{each.name}" for each in read()]
    assert (before.returncode, json.loads(before.stdout)["pending"]) == (1, names)
    assert command("migrate").stdout == "".join(f"applied {name}\n" for name in names)
    process, _, _ = _run(environ)
    assert command("migrate").stdout.startswith("nothing to do")
    assert _end(process, signal.SIGTERM) == 0
    after = command("status", "--json")
    status = json.loads(after.stdout)
    assert (after.returncode, status["pending"], status["embedded"]) == (0, [], True)
    assert [row["number"] for row in status["applied"]] == list(range(1, len(names) + 1))
    assert "PostgreSQL 18" in command("status").stdout


def test_it_is_migrated_before_it_is_ready_and_the_services_own_nothing(environ: dict[str, str], home: Path) -> None:
    environ = {**environ, "HELIX_HOME": str(home / "fresh")}
    process, target, _ = _run(environ)
    try:
        # What the services find, at once: the whole schema, of somebody else.
        found = asyncio.run(
            _query(
                replace(target, user=SERVICE_ROLE),
                "SELECT max(number) FROM helixflow.migrations",
                "SELECT count(*) FROM pg_class WHERE pg_get_userbyid(relowner) = current_user",
                "SELECT has_table_privilege('helixflow.audit_log', 'UPDATE, DELETE, TRUNCATE')",
                "SELECT has_table_privilege('helixflow.sessions', 'INSERT')",
            )
        )
        assert found == [read()[-1].number, 0, False, True]
        reader = asyncio.run(_query(replace(target, user=READER_ROLE), "SELECT count(*) FROM helixflow.audit_log"))
        assert reader == [0]
    finally:
        assert _end(process, signal.SIGTERM) == 0
