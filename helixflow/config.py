"""The configuration: every value declared once, with its documentation.

Order: built-in default, then the TOML file, then the environment (`HELIX_<SECTION>_<OPTION>`).
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from helixflow.engine.kinds import BACKENDS, precisions
from helixflow.errors import ConfigError, HelixError
from helixflow.options import Address, Reader, one_of, option
from helixflow.secret import Secret
from helixflow.sections.auth import AuthConfig
from helixflow.sections.database import DatabaseConfig
from helixflow.sections.gateway import DEFAULT_AUTH, DEFAULT_POOLS, GatewayConfig
from helixflow.sections.ledger import LedgerConfig
from helixflow.sections.limits import LimitsConfig
from helixflow.sections.log import LogConfig
from helixflow.sections.pki import PkiConfig
from helixflow.sections.pool import PoolConfig
from helixflow.sections.supervise import SuperviseConfig

__all__ = [
    "DEFAULT_AUTH",
    "DEFAULT_POOLS",
    "DEVELOPMENT_ALIASES",
    "DEVELOPMENT_KEY",
    "PACKAGE",
    "SECTIONS",
    "SERVICES",
    "SYSTEM_STATE",
    "UNSET",
    "AuthConfig",
    "Config",
    "DatabaseConfig",
    "GatewayConfig",
    "LedgerConfig",
    "LimitsConfig",
    "LogConfig",
    "PkiConfig",
    "PoolConfig",
    "SuperviseConfig",
    "checkout",
    "default_certs_dir",
    "default_engines_dir",
    "default_home",
    "demo_model_dir",
    "describe",
    "load",
    "model_of",
]

UNSET = Path()
SYSTEM_STATE = Path("/var/lib/helixflow")
PACKAGE = Path(__file__).resolve().parent
DEVELOPMENT_KEY = "demo-key"
DEVELOPMENT_ALIASES = ("gpt-4", "gpt-3.5-turbo")
SERVICES = ("api-gateway", "auth-service", "inference-pool", "monitoring")


def checkout() -> Path | None:
    """The source checkout this package runs from, or None when it is installed elsewhere."""
    root = PACKAGE.parent
    return root if (root / "core_rs" / "Cargo.toml").is_file() else None


def default_home(environ: Mapping[str, str] = os.environ) -> Path:
    """State directory: HELIX_HOME, else the user's data directory."""
    if environ.get("HELIX_HOME"):
        return Path(environ["HELIX_HOME"]).expanduser()
    base = environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "helixflow"


def default_certs_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Certificates: HELIX_CERTS, else `certs/` of the checkout, else under the state directory."""
    if environ.get("HELIX_CERTS"):
        return Path(environ["HELIX_CERTS"]).expanduser()
    root = checkout()
    return root / "certs" if root else default_home(environ) / "certs"


def default_engines_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Built engines: HELIX_ENGINES, else `engines/` of the checkout, else under the state directory."""
    if environ.get("HELIX_ENGINES"):
        return Path(environ["HELIX_ENGINES"]).expanduser()
    root = checkout()
    return root / "engines" if root else default_home(environ) / "engines"


