"""`helixflow ledger`: what an operator does with a gateway's records. What a command needs is imported when it runs."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from helixflow.terminal import say

if TYPE_CHECKING:
    from helixflow.config import Config
    from helixflow.ledger.rejected import Resent

CALL_S = 30.0


def add_parser(subparsers: Any) -> None:
    """Adds `ledger` and its commands. Each sets `run`."""
    text = "send records again that the ledger has refused"
    ledger = subparsers.add_parser("ledger", help=text, description=text[0].upper() + text[1:] + ".")
    commands = ledger.add_subparsers(title="commands", metavar="COMMAND", required=True)
    resend = commands.add_parser(
        "resend",
        help="send the records of rejected.log again, each once; exit status 1 when some were refused again",
        description="Send the records that a gateway has set aside (rejected.log beside its spools) again, "
        "on that gateway's machine. Each ends up in the ledger once. Exit status 1 when some were refused again.",
    )
    resend.add_argument("--config", metavar="FILE", help="TOML file (default: HELIX_CONFIG)")
    resend.add_argument("--json", action="store_true", help="as JSON")
    resend.set_defaults(run=_resend)


def _resend(options: argparse.Namespace) -> int:
    import asyncio
    import dataclasses

    from helixflow import log
    from helixflow.config import load

    if options.config:
        os.environ["HELIX_CONFIG"] = options.config
    config = load()
    log.setup(dataclasses.replace(config.log, level="error"), "ledger", command=True)
    done = asyncio.run(_run(config))
    if options.json:
        say(json.dumps(dataclasses.asdict(done)))
    else:
        say(f"sent {done.sent}, refused again {done.refused}, unreadable {done.unreadable}")
    return 1 if done.refused or done.unreadable else 0


async def _run(config: "Config") -> "Resent":
    from helixflow.admin.errors import AdminError, UnreachableError
    from helixflow.core_rs import CoreError, Unavailable
    from helixflow.gateway.certificates import GatewayFiles
    from helixflow.ledger.rejected import BusyError, Rejected, resend
    from helixflow.refusals import message_of
    from helixflow.rpc import messages
    from helixflow.rpc.client import Client

    async def append(spool: str, records: list[bytes]) -> None:
        request = messages.AppendUsageRequest(spool=spool, records=records)
        await client.call("AuthService/AppendUsage", request, timeout_s=CALL_S)

    root = config.ledger.spool
    if not root.is_dir():
        raise AdminError(f"{root} (ledger.spool) does not exist: run this on the machine of a gateway, as its user")
    try:
        client = Client([str(address) for address in config.gateway.auth], GatewayFiles.of(config).to_pools())
    except CoreError as error:
        raise AdminError(f"{message_of(error)}\nThis command shows the gateway's certificate.") from None
    try:
        return await resend(Rejected(root, config.ledger.rejected_max_bytes), append, config.ledger.batch_rows)
    except Unavailable as error:
        raise UnreachableError(f"the ledger takes no rows now; nothing is lost: {message_of(error)}") from None
    except CoreError as error:
        raise AdminError(f"the auth-service refuses: {message_of(error)}") from None
    except BusyError as error:
        raise AdminError(str(error)) from None
    except OSError as error:
        raise AdminError(f"{root}: {error.strerror}") from None
    finally:
        client.close()
