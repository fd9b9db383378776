"""Who acts: the operator, or a user whose role is read from the database at every call."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from helixflow.auth.roles import METHODS, Role
from helixflow.core_rs import InvalidApiKey, InvalidToken, NotFound, PermissionDenied
from helixflow.refusals import refusal

LONGEST_NAME = 254
LONGEST_ADDRESS = 100
LONGEST_REQUEST_ID = 128
ADMIN_PATH = "/admin/v1"

_USER = """
SELECT u.id, u.email, u.role, u.organisation_id, o.first
FROM users u JOIN organisations o ON o.id = u.organisation_id
WHERE u.id = $1 AND u.deleted_at IS NULL AND NOT u.disabled AND NOT o.suspended
"""
_KEY = """
SELECT name, cardinality(models) > 0 OR cardinality(endpoints) > 0 AS restricted,
    cardinality(endpoints) = 0 OR EXISTS (SELECT FROM unnest(endpoints) AS path WHERE starts_with(path, $4)) AS admits
FROM api_keys
WHERE id = $1 AND user_id = $2 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
    AND ($3 OR NOT development)
"""


@dataclass(frozen=True, slots=True)
class Actor:
    """Whoever acts. The operator has no user, no organisation and may do everything."""

    name: str
    """For the audit log: e-mail or key name; of the operator the system account."""
    role: Role = Role.OWNER
    operator: bool = False
    user_id: UUID | None = None
    key_id: UUID | None = None
    organisation_id: UUID | None = None
    installation: bool = False
    """Belongs to the first organisation."""
    restricted: bool = False
    """Acts by a key that may call some models or endpoints only."""
    address: str = ""
    request_id: str = ""

    def owns(self, user_id: UUID) -> bool:
        """Whether the user is the actor."""
        return self.user_id == user_id

    def allow(self, method: str) -> None:
        """Raises PermissionDenied unless the table of roles lets the actor call a method of AdminService."""
        rule = METHODS.get(method)
        if rule is None:
            raise refusal(PermissionDenied, f"nobody may call {method}")
        if self.operator:
            return
        if self.role < rule.least:
            raise refusal(PermissionDenied, f"this needs the role {rule.least.word} or more; yours is {self.role.word}")
        if rule.installation and not self.installation:
            raise refusal(PermissionDenied, "this is left to the operator and the owners of the first organisation")

    def allow_role(self, role: Role, param: str | None = None) -> None:
        """Raises PermissionDenied for a role above the actor's own."""
        if not self.operator and role > self.role:
            raise refusal(PermissionDenied, f"the role {role.word} is above yours, which is {self.role.word}", param)

    def allow_organisation(self, organisation_id: UUID, message: str, param: str | None = None) -> None:
        """Raises NotFound for another organisation than the actor's: whether there is one is nobody's business."""
        if not self.operator and organisation_id != self.organisation_id:
            raise refusal(NotFound, message, param)

    def allow_keys(self) -> None:
        """Raises PermissionDenied when the actor's own key is restricted: it must not make itself a wider one."""
        if self.restricted:
            raise refusal(PermissionDenied, "a key that is bound to models or endpoints may not make or change keys")


def operator(name: str, address: str = "", request_id: str = "") -> Actor:
    """The command line on a machine with the service's certificate. Text is cut to what the audit log takes."""
    return Actor(
        name=_clean(name, LONGEST_NAME) or "operator",
        operator=True,
        address=_clean(address, LONGEST_ADDRESS),
        request_id=_clean(request_id, LONGEST_REQUEST_ID),
    )


def anonymous(name: str, address: str, request_id: str = "") -> Actor:
    """Somebody who is not known yet, for the audit log of logins; may do nothing."""
    return Actor(
        name=_clean(name, LONGEST_NAME),
        role=Role.VIEWER,
        address=_clean(address, LONGEST_ADDRESS),
        request_id=_clean(request_id, LONGEST_REQUEST_ID),
    )


async def known(
    connection: Any, user_id: UUID | None, key_id: UUID | None, *, development: bool, address: str, request_id: str
) -> Actor:
    """The user, who acts by a key or a session that a gateway has verified.

    Raises InvalidToken or InvalidApiKey when one of them is not valid any more, and PermissionDenied for a key whose
    endpoints leave administration out.
    """
    row = await connection.fetchrow(_USER, user_id) if user_id else None
    if row is None:
        raise refusal(InvalidToken, "the user of this request does not exist or may not act now")
    name, restricted = row["email"], False
    if key_id:
        key = await connection.fetchrow(_KEY, key_id, user_id, development, ADMIN_PATH)
        if key is None:
            raise refusal(InvalidApiKey, "the API key is not valid")
        if not key["admits"]:
            raise refusal(PermissionDenied, "the API key is bound to endpoints that leave administration out")
        name, restricted = f"{row['email']} (key {key['name']})", key["restricted"]
    return Actor(
        name=name,
        role=Role[row["role"].upper()],
        user_id=row["id"],
        key_id=key_id,
        organisation_id=row["organisation_id"],
        installation=row["first"],
        restricted=restricted,
        address=_clean(address, LONGEST_ADDRESS),
        request_id=_clean(request_id, LONGEST_REQUEST_ID),
    )


def cut_address(value: str) -> str:
    """A client's address as it is stored."""
    return _clean(value, LONGEST_ADDRESS)


def _clean(value: str, longest: int) -> str:
    return "".join(character for character in value[:longest] if character.isprintable())
