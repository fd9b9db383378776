"""What is asked of the ledger: usage summed up by day, model, key, user; single requests, page by page.

Usage comes from four sums that the writer keeps (see the migration), never from the rows: what a question costs
depends on how many keys and models were used, not on how many requests there were.
"""

import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Final

from helixflow.core_rs import InvalidRequest
from helixflow.ledger.chain import EPOCH, midnight
from helixflow.ledger.record import id_bound, midnight_us, today
from helixflow.refusals import refusal

GROUPS: Final = ("day", "model", "endpoint", "key", "user", "organisation")
USAGE_ROWS: Final = 10_000
"""Most rows of a usage report; a message between services has 4 MiB."""
PAGE: Final = 100
PAGE_MAX: Final = 1000
"""Rows of a page of requests: by default, at most."""

_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
_US: Final = timedelta(microseconds=1)
_COLUMNS: Final = {
    "day": "day",
    "model": "model",
    "endpoint": "endpoint",
    "key": "key_id",
    "user": "user_id",
    "organisation": "organisation_id",
}
_COUNTS: Final = "requests, errors, interrupted, prompt_tokens, cached_tokens, completion_tokens, cost"
_SUMS: Final = ", ".join(f"sum({name})::bigint AS {name}" for name in _COUNTS.split(", "))
_NAMES: Final = {
    "key": ("k.name", "LEFT JOIN helixflow.api_keys k ON k.id = s.key_id"),
    "user": ("u.email", "LEFT JOIN helixflow.users u ON u.id = s.user_id"),
    "organisation": ("o.name", "LEFT JOIN helixflow.organisations o ON o.id = s.organisation_id"),
}
_LAST_MS: Final = midnight_us(date(2101, 1, 1)) // 1000
_LATER: Final = "SELECT EXISTS (SELECT FROM helixflow.usage_models WHERE day > $1 AND day < $2)"


@dataclass(slots=True)
class UsageRow:
    """One group of a usage report; what it was not grouped by is empty. The fields of admin.proto."""

    day: str = ""
    model: str = ""
    endpoint: str = ""
    key_id: str = ""
    key: str = ""
    user_id: str = ""
    user: str = ""
    organisation_id: str = ""
    organisation: str = ""
    requests: int = 0
    errors: int = 0
    """Status 400 or higher, or an error later on; a client that went away is none."""
    interrupted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0
    """Nano currency units."""


@dataclass(slots=True)
class LedgerRow:
    """One request. The fields of admin.proto; ids that are unknown are empty."""

    id: str
    at_us: int
    """Microseconds since the epoch."""
    organisation_id: str
    user_id: str
    key_id: str
    model: str
    endpoint: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_us: int
    first_token_us: int
    total_us: int
    finish: str
    error: str
    status: int
    client: str
    cost: int
    """Nano currency units."""
    request_id: str


def parse_day(text: str, name: str) -> date | None:
    """A day of UTC, YYYY-MM-DD; None for an empty text. Raises InvalidRequest, which calls it `name`."""
    if not text:
        return None
    try:
        day = date.fromisoformat(text) if _DAY.fullmatch(text) else None
    except ValueError:
        day = None
    if day is None or not 1970 <= day.year <= 2100:
        raise refusal(InvalidRequest, f"{name} must be a day of the form YYYY-MM-DD, from 1970 to 2100.", name)
    return day


def period(first: str, last: str) -> tuple[date, date]:
    """The days of a question's `from` and `to`; empty: the first of this month, today. Raises InvalidRequest."""
    until = parse_day(last, "to") or today()
    since = parse_day(first, "from") or min(until, today()).replace(day=1)
    if since > until:
        raise refusal(InvalidRequest, f"from ({since}) lies after to ({until}).", "from")
    return since, until


async def usage(
    connection: Any,
    *,
    first: date,
    last: date,
    group_by: Sequence[str] = (),
    organisation_id: uuid.UUID | None = None,
    key_id: uuid.UUID | None = None,
    user_id: uuid.UUID | None = None,
    model: str = "",
) -> list[UsageRow]:
    """Usage of the days from `first` to `last`, summed up by `group_by` (of GROUPS; empty: day), in that order.

    The ids and `model` narrow it down. Raises InvalidRequest for an unknown group, and for more than USAGE_ROWS rows.
    """
    groups = [group for group in GROUPS if group in (group_by or ["day"])]
    if unknown := sorted(set(group_by) - set(GROUPS)):
        raise refusal(
            InvalidRequest, f"Usage cannot be grouped by {', '.join(unknown)}, only by {', '.join(GROUPS)}.", "group_by"
        )
    wanted = {"organisation_id": organisation_id, "key_id": key_id, "user_id": user_id, "model": model or None}
    filters = {name: value for name, value in wanted.items() if value is not None}
    async with planned(connection):
        parts = await _parts(connection, first, last, {*groups, *filters})
        found = await connection.fetch(_query(groups, parts, list(filters)), first, last, *filters.values())
    if len(found) > USAGE_ROWS:
        raise refusal(
            InvalidRequest,
            f"The report would have more than {USAGE_ROWS} rows. Ask for fewer days, or group by less.",
            "group_by",
        )
    return [UsageRow(**dict(row)) for row in found]


