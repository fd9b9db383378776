"""AdminService over a database with a user of each role in two organisations."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from helixflow.auth.admin import AdminHandlers
from helixflow.auth.keys import presented
from helixflow.db.target import Target
from helixflow.limits.model import Limits
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
    tokens: dict[str, str] = field(default_factory=dict)
    """An access token of each person who has acted."""

    async def operator(self, method: str, **values: Any) -> Any:
        return await self._call(method, COMMAND, {"name": "root", "address": "10.9.9.9"}, values)

    async def call(self, who: str, method: str, *, by: str | None = None, **values: Any) -> Any:
        """With an access token of the person `who` (`admin` or `other-admin`), or `by` a key instead."""
        shown = {"key_digest": presented(by.encode()).hex()} if by else {"access_token": await self.token(who)}
        return await self._call(method, GATEWAY, {"address": "10.0.0.1", "request_id": "r-1", **shown}, values)

    async def token(self, who: str) -> str:
        if who not in self.tokens:
            issued = await self.w.do(self.w.sessions.begin, self.people[who], "password", "")
            self.tokens[who] = issued.access_token
        return self.tokens[who]

    async def _call(self, method: str, caller: Caller, actor: dict[str, str], values: dict[str, Any]) -> Any:
        kind = messages.method(f"AdminService/{method}").request
        return await self.handlers[f"AdminService/{method}"](messages.parse(kind, {"actor": actor, **values}), caller)


@contextlib.asynccontextmanager
async def office(
    target: Target, pki: Layout, *, development: bool = False, new_keys: Limits | None = None
) -> AsyncIterator[Office]:
    async with world(target, pki) as w:
        admin = AdminHandlers(
            w.pool,
            SECRET,
            w.signer,
            w.passwords,
            currency="EUR",
            development=development,
            new_keys=new_keys or Limits(),
        )
        made = Office(w, admin.methods())
        if not await w.value("SELECT EXISTS (SELECT FROM organisations WHERE name = 'other')"):
            await made.operator("CreateOrganisation", name="other")
            for role in ROLES:
                await w.user(f"{role}@example.com", role)
                await w.user(f"other-{role}@example.com", role, "other")
            await w.value("UPDATE organisations SET domains = '{example.com}' WHERE first")
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
        "RequireFactor": {"organisation": "default", "role": "owner"},
        "ResetFactor": {"user": "viewer@example.com"},
        "EndSession": {"session": str(uuid4())},
        "EndSessions": {"user": str(uuid4())},
        "UnlockUser": {"user": "viewer@example.com"},
        "DeleteUser": {"user": "viewer@example.com"},
        "CreateKey": {"name": "x"},
        "UpdateKey": {"key": str(uuid4())},
        "RotateKey": {"key": str(uuid4())},
        "RevokeKey": {"key": str(uuid4())},
        "SetLimits": {"subject": f"user:{o.people['viewer']}", "limits": {}},
        "SetPrice": {"price": {"model": "m", "prompt": 1, "cached": 1, "completion": 1}},
        "DeletePrice": {"model": "m"},
        "GetTexts": {"request": "00000000-0000-0000-0000-000000000000"},
    }
