"""`helixflow db setup`: prepares an external server, once, with an administrator's rights. Running it again is safe."""

import base64
import hashlib
import hmac
import secrets
import ssl
from dataclasses import replace
from typing import Any

import asyncpg

from helixflow.db.errors import DatabaseError, DatabaseRefusedError
from helixflow.db.target import Target, connect

SCRAM_ITERATIONS = 4096
"""PostgreSQL's own default (scram_iterations); the salt is what protects a random password."""


def quoted(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def scram_verifier(password: str, salt: bytes | None = None) -> str:
    """What PostgreSQL stores of a password (RFC 5802, RFC 7677), so that the server's log never sees the password.

    ASCII passwords only: others would need SASLprep. Raises DatabaseRefusedError.
    """
    if not password.isascii() or not password.isprintable():
        raise DatabaseRefusedError("the password of the database URL must consist of printable ASCII characters")
    salt = salt or secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, SCRAM_ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    parts = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256${SCRAM_ITERATIONS}:{parts[0]}${parts[1]}:{parts[2]}"


def reader_of(owner: Target) -> str:
    """The role of whoever audits: it cannot log in, an administrator grants it to those who may."""
    return f"{owner.user}_reader"


async def prepare(
    admin: Target,
    service: Target,
    tls_admin: ssl.SSLContext | bool,
    tls: ssl.SSLContext | bool,
    owner: Target | None = None,
) -> list[str]:
    """Makes roles, database, schema and grants as far as they are missing; returns what was done, a line each.

    `owner`: whose everything is; None: the service's role. What the service owned before is handed over. Raises
    DatabaseError.
    """
    owner = owner or service
    if (admin.host, admin.port) != (service.host, service.port):
        raise DatabaseRefusedError(f"the administrator's URL leads to {admin}, the service's to {service}: two servers")
    if (owner.host, owner.port, owner.database) != (service.host, service.port, service.database):
        raise DatabaseRefusedError(f"the owner's URL leads to {owner}, the service's to {service}: two databases")
    done: list[str] = []
    try:
        connection = await connect(admin, tls=tls_admin)
        try:
            await _role(connection, owner, done)
            if owner.user != service.user:
                await _role(connection, service, done)
                await _reader(connection, owner, done)
            await _database(connection, owner, done)
        finally:
            await connection.close()
        inside = await connect(replace(admin, database=service.database), tls=tls_admin)
        try:
            if owner.user != service.user:
                await _hand_over(inside, service, owner, done)
            await _schema(inside, owner, done)
            if owner.user != service.user:
                await _guest(inside, service, owner)
        finally:
            await inside.close()
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseRefusedError(
            f"{admin.user} may not do this: {error}. The administrator needs CREATEROLE and CREATEDB"
        ) from None
    except asyncpg.PostgresError as error:
        raise DatabaseError(f"the server refused a step of the set-up: {error}") from None
    await (await connect(service, tls=tls)).close()
    done.append(f"{service}: the service can connect")
    return done


async def _role(connection: Any, service: Target, done: list[str]) -> None:
    name = quoted(service.user)
    row = await connection.fetchrow("SELECT rolsuper, rolcanlogin FROM pg_roles WHERE rolname = $1", service.user)
    if row is None:
        await connection.execute(f"CREATE ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION")
        done.append(f"role {service.user} made")
    elif row["rolsuper"]:
        raise DatabaseRefusedError(
            f"the role {service.user} is a superuser; the service must not be: name another role in the URL"
        )
    elif not row["rolcanlogin"]:
        await connection.execute(f"ALTER ROLE {name} LOGIN")
        done.append(f"role {service.user} may log in now")
    if service.password:
        await connection.execute(f"ALTER ROLE {name} PASSWORD '{scram_verifier(service.password.reveal())}'")
        done.append(f"password of {service.user} set to that of the URL")


async def _reader(connection: Any, owner: Target, done: list[str]) -> None:
    name = reader_of(owner)
    if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", name):
        await connection.execute(f"CREATE ROLE {quoted(name)} NOLOGIN")
        done.append(f"role {name} made: grant it to whoever may read ledger and audit log")


async def _guest(connection: Any, service: Target, owner: Target) -> None:
    """The services and readers may come in, and make nothing of their own."""
    name = quoted(service.database)
    await _join(connection, owner.user)
    for role in (service.user, reader_of(owner)):
        await connection.execute(f"REVOKE ALL ON DATABASE {name} FROM {quoted(role)}")
        await connection.execute(f"GRANT CONNECT ON DATABASE {name} TO {quoted(role)}")


async def _hand_over(connection: Any, service: Target, owner: Target, done: list[str]) -> None:
    """What the services owned when there was one role for everything."""
    held = await connection.fetchval(
        "SELECT pg_get_userbyid(nspowner) = $1 FROM pg_namespace WHERE nspname = 'helixflow'", service.user
    )
    if not held:
        return
    for role in (service.user, owner.user):
        await _join(connection, role)
    # First: the new owner must be allowed to make things there, in whatever order the server takes the rest.
    await connection.execute(f"ALTER SCHEMA helixflow OWNER TO {quoted(owner.user)}")
    await connection.execute(f"REASSIGN OWNED BY {quoted(service.user)} TO {quoted(owner.user)}")
    done.append(f"what {service.user} owned belongs to {owner.user} now")


async def _join(connection: Any, role: str) -> None:
    """Only a member of a role may give or take what is the role's."""
    if not await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"):
        await connection.execute(f"GRANT {quoted(role)} TO CURRENT_USER")


async def _database(connection: Any, service: Target, done: list[str]) -> None:
    row = await connection.fetchrow(
        "SELECT pg_encoding_to_char(encoding) AS encoding, pg_get_userbyid(datdba) AS owner "
        "FROM pg_database WHERE datname = $1",
        service.database,
    )
    if row and row["encoding"] != "UTF8":
        raise DatabaseRefusedError(
            f"the database {service.database} has the encoding {row['encoding']}; it must be UTF8: name another one"
        )
    name, role = quoted(service.database), quoted(service.user)
    if row is None:
        await _join(connection, service.user)
        await connection.execute(f"CREATE DATABASE {name} OWNER {role} TEMPLATE template0 ENCODING 'UTF8'")
        done.append(f"database {service.database} made")
    await connection.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
    await connection.execute(f"GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {name} TO {role}")
    done.append(f"database {service.database}: {service.user} may connect, others only by a grant of their own")


async def _schema(connection: Any, service: Target, done: list[str]) -> None:
    role = quoted(service.user)
    owner = await connection.fetchval(
        "SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'helixflow'",
    )
    if owner is None:
        await _join(connection, service.user)
        await connection.execute(f"CREATE SCHEMA helixflow AUTHORIZATION {role}")
        done.append("schema helixflow made")
    elif owner != service.user:
        raise DatabaseRefusedError(
            f"the schema helixflow of {service.database} belongs to {owner}, not to {service.user}: "
            "name that role in the URL, or another database"
        )
