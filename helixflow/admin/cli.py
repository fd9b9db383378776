"""`helixflow user | session | organisation | key | limits | price | usage | audit`.

What a command needs is imported when it runs.
"""

import argparse
import importlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixflow.admin.values import count, day, duration, expiry, money, token_price
from helixflow.terminal import say

if TYPE_CHECKING:
    from helixflow.admin.operator import Outcome
    from helixflow.config import Config

ROLES = ("owner", "admin", "member", "viewer")
GROUPS = ("day", "model", "endpoint", "key", "user", "organisation")
AUDIT_ROWS = 200
"""Rows that `audit list` shows unless told otherwise."""


def add_parser(subparsers: Any) -> None:
    """Adds the commands of accounts. Each sets `run`."""
    _users(_group(subparsers, "user", "add, list, change and remove users and service accounts"))
    _sessions(_group(subparsers, "session", "list and end the sessions of people who are logged in"))
    _organisations(_group(subparsers, "organisation", "add, list and change organisations"))
    _keys(_group(subparsers, "key", "make, list, change, rotate and revoke API keys"))
    _limits(_group(subparsers, "limits", "set and list rate limits and budgets"))
    _prices(_group(subparsers, "price", "set and list what models cost"))
    _usage(subparsers)
    _audit(_group(subparsers, "audit", "list administrative acts, check the ledger"))


def _users(commands: Any) -> None:
    add = _command(
        commands,
        "add",
        "people.user_add",
        "make a user; a one-time password is shown once",
        "Make a user and show a one-time password, once. A service account has no password, only keys.",
    )
    add.add_argument("email", metavar="EMAIL", help="e-mail address; of a service account: its name")
    add.add_argument("--role", choices=ROLES, default="member", help="what the user may do (default: member)")
    add.add_argument("--service-account", action="store_true", help="a program, not a person: no password")
    _organisation(add, "the user's; needed when there are several")
    _organisation(_command(commands, "list", "people.user_list", "show every user"), "only of this one")
    update = _command(commands, "update", "people.user_update", "change role or state of a user")
    _user(update)
    update.add_argument("--role", choices=ROLES, help="the new role")
    _switch(update, "disabled", "--disable", "--enable", "no login and no key works", "undo --disable")
    reset = _command(
        commands,
        "reset-password",
        "people.user_reset_password",
        "give a user a new one-time password, which is shown once",
        "Give a user a new one-time password, which is shown once. All sessions end; say what becomes of API keys.",
    )
    _user(reset)
    reset.add_argument(
        "--keys", choices=("keep", "revoke"), help="whether the user's API keys go on; needed when there are any"
    )
    _user(
        _command(
            commands,
            "reset-factor",
            "access.user_reset_factor",
            "remove a second factor that was lost; the user's sessions end",
        )
    )
    _user(_command(commands, "unlock", "people.user_unlock", "forget the wrong passwords that make a user wait"))
    _user(_command(commands, "remove", "people.user_remove", "remove a user; keys and sessions end at once"))


def _sessions(commands: Any) -> None:
    show = _command(commands, "list", "access.session_list", "show who is logged in")
    show.add_argument("--user", metavar="USER", help="only of this one: e-mail or id")
    end = _command(commands, "end", "access.session_end", "end one session, or all of a user")
    end.add_argument("session", nargs="?", metavar="SESSION", help="its id, as `helixflow session list` shows it")
    end.add_argument("--user", metavar="USER", help="e-mail or id: every session of this user")


