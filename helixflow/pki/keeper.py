"""`helixflow serve` and its certificates: made at the start, renewed while it runs."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from helixflow import command, log
from helixflow.config import UNSET, Config

INTERVAL_S = 3600.0
"""Certificates that live a day are due eight hours before they end."""

logger = log.get("pki")


def options(config: Config) -> list[str]:
    """What `pki init` and `pki renew` are called with."""
    pki = config.pki
    chosen = ["--dir", str(config.certs), "--days", str(pki.leaf_days)]
    for option, path in (("--ca-key", pki.ca_key), ("--ca-passphrase-file", pki.ca_passphrase_file)):
        if path != UNSET:
            chosen += [option, str(Path(path).expanduser())]
    return chosen


async def renew_due(config: Config) -> bool:
    """Runs `helixflow pki renew`; false, and said in the log, when it failed."""
    status = await command.run("pki", "renew", *options(config), quiet=True)
    if status:
        hint = (
            "see the message above; without the CA's key here, renew where it is and copy the files, or set pki.renew"
        )
        logger.error("certificates are due and could not be renewed", status=status, hint=hint)
    return status == 0


async def keep(
    config: Config,
    renew: Callable[[Config], Awaitable[bool]] = renew_due,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Looks once an hour for certificates and a revocation list that are due, until it is cancelled."""
    while config.pki.renew:
        await renew(config)
        await pause(INTERVAL_S)
