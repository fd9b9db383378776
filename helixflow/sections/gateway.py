"""Section `[gateway]`: the HTTPS endpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

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


def _check_networks(entries: tuple[str, ...]) -> str | None:
    for entry in entries:
        try:
            ip_network(entry)
        except ValueError as error:
            return f"{error}: write a network as 10.0.0.0/8, or an address"
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
    front_threads: int = option(2, "threads that end TLS and forward requests", check=between(1, 256))
    max_connections: int = option(4096, "open connections, idle ones included", check=between(1, 1_000_000))
    max_connections_per_client: int = option(
        1024,
        "connections of one address (IPv6: one /64), so that nobody takes all; raise it for a load balancer that is no "
        "trusted proxy",
        check=between(1, 1_000_000),
    )
    max_handshakes: int = option(
        128, "TLS handshakes at once; a quarter of them from one address", check=between(1, 65_536)
    )
    max_strangers_per_client: int = option(
        512,
        "requests at once of one address that have shown no credential known to be good; more wait a second, then are "
        "refused with 429",
        check=between(1, 1_000_000),
    )
    max_streams: int = option(1000, "streams of one HTTP/2 connection", check=between(1, 65_536))
    max_resets: int = option(
        64, "streams that an HTTP/2 connection may reset before they are looked at", check=between(1, 65_536)
    )
    handshake_timeout_s: float = option(10.0, "a TLS handshake is over by then (seconds)", check=between(0.1, 600))
    first_byte_timeout_s: float = option(
        10.0, "a connection that has sent nothing by then is closed (seconds)", check=between(0.1, 600)
    )
    head_timeout_s: float = option(
        20.0, "from the first byte of a request's head to its last (seconds)", check=between(0.1, 600)
    )
    body_min_rate: int = option(
        1024, "least speed of a request's body (bytes per second), after body_grace_s", check=between(1, 1 << 30)
    )
    body_grace_s: float = option(15.0, "a request's body may be slower for so long (seconds)", check=between(0, 600))
    idle_timeout_s: float = option(
        75.0,
        "between two requests (seconds); longer than the 60 s after which load balancers give connections up",
        check=between(0.1, 86_400),
    )
    trusted_proxies: tuple[str, ...] = option(
        (), "networks of proxies whose X-Forwarded-For names the client, as 10.0.0.0/8", check=_check_networks
    )
    proxy_protocol: bool = option(False, "connections of trusted proxies begin with PROXY protocol v2")
    client_ca: Path = option(
        Path(), "CA certificates (PEM) of API clients, which may then show a certificate instead of a key"
    )
    client_crl: Path = option(Path(), "revocation list of gateway.client_ca (PEM)")
    stream_buffer_bytes: int = option(
        16384, "unread output kept per stream before its sequence is parked (bytes)", check=between(4096, 1 << 26)
    )
    plain_http: bool = option(False, "serve HTTP without TLS: development profile on a loopback address only")