def _organisations(commands: Any) -> None:
    add = _command(commands, "add", "people.organisation_add", "make an organisation")
    add.add_argument("name", metavar="NAME", help="its name")
    _command(commands, "list", "people.organisation_list", "show every organisation")
    update = _command(
        commands,
        "update",
        "people.organisation_update",
        "rename or suspend an organisation, keep its texts or not, declare its domains",
        "Change an organisation. Prompts and answers are not kept unless --keep-texts says so.",
    )
    update.add_argument("organisation", metavar="ORGANISATION", help="name or id")
    update.add_argument("--name", metavar="NAME", help="the new name")
    _switch(update, "suspended", "--suspend", "--resume", "no login and no key works", "undo --suspend")
    update.add_argument(
        "--keep-texts",
        dest="store",
        action=argparse.BooleanOptionalAction,
        help="whether prompts and answers are kept from now on",
    )
    update.add_argument("--retention-days", type=_days, metavar="DAYS", help="how long texts are kept")
    redact = update.add_mutually_exclusive_group()
    redact.add_argument(
        "--redact",
        action="append",
        metavar="PATTERN",
        help="regular expression; what matches is replaced in texts; may be repeated, replaces all earlier ones",
    )
    redact.add_argument("--no-redact", dest="redact", action="store_const", const=[], help="redact nothing")
    domains = update.add_mutually_exclusive_group()
    domains.add_argument(
        "--domain",
        action="append",
        metavar="DOMAIN",
        help="e-mail addresses of this domain are the organisation's; may be repeated, replaces all earlier ones",
    )
    domains.add_argument("--no-domain", dest="domain", action="store_const", const=[], help="no domain is")

    factor = _command(
        commands,
        "require-factor",
        "access.require_factor",
        "say from which role on a password needs a second factor",
        "Say from which role on a password needs a second factor. Who has none can enrol one and do nothing else.",
    )
    factor.add_argument("organisation", metavar="ORGANISATION", help="name or id")
    factor.add_argument("role", choices=(*ROLES, "nobody"), help="the least role that needs one")


_CERTIFICATE = (
    "a client certificate of gateway.client_ca that stands for the key, for inference: a SPIFFE URI, or sha256: and "
    "its fingerprint"
)


def _keys(commands: Any) -> None:
    add = _command(
        commands,
        "add",
        "people.key_add",
        "make an API key, which is shown once",
        "Make an API key and show it, once. Without limits of its own it has those of its user and organisation. It is "
        "for inference only unless --admin says otherwise.",
    )
    add.add_argument("name", metavar="NAME", help="what the key is for")
    add.add_argument("--user", metavar="USER", help="e-mail or id of its holder (default: the first owner)")
    add.add_argument("--expires", type=expiry, default=0, metavar="WHEN", help="YYYY-MM-DD, or for example 90d")
    add.add_argument("--model", action="append", default=[], metavar="MODEL", help="may call this model; repeatable")
    add.add_argument("--endpoint", action="append", default=[], metavar="PATH", help="may call this path; repeatable")
    add.add_argument(
        "--admin", action="store_true", help="administers, up to the role of its holder; else it is for inference only"
    )
    add.add_argument("--certificate", default="", metavar="NAME", help=_CERTIFICATE)
    _limit_options(add)
    _organisation(_command(commands, "list", "people.key_list", "show every key, not the secrets"), "only of this one")
    update = _command(commands, "update", "people.key_update", "change name, expiry or what a key may call")
    _key(update)
    update.add_argument("--name", metavar="NAME", help="the new name")
    update.add_argument("--expires", type=expiry, metavar="WHEN", help="YYYY-MM-DD, for example 90d, or never")
    for name, what in (("model", "MODEL"), ("endpoint", "PATH")):
        group = update.add_mutually_exclusive_group()
        group.add_argument(f"--{name}", action="append", metavar=what, help="may call these only; repeatable")
        group.add_argument(f"--any-{name}", dest=name, action="store_const", const=[], help="may call all")
    update.add_argument(
        "--admin",
        action=argparse.BooleanOptionalAction,
        help="whether it administers, up to the role of its holder, or is for inference only",
    )
    group = update.add_mutually_exclusive_group()
    group.add_argument("--certificate", metavar="NAME", help=_CERTIFICATE)
    group.add_argument("--no-certificate", dest="certificate", action="store_const", const="", help="none any more")
    rotate = _command(
        commands,
        "rotate",
        "people.key_rotate",
        "make a new key in the place of an old one; it is shown once",
        "Make a new key with the rights and limits of the old one and show it, once. Both work during the overlap.",
    )
    _key(rotate)
    rotate.add_argument(
        "--overlap", type=duration, metavar="DURATION", help="how long the old one still works (default: 1d)"
    )
    _key(_command(commands, "revoke", "people.key_revoke", "end a key at once"))


