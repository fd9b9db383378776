"""Where and as whom the services of `serve` run; only root has a choice."""

import asyncio
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from helixflow import log
from helixflow.config import Config
from helixflow.confine import kernel
from helixflow.confine.account import ROOT, Account, ConfinementError
from helixflow.confine.belongings import hand_over, home_of, needed, software
from helixflow.confine.copies import NAMES, Copies
from helixflow.confine.environment import general, options
from helixflow.confine.plan import PLAN, Plan
from helixflow.errors import StartError
from helixflow.options import Address
from helixflow.pki.layout import Layout
from helixflow.process import PARENT_PID

DATABASE_CAPABILITIES = (
    kernel.CAP_CHOWN,
    kernel.CAP_DAC_OVERRIDE,
    kernel.CAP_FOWNER,
    kernel.CAP_KILL,
    kernel.CAP_SETGID,
    kernel.CAP_SETUID,
)
"""What the owner of the embedded PostgreSQL needs to give folders to its account, to become it and to stop it."""

PROBE_S = 60.0

logger = log.get("supervisor")


@dataclass(slots=True)
class Settled:
    """How one service runs."""

    environ: dict[str, str]
    account: Account | None = None
    """None: the one of this process."""
    launcher: tuple[str, ...] = ()
    """Module that confines the process before the service's own begins; empty: nothing is to be given up."""
    copies: Copies | None = field(default=None)


async def settle(service: str, config: Config) -> Settled:
    """Prepares what a service needs: environment, and for root an account, folders and certificates of its own.

    Raises StartError when its folders cannot be made.
    """
    environ = {**general(service), **options(service, config)}
    if os.geteuid() != 0:
        return Settled(environ)
    if service == "database":
        return _settled(environ, ROOT, Plan.of(ROOT, DATABASE_CAPABILITIES))
    try:
        return await _apart(service, config, environ, _account(service, config))
    except (ConfinementError, OSError) as error:
        logger.warning("service keeps the account root, without its capabilities", name=service, reason=str(error))
    made = _settled(environ, ROOT, Plan.of(ROOT, _capabilities(service, config)))
    try:
        _move_in(service, config, ROOT, made)
    except OSError as error:
        where = error.filename or config.home
        raise StartError(f"{where}, for the {NAMES[service]}, cannot be used: {error.strerror or error}") from error
    return made


def _account(service: str, config: Config) -> Account:
    if not config.supervise.separate:
        raise ConfinementError("supervise.separate is off")
    return Account.of(service, config.supervise.first_uid)


async def _apart(service: str, config: Config, environ: dict[str, str], account: Account) -> Settled:
    hand_over(service, config, account)
    wanted = needed(service, config)
    shown = [*software(), home_of(service, config), *(path for _mode, path in wanted)]
    if service == "auth" and not config.database.url:
        shown.append(config.database.directory.expanduser().absolute())
    if service == "auth":
        # A first start makes the secret in it.
        shown.append(config.auth.pepper.expanduser().absolute().parent)
    plan = Plan.of(account, _capabilities(service, config), tuple(dict.fromkeys(str(path) for path in shown)))
    made = _settled(dict(environ), account, plan)
    _move_in(service, config, account, made)
    reason = await _probe(made, [f"{mode}:{path}" for mode, path in wanted])
    if reason.startswith("/"):
        raise ConfinementError(f"{account.name} cannot use {reason}: let it be read, or move it to where it can be")
    if reason:
        raise ConfinementError(f"{account.name} cannot run HelixFlow here: {reason}")
    return made


def _settled(environ: dict[str, str], account: Account, plan: Plan) -> Settled:
    return Settled({**environ, PLAN: plan.dumps()}, account, ("helixflow.confine.launch",))


def _move_in(service: str, config: Config, account: Account, made: Settled) -> None:
    """Certificates and a home of its own."""
    hand_over(service, config, account)
    folder = home_of(service, config)
    made.copies = Copies(service, Layout(config.certs), folder / "certs", account)
    made.copies.begin()
    made.environ |= {"HELIX_CERTS": str(folder / "certs"), "HOME": str(folder / "home")}


def _capabilities(service: str, config: Config) -> tuple[int, ...]:
    """One service's listener may need one capability: ports below 1024 are for the privileged."""
    listen: Address = getattr(config, service).listen
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text("ascii"))
    except OSError:
        first = 1024
    return (kernel.CAP_NET_BIND,) if 0 < listen.port < first else ()


async def _probe(made: Settled, wanted: list[str]) -> str:
    """What the account would not reach, found by becoming it; empty: it reaches everything."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *made.launcher,
        "helixflow.confine.probe",
        *wanted,
        env={**made.environ, PARENT_PID: str(os.getpid())},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(PROBE_S):
            said, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return (lines[-1] if lines else "Python") if process.returncode else ""
