"""Section `[log]`: how the services write their logs (standard error)."""

from dataclasses import dataclass

from helixflow.options import one_of, option


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How the services write their logs (standard error)."""

    level: str = option("info", "lowest level written", check=one_of("debug", "info", "warning", "error"))
    format: str = option(
        "auto",
        "json, console, or auto (console on a terminal, json otherwise)",
        check=one_of("auto", "json", "console"),
    )
