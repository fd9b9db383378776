"""Who may do what: one table over the methods of AdminService, and the rules about whom an act is about.

All of it is plain data in and a reason out (None: nothing forbids it), so that tests can try every sequence of acts.

- People act by their role: on themselves and on those whose role is below theirs, owners on everybody of their
  organisation. What is not in the table is refused.
- Keys never widen anything. A key is for inference unless it was made to administer, and one that is bound to models,
  endpoints or limits administers nothing beyond itself. A key that administers makes keys for inference under its own
  ceiling, which end with it; of everything else it only takes away, and never from its peers.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from helixflow.limits.model import Limits


class Role(enum.IntEnum):
    """Roles of a user, the higher the more. In the database and on the wire by `word`."""

    VIEWER = 1
    MEMBER = 2
    ADMIN = 3
    OWNER = 4

    @property
    def word(self) -> str:
        """`viewer`, `member`, `admin` or `owner`."""
        return self.name.lower()

    @classmethod
    def parse(cls, word: str) -> "Role | None":
        """The role of a word, or None when it is none."""
        return _WORDS.get(word)


_WORDS = {role.word: role for role in Role}
WORDS = tuple(_WORDS)

OPERATOR = "operator"
"""Who set a limit, where no role did."""


class Keys(enum.Enum):
    """Which keys may call a method; people and the operator are not meant."""

    NONE = "none: what it gives outlives a key"
    ADMIN = "those that administer"
    ITSELF = "all, each about itself; those that administer about what they reach"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a caller needs. `installation`: an owner must also belong to the first organisation."""

    least: Role
    keys: Keys = Keys.NONE
    installation: bool = False


METHODS: dict[str, Rule] = {
    "CreateOrganisation": Rule(Role.OWNER, installation=True),
    "ListOrganisations": Rule(Role.VIEWER, Keys.ADMIN),
    "UpdateOrganisation": Rule(Role.OWNER, installation=True),
    "RequireFactor": Rule(Role.OWNER),
    "CreateUser": Rule(Role.ADMIN, Keys.ADMIN),
    "ListUsers": Rule(Role.ADMIN, Keys.ADMIN),
    "UpdateUser": Rule(Role.ADMIN, Keys.ADMIN),
    "ResetPassword": Rule(Role.ADMIN),
    "ResetFactor": Rule(Role.ADMIN),
    "UnlockUser": Rule(Role.ADMIN),
    "DeleteUser": Rule(Role.ADMIN, Keys.ADMIN),
    "ListSessions": Rule(Role.VIEWER),
    "EndSession": Rule(Role.VIEWER),
    "EndSessions": Rule(Role.VIEWER),
    "CreateKey": Rule(Role.MEMBER, Keys.ADMIN),
    "ListKeys": Rule(Role.VIEWER, Keys.ITSELF),
    "UpdateKey": Rule(Role.MEMBER, Keys.ADMIN),
    "RotateKey": Rule(Role.MEMBER, Keys.ADMIN),
    "RevokeKey": Rule(Role.MEMBER, Keys.ITSELF),
    "SetLimits": Rule(Role.ADMIN, Keys.ADMIN),
    "ListLimits": Rule(Role.VIEWER, Keys.ADMIN),
    "SetPrice": Rule(Role.OWNER, installation=True),
    "DeletePrice": Rule(Role.OWNER, installation=True),
    "ListPrices": Rule(Role.VIEWER, Keys.ITSELF),
    "QueryUsage": Rule(Role.VIEWER, Keys.ITSELF),
    "ListRequests": Rule(Role.ADMIN, Keys.ADMIN),
    "GetTexts": Rule(Role.ADMIN, Keys.ADMIN),
    "ListAudit": Rule(Role.ADMIN, Keys.ADMIN),
    "VerifyLedger": Rule(Role.OWNER, Keys.ADMIN, installation=True),
    "AnchorLedger": Rule(Role.OWNER, Keys.ADMIN, installation=True),
}
"""Members see and manage what is their own, admins what is their organisation's: the functions behind see to that."""


