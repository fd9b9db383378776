"""Where the database is: the URL, TLS, one connection; asyncpg's errors as ours."""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import asyncpg

from helixflow.db.errors import (
    DatabaseError,
    DatabaseRefusedError,
    DatabaseUnavailableError,
    DatabaseVersionError,
    UrlError,
)
from helixflow.options import Address
from helixflow.secret import Secret

SUPPORTED = (15, 18)
"""Oldest and newest major version of the server."""

DEFAULT_PORT = 5432
_FORM = "write postgresql://user:password@host:port/database, or ...@/database?host=/directory for a Unix socket"


@dataclass(frozen=True, slots=True)
class Target:
    """One database on one server."""

    host: str
    """Host name, or the directory of a Unix socket."""
    port: int
    user: str
    database: str
    password: Secret = field(default_factory=Secret)

    @classmethod
    def parse(cls, secret: str | Secret) -> "Target":
        """Reads a URL. Raises UrlError, whose message never repeats the URL."""
        url = secret.reveal() if isinstance(secret, Secret) else secret
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORT
            query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        except ValueError:
            raise UrlError(f"the database URL cannot be read; {_FORM}") from None
        if parts.scheme not in ("postgresql", "postgres"):
            raise UrlError(f"the database URL does not begin with postgresql://; {_FORM}")
        if unknown := sorted(set(query) - {"host"}):
            raise UrlError(
                f"the database URL has parameters that are not taken from it: {', '.join(unknown)}; "
                "TLS, pool sizes and timeouts are options of [database]"
            )
        if parts.hostname and "host" in query:
            raise UrlError(f"the database URL names two hosts; {_FORM}")
        host = query.get("host") or unquote(parts.hostname or "")
        user, database = unquote(parts.username or ""), unquote(parts.path.removeprefix("/"))
        if not host or not user or not database or "," in parts.netloc.rpartition("@")[2]:
            raise UrlError(f"the database URL needs one host, a user and a database; {_FORM}")
        if "\0" in user + database + host:
            raise UrlError("the database URL holds a NUL character")
        return cls(host, port, user, database, Secret(unquote(parts.password or "")))

    @property
    def socket(self) -> bool:
        """True for a Unix socket."""
        return self.host.startswith("/")

    @property
    def local(self) -> bool:
        """True when the way to the server does not leave this machine."""
        return self.socket or Address(self.host, self.port).loopback

    def dsn(self) -> str:
        """The URL without the password."""
        user, database = quote(self.user, safe=""), quote(self.database, safe="")
        if self.socket:
            port = "" if self.port == DEFAULT_PORT else f":{self.port}"
            return f"postgresql://{user}@{port}/{database}?host={quote(self.host)}"
        return f"postgresql://{user}@{Address(self.host, self.port)}/{database}"

    def __str__(self) -> str:
        return self.dsn()


def tls_context(target: Target, mode: str, ca: Path | None) -> ssl.SSLContext | bool:
    """What asyncpg takes as `ssl`: a context that checks chain and host name, or False.

    `mode`: `verify-full`, or `disable`, which is refused when others could listen in.
    `ca`: file of CA certificates; None: the system's. Raises DatabaseRefusedError.
    """
    if target.socket:
        return False
    if mode == "disable":
        if not target.local:
            raise DatabaseRefusedError(
                f"{target}: TLS may be off (database.tls) only for a loopback address or a Unix socket"
            )
        return False
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        raise DatabaseRefusedError(
            f"database.tls_ca: {ca} cannot be used as a file of CA certificates: {error}"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@contextlib.contextmanager
def explained(target: Target) -> Iterator[None]:
    """Turns the errors of connecting into DatabaseUnavailableError or DatabaseRefusedError."""
    try:
        yield
    except DatabaseError:
        raise
    except ssl.SSLCertVerificationError as error:
        raise DatabaseRefusedError(
            f"{target}: the server's certificate was refused: {error.verify_message}. database.tls_ca must name the "
            "CA that signed it, and the URL's host must stand in it"
        ) from None
    except (ssl.SSLError, asyncpg.exceptions.ClientConfigurationError) as error:
        raise DatabaseRefusedError(f"{target}: TLS failed: {error}") from None
    except (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.InsufficientPrivilegeError,
    ) as error:
        raise DatabaseRefusedError(f"{target}: the server refused: {error}") from None
    except asyncpg.PostgresError as error:
        raise DatabaseUnavailableError(f"{target}: the server does not serve now: {error}") from None
    except TimeoutError:
        raise DatabaseUnavailableError(f"{target}: no answer in time (database.connect_timeout_ms)") from None
    except ConnectionError as error:
        if "SSL upgrade" in str(error):
            raise DatabaseRefusedError(
                f"{target}: the server does not speak TLS, and database.tls asks for it"
            ) from None
        raise DatabaseUnavailableError(f"{target}: cannot be reached: {error}") from None
    except (OSError, asyncpg.InterfaceError) as error:
        raise DatabaseUnavailableError(f"{target}: cannot be reached: {error}") from None


async def check_version(connection: Any) -> None:
    """Raises DatabaseVersionError unless the server's major version is supported."""
    major = connection.get_server_version().major
    low, high = SUPPORTED
    if not low <= major <= high:
        raise DatabaseVersionError(f"the server is PostgreSQL {major}; HelixFlow works with {low} to {high}")


async def connect(
    target: Target, *, tls: ssl.SSLContext | bool = False, timeout_s: float = 10.0, **settings: str
) -> Any:
    """One asyncpg connection with the given server settings.

    Raises DatabaseUnavailableError, DatabaseRefusedError or DatabaseVersionError.
    """
    with explained(target):
        async with asyncio.timeout(timeout_s):
            connection = await asyncpg.connect(**arguments(target, tls), server_settings=settings)
        try:
            await check_version(connection)
        except BaseException:
            connection.terminate()
            raise
    return connection


def arguments(target: Target, tls: ssl.SSLContext | bool) -> dict[str, Any]:
    """Arguments of asyncpg that name the server; PG* variables and ~/.pgpass have no say."""
    return {
        "host": target.host,
        "port": target.port,
        "user": target.user,
        "database": target.database,
        # An empty string, not None: None makes asyncpg look into the environment.
        "password": target.password.reveal(),
        "ssl": tls,
        "target_session_attrs": "any",
    }
