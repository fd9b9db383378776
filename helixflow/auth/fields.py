"""Fields of requests: what they may hold. Every function raises InvalidRequest, which names the parameter."""

import base64
import re
import unicodedata
from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from urllib.parse import urlsplit
from uuid import UUID

from helixflow.auth.roles import WORDS, Role
from helixflow.core_rs import InvalidRequest
from helixflow.refusals import refusal

LONGEST_EMAIL = 254
"""RFC 5321, 4.5.3.1.3: a path of 256 octets less its brackets."""

LONGEST_NAME = 100
LONGEST_ITEM = 256
MOST_ITEMS = 100
PAGE_DEFAULT = 100
PAGE_MAX = 1000
LAST_SECOND = 253_402_300_799
"""The end of the year 9999, where datetime ends."""

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_EMAIL = re.compile(r"[^@\s]{1,64}@[^@\s]+")
_SERVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DOMAIN = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def as_uuid(value: str) -> UUID | None:
    """The UUID in its text form, or None."""
    return UUID(value) if _UUID.fullmatch(value) else None


def uuid(value: str, param: str) -> UUID:
    """A UUID in its text form."""
    found = as_uuid(value)
    if found is None:
        raise refusal(InvalidRequest, f"{param} must be a UUID", param)
    return found


def text(value: str, param: str, longest: int = LONGEST_NAME) -> str:
    """Text on one line, without spaces around it."""
    value = unicodedata.normalize("NFC", value).strip()
    if not value:
        raise refusal(InvalidRequest, f"{param} must not be empty", param)
    if len(value) > longest or not value.isprintable():
        raise refusal(InvalidRequest, f"{param} must be at most {longest} printable characters", param)
    return value


def email(value: str, param: str = "email") -> str:
    """An e-mail address in lower case, as it is stored and compared."""
    value = text(value, param, LONGEST_EMAIL).lower()
    if not _EMAIL.fullmatch(value):
        raise refusal(InvalidRequest, f"{param} must be an e-mail address", param)
    return value


def service_name(value: str, param: str = "email") -> str:
    """The name of a service account."""
    if not _SERVICE.fullmatch(value) or as_uuid(value):
        raise refusal(
            InvalidRequest, f"{param}: the name of a service account has 1 to 64 letters, digits and . _ -", param
        )
    return value


def organisation_name(value: str, param: str = "name") -> str:
    """The name of an organisation; a UUID would stand for another one."""
    value = text(value, param)
    if as_uuid(value):
        raise refusal(InvalidRequest, f"{param} must not be a UUID", param)
    return value


def role(value: str, param: str = "role") -> Role:
    """A role by its word."""
    found = Role.parse(value)
    if found is None:
        raise refusal(InvalidRequest, f"{param} must be one of {', '.join(WORDS)}", param)
    return found


def items(values: Sequence[str], param: str) -> list[str]:
    """Names of models: each once, in order."""
    if len(values) > MOST_ITEMS:
        raise refusal(InvalidRequest, f"{param} may hold at most {MOST_ITEMS} entries", param)
    return list(dict.fromkeys(text(value, f"{param}[{index}]", LONGEST_ITEM) for index, value in enumerate(values)))


def paths(values: Sequence[str], param: str) -> list[str]:
    """Paths of endpoints: each once, in order."""
    found = items(values, param)
    for index, value in enumerate(found):
        if not value.startswith("/"):
            raise refusal(InvalidRequest, f"{param}[{index}] must be a path that begins with /", f"{param}[{index}]")
    return found


def domains(values: Sequence[str], param: str) -> list[str]:
    """Domains of e-mail addresses: in lower case, each once, in order."""
    found = items([value.lower() for value in values], param)
    for index, value in enumerate(found):
        if not _DOMAIN.fullmatch(value):
            where = f"{param}[{index}]"
            raise refusal(InvalidRequest, f"{where} must be a domain such as example.com, in ASCII", where)
    return found


def domain_of(address: str) -> str:
    """The domain of an e-mail address."""
    return address.rpartition("@")[2]


def future(value: int, param: str, now: datetime) -> datetime | None:
    """A time in seconds since the epoch that lies ahead; None for 0."""
    if value == 0:
        return None
    if value > LAST_SECOND:
        raise refusal(InvalidRequest, f"{param} must be a time in seconds since the epoch", param)
    moment = datetime.fromtimestamp(value, UTC)
    if moment <= now:
        raise refusal(InvalidRequest, f"{param} must lie in the future", param)
    return moment


def day(value: str, param: str) -> date | None:
    """A day as YYYY-MM-DD; None for an empty one."""
    if not value:
        return None
    try:
        # fromisoformat alone would take weeks and other forms as well.
        found = date.fromisoformat(value) if _DAY.fullmatch(value) else None
    except ValueError:
        found = None
    if found is None:
        raise refusal(InvalidRequest, f"{param} must be a day written YYYY-MM-DD", param)
    return found


def days(first: str, last: str) -> tuple[date | None, date | None]:
    """A span of days, from and to."""
    begin, end = day(first, "from"), day(last, "to")
    if begin and end and begin > end:
        raise refusal(InvalidRequest, "from must not be after to", "from")
    if end and end == date.max:
        raise refusal(InvalidRequest, "to must be a day written YYYY-MM-DD before 9999-12-31", "to")
    return begin, end


def day_start(value: date) -> datetime:
    """Midnight of UTC."""
    return datetime.combine(value, time.min, UTC)


def page(limit: int) -> int:
    """Rows of a page; 0: the default."""
    if limit > PAGE_MAX:
        raise refusal(InvalidRequest, f"limit must be at most {PAGE_MAX}", "limit")
    return limit or PAGE_DEFAULT


def cursor(moment_us: int, row: UUID) -> str:
    """The place after one row in lists that are ordered by time (microseconds since the epoch) and id."""
    return base64.urlsafe_b64encode(moment_us.to_bytes(8) + row.bytes).decode()


def place(value: str) -> tuple[int, UUID] | None:
    """Reads a cursor; None for an empty one."""
    if not value:
        return None
    try:
        content = base64.b64decode(value.encode("ascii"), altchars=b"-_", validate=True)
    except ValueError:
        content = b""
    moment = int.from_bytes(content[:8])
    if len(content) != 24 or moment > LAST_SECOND * 1_000_000:
        raise refusal(InvalidRequest, "after must be `next` of the page before", "after")
    return moment, UUID(bytes=content[8:])


def number_after(value: str) -> int | None:
    """Reads the cursor of a list that is ordered by number; None for an empty one."""
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise refusal(InvalidRequest, "after must be `next` of the page before", "after")
    return int(value)


def redirect(value: str, param: str = "redirect_uri") -> str:
    """Where a provider may send a browser back to: HTTPS, or HTTP on this machine."""
    value = text(value, param, 2000)
    try:
        parts = urlsplit(value)
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    except ValueError:
        parts, local = urlsplit(""), False
    if parts.scheme not in (("https", "http") if local else ("https",)) or not parts.hostname or parts.fragment:
        raise refusal(InvalidRequest, f"{param} must be an https URL without a fragment", param)
    return value
