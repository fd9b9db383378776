"""Section `[supervise]`: how `helixflow serve` keeps its services up."""

from dataclasses import dataclass

from helixflow.options import between, option


@dataclass(frozen=True, slots=True)
class SuperviseConfig:
    """How `helixflow serve` keeps its services up."""

    ready_timeout_s: float = option(120.0, "a service must be ready within this time (seconds)", check=between(1, 3600))
    backoff_min_s: float = option(0.2, "first pause before a restart (seconds)", check=between(0.01, 60))
    backoff_max_s: float = option(10.0, "longest pause before a restart (seconds)", check=between(0.01, 600))
    separate: bool = option(
        True,
        "started by root: each service under an account of its own, helixflow-gateway, -auth and -pool, or a number "
        "where there is none; false: all as root, without its capabilities",
    )
    first_uid: int = option(
        60601, "first of the numbers for services that have no account", check=between(1000, 2_000_000_000)
    )
    disk_warn_bytes: int = option(
        1 << 30,
        "warn when less is free on the disk of the spool or of the embedded database; 0: never (bytes)",
        check=between(0, 1 << 50),
    )
    stall_timeout_s: float = option(
        6.0,
        "a service, or a gateway's worker, whose loop stood still this long (seconds) is ended and replaced; 0: never",
        check=between(0, 3600),
    )
