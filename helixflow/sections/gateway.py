"""Section `[gateway]`: the HTTPS endpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

from helixflow.options import Address, between, one_of, option

DEFAULT_POOLS = (Address("127.0.0.1", 8501),)
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100.0
DEFAULT_AUTH = (Address("127.0.0.1", 8502),)


def weights(entries: tuple[str, ...]) -> Mapping[str, float]:
    """Reads entries `NAME=WEIGHT`. Raises ValueError."""
    found = {}
    for entry in entries:
        name, _, value = entry.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = 0.0
        if not name.strip() or not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            raise ValueError(
                f"{entry!r} is not a weight: write NAME=WEIGHT, for example acme=3, with a weight from "
                f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
        found[name.strip()] = weight
    return found


def _check_weights(entries: tuple[str, ...]) -> str | None:
    try:
        weights(entries)
    except ValueError as error:
        return str(error)
    return None


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
    unknown_keys_per_minute: int = option(
        600,
        "unknown keys and tokens that one address (IPv6: one /64) may have checked by a worker each minute; more are "
        "refused with 429 unasked",
        check=between(1, 1_000_000),
    )
    key_grace_s: float = option(
        86_400.0, "known keys go on this long without an auth-service (seconds)", check=between(0, 604_800)
    )
    key_cache_size: int = option(100_000, "credentials a worker remembers", check=between(100, 10_000_000))
    prefix_scope: str = option(
        "organisation",
        "who may start from each other's prompts in the caches: requests of an organisation, of a user, or of a key; "
        "never more",
        check=one_of("organisation", "user", "key"),
    )
    weights: tuple[str, ...] = option(
        (),
        "shares of a busy engine beside others' 1: NAME=WEIGHT, where NAME is an organisation's name or id, or a key's "
        "id",
        check=_check_weights,
    )
    cors_origins: tuple[str, ...] = option((), "origins that browsers may call from; empty: CORS is off")
    strict_parameters: bool = option(
        False, "refuse request parameters that nobody knows; otherwise they are ignored and named in the answer"
    )
    max_body_bytes: int = option(4 * 1024 * 1024, "largest request body (bytes)", check=between(1024, 1 << 30))
    keepalive_s: float = option(15.0, "a silent stream gets a comment this often (seconds)", check=between(0.05, 3600))
    stall_timeout_s: float = option(
        60.0, "a client that reads nothing of its stream is cut after this time (seconds)", check=between(0.1, 3600)
    )
    drain_timeout_s: float = option(30.0, "streams may run this long after SIGTERM (seconds)", check=between(0, 3600))
    request_timeout_ms: int = option(
        120_000, "a request that no slot took up by then is refused (milliseconds)", check=between(1, 86_400_000)
    )
    backlog: int = option(1024, "TCP accept queue of the listener", check=between(16, 65535))
    max_connections: int = option(4096, "open connections per worker, idle ones included", check=between(1, 1_000_000))
    stream_buffer_bytes: int = option(
        16384, "unread output kept per stream before its sequence is parked (bytes)", check=between(4096, 1 << 26)
    )
    plain_http: bool = option(False, "serve HTTP without TLS: development profile on a loopback address only")
