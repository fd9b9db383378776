"""Section `[database]`: your own PostgreSQL by its URL, else the embedded one."""

from dataclasses import dataclass
from pathlib import Path

from helixflow.options import between, one_of, option
from helixflow.secret import Secret


@dataclass(frozen=True, slots=True)
class DatabaseConfig:
    """PostgreSQL: your own by its URL, else the embedded one."""

    url: Secret = option(Secret(), "postgresql://user:password@host:port/database; empty: the embedded server")
    owner_url: Secret = option(
        Secret(),
        "URL of the role that owns the tables, which url's then does not; `helixflow db` and `serve` migrate with it",
    )
    admin_url: Secret = option(Secret(), "URL of an administrator; only `helixflow db setup` uses it")
    tls: str = option(
        "verify-full",
        "verify-full, or disable (only for a loopback address); a Unix socket has none",
        check=one_of("verify-full", "disable"),
    )
    tls_ca: Path = option(Path(), "file of CA certificates for the server; empty: the system's")
    pool_min: int = option(1, "connections a service keeps open", check=between(0, 1000))
    pool_max: int = option(10, "most connections of a service", check=between(1, 1000))
    connect_timeout_ms: int = option(5000, "time for one connection (milliseconds)", check=between(10, 600_000))
    acquire_timeout_ms: int = option(
        2000, "wait for a free connection of the pool (milliseconds)", check=between(1, 600_000)
    )
    statement_timeout_ms: int = option(
        10_000, "the server ends a statement after this time (milliseconds)", check=between(1, 86_400_000)
    )
    directory: Path = option(
        Path(),
        "data of the embedded server; empty: postgres/ under home, for root without HELIX_HOME "
        "/var/lib/helixflow/postgres",
    )
    client: str = option(
        "", "account, by name or number, of an auth-service that is not the one that the embedded server's owner has"
    )
    user: str = option("nobody", "account that the embedded server runs under when HelixFlow runs as root")
