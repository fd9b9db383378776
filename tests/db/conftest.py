"""One server of each kind for the session."""

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixflow.pki import issue
from helixflow.pki.layout import Layout, Role

from .support import DEBIAN, OPERATOR, PASSWORD, ROOT, Loop, Server, folder


@pytest.fixture(autouse=True)
def _no_log_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command run in this process would tie the log to a captured stream that ends with its test."""
    monkeypatch.setattr("helixflow.log.setup", lambda *_, **_options: None)


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.close()


def _serve(loop: Loop, place: Path, binaries: Path | None, tls: dict[str, str]) -> Iterator[Server]:
    server = Server(place, binaries, tls)
    loop.run(server.embedded.start())
    try:
        operator = f"CREATE ROLE {OPERATOR} LOGIN CREATEDB CREATEROLE PASSWORD '{PASSWORD}'"
        loop.run(server.execute(operator, f"GRANT CONNECT ON DATABASE postgres TO {OPERATOR}"))
        yield server
    finally:
        loop.run(server.embedded.stop())


@pytest.fixture(scope="session")
def wheel(loop: Loop) -> Iterator[Server]:
    """The wheel's PostgreSQL; it cannot speak TLS."""
    with folder() as place:
        yield from _serve(loop, place, None, {})


@pytest.fixture(scope="session")
def debian(loop: Loop, pki: Layout) -> Iterator[Server]:
    """Debian's PostgreSQL 15 with TLS, its certificate from our own authority."""
    if not (DEBIAN / "postgres").exists():
        pytest.skip("postgresql-15 is not installed (as root, `make system` does it)")
    if not pki.pair("postgres", Role.SERVER).cert.exists():
        issue.issue(pki, "postgres")
    with folder() as place:
        pair = pki.pair("postgres", Role.SERVER)
        for source, name in ((pair.cert, "server.crt"), (pair.key, "server.key")):
            copy = place / name
            copy.write_bytes(source.read_bytes())
            copy.chmod(0o600)
            if ROOT:
                nobody = pwd.getpwnam("nobody")
                os.chown(copy, nobody.pw_uid, nobody.pw_gid)
        tls = {"ssl": "on", "ssl_cert_file": str(place / "server.crt"), "ssl_key_file": str(place / "server.key")}
        yield from _serve(loop, place, DEBIAN, tls)


@pytest.fixture(params=["wheel", "debian"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each kind in turn."""
    found: Server = request.getfixturevalue(request.param)
    return found