def demo_model_dir() -> Path | None:
    """The demo model: it comes with the checkout, not with an installed wheel."""
    root = checkout()
    return root / "engines" / "demo" if root else None


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    profile: str = option(
        "production",
        "production, or development: loopback only, knows the key demo-key",
        check=one_of("production", "development"),
    )
    home: Path = option(Path(), "state directory; empty: the user's data directory")
    certs: Path = option(Path(), "certificate directory; empty: certs/ of the checkout, else under home")
    engines: Path = option(Path(), "built engines; empty: engines/ of the checkout, else under home")
    log: LogConfig = field(default_factory=LogConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    pki: PkiConfig = field(default_factory=PkiConfig)
    supervise: SuperviseConfig = field(default_factory=SuperviseConfig)

    @property
    def development(self) -> bool:
        """True in the development profile."""
        return self.profile == "development"


SECTIONS: dict[str, type[Any]] = {
    "log": LogConfig,
    "gateway": GatewayConfig,
    "pool": PoolConfig,
    "auth": AuthConfig,
    "limits": LimitsConfig,
    "ledger": LedgerConfig,
    "database": DatabaseConfig,
    "pki": PkiConfig,
    "supervise": SuperviseConfig,
}


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Reads the file (default: HELIX_CONFIG) and the environment. Raises ConfigError with every problem."""
    if path is None and environ.get("HELIX_CONFIG"):
        path = Path(environ["HELIX_CONFIG"])
    document = _read(path) if path else {}
    environ = {name: value for name, value in environ.items() if name != "HELIX_CONFIG"}
    reader = Reader(document, environ, str(path) if path else "configuration")
    config = reader.section(Config, "")
    sections = {name: reader.section(cls, name) for name, cls in SECTIONS.items()}
    reader.unknown(set(SECTIONS))
    config = dataclasses.replace(config, **sections)
    problems = reader.problems + _cross_check(config)
    if problems:
        raise ConfigError(problems)
    return _resolve(config, environ)


def model_of(config: Config) -> Path:
    """The checkpoint to serve. Raises ConfigError when there is none; a gateway's machine needs none."""
    if config.pool.model == UNSET:
        raise ConfigError(
            ["pool.model: this installation has no demo model; set HELIX_MODEL to a checkpoint directory"]
        )
    if not config.pool.model.is_dir():
        raise ConfigError(
            [f"pool.model: {config.pool.model} is not a directory; name the directory of a checkpoint (config.json, …)"]
        )
    return config.pool.model


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: is not TOML: {error}"]) from None


def _cross_check(config: Config) -> list[str]:
    """Rules over several values: what is open to whom."""
    problems = []
    for name, address in (
        ("gateway.listen", config.gateway.listen),
        ("pool.listen", config.pool.listen),
        ("auth.listen", config.auth.listen),
    ):
        if config.development and not address.loopback:
            problems.append(
                f"{name}: {address} is not a loopback address, and the development profile knows a public key; "
                'set profile = "production" (HELIX_PROFILE) to listen there'
            )
    if config.gateway.plain_http and not (config.development and config.gateway.listen.loopback):
        problems.append(
            "gateway.plain_http: HTTP without TLS exists only in the development profile on a loopback address"
        )
    problems += [
        f"gateway.{name}: at least one address is needed"
        for name in ("pools", "auth")
        if not getattr(config.gateway, name)
    ]
    if not config.gateway.accounts and not config.development:
        problems.append("gateway.accounts: keys, limits and ledger can be off in the development profile only")
    problems += _engine_problems(config.pool)
    problems += _oidc_problems(config.auth, development=config.development)
    problems += _database_problems(config.database)
    problems += _redis_problems(config.limits.redis_url.reveal())
    if config.supervise.backoff_min_s > config.supervise.backoff_max_s:
        problems.append("supervise.backoff_min_s: must not be larger than supervise.backoff_max_s")
    return problems


def _engine_problems(pool: PoolConfig) -> list[str]:
    """What does not go together; the scripted engine ignores all of it."""
    problems = []
    for backend in BACKENDS:
        if backend != pool.engine:
            continue
        if backend != "onnx" and pool.provider != "cpu":
            problems.append(f"pool.provider: {pool.provider} is for the onnx engine; {backend} always runs on a GPU")
        offered = precisions(backend, "cuda" if pool.provider == "cuda" else "cpu")
        if pool.precision not in ("auto", *offered):
            where = f" with provider {pool.provider}" if backend == "onnx" else ""
            problems.append(
                f"pool.precision: {pool.precision} is not offered by {backend}{where}; choose among auto, "
                + ", ".join(offered)
            )
    return problems


def _oidc_problems(auth: AuthConfig, *, development: bool) -> list[str]:
    if not auth.oidc_issuer:
        return []
    problems = [] if auth.oidc_client_id else ["auth.oidc_client_id: the provider of auth.oidc_issuer needs one"]
    if not auth.public_url and not development:
        problems.append("auth.public_url: set the https URL of the gateways: the provider sends browsers back to it")
    if not auth.oidc_issuer.startswith("https://"):
        problems.append(f"auth.oidc_issuer: {auth.oidc_issuer} must be an https:// URL")
    return problems


def _redis_problems(url: str) -> list[str]:
    """The words of an error never repeat the URL, which holds a password."""
    if not url:
        return []
    from redis.connection import parse_url  # noqa: PLC0415 - only a URL needs it

    try:
        parts = parse_url(url)  # type: ignore[no-untyped-call]
        number = urlsplit(url).path.strip("/")
    except ValueError:
        parts, number = {}, ""
    served = parts.get("host") and 0 < parts.get("port", 6379) < 65536 and (not number or number.isdecimal())
    if parts.get("path") or served:
        return []
    return ["limits.redis_url: write redis://host:port, rediss://user:password@host:port or unix:///path"]


def _database_problems(database: DatabaseConfig) -> list[str]:
    problems = []
    if database.pool_min > database.pool_max:
        problems.append("database.pool_min: must not be larger than database.pool_max")
    if not database.url and not database.admin_url:
        return problems
    from helixflow.db.target import Target  # noqa: PLC0415 - asyncpg is slow to import, and only a URL needs it

    if database.owner_url and not database.url:
        problems.append("database.owner_url: only together with database.url; the embedded server has its own roles")
    for name, url in (("url", database.url), ("owner_url", database.owner_url), ("admin_url", database.admin_url)):
        try:
            target = Target.parse(url) if url else None
        except HelixError as error:
            problems.append(f"database.{name}: {error}")
            continue
        if target and database.tls == "disable" and not target.local:
            problems.append(f"database.tls: {target.host} (database.{name}) is no loopback address: TLS must stay on")
    return problems


def _resolve(config: Config, environ: Mapping[str, str]) -> Config:
    """Fills in the defaults that depend on other values."""
    home = config.home if config.home != UNSET else default_home(environ)
    environ = {**environ, "HELIX_HOME": str(home)}
    pool = config.pool
    demo = demo_model_dir()
    if pool.model == UNSET and demo:
        aliases = pool.aliases or (DEVELOPMENT_ALIASES if config.development else ())
        pool = dataclasses.replace(pool, model=demo, model_id=pool.model_id or "helixflow-demo", aliases=aliases)
    elif pool.model != UNSET and not pool.model_id:
        pool = dataclasses.replace(pool, model_id=pool.model.resolve().name)
    return dataclasses.replace(
        config,
        home=home,
        certs=config.certs if config.certs != UNSET else default_certs_dir(environ),
        engines=config.engines if config.engines != UNSET else default_engines_dir(environ),
        pool=pool,
        auth=_placed(config.auth, "pepper", home / "secrets" / "pepper"),
        ledger=_placed(config.ledger, "spool", home / "spool"),
        database=_database(config, home),
    )


def _placed(section: Any, name: str, default: Path) -> Any:
    return section if getattr(section, name) != UNSET else dataclasses.replace(section, **{name: default})


def _database(config: Config, home: Path) -> DatabaseConfig:
    """Places the embedded server's data. Root's own folders are usually closed to the account it runs under."""
    if config.database.directory != UNSET:
        return config.database
    by_default = config.home == UNSET and home == default_home({})
    directory = SYSTEM_STATE / "postgres" if by_default and os.geteuid() == 0 else home / "postgres"
    return dataclasses.replace(config.database, directory=directory)


def describe(config: Config) -> dict[str, Any]:
    """The effective configuration as plain data, secrets masked."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, (Path, Address)) else value

    def table(section: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for entry in dataclasses.fields(section):
            value = getattr(section, entry.name)
            if isinstance(value, Secret):
                out[entry.name] = str(value) if value else ""
            else:
                out[entry.name] = (
                    table(value) if dataclasses.is_dataclass(value) and entry.name in SECTIONS else plain(value)
                )
        return out

    return table(config)
