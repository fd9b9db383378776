"""AdminService over a database with a user of each role in two organisations."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from helixflow.auth.admin import AdminHandlers
from helixflow.db.target import Target
from helixflow.pki.layout import Layout
from helixflow.rpc import messages
from helixflow.rpc.server import Caller

from .support import SECRET, World, world

GATEWAY = Caller("api-gateway", "127.0.0.1:5000", "call-1")
COMMAND = Caller("auth-service", "127.0.0.1:5001", "call-2")
ROLES = ("viewer", "member", "admin", "owner")


@dataclass
class Office:
    """AdminService over a world with one user of each role in `default` and in `other`."""

    w: World
    handlers: dict[str, Any]
    people: dict[str, UUID] = field(default_factory=dict)

    async def operator(self, method: str, **values: Any) -> Any:
        return await self._call(method, COMMAND, {"name": "root", "address": "10.9.9.9"}, values)

    async def call(self, who: str, method: str, *, by: UUID | None = None, **values: Any) -> Any:
        """As the user `who` (`admin` or `other-admin`), perhaps `by` a key."""
        actor = {"principal_user_id": str(self.people[who]), "address": "10.0.0.1", "request_id": "r-1"}
        return await self._call(method, GATEWAY, actor | ({"principal_key_id": str(by)} if by else {}), values)

    async def _call(self, method: str, caller: Caller, actor: dict[str, str], values: dict[str, Any]) -> Any:
        kind = messages.method(f"AdminService/{method}").request
        return await self.handlers[f"AdminService/{method}"](messages.parse(kind, {"actor": actor, **values}), caller)


@contextlib.asynccontextmanager
async def office(target: Target, pki: Layout, *, development: bool = False) -> AsyncIterator[Office]:
    async with world(target, pki) as w:
        admin = AdminHandlers(w.pool, SECRET, w.passwords, currency="EUR", development=development)
        made = Office(w, admin.methods())
        if not await w.value("SELECT EXISTS (SELECT FROM organisations WHERE name = 'other')"):
            await made.operator("CreateOrganisation", name="other")
            for role in ROLES:
                await w.user(f"{role}@example.com", role)
                await w.user(f"other-{role}@example.com", role, "other")
        for row in await w.rows("SELECT id, email FROM users"):
            made.people[row["email"].removesuffix("@example.com")] = row["id"]
        yield made


def arguments(o: Office) -> dict[str, dict[str, Any]]:
    """A request of each method that reaches what it wants: every actor gets to the rules."""
    return {
        "CreateOrganisation": {"name": "x"},
        "UpdateOrganisation": {"organisation": "default", "suspended": False},
        "CreateUser": {"email": "new@example.com", "role": "viewer"},
        "UpdateUser": {"user": "viewer@example.com", "disabled": False},
        "ResetPassword": {"user": "viewer@example.com"},
        "UnlockUser": {"user": "viewer@example.com"},
        "DeleteUser": {"user": "viewer@example.com"},
        "CreateKey": {"name": "x"},
        "UpdateKey": {"key": str(uuid4())},
        "RotateKey": {"key": str(uuid4())},
        "RevokeKey": {"key": str(uuid4())},
        "SetLimits": {"subject": f"user:{o.people['viewer']}", "limits": {}},
        "SetPrice": {"price": {"model": "m", "prompt": 1}},
        "DeletePrice": {"model": "m"},
        "GetTexts": {"request": "00000000-0000-0000-0000-000000000000"},
    }
