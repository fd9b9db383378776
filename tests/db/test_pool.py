"""Targets, TLS and the pool, on real servers."""

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import asyncpg
import pytest

from helixflow import cli, config
from helixflow.config import DatabaseConfig
from helixflow.db.errors import (
    DatabaseRefusedError,
    DatabaseUnavailableError,
    DatabaseVersionError,
    PoolExhaustedError,
    UrlError,
)
from helixflow.db.pool import Pool, tls_of
from helixflow.db.target import Target, check_version, connect, tls_context
from helixflow.errors import ConfigError
from helixflow.pki import issue
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout
from helixflow.secret import Secret

from .support import OPERATOR, PASSWORD, Server, options


async def _use(options: DatabaseConfig, target: Target, *queries: str) -> list[object]:
    pool = await Pool.open(options, target, name="test")
    try:
        async with pool.acquire() as connection:
            return [await connection.fetchval(query) for query in queries]
    finally:
        await pool.close()


def test_settings_reach_the_server(server: Server) -> None:
    queries = [f"SHOW {name}" for name in ("statement_timeout", "search_path", "timezone", "application_name")]
    found = asyncio.run(_use(options(statement_timeout_ms=1500), server.database(), *queries))
    assert found == ["1500ms", "helixflow", "UTC", "test"]


def test_statement_timeout(server: Server) -> None:
    with pytest.raises(asyncpg.QueryCanceledError, match="statement timeout"):
        asyncio.run(_use(options(statement_timeout_ms=50), server.database(), "SELECT pg_sleep(20)"))


def test_an_exhausted_pool_says_so_and_recovers(wheel: Server) -> None:
    target = wheel.database()

    async def exhaust() -> None:
        pool = await Pool.open(options(pool_max=1, acquire_timeout_ms=50), target, name="test")
        async with pool.acquire():
            with pytest.raises(PoolExhaustedError, match=r"all 1 connections were busy for 50 ms"):
                async with pool.acquire():
                    pytest.fail("there is only one connection")
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        await pool.close()

    asyncio.run(exhaust())


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailableError, match="cannot be reached"):
        asyncio.run(_use(options(), Target(str(tmp_path), 5432, "u", "d"), "SELECT 1"))


def test_a_silent_server_is_given_up() -> None:
    async def attempt() -> None:
        left = asyncio.Event()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            left.set()

        silent = await asyncio.start_server(listen, "127.0.0.1", 0)
        target = Target("127.0.0.1", silent.sockets[0].getsockname()[1], "u", "d", Secret(PASSWORD))
        with pytest.raises(DatabaseUnavailableError, match="no answer in time"):
            await Pool.open(options(tls="disable", connect_timeout_ms=50), target, name="test")
        await left.wait()
        silent.close()

    asyncio.run(attempt())


def test_tls_is_verified(debian: Server, pki: Layout) -> None:
    trusted = options(tls_ca=pki.ca_cert)
    query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    for host in ("127.0.0.1", "localhost"):
        assert asyncio.run(_use(trusted, debian.tcp(OPERATOR, "postgres", host=host), query)) == [True]


def test_another_authority_is_refused(debian: Server, tmp_path: Path) -> None:
    other = Layout(tmp_path / "certs")
    other.directory.mkdir()
    issue.init(other, key_type=KeyType.ECDSA_P256)
    target = debian.tcp(OPERATOR, "postgres")
    with pytest.raises(DatabaseRefusedError, match="certificate was refused"):
        asyncio.run(_use(options(tls_ca=other.ca_cert), target, "SELECT 1"))
    with pytest.raises(DatabaseRefusedError, match="certificate was refused"):
        asyncio.run(_use(options(), target, "SELECT 1"))


def test_another_name_is_refused(debian: Server, pki: Layout) -> None:
    target = debian.tcp(OPERATOR, "postgres", host="127.0.0.2")
    asyncio.run(debian.execute("SELECT 1"))
    context = tls_context(target, "verify-full", pki.ca_cert)
    # The server listens on 127.0.0.1; a relay makes it answer under a name that its certificate does not hold.

    async def attempt() -> None:
        left = asyncio.Event()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", debian.port)

            async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    sink.write(data)
                sink.close()

            await asyncio.gather(copy(reader, back), copy(there, writer), return_exceptions=True)
            back.close()
            writer.close()
            left.set()

        served = await asyncio.start_server(relay, "127.0.0.2", 0)
        moved = replace(target, port=served.sockets[0].getsockname()[1])
        with pytest.raises(DatabaseRefusedError, match=r"certificate was refused: IP address mismatch"):
            await connect(moved, tls=context)
        await left.wait()
        served.close()

    asyncio.run(attempt())