@dataclass(frozen=True, slots=True)
class Power:
    """What somebody has who acts."""

    role: Role = Role.OWNER
    """Of the user; of a key that administers: up to which it does."""
    operator: bool = False
    installation: bool = False
    """Belongs to the first organisation."""
    by_key: bool = False
    administers: bool = True
    """False: acts by a key for inference, or by a bound one."""
    expires_at: int = 0
    """Of the key (seconds since the epoch), 0: never."""


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """A key that an act is about, as seen by who acts."""

    holder: Role
    own: bool = False
    """Its holder is the user who acts."""
    itself: bool = False
    """It is acted by."""
    child: bool = False
    """It was made by the key that is acted by."""
    administers: bool = False


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a key may. Empty sets mean everything, `expires_at` 0 never (seconds since the epoch)."""

    models: frozenset[str] = frozenset()
    endpoints: frozenset[str] = frozenset()
    expires_at: int = 0
    administers: bool = False

    @classmethod
    def of(cls, models: Iterable[str], endpoints: Iterable[str], expires_at: int, *, administers: bool) -> "Ceiling":
        """From lists."""
        return cls(frozenset(models), frozenset(endpoints), expires_at, administers)

    def exceeded(self, wanted: "Ceiling") -> str | None:
        """The first thing in which `wanted` is more, by the name of its field."""
        for name in ("models", "endpoints"):
            most, more = getattr(self, name), getattr(wanted, name)
            if most and not (more and more <= most):
                return name
        if self.expires_at and not 0 < wanted.expires_at <= self.expires_at:
            return "expires_at"
        return "admin" if wanted.administers and not self.administers else None


# --- methods and people -----------------------------------------------------------


def call(power: Power, method: str) -> str | None:
    """What forbids calling a method of AdminService."""
    rule = METHODS.get(method)
    if rule is None:
        return f"nobody may call {method}"
    if power.operator:
        return None
    if power.by_key and rule.keys is Keys.NONE:
        return "no key may do this: it takes an access token of a person, or the operator"
    if rule.keys is not Keys.ITSELF and not power.administers:
        return (
            "this API key administers nothing: keys do only when they were made for it, and while they are bound to no "
            "models, endpoints or limits"
        )
    if power.role < rule.least:
        return f"this needs the role {rule.least.word} or more; yours is {power.role.word}"
    if rule.installation and not power.installation:
        return "this is left to the operator and the owners of the first organisation"
    return None


def grant(power: Power, role: Role) -> str | None:
    """What forbids giving somebody a role."""
    return None if power.operator else _below(power, role)


def person(power: Power, role: Role, *, own: bool) -> str | None:
    """What forbids changing a user of this role. `own`: the one who acts."""
    if power.operator or (own and not power.by_key):
        return None
    return "a key may not change the account that it belongs to" if own else _below(power, role)


def secret(power: Power, role: Role, *, own: bool) -> str | None:
    """What forbids giving a user a new password, which takes the account over.

    Nobody's own: whoever has stolen a session would keep the account.
    """
    if own:
        return "nobody resets their own password: the login changes it"
    return person(power, role, own=False)


def enables(power: Power, before: tuple[Role, bool], after: tuple[Role, bool]) -> str | None:
    """What forbids a change of (role, disabled)."""
    if power.by_key and (after[0] > before[0] or (before[1] and not after[1])):
        return "a key may take roles and access away, but not give them"
    return None


def joins(power: Power, role: Role, *, service: bool) -> str | None:
    """What forbids making a user of this role."""
    if power.by_key and not service:
        return "a key may make service accounts only: people are let in by people"
    return grant(power, role)


def _below(power: Power, role: Role) -> str | None:
    if role < power.role or (power.role is Role.OWNER and not power.by_key):
        return None
    return f"the role {role.word} is not below yours, which is {power.role.word}"


# --- keys -------------------------------------------------------------------------


def makes_key(power: Power, holder: Role, wanted: Ceiling, *, own: bool) -> str | None:
    """What forbids making a key for a user of the role `holder`."""
    if power.operator:
        return None
    problem = None if own else _others(power, holder)
    return problem or (_above(Ceiling(expires_at=power.expires_at), wanted) if power.by_key else None)


def touches_key(power: Power, key: KeyFacts) -> str | None:
    """What forbids changing or ending a key."""
    if power.operator or key.itself or key.child:
        return None
    if not power.administers:
        return "this API key may look at itself and revoke itself only"
    if power.by_key and key.administers:
        return "a key may not change other keys that administer"
    return None if key.own else _others(power, key.holder)


def changes_key(power: Power, key: KeyFacts, before: Ceiling, after: Ceiling) -> str | None:
    """What forbids a change of what a key may."""
    if power.operator or not power.by_key:
        return None
    return _above(Ceiling(expires_at=power.expires_at) if key.child else before, after)


def replaces_key(power: Power, key: KeyFacts) -> str | None:
    """What forbids making another key in place of one: whoever does gets to know it."""
    if power.by_key and not key.child:
        return "a key may rotate only keys that it has made"
    return touches_key(power, key)


def _others(power: Power, holder: Role) -> str | None:
    if power.role < Role.ADMIN:
        return "you may manage your own keys only"
    return _below(power, holder)


def _above(ceiling: Ceiling, wanted: Ceiling) -> str | None:
    name = ceiling.exceeded(wanted)
    return f"{name}: a key may not let another, or itself, have more than it has" if name else None


# --- limits -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setter:
    """Who set the limits of a subject. `rank`: a role's word or OPERATOR; empty: not known, or there are none."""

    rank: str = ""
    own: bool = False
    """It was who acts now."""


def sets_limits(power: Power, setter: Setter, before: Limits, after: Limits, *, own: bool) -> str | None:
    """What forbids new limits in place of those `before`, on somebody or something that may be changed.

    `own`: of who acts, or of their keys. Tighter ones are always fine.
    """
    name = after.wider_than(before)
    if power.operator or name is None:
        return None
    if power.by_key:
        return f"limits.{name}: a key may tighten limits, but not widen them"
    if setter.rank == OPERATOR or power.role < (Role.parse(setter.rank) or Role.ADMIN):
        by = "the operator" if setter.rank == OPERATOR else f"an {setter.rank}"
        return f"limits.{name}: it was set by {by}, whose it is to widen it"
    if own and not setter.own and power.role < Role.OWNER:
        return f"limits.{name}: you may tighten your own limits, but not widen what somebody else has set"
    return None
