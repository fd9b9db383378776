"""How a process is to be confined: made by the supervisor, carried out by `helixflow.confine.launch`."""

import json
from dataclasses import asdict, dataclass

from helixflow.confine.account import Account

PLAN = "HELIXFLOW_CONFINE"
"""Environment variable: the plan as JSON."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left to a process."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    capabilities: tuple[int, ...] = ()
    shown: tuple[str, ...] = ()
    """Files and folders that it needs: a folder on the way that its account may not pass is covered by an empty one in
    which there is nothing else."""

    @classmethod
    def of(cls, account: Account, capabilities: tuple[int, ...] = (), shown: tuple[str, ...] = ()) -> "Plan":
        """The plan for an account."""
        return cls(account.uid, account.gid, account.groups, capabilities, shown)

    def dumps(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Plan":
        """The same from text."""
        parts = json.loads(text)
        lists = [tuple(parts[name]) for name in ("groups", "capabilities", "shown")]
        return cls(parts["uid"], parts["gid"], *lists)

    @property
    def account(self) -> Account:
        """Whose rights it has."""
        return Account("", self.uid, self.gid, self.groups)