@contextlib.asynccontextmanager
async def planned(connection: Any) -> AsyncIterator[None]:
    """A transaction whose statements are planned for their own values: some ask for a day, others for years."""
    async with connection.transaction():
        await connection.execute("SET LOCAL plan_cache_mode = force_custom_plan")
        yield


def _query(groups: Sequence[str], parts: Sequence[str], filters: Sequence[str]) -> str:
    """The statement; $1 and $2 are the days, the values of `filters` come after them."""
    columns = [_COLUMNS[group] for group in groups]
    joined = {group: _NAMES[group] for group in groups if group in _NAMES}
    where = "".join(f" AND {name} = ${number}" for number, name in enumerate(filters, 3))
    rows = " UNION ALL ".join(f"SELECT * FROM helixflow.{part}{where}" for part in parts)  # noqa: S608 - constants
    listed = ", ".join(columns)
    texts = {column: f"s.{column}::text" for column in columns} | {group: name for group, (name, _) in joined.items()}
    shown = ", ".join(f"coalesce({value}, '') AS \"{name}\"" for name, value in texts.items())
    joins = " ".join(join for _, join in joined.values())
    order = ", ".join(f"s.{column}" for column in columns)
    return (
        f"SELECT {shown}, {_COUNTS} FROM (SELECT {listed}, {_SUMS} FROM ({rows}) p GROUP BY {listed} "  # noqa: S608
        f"ORDER BY {listed} LIMIT {USAGE_ROWS + 1}) s {joins} ORDER BY {order}"
    )


async def _parts(connection: Any, first: date, last: date, about: set[str]) -> list[str]:
    """Tables whose rows, within a condition on the days $1 to $2, are the period's usage; the smallest that will do.

    `about`: what the question groups by and asks for.
    """
    single = bool(about & {"key_id", "user_id"})
    detailed = single or bool(about & {"model", "endpoint"})
    if not single and not about & {"key", "user"}:
        return ["usage_models WHERE day BETWEEN $1 AND $2"]
    daily = "usage_daily" if detailed else "usage_keys"
    since = first if first.day == 1 else _next_month(first)
    until = _next_month(last)
    if (last + timedelta(days=1)).day != 1 and await connection.fetchval(_LATER, last, until):
        until = last.replace(day=1)  # the last month has rows behind the last day
    if single or "day" in about or since >= until:
        return [f"{daily} WHERE day BETWEEN $1 AND $2"]
    # Each part names a parameter, or the server could not tell their types.
    parts = [f"usage_monthly WHERE day >= '{since}' AND day < '{until}' AND $1::date <= $2::date"]
    if first < since:
        parts.append(f"{daily} WHERE day >= $1 AND day <= $2 AND day < '{since}'")
    if until <= last:
        parts.append(f"{daily} WHERE day >= '{until}' AND day <= $2")
    return parts


def _next_month(day: date) -> date:
    return (day.replace(day=1) + timedelta(days=32)).replace(day=1)


def _plain(value: Any) -> Any:
    if isinstance(value, int):
        return value
    return "" if value is None else str(value)


async def requests(
    connection: Any,
    *,
    first: date,
    last: date,
    organisation_id: uuid.UUID | None = None,
    user_id: uuid.UUID | None = None,
    after: str = "",
    limit: int = 0,
) -> tuple[list[LedgerRow], str]:
    """A page of the requests of the days from `first` to `last`, oldest first, and the next page's `after`.

    `after`: empty for the first page; an empty one comes back with the last. `limit`: 0: PAGE, at most PAGE_MAX.
    Raises InvalidRequest.
    """
    rows = min(limit or PAGE, PAGE_MAX)
    since, until = midnight(first), midnight(last + timedelta(days=1))
    if after:
        place = _place(after)
        # The id holds the time, so that the months before it need not be looked into.
        since = max(since, min(until, EPOCH + timedelta(milliseconds=min(place.int >> 80, _LAST_MS))))
    else:
        place = uuid.UUID(int=max(int.from_bytes(id_bound(midnight_us(first))) - 1, 0))
    where = ["at >= $1", "at < $2", "id > $3"]
    values: list[Any] = [since, until, place]
    for name, value in (("organisation_id", organisation_id), ("user_id", user_id)):
        if value is not None:
            values.append(value)
            where.append(f"{name} = ${len(values)}")
    query = (
        "SELECT id, at, organisation_id, user_id, key_id, model, endpoint, prompt_tokens, cached_tokens, "  # noqa: S608
        "completion_tokens, queue_us, first_token_us, total_us, finish, error, status, client, cost, request_id "
        f"FROM helixflow.requests WHERE {' AND '.join(where)} ORDER BY id LIMIT {rows + 1}"
    )
    async with planned(connection):
        found = await connection.fetch(query, *values)
    page = [_ledger_row(row) for row in found]
    return page[:rows], page[rows - 1].id if len(page) > rows else ""


def _ledger_row(row: Sequence[Any]) -> LedgerRow:
    identity, at, *rest = row
    return LedgerRow(str(identity), (at - EPOCH) // _US, *map(_plain, rest))


def _place(after: str) -> uuid.UUID:
    try:
        return uuid.UUID(after)
    except ValueError:
        raise refusal(InvalidRequest, "after is not the place that a page ended with.", "after") from None
