"""Section `[limits]`: rate limits and budgets."""

from dataclasses import dataclass
from pathlib import Path

from helixflow.options import between, option
from helixflow.secret import Secret


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Rate limits and budgets."""

    redis_url: Secret = option(
        Secret(), "redis://, rediss:// (TLS) or unix:// URL; empty: PostgreSQL counts", env="HELIX_REDIS_URL"
    )
    redis_ca: Path = option(Path(), "file of CA certificates for Redis; empty: the system's")
    redis_timeout_ms: int = option(200, "time for one answer of Redis (milliseconds)", check=between(1, 60_000))
    default_max_tokens: int = option(
        1024, "completion tokens reserved for a request that names no maximum", check=between(1, 1 << 20)
    )
    new_key_requests_per_minute: int = option(
        600, "limit of a new key that is given none, in the production profile; 0: none", check=between(0, 1 << 40)
    )
    new_key_tokens_per_minute: int = option(
        1_000_000,
        "limit of a new key that is given none, in the production profile; 0: none",
        check=between(0, 1 << 40),
    )
    new_key_concurrent_requests: int = option(
        32, "limit of a new key that is given none, in the production profile; 0: none", check=between(0, 1 << 20)
    )
    currency: str = option("USD", "what prices and budgets are in; only shown")
    lease_timeout_ms: int = option(
        1000, "a gateway that got no answer by then counts by itself (milliseconds)", check=between(10, 60_000)
    )
