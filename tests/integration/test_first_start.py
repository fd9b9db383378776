"""Auth-services that start on an empty database, four at once."""

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helixflow.db import migrate
from tests.db.support import folder

from .accounts import Platform
from .people import OWNER, Site, one_time_password
from .stack import SCRIPTED, Process, environment

SERVICES = 4


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with folder() as path:
        yield path


def test_four_at_once_apply_each_migration_once_and_make_one_owner(certs: Path, place: Path) -> None:
    environ = environment(certs, place, **SCRIPTED) | {
        "HELIX_AUTH_LISTEN": "127.0.0.1:0",
        "HELIX_DATABASE_DIRECTORY": str(place / "postgres"),
    }
    database = Process(("db", "run"), environ, place / "database.log").start()
    services = [Process(("auth",), environ, place / f"auth{number}.log") for number in range(SERVICES)]
    # A service ends with the thread that started it.
    with ThreadPoolExecutor(SERVICES) as threads:
        try:
            list(threads.map(Process.start, services))
            check(Platform(certs, place, environ, None, services[0], database), services)
        finally:
            for service in services:
                if hasattr(service, "popen"):
                    service.stop()
            database.stop()


def test_a_start_that_fails_later_loses_no_password(certs: Path) -> None:
    with folder() as place, socket.create_server(("127.0.0.1", 0)) as taken:
        environ = environment(certs, place, **SCRIPTED) | {"HELIX_DATABASE_DIRECTORY": str(place / "postgres")}
        database = Process(("db", "run"), environ, place / "database.log").start()
        try:
            listen = {"HELIX_AUTH_LISTEN": f"127.0.0.1:{taken.getsockname()[1]}"}
            with pytest.raises(AssertionError, match="cannot start"):
                Process(("auth",), environ | listen, place / "failed.log").start()
            password = one_time_password(place)
            first = Process(("auth",), environ | {"HELIX_AUTH_LISTEN": "127.0.0.1:0"}, place / "auth.log").start()
            first.stop()
            assert one_time_password(place) == password, "it is still valid"
            for log, told in ((place / "failed.log", 0), (first.log, 1)):
                text = log.read_text()
                assert text.count("first-password") == told
                assert password not in text
        finally:
            database.stop()


def check(platform: Platform, services: list[Process]) -> None:
    """Each thing was made once, and all services serve."""
    logs = "".join(process.text() for process in (platform.pool, *services))
    numbers = [each.number for each in migrate.read()]
    assert sorted(map(int, re.findall(r'"number":(\d+).*"migration applied"', logs))) == numbers
    password = one_time_password(platform.place)
    assert len(password) == 24, "one of them has made the owner"
    assert password not in logs
    site = Site(platform, [])
    assert site.value("SELECT array_agg(number ORDER BY number) FROM migrations") == numbers
    assert site.value("SELECT array_agg(email) FROM users") == [OWNER]
    assert site.value("SELECT array_agg(name) FROM organisations") == ["default"]
    assert site.value("SELECT count(*) FROM api_keys") == 1, "the key of the development profile"
    assert site.value("SELECT count(*) FROM signing_keys") == 1
    for service in services:
        platform.auth = service
        assert [row["email"] for row in platform.json("user", "list")["data"]] == [OWNER]
