"""Preparing an external server, as an administrator who is no superuser."""

import asyncio
import base64
import hashlib
import hmac
from dataclasses import replace
from pathlib import Path

import pytest

from helixflow import cli
from helixflow.db import setup
from helixflow.db.errors import DatabaseRefusedError
from helixflow.db.pool import tls_of
from helixflow.db.target import Target, connect
from helixflow.pki.layout import Layout
from helixflow.secret import Secret

from .support import OPERATOR, PASSWORD, Server, options


def _prepare(server: Server, pki: Layout, service: Target) -> list[str]:
    chosen = options(tls_ca=pki.ca_cert) if server.tls else options(tls="disable")
    admin = server.tcp(OPERATOR, "postgres")
    return asyncio.run(setup.prepare(admin, service, tls_of(chosen, admin), tls_of(chosen, service)))


def test_setup_is_idempotent_and_migrations_run(
    server: Server, pki: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HELIX_DATABASE_URL", server.url("flow er", "the db", "first%20one").replace(" ", "%20"))
    monkeypatch.setenv("HELIX_DATABASE_ADMIN_URL", server.url(OPERATOR, "postgres"))
    if server.tls:
        monkeypatch.setenv("HELIX_DATABASE_TLS_CA", str(pki.ca_cert))
    else:
        monkeypatch.setenv("HELIX_DATABASE_TLS", "disable")
    assert cli.main(["db", "setup"]) == 0
    first = capsys.readouterr().out
    assert "role flow er made" in first
    assert "database the db made" in first
    assert cli.main(["db", "setup"]) == 0
    again = capsys.readouterr().out
    assert "made" not in again
    assert "the service can connect" in again
    assert cli.main(["db", "migrate"]) == 0
    assert cli.main(["db", "setup"]) == 0
    assert cli.main(["db", "status"]) == 0
    assert "first" not in first + again + capsys.readouterr().out


def test_a_new_password_of_the_url_is_set(wheel: Server, pki: Layout) -> None:
    service = wheel.tcp("rotating", "rotating", password="one")
    _prepare(wheel, pki, service)
    _prepare(wheel, pki, replace(service, password=Secret("two")))
    asyncio.run(_check(replace(service, password=Secret("two"))))
    with pytest.raises(DatabaseRefusedError, match="password authentication failed"):
        asyncio.run(_check(service))


async def _check(target: Target) -> None:
    connection = await connect(target)
    await connection.close()


def test_others_cannot_connect(wheel: Server, pki: Layout) -> None:
    _prepare(wheel, pki, wheel.tcp("owner_a", "private_a"))
    asyncio.run(wheel.execute(f"CREATE ROLE outsider LOGIN PASSWORD '{PASSWORD}'"))
    with pytest.raises(DatabaseRefusedError, match="permission denied for database"):
        asyncio.run(_check(wheel.tcp("outsider", "private_a")))


def test_refusals(wheel: Server, pki: Layout) -> None:
    service = wheel.tcp("refused", "refused")
    with pytest.raises(DatabaseRefusedError, match="two servers"):
        _prepare(wheel, pki, replace(service, port=1))
    with pytest.raises(DatabaseRefusedError, match="is a superuser"):
        _prepare(wheel, pki, replace(service, user="helixflow_admin"))
    with pytest.raises(DatabaseRefusedError, match="printable ASCII"):
        _prepare(wheel, pki, replace(service, password=Secret("pässword")))
    asyncio.run(wheel.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"))
    with pytest.raises(DatabaseRefusedError, match="encoding LATIN1"):
        _prepare(wheel, pki, replace(service, database="latin"))
    asyncio.run(wheel.execute(f"CREATE ROLE plain LOGIN PASSWORD '{PASSWORD}'"))
    asyncio.run(wheel.execute("GRANT CONNECT ON DATABASE postgres TO plain"))
    with pytest.raises(DatabaseRefusedError, match="needs CREATEROLE and CREATEDB"):
        asyncio.run(setup.prepare(wheel.tcp("plain", "postgres"), wheel.tcp("x", "x"), False, False))


def test_urls_are_needed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HELIX_HOME", str(tmp_path))
    assert cli.main(["db", "setup"]) == 64
    assert "HELIX_DATABASE_ADMIN_URL" in capsys.readouterr().err


def test_the_verifier_is_that_of_the_standard() -> None:
    """RFC 7677, section 3: its example's proof and signature follow from our verifier."""
    nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    message = f"n=user,r={nonce[:20]},r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r={nonce}".encode()
    proof = base64.b64decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    signature = base64.b64decode("6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
    made = setup.scram_verifier("pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="))
    begin, _, keys = made.rpartition("$")
    assert begin == "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ=="
    stored, server = (base64.b64decode(key) for key in keys.split(":"))
    assert hmac.digest(server, message, "sha256") == signature
    client = bytes(a ^ b for a, b in zip(proof, hmac.digest(stored, message, "sha256"), strict=True))
    assert hashlib.sha256(client).digest() == stored
    with pytest.raises(DatabaseRefusedError, match="printable ASCII"):
        setup.scram_verifier("line\nbreak")
