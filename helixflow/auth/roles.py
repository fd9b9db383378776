"""Who may do what: one table over the methods of AdminService. What is not in it is refused."""

import enum
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Rule:
    """What a caller needs. `installation`: an owner must also belong to the first organisation."""

    least: Role
    installation: bool = False


METHODS: dict[str, Rule] = {
    "CreateOrganisation": Rule(Role.OWNER, installation=True),
    "ListOrganisations": Rule(Role.VIEWER),
    "UpdateOrganisation": Rule(Role.OWNER, installation=True),
    "CreateUser": Rule(Role.ADMIN),
    "ListUsers": Rule(Role.ADMIN),
    "UpdateUser": Rule(Role.ADMIN),
    "ResetPassword": Rule(Role.ADMIN),
    "UnlockUser": Rule(Role.ADMIN),
    "DeleteUser": Rule(Role.ADMIN),
    "CreateKey": Rule(Role.MEMBER),
    "ListKeys": Rule(Role.VIEWER),
    "UpdateKey": Rule(Role.MEMBER),
    "RotateKey": Rule(Role.MEMBER),
    "RevokeKey": Rule(Role.MEMBER),
    "SetLimits": Rule(Role.ADMIN),
    "ListLimits": Rule(Role.VIEWER),
    "SetPrice": Rule(Role.OWNER, installation=True),
    "DeletePrice": Rule(Role.OWNER, installation=True),
    "ListPrices": Rule(Role.VIEWER),
    "QueryUsage": Rule(Role.VIEWER),
    "ListRequests": Rule(Role.ADMIN),
    "GetTexts": Rule(Role.ADMIN),
    "ListAudit": Rule(Role.ADMIN),
    "VerifyLedger": Rule(Role.OWNER, installation=True),
}
"""Members see and manage what is their own, admins what is their organisation's: the functions behind see to that."""
