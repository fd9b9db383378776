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

from helixflow.engine.kinds import (
    ATTENTION_CHOICES,
    BACKENDS,
    DEFAULT_CHUNK_TOKENS,
    PRECISION_CHOICES,
    PROVIDERS,
    TENSORRT_MAX_LEN,
    precisions,
)
from helixflow.errors import ConfigError, HelixError
from helixflow.options import Address, Reader, between, one_of, option

UNSET = Path()
SYSTEM_STATE = Path("/var/lib/helixflow")
PACKAGE = Path(__file__).resolve().parent
DEVELOPMENT_KEY = "demo-key"
DEVELOPMENT_ALIASES = ("gpt-4", "gpt-3.5-turbo")
DEFAULT_POOLS = (Address("127.0.0.1", 8501),)
DEFAULT_AUTH = (Address("127.0.0.1", 8502),)
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
class LogConfig:
    """How the services write their logs (standard error)."""

    level: str = option("info", "lowest level written", check=one_of("debug", "info", "warning", "error"))
    format: str = option(
        "auto",
        "json, console, or auto (console on a terminal, json otherwise)",
        check=one_of("auto", "json", "console"),
    )


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The HTTPS endpoint."""

    listen: Address = option(Address("127.0.0.1", 8443), "address of the HTTPS endpoint")
    workers: int = option(1, "Granian worker processes", check=between(1, 256))
    pools: tuple[Address, ...] = option(
        DEFAULT_POOLS, "addresses of the inference pools; under `helixflow serve` by default that of its own pool"
    )
    auth: tuple[Address, ...] = option(
        DEFAULT_AUTH, "addresses of the auth-services; under `helixflow serve` by default that of its own"
    )
    accounts: bool = option(
        True, "ask the auth-service for keys, limits and ledger; false: development profile only, knows only demo-key"
    )
    key_cache_s: float = option(
        60.0, "a verified key is asked for again after this time (seconds)", check=between(1, 3600)
    )
    key_negative_s: float = option(
        5.0, "an unknown key is refused from memory this long (seconds)", check=between(0, 300)
    )
    key_grace_s: float = option(
        86_400.0, "known keys go on this long without an auth-service (seconds)", check=between(0, 604_800)
    )
    key_cache_size: int = option(100_000, "credentials a worker remembers", check=between(100, 10_000_000))
    cors_origins: tuple[str, ...] = option((), "origins that browsers may call from; empty: CORS is off")
    max_body_bytes: int = option(4 * 1024 * 1024, "largest request body (bytes)", check=between(1024, 1 << 30))
    keepalive_s: float = option(15.0, "a silent stream gets a comment this often (seconds)", check=between(0.05, 3600))
    drain_timeout_s: float = option(30.0, "streams may run this long after SIGTERM (seconds)", check=between(0, 3600))
    request_timeout_ms: int = option(
        120_000, "a request that no slot took up by then is refused (milliseconds)", check=between(1, 86_400_000)
    )
    backlog: int = option(1024, "TCP accept queue of the listener", check=between(16, 65535))
    max_connections: int = option(4096, "open connections per worker, idle ones included", check=between(1, 1_000_000))
    stream_buffer_bytes: int = option(
        65536, "unread output kept per stream before its sequence is parked (bytes)", check=between(4096, 1 << 26)
    )
    plain_http: bool = option(False, "serve HTTP without TLS: development profile on a loopback address only")


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """The inference pool: one model on one engine."""

    listen: Address = option(Address("127.0.0.1", 8501), "address of the gRPC server")
    model: Path = option(Path(), "checkpoint directory (Hugging Face layout); empty: the demo model", env="HELIX_MODEL")
    model_id: str = option("", "name of the model in the API; empty: the directory's name")
    aliases: tuple[str, ...] = option((), "further names of the model in the API")
    engine: str = option(
        "onnx",
        "onnx, tensorrt, tensorrt-rtx (both on an NVIDIA GPU), or scripted (tokens from a script; for tests)",
        check=one_of(*BACKENDS, "scripted"),
    )
    provider: str = option("cpu", "where the onnx engine runs: cpu, or cuda (an NVIDIA GPU)", check=one_of(*PROVIDERS))
    device: int = option(0, "number of the GPU, as CUDA counts them", check=between(0, 255))
    precision: str = option(
        "auto",
        "of the weights; auto: fp32 on the CPU, on a GPU bf16 or fp16, as the checkpoint is stored",
        check=one_of(*PRECISION_CHOICES),
    )
    attention: str = option(
        "auto",
        "TensorRT: form of attention; auto: the first one that passes the self-test on the GPU",
        check=one_of(*ATTENTION_CHOICES),
    )
    chunk_tokens: int = option(
        DEFAULT_CHUNK_TOKENS, "TensorRT: longest piece of a prompt in one launch (tokens)", check=between(16, 1 << 16)
    )
    slots: int = option(16, "sequences that run at once", check=between(1, 1024))
    max_len: int = option(
        0,
        f"positions of a slot; 0: what the model was trained for, with TensorRT at most {TENSORRT_MAX_LEN}",
        check=between(0, 1 << 20),
    )
    threads: int = option(0, "engine threads; 0: one per core", check=between(0, 1024))
    step_tokens: int = option(512, "most tokens in one engine step", check=between(1, 1 << 20))
    queue_requests: int = option(1024, "most sequences that wait", check=between(1, 1 << 20))
    queue_tokens: int = option(1 << 20, "most prompt tokens that wait", check=between(1, 1 << 30))
    prefix_reuse: bool = option(True, "start a request from the longest prefix any slot holds")
    stall_timeout_ms: int = option(60_000, "a reader may stall this long (milliseconds)", check=between(10, 86_400_000))
    default_timeout_ms: int = option(
        120_000, "deadline to the first step when a call brings none (milliseconds)", check=between(1, 86_400_000)
    )
    drain_timeout_s: float = option(30.0, "requests may run this long after SIGTERM (seconds)", check=between(0, 3600))
    script_step_ms: float = option(0.0, "scripted engine: duration of a step (milliseconds)", check=between(0, 60_000))
    script_tokens: int = option(
        0, "scripted engine: tokens before it ends; 0: as many as asked for", check=between(0, 1 << 20)
    )


@dataclass(frozen=True, slots=True)
class DatabaseConfig:
    """PostgreSQL: your own by its URL, else the embedded one."""

    url: str = option("", "postgresql://user:password@host:port/database; empty: the embedded server", secret=True)
    admin_url: str = option("", "URL of an administrator; only `helixflow db setup` uses it", secret=True)
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
    user: str = option("nobody", "account that the embedded server runs under when HelixFlow runs as root")


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """The auth-service: accounts, keys, tokens."""

    listen: Address = option(Address("127.0.0.1", 8502), "address of the gRPC server")
    pepper: Path = option(
        Path(), "file of the secret behind key digests; empty: secrets/pepper under home, made at the first start"
    )
    owner: str = option("owner@localhost", "e-mail of the owner that the first start makes")
    issuer: str = option("https://helixflow.local", "issuer of access tokens")
    access_ttl_s: int = option(900, "an access token is valid this long (seconds)", check=between(30, 86_400))
    refresh_ttl_s: int = option(
        2_592_000,
        "a session ends when its refresh token was not used this long (seconds)",
        check=between(60, 31_536_000),
    )
    password_checks: int = option(2, "passwords hashed at a time; each costs 64 MiB", check=between(1, 64))
    lockout_failures: int = option(10, "wrong passwords in a row that lock a user", check=between(1, 1000))
    lockout_s: int = option(900, "how long a user stays locked (seconds)", check=between(1, 86_400))
    drain_timeout_s: float = option(10.0, "calls may run this long after SIGTERM (seconds)", check=between(0, 3600))
    oidc_issuer: str = option("", "URL of an OpenID Connect provider; empty: no login through one")
    oidc_client_id: str = option("", "client id at the provider")
    oidc_client_secret: str = option("", "client secret at the provider", secret=True)
    oidc_ca: Path = option(Path(), "file of CA certificates for the provider; empty: the system's")
    oidc_organisation: str = option("", "organisation that new users of the provider join; empty: none may join")
    oidc_role: str = option("member", "role of users who join", check=one_of("viewer", "member", "admin"))


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Rate limits and budgets."""

    redis_url: str = option(
        "", "redis://, rediss:// (TLS) or unix:// URL; empty: PostgreSQL counts", env="HELIX_REDIS_URL", secret=True
    )
    redis_ca: Path = option(Path(), "file of CA certificates for Redis; empty: the system's")
    redis_timeout_ms: int = option(200, "time for one answer of Redis (milliseconds)", check=between(1, 60_000))
    default_max_tokens: int = option(
        1024, "completion tokens reserved for a request that names no maximum", check=between(1, 1 << 20)
    )
    currency: str = option("USD", "what prices and budgets are in; only shown")
    lease_timeout_ms: int = option(
        1000, "a gateway that got no answer by then counts by itself (milliseconds)", check=between(10, 60_000)
    )


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """The record of every request."""

    spool: Path = option(Path(), "directory of the gateway's spool; empty: spool/ under home")
    spool_max_bytes: int = option(
        4 << 30, "most bytes a worker keeps until they are in the database", check=between(1 << 20, 1 << 44)
    )
    when_full: str = option(
        "refuse",
        "a full spool refuses requests, or serves them unrecorded (and says so in the log)",
        check=one_of("refuse", "serve"),
    )
    fsync_ms: int = option(10, "records are on the disk after this time (milliseconds)", check=between(1, 10_000))
    ship_ms: int = option(200, "records are sent to the database this often (milliseconds)", check=between(1, 60_000))
    batch_rows: int = option(1000, "most rows of one transaction", check=between(1, 10_000))
    keep_months: int = option(0, "months of rows that are kept; 0: all", check=between(0, 1200))