def test_a_server_without_tls_is_refused(wheel: Server, pki: Layout) -> None:
    target = wheel.tcp(OPERATOR, "postgres")
    with pytest.raises(DatabaseRefusedError, match="does not speak TLS"):
        asyncio.run(_use(options(tls_ca=pki.ca_cert), target, "SELECT 1"))
    assert asyncio.run(_use(options(tls="disable"), target, "SELECT 1")) == [1]


def test_tls_off_only_on_this_machine() -> None:
    target = Target.parse("postgresql://u:p@db.example.com/d")
    with pytest.raises(DatabaseRefusedError, match="only for a loopback address"):
        tls_of(options(tls="disable"), target)
    problem = r"database.tls: db.example.com \(database.url\) is no loopback address"
    with pytest.raises(ConfigError, match=problem):
        config.load(None, {"HELIX_DATABASE_URL": "postgresql://u:p@db.example.com/d", "HELIX_DATABASE_TLS": "disable"})


def test_a_file_that_is_no_ca(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    target = Target.parse("postgresql://u:p@db.example.com/d")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(DatabaseRefusedError, match=rf"database.tls_ca: .*{name}"):
            tls_of(options(tls_ca=tmp_path / name), target)


def test_passwords_stay_out_of_messages(server: Server, pki: Layout) -> None:
    wrong = server.tcp(OPERATOR, "postgres", password="wrong-secret")
    chosen = options(tls_ca=pki.ca_cert) if server.tls else options(tls="disable")
    with pytest.raises(DatabaseRefusedError, match="password authentication failed") as caught:
        asyncio.run(_use(chosen, wrong, "SELECT 1"))
    assert "wrong-secret" not in str(caught.value)
    assert "wrong-secret" not in repr(wrong) + str(wrong)
    missing = server.tcp(OPERATOR, "no_such_database")
    with pytest.raises(DatabaseRefusedError, match="no_such_database"):
        asyncio.run(_use(chosen, missing, "SELECT 1"))


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:hush@h/d",
        "postgresql://u:hush@h:port/d",
        "postgresql://u:hush@h",
        "postgresql://:hush@h/d",
        "postgresql://u:hush@h1,h2/d",
        "postgresql://u:hush@h/d?sslmode=disable",
        "postgresql://u:hush@h/d?host=/run",
        "postgresql://u:hush@[::1/d",
    ],
)
def test_wrong_urls(url: str) -> None:
    with pytest.raises(UrlError) as caught:
        Target.parse(url)
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"database.url: .*database URL") as refused:
        config.load(None, {"HELIX_DATABASE_URL": url})
    assert "hush" not in str(refused.value)


def test_urls() -> None:
    target = Target.parse("postgresql://us%40er:p%2Fw@[::1]:6000/da%20ta")
    assert target == Target("::1", 6000, "us@er", "da ta", Secret("p/w"))
    assert target.local
    assert not target.socket
    assert target.dsn() == "postgresql://us%40er@[::1]:6000/da%20ta"
    local = Target("/run/my pg", 6001, "u", "d")
    assert Target.parse(local.dsn()) == local
    assert local.socket


def test_the_configuration_masks_urls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HELIX_DATABASE_URL", "postgresql://u:hush@h/d")
    assert cli.main(["config", "check", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["database"]["url"] == "***"
    assert json.loads(out)["database"]["admin_url"] == ""
    assert "hush" not in out


@pytest.mark.parametrize(("major", "fits"), [(14, False), (15, True), (18, True), (19, False)])
def test_versions(major: int, fits: bool) -> None:
    class Connection:
        def get_server_version(self) -> object:
            return SimpleNamespace(major=major)

    if fits:
        asyncio.run(check_version(Connection()))
    else:
        with pytest.raises(DatabaseVersionError, match=rf"PostgreSQL {major}; HelixFlow works with 15 to 18"):
            asyncio.run(check_version(Connection()))
