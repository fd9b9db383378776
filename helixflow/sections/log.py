"""Section `[log]`: how and where the services write their logs."""

from dataclasses import dataclass
from pathlib import Path

from helixflow.options import between, one_of, option


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How and where the services write their logs."""

    level: str = option("info", "lowest level written", check=one_of("debug", "info", "warning", "error"))
    format: str = option(
        "auto",
        "json, console, or auto (console on a terminal, json otherwise)",
        check=one_of("auto", "json", "console"),
    )
    health: bool = option(False, "log the requests of /health, /live and /ready, too")
    repeats_s: float = option(
        60.0,
        "lines of a kind beyond the first five are counted, and the sum told after this time (seconds)",
        check=between(0.1, 86_400),
    )
    file: Path = option(
        Path(), "write to this file instead of standard error; {service} in it is the service's name; empty: none"
    )
    file_max_bytes: int = option(
        100 << 20, "a file of this size is set aside, and compressed (bytes)", check=between(4096, 1 << 40)
    )
    file_max_hours: int = option(
        24, "a file of this age is set aside; 0: whatever its age (hours)", check=between(0, 8784)
    )
    file_keep: int = option(14, "files that were set aside and are kept", check=between(0, 10_000))