def _limits(commands: Any) -> None:
    put = _command(
        commands,
        "set",
        "budget.limits_set",
        "replace all limits of a key, a user or an organisation",
        "Replace all limits of a subject: what is not named is unlimited from now on. Numbers may end in k, M or G.",
    )
    put.add_argument("subject", metavar="SUBJECT", help="key:ID, user:E-MAIL or organisation:NAME")
    put.add_argument("--none", action="store_true", help="no limits")
    _limit_options(put)
    _organisation(_command(commands, "list", "budget.limits_list", "show every limit"), "only of this one")


def _limit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for period in ("minute", "day", "month"):
        if period == "minute":
            group.add_argument("--requests-per-minute", type=count, metavar="N", help="requests")
        group.add_argument(f"--tokens-per-{period}", type=count, metavar="N", help="prompt and completion tokens")
        if period != "minute":
            group.add_argument(f"--cost-per-{period}", type=money, metavar="AMOUNT", help="money, for example 12.50")
    group.add_argument("--concurrent-requests", type=count, metavar="N", help="requests at a time")


def _prices(commands: Any) -> None:
    put = _command(
        commands,
        "set",
        "budget.price_set",
        "say what a model costs",
        "Set the price of a model, per million tokens. It counts from the next request on.",
    )
    put.add_argument("model", metavar="MODEL", help="name of the model")
    for name, required, text in (
        ("prompt", True, "a million prompt tokens"),
        ("cached", False, "a million prompt tokens that were reused (default: as --prompt)"),
        ("completion", True, "a million generated tokens"),
    ):
        put.add_argument(f"--{name}", type=token_price, required=required, metavar="PRICE", help=text)
    _command(commands, "list", "budget.price_list", "show every price")
    remove = _command(commands, "remove", "budget.price_remove", "make a model free")
    remove.add_argument("model", metavar="MODEL", help="name of the model")


def _usage(subparsers: Any) -> None:
    text = "show what was used, export the ledger"
    usage = _command(
        subparsers,
        "usage",
        "records.usage_show",
        text,
        "Show what was used, this month by day unless told otherwise; `usage export` writes every request.",
    )
    _show_options(usage)
    commands = usage.add_subparsers(title="commands", metavar="[COMMAND]")
    # Defaults of these would hide what stands before the command: only what is given counts.
    show = _command(commands, "show", "records.usage_show", "show what was used (the default)", suppress=True)
    _show_options(show, argparse.SUPPRESS)
    export = _command(
        commands,
        "export",
        "records.usage_export",
        "write every request of the ledger",
        "Write one line for every request. A file appears once it is complete, and replaces one of the same name.",
        suppress=True,
    )
    _day_options(export, argparse.SUPPRESS)
    _organisation(export, "only of this one", argparse.SUPPRESS)
    export.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default: csv")
    export.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    texts = _command(
        commands,
        "texts",
        "records.usage_texts",
        "show prompt and answer of a request",
        "Show prompt and answer of one request, if its organisation keeps them. The audit log says that you did.",
        suppress=True,
    )
    texts.add_argument("request", metavar="REQUEST", help="its id, as an export has it")


def _show_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    _day_options(parser, default)
    parser.add_argument(
        "--by", type=_groups, default=default, metavar="GROUPS", help=f"{', '.join(GROUPS)}; several with commas"
    )
    _organisation(parser, "only of this one", default)
    for name, text in (("key", "id of a key"), ("user", "e-mail or id of a user"), ("model", "name of a model")):
        parser.add_argument(f"--{name}", default=default, metavar=name.upper(), help=f"only of this one: {text}")


