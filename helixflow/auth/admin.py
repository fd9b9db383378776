"""AdminService: organisations, users and keys; the rest of its methods is in `admin_usage`."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from helixflow.auth import api_keys, organisations, session_desk, users
from helixflow.auth.actors import Actor
from helixflow.auth.admin_usage import UsageMethods, set_limits
from helixflow.auth.desk import Desk, Handler, filled, listed, optional
from helixflow.auth.passwords import Passwords, one_time
from helixflow.auth.pepper import Pepper
from helixflow.auth.records import Content, User
from helixflow.auth.refusals import Refusals
from helixflow.auth.signing import Signer
from helixflow.db.pool import Pool
from helixflow.ledger.proof import Proof
from helixflow.ledger.sealer import Sealer
from helixflow.limits.model import Limits
from helixflow.rpc import messages
from helixflow.rpc.server import Caller

SERVICE = "AdminService"
REHEARSED = "!"
"""Stands for a hash in an act that is rolled back: no password has it."""


class AdminHandlers:
    """Answers AdminService."""

    def __init__(  # noqa: PLR0913 - its parts, each by name
        self,
        pool: Pool,
        pepper: Pepper,
        signer: Signer,
        hashes: Passwords,
        *,
        currency: str,
        development: bool,
        new_keys: Limits,
        sealer: Sealer | None = None,
        one_time_s: float = users.ONE_TIME_S,
    ) -> None:
        """`currency`: name of what prices are in. `development`: keys of that profile are known.

        `new_keys`: limits of keys that are given none, unless they administer. `sealer`: of this service; None: one
        that keeps no anchor. `one_time_s`: how long one-time passwords last (seconds).
        """
        self._one_time_s = one_time_s
        self._pepper = pepper
        self._new_keys = new_keys
        self._passwords = hashes
        self.refused = Refusals(pool)
        """Acts that were refused; `run` of it must be running."""
        self._desk = Desk(pool, pepper, signer, self.refused, development=development)
        proof = Proof(pool, sealer or Sealer(pool, pepper.ledger_key()))
        self._usage = UsageMethods(self._desk, proof, currency)

    def methods(self) -> dict[str, Handler]:
        """A handler for every method."""
        own: dict[str, Handler] = {
            "CreateOrganisation": self._create_organisation,
            "ListOrganisations": self._list_organisations,
            "UpdateOrganisation": self._update_organisation,
            "CreateUser": self._create_user,
            "ListUsers": self._list_users,
            "UpdateUser": self._update_user,
            "ResetPassword": self._reset_password,
            "RequireFactor": self._require_factor,
            "ResetFactor": self._reset_factor,
            "ListSessions": self._list_sessions,
            "EndSession": self._end_session,
            "EndSessions": self._end_sessions,
            "UnlockUser": self._unlock_user,
            "DeleteUser": self._delete_user,
            "CreateKey": self._create_key,
            "ListKeys": self._list_keys,
            "UpdateKey": self._update_key,
            "RotateKey": self._rotate_key,
            "RevokeKey": self._revoke_key,
        }
        return {f"{SERVICE}/{name}": handler for name, handler in (own | self._usage.methods()).items()}

    async def _create_organisation(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("CreateOrganisation", request, caller) as (connection, actor):
            made = await organisations.create(connection, actor, request.name)
        return filled(messages.Organisation, made)

    async def _list_organisations(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("ListOrganisations", request, caller) as (connection, actor):
            page = await organisations.listing(connection, actor, request.organisation, request.limit, request.after)
        return listed(messages.Organisations, messages.Organisation, page)

    async def _update_organisation(self, request: Any, caller: Caller) -> Any:
        policy = optional(request, "content")
        content = Content(policy.store, policy.retention_days, list(policy.redact)) if policy is not None else None
        async with self._desk.act("UpdateOrganisation", request, caller) as (connection, actor):
            name, suspended = optional(request, "name"), optional(request, "suspended")
            domains = list(request.domains.values) if request.HasField("domains") else None
            changed = await organisations.update(
                connection, actor, request.organisation, name, suspended, content, domains
            )
        return filled(messages.Organisation, changed)

    async def _create_user(self, request: Any, caller: Caller) -> Any:
        async def create(connection: Any, actor: Actor, stored: str | None) -> User:
            return await users.create(
                connection,
                actor,
                organisation=request.organisation,
                email=request.email,
                role=request.role,
                password=stored,
                lasts_s=self._one_time_s,
            )

        if not request.service_account:
            return await self._with_one_time("CreateUser", request, caller, create)
        async with self._desk.act("CreateUser", request, caller) as (connection, actor):
            made = await create(connection, actor, None)
        return messages.CreatedUser(user=filled(messages.User, made))

    async def _list_users(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("ListUsers", request, caller) as (connection, actor):
            page = await users.listing(connection, actor, request.organisation, request.limit, request.after)
        return listed(messages.Users, messages.User, page)

    async def _update_user(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("UpdateUser", request, caller) as (connection, actor):
            role, disabled = optional(request, "role"), optional(request, "disabled")
            changed = await users.update(connection, actor, request.user, role, disabled)
        return filled(messages.User, changed)

    async def _reset_password(self, request: Any, caller: Caller) -> Any:
        async def reset(connection: Any, actor: Actor, stored: str) -> User:
            return await users.reset_password(connection, actor, request.user, stored, request.keys, self._one_time_s)

        return await self._with_one_time("ResetPassword", request, caller, reset)

    async def _require_factor(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("RequireFactor", request, caller) as (connection, actor):
            changed = await organisations.require_factor(connection, actor, request.organisation, request.role)
        return filled(messages.Organisation, changed)

    async def _reset_factor(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("ResetFactor", request, caller) as (connection, actor):
            changed = await session_desk.reset_factor(connection, actor, request.user)
        return filled(messages.User, changed)

    async def _list_sessions(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("ListSessions", request, caller) as (connection, actor):
            page = await session_desk.listing(connection, actor, request.user, request.limit, request.after)
        return listed(messages.Sessions, messages.Session, page)

    async def _end_session(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("EndSession", request, caller) as (connection, actor):
            ended = await session_desk.end(connection, actor, request.session)
        return messages.Deleted(id=ended)

    async def _end_sessions(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("EndSessions", request, caller) as (connection, actor):
            ended = await session_desk.end_all(connection, actor, request.user)
        return messages.EndedSessions(ended=ended)

    async def _unlock_user(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("UnlockUser", request, caller) as (connection, actor):
            changed = await users.unlock(connection, actor, request.user)
        return filled(messages.User, changed)

    async def _delete_user(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("DeleteUser", request, caller) as (connection, actor):
            removed = await users.delete(connection, actor, request.user)
        return messages.Deleted(id=removed)

    async def _create_key(self, request: Any, caller: Caller) -> Any:
        models, endpoints = tuple(request.models), tuple(request.endpoints)
        wanted = api_keys.Wanted(
            request.name, request.expires_at, models, endpoints, request.admin, request.certificate
        )
        limits = Limits.of(request.limits)
        if wanted.admin and limits:
            raise api_keys.bound()
        if not limits and not wanted.admin:
            limits = self._new_keys
        async with self._desk.act("CreateKey", request, caller) as (connection, actor):
            made = await api_keys.create(connection, actor, self._pepper, request.user, wanted)
            if limits:
                await set_limits(connection, actor, f"key:{made.key.id}", UUID(made.key.organisation_id), limits)
        return messages.CreatedKey(key=filled(messages.Key, made.key), secret=made.secret)

    async def _list_keys(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("ListKeys", request, caller) as (connection, actor):
            page = await api_keys.listing(connection, actor, request.organisation, request.limit, request.after)
        return listed(messages.Keys, messages.Key, page)

    async def _update_key(self, request: Any, caller: Caller) -> Any:
        changes = api_keys.Changes(
            optional(request, "name"),
            optional(request, "expires_at"),
            tuple(request.models.values) if request.HasField("models") else None,
            tuple(request.endpoints.values) if request.HasField("endpoints") else None,
            optional(request, "admin"),
            optional(request, "certificate"),
        )
        async with self._desk.act("UpdateKey", request, caller) as (connection, actor):
            changed = await api_keys.update(connection, actor, self._pepper, request.key, changes)
        return filled(messages.Key, changed)

    async def _rotate_key(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("RotateKey", request, caller) as (connection, actor):
            overlap_s = optional(request, "overlap_s")
            made = await api_keys.rotate(connection, actor, self._pepper, request.key, overlap_s)
        return messages.CreatedKey(key=filled(messages.Key, made.key), secret=made.secret)

    async def _revoke_key(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("RevokeKey", request, caller) as (connection, actor):
            revoked = await api_keys.revoke(connection, actor, request.key)
        return filled(messages.Key, revoked)

    async def _with_one_time(
        self, method: str, request: Any, caller: Caller, act: Callable[[Any, Actor, str], Awaitable[User]]
    ) -> Any:
        """An act that stores the hash of a one-time password.

        It is rehearsed first: nothing is hashed for what will be refused, and no connection is held meanwhile.
        """
        async with self._desk.act(method, request, caller) as (connection, actor):
            rehearsal = connection.transaction()
            await rehearsal.start()
            await act(connection, actor, REHEARSED)
            await rehearsal.rollback()
        password = one_time()
        async with self._passwords.turn(actor.address):
            stored = await self._passwords.hash(password)
        async with self._desk.act(method, request, caller) as (connection, actor):
            changed = await act(connection, actor, stored)
        return messages.CreatedUser(user=filled(messages.User, changed), one_time_password=password)
