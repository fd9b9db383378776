"""Limits and prices as administrators set them, over a connection of the database."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from helixflow.config import Config
from helixflow.core_rs import InvalidRequest
from helixflow.limits.model import FIELDS, Limits, Price, SubjectLimits
from helixflow.refusals import refusal

MAX_PRICE = 10**12
"""Highest price of a token: 1,000 currency units, in nano units."""

MAX_MODEL = 200
"""Longest name of a model (characters)."""

_SUBJECT = re.compile(r"(key|user|organisation):[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_COLUMNS = ", ".join(FIELDS)
_SET = (
    f"INSERT INTO helixflow.limits (subject, set_by, set_rank, {_COLUMNS}) VALUES ($1, $2, $3, "  # noqa: S608 - names of our own
    + ", ".join(f"${number}" for number in range(4, len(FIELDS) + 4))
    + ") ON CONFLICT (subject) DO UPDATE SET updated_at = now(), "
    + ", ".join(f"{name} = EXCLUDED.{name}" for name in ("set_by", "set_rank", *FIELDS))
)
_COPY = f"""
    INSERT INTO helixflow.limits (subject, set_by, set_rank, {_COLUMNS})
    SELECT $2, set_by, set_rank, {_COLUMNS} FROM helixflow.limits WHERE subject = $1
"""  # noqa: S608 - names of our own
_OF_ALL = f"SELECT subject, {_COLUMNS} FROM helixflow.limits WHERE subject > $1 ORDER BY subject LIMIT $2"  # noqa: S608
_OF_ORGANISATION = f"""
    SELECT subject, {_COLUMNS} FROM helixflow.limits
    WHERE subject > $1 AND subject = ANY (ARRAY(
        SELECT 'organisation:' || $3::uuid
        UNION ALL SELECT 'user:' || id FROM helixflow.users WHERE organisation_id = $3
        UNION ALL SELECT 'key:' || api_keys.id FROM helixflow.api_keys JOIN helixflow.users ON users.id = user_id
                  WHERE organisation_id = $3))
    ORDER BY subject LIMIT $2
"""  # noqa: S608 - names of our own
_FOUND = f"SELECT set_by, set_rank, {_COLUMNS} FROM helixflow.limits WHERE subject = $1"  # noqa: S608 - names of our own
_OF_SUBJECTS = f"SELECT subject, {_COLUMNS} FROM helixflow.limits WHERE subject = ANY ($1)"  # noqa: S608


def check_subject(subject: str) -> str:
    """The subject. Raises InvalidRequest for what is none."""
    if not _SUBJECT.fullmatch(subject):
        raise refusal(
            InvalidRequest, "subject must be key:UUID, user:UUID or organisation:UUID, in lower case", "subject"
        )
    return subject


def of_new_keys(config: Config) -> Limits:
    """What a new key gets that is given no limits: in the production profile those of the configuration."""
    if config.development:
        return Limits()
    options = config.limits
    return Limits(
        requests_per_minute=options.new_key_requests_per_minute or None,
        tokens_per_minute=options.new_key_tokens_per_minute or None,
        concurrent_requests=options.new_key_concurrent_requests or None,
    )


@dataclass(frozen=True, slots=True)
class Setter:
    """Who set limits: the user, and the role's word or `operator`. Nobody where that is not known."""

    user_id: UUID | None = None
    rank: str | None = None


async def set_limits(connection: Any, subject: str, limits: Limits, by: Setter | None = None) -> SubjectLimits:
    """Replaces all limits of a subject; none at all removes it. Whether the subject exists is the caller's to check.

    Gateways learn of it through `helixflow.notify_change`. Raises InvalidRequest.
    """
    check_subject(subject)
    limits.check()
    if limits:
        setter = by or Setter()
        await connection.execute(_SET, subject, setter.user_id, setter.rank, *limits.values())
    else:
        await connection.execute("DELETE FROM helixflow.limits WHERE subject = $1", subject)
    return SubjectLimits(subject, limits)


async def found(connection: Any, subject: str) -> tuple[Limits, Setter]:
    """The limits of one subject, and who set them."""
    row = await connection.fetchrow(_FOUND, subject)
    return (Limits.of_row(row), Setter(row["set_by"], row["set_rank"])) if row else (Limits(), Setter())


async def copy_limits(connection: Any, source: str, target: str) -> None:
    """Gives a new subject the limits of another one, as far as that has any."""
    await connection.execute(_COPY, source, target)


async def limits_of(
    connection: Any, organisation_id: Any | None, after: str, limit: int
) -> tuple[list[SubjectLimits], str]:
    """A page of limits in the order of subjects, and `after` of the next one: empty at the end.

    `organisation_id`: UUID; only the organisation, its users and their keys. None: all.
    """
    if organisation_id is None:
        rows = await connection.fetch(_OF_ALL, after, limit + 1)
    else:
        rows = await connection.fetch(_OF_ORGANISATION, after, limit + 1, organisation_id)
    page = [SubjectLimits(row["subject"], Limits.of_row(row)) for row in rows[:limit]]
    return page, page[-1].subject if len(rows) > limit else ""


async def limits_for(connection: Any, subjects: Sequence[str]) -> tuple[SubjectLimits, ...]:
    """The limits of these subjects, as far as they have any, in this order."""
    rows = await connection.fetch(_OF_SUBJECTS, list(subjects))
    found = {row["subject"]: Limits.of_row(row) for row in rows}
    return tuple(SubjectLimits(subject, found[subject]) for subject in subjects if subject in found)


async def set_price(connection: Any, price: Price) -> Price:
    """Sets the price of a model. Raises InvalidRequest."""
    if not price.model or len(price.model) > MAX_MODEL or not price.model.isprintable():
        raise refusal(InvalidRequest, f"model must be 1 to {MAX_MODEL} printable characters", "price.model")
    for name in ("prompt", "cached", "completion"):
        if not 0 <= getattr(price, name) <= MAX_PRICE:
            raise refusal(InvalidRequest, f"{name} must be from 0 to {MAX_PRICE} nano units", f"price.{name}")
    await connection.execute(
        "INSERT INTO helixflow.prices (model, prompt, cached, completion) VALUES ($1, $2, $3, $4) "
        "ON CONFLICT (model) DO UPDATE SET updated_at = now(), prompt = EXCLUDED.prompt, cached = EXCLUDED.cached, "
        "completion = EXCLUDED.completion",
        price.model,
        price.prompt,
        price.cached,
        price.completion,
    )
    return price


async def delete_price(connection: Any, model: str) -> bool:
    """Whether the model had a price."""
    done = await connection.execute("DELETE FROM helixflow.prices WHERE model = $1", model)
    return bool(done != "DELETE 0")


async def prices(connection: Any, after: str = "", limit: int | None = None) -> tuple[list[Price], str]:
    """A page of prices in the order of models, and `after` of the next one: empty at the end. `limit` None: all."""
    rows = await connection.fetch(
        "SELECT model, prompt, cached, completion FROM helixflow.prices WHERE model > $1 ORDER BY model LIMIT $2",
        after,
        None if limit is None else limit + 1,
    )
    page = [Price(**row) for row in (rows if limit is None else rows[:limit])]
    return page, page[-1].model if limit is not None and len(rows) > limit else ""