def _audit(commands: Any) -> None:
    show = _command(commands, "list", "records.audit_list", "show administrative acts")
    _day_options(show)
    _organisation(show, "only of this one")
    show.add_argument("--limit", type=_rows, default=AUDIT_ROWS, metavar="N", help=f"most rows (default: {AUDIT_ROWS})")
    verify = _command(
        commands,
        "verify",
        "records.audit_verify",
        "check the hash chains of ledger and audit log; exit status 1 when one is broken",
        "Recompute the hash chains of the ledger and of the audit log, and compare them with the last checkpoint: an "
        "altered, removed, added or moved row is found, and a day or an end that is missing. Exit status 1 then.",
    )
    _day_options(verify)
    verify.add_argument(
        "--anchor", type=Path, metavar="FILE", help="also compare with what `audit anchor` wrote earlier"
    )
    anchor = _command(
        commands,
        "anchor",
        "records.audit_anchor",
        "write a signed statement of where all chains end now",
        "Write a signed statement of where all chains end now. Kept on another machine and given to `audit verify "
        "--anchor` later, it shows whether history was rewritten or cut since, even by somebody who has the database "
        "and the pepper.",
    )
    anchor.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new file; never overwritten")


# --- parts of commands ---------------------------------------------------------


def _group(subparsers: Any, name: str, text: str) -> Any:
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _command(
    commands: Any, name: str, action: str, text: str, description: str = "", suppress: bool = False
) -> argparse.ArgumentParser:
    """`action`: module and function below helixflow.admin. `suppress`: an option that is not given sets nothing."""
    full = description or text[0].upper() + text[1:] + "."
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=full)
    default = argparse.SUPPRESS if suppress else None
    parser.add_argument("--config", metavar="FILE", default=default, help="TOML file (default: HELIX_CONFIG)")
    parser.add_argument(
        "--json", action="store_true", default=default or False, help="as JSON, as the admin API has it"
    )
    parser.set_defaults(run=run, action=action)
    return parser


def _organisation(parser: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    parser.add_argument("--organisation", default=default, metavar="ORGANISATION", help=f"name or id: {text}")


def _user(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("user", metavar="USER", help="e-mail or id")


def _key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", metavar="KEY", help="its id, as `helixflow key list` shows it")


def _switch(parser: argparse.ArgumentParser, name: str, on: str, off: str, on_text: str, off_text: str) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(on, dest=name, action="store_const", const=True, help=on_text)
    group.add_argument(off, dest=name, action="store_const", const=False, help=off_text)


def _day_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    for option, name, text in (
        ("--from", "first", "first day (UTC; default: of this month)"),
        ("--to", "last", "last day (default: today)"),
    ):
        parser.add_argument(option, dest=name, type=day, default=default, metavar="YYYY-MM-DD", help=text)


def _groups(text: str) -> list[str]:
    groups = text.split(",")
    wrong = [name for name in groups if name not in GROUPS]
    if wrong or len(set(groups)) < len(groups):
        raise argparse.ArgumentTypeError(f"`{text}`: name each of {', '.join(GROUPS)} at most once, with commas")
    return groups


def _rows(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of rows from 1 to 100000")
    return int(text)


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 3650:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of days from 1 to 3650")
    return int(text)


# --- running -------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Runs a parsed command; returns its exit status. Raises AdminError and ConfigError."""
    import asyncio
    import dataclasses

    from helixflow import log
    from helixflow.config import load
    from helixflow.ledger.neutral import json_text

    if options.config:
        os.environ["HELIX_CONFIG"] = options.config
    config = load()
    # What a client notes on its way is for services; a command says itself what went wrong.
    level = "error" if config.log.level in ("info", "warning") else config.log.level
    log.setup(dataclasses.replace(config.log, level=level), "admin", command=True)
    outcome = asyncio.run(_run(config, options))
    if options.json and outcome.data is not None:
        say(json_text(json.dumps(outcome.data, indent=2, ensure_ascii=False)))
    elif outcome.text:
        say(outcome.text)
    return outcome.status


async def _run(config: "Config", options: argparse.Namespace) -> "Outcome":
    from helixflow.admin.operator import connect

    module, _, name = options.action.partition(".")
    action: Callable[..., Awaitable[Outcome]] = getattr(importlib.import_module(f"helixflow.admin.{module}"), name)
    options.owner = config.auth.owner
    async with connect(config) as operator:
        return await action(operator, options)
