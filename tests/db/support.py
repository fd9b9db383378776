"""Real servers for the tests: the wheel's PostgreSQL and Debian's, run by the code under test."""

import asyncio
import itertools
import os
import pwd
import select
import shutil
import socket
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from helixflow.config import DatabaseConfig
from helixflow.db.embedded import ADMIN, READER_ROLE, ROLE, SERVICE_ROLE, Embedded
from helixflow.db.place import service_account
from helixflow.db.target import Target, connect
from helixflow.secret import Secret

T = TypeVar("T")
DEBIAN = Path("/usr/lib/postgresql/15/bin")
ROOT = os.geteuid() == 0
OPERATOR = "operator"
PASSWORD = "s3cret-of-the-test"
_numbers = itertools.count(1)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder that the unprivileged account may pass, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="hf-db-"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Loop:
    """An event loop that outlives the tests, in a thread that does too: PostgreSQL dies with the thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Server:
    """A server with an administrator, on a loopback port with passwords, where tests make databases."""

    def __init__(self, place: Path, binaries: Path | None, tls: dict[str, str]) -> None:
        hba, ident = place / "pg_hba.conf", place / "pg_ident.conf"
        hba.write_text("local all all peer map=test\nhost all all all scram-sha-256\n")
        mapped = (ADMIN, ROLE, SERVICE_ROLE, READER_ROLE)
        ident.write_text("".join(f"test {service_account()} {role}\n" for role in mapped))
        self.tls = bool(tls)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        settings = {
            "hba_file": str(hba),
            "ident_file": str(ident),
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "fsync": "off",
            **tls,
        }
        self.embedded = Embedded(place / "pg", binaries=binaries, settings=settings)

    async def execute(self, *statements: str, database: str = "postgres") -> None:
        connection = await connect(replace(self.embedded.target, user=ADMIN, database=database))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    def database(self) -> Target:
        """A new, empty database of the service's role."""
        name = f"test_{next(_numbers)}"
        asyncio.run(self.execute(f"CREATE DATABASE {name} OWNER {ROLE}"))
        return replace(self.embedded.target, database=name)

    def tcp(self, user: str, database: str, password: str = PASSWORD, host: str = "127.0.0.1") -> Target:
        return Target(host, self.port, user, database, Secret(password))

    def url(self, user: str, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"


def options(**values: Any) -> DatabaseConfig:
    return replace(DatabaseConfig(), **values)


@contextmanager
def as_user(name: str | int) -> Iterator[None]:
    """The effective account of this process, which is what the server sees at the other end of a Unix socket."""
    uid, gid = (name, name) if isinstance(name, int) else (pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def wait_gone(pid: int, timeout_s: float = 20.0) -> bool:
    """Waits for the end of a process that need not be a child; True when it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)
