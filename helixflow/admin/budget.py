"""`helixflow limits` and `helixflow price`."""

import contextlib
from argparse import Namespace
from typing import Any
from uuid import UUID

from helixflow.admin.errors import AdminError
from helixflow.admin.operator import Operator, Outcome
from helixflow.admin.table import Column, facts, table
from helixflow.admin.values import count_text, money_text, token_price_text

METRICS = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "concurrent_requests": "requests at a time",
    "tokens_per_day": "tokens per day",
    "tokens_per_month": "tokens per month",
    "cost_per_day": "cost per day",
    "cost_per_month": "cost per month",
}
"""Fields of the message `Limits`, and how people call them."""


def limits_of(options: Namespace) -> dict[str, int]:
    """The limits that were named on the command line."""
    named = {name: getattr(options, name) for name in METRICS}
    return {name: value for name, value in named.items() if value is not None}


async def limits_set(operator: Operator, options: Namespace) -> Outcome:
    """Replaces all limits of a subject."""
    limits = limits_of(options)
    if bool(limits) == options.none:
        raise AdminError("give the limits that the subject has from now on, or --none to remove all of them")
    subject = await _subject(operator, options.subject)
    answer = await operator.call("SetLimits", "SetLimitsRequest", {"subject": subject, "limits": limits})
    return Outcome(answer, facts([("subject", answer["subject"]), *_limit_texts(answer), *_unlimited(answer)]))


async def limits_list(operator: Operator, options: Namespace) -> Outcome:
    """Every limit."""
    rows = await operator.rows("ListLimits", "ListRequest", {"organisation": options.organisation})
    columns = [Column("SUBJECT"), Column("LIMIT"), Column("VALUE", right=True)]
    cells = [(row["subject"], name, value) for row in rows for name, value in _limit_texts(row)]
    return Outcome({"data": rows}, table(columns, cells, "no limits"))


def _limit_texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    limits = row.get("limits", {})
    return [
        (text, money_text(limits[name]) if name.startswith("cost") else count_text(limits[name]))
        for name, text in METRICS.items()
        if name in limits
    ]


def _unlimited(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [] if row.get("limits") else [("limits", "none")]


async def _subject(operator: Operator, text: str) -> str:
    """`kind:UUID`, from that or from `user:E-MAIL` or `organisation:NAME`."""
    kind, _, name = text.partition(":")
    if kind not in ("key", "user", "organisation") or not name:
        raise AdminError(f"`{text}` is not a subject: write key:ID, user:E-MAIL or organisation:NAME")
    with contextlib.suppress(ValueError):
        return f"{kind}:{UUID(name)}"
    if kind == "key":
        raise AdminError(f"`{name}` is not the id of a key; `helixflow key list` shows them")
    lists = {"user": ("ListUsers", "email"), "organisation": ("ListOrganisations", "name")}
    method, field = lists[kind]
    found = [row["id"] for row in await operator.rows(method, "ListRequest") if row[field] == name]
    if len(found) != 1:
        problem = "there is no" if not found else "there is more than one"
        raise AdminError(f"{problem} {kind} `{name}`; `helixflow {kind} list --json` shows their ids")
    return f"{kind}:{found[0]}"


# --- prices ------------------------------------------------------------------


async def price_set(operator: Operator, options: Namespace) -> Outcome:
    """Sets what a model costs. Cached prompt tokens cost as much as others unless said otherwise."""
    price = {
        "model": options.model,
        "prompt": options.prompt,
        "cached": options.prompt if options.cached is None else options.cached,
        "completion": options.completion,
    }
    answer = await operator.call("SetPrice", "SetPriceRequest", {"price": price})
    pairs = [(name, f"{token_price_text(answer[name])} per million") for name in ("prompt", "cached", "completion")]
    return Outcome(answer, facts([("model", answer["model"]), *pairs]))


async def price_list(operator: Operator, _options: Namespace) -> Outcome:
    """Every price."""
    answer = await operator.call("ListPrices", "ListRequest")
    columns = [
        Column("MODEL", cut=True),
        Column("PROMPT", right=True),
        Column("CACHED", right=True),
        Column("COMPLETION", right=True),
    ]
    cells = [
        (row["model"], *(token_price_text(row[name]) for name in ("prompt", "cached", "completion")))
        for row in answer["prices"]
    ]
    unit = f"{answer['currency']} per million tokens".strip()
    shown = table(columns, cells, "no prices: every model is free")
    return Outcome(answer, f"{shown}\n\n{unit}" if cells else shown)


async def price_remove(operator: Operator, options: Namespace) -> Outcome:
    """Makes a model free."""
    gone = await operator.call("DeletePrice", "PriceRequest", {"model": options.model})
    return Outcome(gone, f"{options.model} has no price any more: it is free")
