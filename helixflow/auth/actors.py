"""Who acts: the operator, or the holder of a credential, which is checked at every call."""

from dataclasses import dataclass, field
from uuid import UUID

from helixflow.auth import roles
from helixflow.auth.principals import Principal
from helixflow.auth.roles import KeyFacts, Power, Role
from helixflow.core_rs import NotFound, PermissionDenied
from helixflow.refusals import refusal

LONGEST_NAME = 254
LONGEST_ADDRESS = 100
LONGEST_REQUEST_ID = 128
ADMIN_PATH = "/admin/v1"


@dataclass(frozen=True, slots=True)
class Actor:
    """Whoever acts. The operator has no user, no organisation and may do everything."""

    name: str
    """For the audit log: e-mail and key name; of the operator the system account."""
    power: Power = field(default_factory=Power)
    user_id: UUID | None = None
    key_id: UUID | None = None
    organisation_id: UUID | None = None
    address: str = ""
    request_id: str = ""

    @property
    def operator(self) -> bool:
        """Whether it is the operator."""
        return self.power.operator

    @property
    def role(self) -> Role:
        """The role that the actor acts up to."""
        return self.power.role

    @property
    def installation(self) -> bool:
        """Whether it owns the installation: owners of the first organisation do."""
        return self.operator or (self.power.installation and self.role is Role.OWNER)

    @property
    def only_key(self) -> UUID | None:
        """The key that alone the actor may see; None: all that its role lets it."""
        return None if self.power.administers else self.key_id

    def owns(self, user_id: UUID) -> bool:
        """Whether the user is the actor."""
        return self.user_id == user_id

    def facts(self, key_id: UUID, parent_id: UUID | None, user_id: UUID, holder: str, *, administers: bool) -> KeyFacts:
        """A key as the actor stands to it. `holder`: role of its user."""
        return KeyFacts(
            holder=Role[holder.upper()],
            own=self.owns(user_id),
            itself=self.key_id == key_id,
            child=self.key_id is not None and self.key_id == parent_id,
            administers=administers,
        )

    def allow(self, method: str) -> None:
        """Raises PermissionDenied unless the table of roles lets the actor call a method of AdminService."""
        permit(roles.call(self.power, method))

    def allow_organisation(self, organisation_id: UUID, message: str, param: str | None = None) -> None:
        """Raises NotFound for another organisation than the actor's: whether there is one is nobody's business."""
        if not self.operator and organisation_id != self.organisation_id:
            raise refusal(NotFound, message, param)


def permit(problem: str | None, param: str | None = None) -> None:
    """Raises PermissionDenied when a rule of `roles` forbids something."""
    if problem is not None:
        raise refusal(PermissionDenied, problem, param)


def operator(name: str, address: str = "", request_id: str = "") -> Actor:
    """The command line on a machine with the service's certificate. Text is cut to what the audit log takes."""
    return Actor(
        name=_clean(name, LONGEST_NAME) or "operator",
        power=Power(operator=True),
        address=_clean(address, LONGEST_ADDRESS),
        request_id=_clean(request_id, LONGEST_REQUEST_ID),
    )


def anonymous(name: str, address: str, request_id: str = "") -> Actor:
    """Somebody who is not known yet, for the audit log of logins; may do nothing."""
    return Actor(
        name=_clean(name, LONGEST_NAME),
        power=Power(role=Role.VIEWER, administers=False),
        address=_clean(address, LONGEST_ADDRESS),
        request_id=_clean(request_id, LONGEST_REQUEST_ID),
    )


def holder(found: Principal, address: str, request_id: str) -> Actor:
    """The holder of a credential that was checked in this transaction.

    Raises PermissionDenied for a key whose endpoints leave administration out.
    """
    endpoints = found.endpoints
    if endpoints and not any(path.startswith(ADMIN_PATH) for path in endpoints):
        raise refusal(PermissionDenied, "the API key is bound to endpoints that leave administration out")
    return Actor(
        name=_clean(f"{found.user} (key {found.key})" if found.key_id else found.user, LONGEST_NAME),
        power=Power(
            role=Role[(found.administers or found.role).upper()],
            installation=found.installation,
            by_key=found.key_id is not None,
            administers=bool(found.administers),
            expires_at=found.expires_at if found.key_id else 0,
        ),
        user_id=found.user_id,
        key_id=found.key_id,
        organisation_id=found.organisation_id,
        address=_clean(address, LONGEST_ADDRESS),
        request_id=_clean(request_id, LONGEST_REQUEST_ID),
    )


def cut_address(value: str) -> str:
    """A client's address as it is stored."""
    return _clean(value, LONGEST_ADDRESS)


def _clean(value: str, longest: int) -> str:
    return "".join(character for character in value[:longest] if character.isprintable())