@dataclass(frozen=True, slots=True)
class SuperviseConfig:
    """How `helixflow serve` keeps its services up."""

    ready_timeout_s: float = option(120.0, "a service must be ready within this time (seconds)", check=between(1, 3600))
    backoff_min_s: float = option(0.2, "first pause before a restart (seconds)", check=between(0.01, 60))
    backoff_max_s: float = option(10.0, "longest pause before a restart (seconds)", check=between(0.01, 600))


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
    problems += _oidc_problems(config.auth)
    problems += _database_problems(config.database)
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


def _oidc_problems(auth: AuthConfig) -> list[str]:
    if not auth.oidc_issuer:
        return []
    problems = [] if auth.oidc_client_id else ["auth.oidc_client_id: the provider of auth.oidc_issuer needs one"]
    if not auth.oidc_issuer.startswith("https://"):
        problems.append(f"auth.oidc_issuer: {auth.oidc_issuer} must be an https:// URL")
    return problems


def _database_problems(database: DatabaseConfig) -> list[str]:
    problems = []
    if database.pool_min > database.pool_max:
        problems.append("database.pool_min: must not be larger than database.pool_max")
    if not database.url and not database.admin_url:
        return problems
    from helixflow.db.target import Target  # noqa: PLC0415 - asyncpg is slow to import, and only a URL needs it

    for name, url in (("url", database.url), ("admin_url", database.admin_url)):
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
            if entry.metadata.get("secret"):
                out[entry.name] = "***" if value else ""
            else:
                out[entry.name] = (
                    table(value) if dataclasses.is_dataclass(value) and entry.name in SECTIONS else plain(value)
                )
        return out

    return table(config)
