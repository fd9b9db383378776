"""Accounts on a real database, without the processes around them."""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from argon2 import PasswordHasher

from helixflow.auth import actors, api_keys, audit, users
from helixflow.auth.actors import Actor
from helixflow.auth.api_keys import Wanted
from helixflow.auth.factor_login import FactorLogin
from helixflow.auth.factors import Factors
from helixflow.auth.first_start import FILE, discard, first_start
from helixflow.auth.login import Login
from helixflow.auth.passwords import Passwords
from helixflow.auth.pepper import Pepper
from helixflow.auth.refusals import Refusals
from helixflow.auth.roles import Power, Role
from helixflow.auth.sessions import Sessions
from helixflow.auth.signing import Signer
from helixflow.auth.throttle import Throttle
from helixflow.config import AuthConfig, DatabaseConfig
from helixflow.db.pool import Pool
from helixflow.db.target import Target
from helixflow.ledger.record import Row, new_id
from helixflow.ledger.seals import SealKeys
from helixflow.pki.layout import Layout

CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
"""The real parameters take 0.1 s a password."""

PASSWORD = "correct horse battery"
OPERATOR = actors.operator("root", "127.0.0.1", "request-1")
SECRET = Pepper(bytes(range(32)))
OWNER = "owner@localhost"

INJECTIONS = (
    "'; DROP TABLE helixflow.users; --",
    "' OR '1'='1",
    "\\'; SELECT pg_sleep(10); --",
    "$1; DELETE FROM helixflow.api_keys",
    '"; TRUNCATE helixflow.sessions; --',
    "x') UNION SELECT password FROM helixflow.users --",
    "%00' --",
    "\x00'; DROP TABLE helixflow.users; --",
)


@dataclass
class World:
    """One auth-service's objects over one database."""

    pool: Pool
    options: AuthConfig
    passwords: Passwords
    signer: Signer
    sessions: Sessions
    login: Login
    refusals: Refusals
    factors: Factors
    factor: FactorLogin
    first_password: str | None
    first_file: Path

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[Any]:
        """A connection in a transaction, as handlers have it."""
        async with self.pool.acquire() as connection, connection.transaction():
            yield connection

    async def do(self, function: Callable[..., Awaitable[Any]], *arguments: Any, **named: Any) -> Any:
        """Calls a function of the database level in a transaction of its own."""
        async with self.begin() as connection:
            return await function(connection, *arguments, **named)

    async def value(self, query: str, *arguments: Any) -> Any:
        async with self.pool.acquire() as connection:
            return await connection.fetchval(query, *arguments)

    async def rows(self, query: str, *arguments: Any) -> list[Any]:
        async with self.pool.acquire() as connection:
            found: list[Any] = await connection.fetch(query, *arguments)
            return found

    async def user(self, email: str, role: str = "member", organisation: str = "default") -> UUID:
        """A person with PASSWORD, which need not be changed."""
        stored = await self.passwords.hash(PASSWORD)
        made = await self.do(users.create, OPERATOR, organisation=organisation, email=email, role=role, password=stored)
        await self.value("UPDATE users SET must_change_password = false WHERE id = $1", UUID(made.id))
        return UUID(made.id)

    async def service(self, name: str, role: str = "member", organisation: str = "default") -> UUID:
        made = await self.do(users.create, OPERATOR, organisation=organisation, email=name, role=role, password=None)
        return UUID(made.id)

    async def acting(self, user_id: UUID) -> Actor:
        """The user as one who acts, by an access token."""
        (row,) = await self.rows(
            "SELECT u.email, u.role, u.organisation_id, o.first FROM users u JOIN organisations o "
            "ON o.id = u.organisation_id WHERE u.id = $1",
            user_id,
        )
        power = Power(role=Role[row["role"].upper()], installation=row["first"])
        return Actor(row["email"], power, user_id, organisation_id=row["organisation_id"], address="10.0.0.1")

    async def key(self, user: UUID, name: str = "key", **wanted: Any) -> tuple[UUID, str]:
        """A key: its UUID and secret."""
        made = await self.do(api_keys.create, OPERATOR, SECRET, str(user), Wanted(name, **wanted))
        return UUID(made.key.id), made.secret

    async def blocked(self) -> None:
        """Returns when somebody waits for a lock of this database."""
        waiting = False
        while not waiting:
            waiting = await self.value(
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() "
                "AND wait_event_type = 'Lock')"
            )

    async def audited(self, action: str) -> list[Any]:
        return await self.rows("SELECT * FROM audit_log WHERE action = $1 ORDER BY id", action)


@contextlib.asynccontextmanager
async def world(target: Target, pki: Layout, **options: Any) -> AsyncIterator[World]:
    """A database after its first start."""
    # Pauses that no slow machine sits out.
    chosen = replace(AuthConfig(login_delay_s=100.0), **options)
    audit.seal_with(SealKeys.of(SECRET.ledger_key()).audit)
    pool = await Pool.open(DatabaseConfig(), target, name="test")
    passwords = Passwords(chosen.password_checks, CHEAP)
    exits = contextlib.ExitStack()
    try:
        first_file = Path(exits.enter_context(tempfile.TemporaryDirectory())) / FILE
        async with pool.acquire() as connection, connection.transaction():
            first = await first_start(connection, passwords, chosen.owner, first_file, chosen.first_password_ttl_s)
            signer = await Signer.open(connection, pki.jwt_private, chosen)
        sessions = Sessions(chosen, SECRET, signer)
        refusals, rules, factors = Refusals(pool), Throttle.of(chosen), Factors(SECRET, chosen.factor_issuer)
        login = Login(
            pool,
            passwords,
            rules,
            sessions,
            refusals,
            factors=factors,
            on_change=lambda email: discard(first_file, email),
        )
        yield World(
            pool,
            chosen,
            passwords,
            signer,
            sessions,
            login,
            refusals,
            factors,
            FactorLogin(pool, passwords, login, factors, rules, refusals),
            first.password if first else None,
            first_file,
        )
    finally:
        exits.close()
        passwords.close()
        await pool.close()


def run(work: Awaitable[None], seconds: float = 25) -> None:
    """Runs one test's coroutine."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await work

    asyncio.run(bounded())


def row(at_us: int, *, organisation: UUID, user: UUID, key: UUID | None = None) -> Row:
    """One request in the ledger."""
    return Row(
        id=new_id(at_us),
        at_us=at_us,
        organisation=organisation.bytes,
        user=user.bytes,
        key=key.bytes if key else None,
        model="m",
        endpoint="/v1/x",
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=1,
        queue_us=0,
        first_token_us=0,
        total_us=0,
        finish="stop",
        error="",
        status=200,
        client="",
        cost=0,
        request_id="r",
        gateway=uuid4().bytes,
    )


def copy(pki: Layout, place: Path) -> Layout:
    """A certificate directory that the test may change."""
    return Layout(Path(shutil.copytree(pki.directory, place / "certs")))


def rotate(layout: Layout, other: Layout) -> None:
    """As `helixflow pki rotate-tokens` does it, with a pair that was made before: making one takes a second."""
    for source, place in ((other.jwt_private, layout.jwt_private), (other.jwt_public, layout.jwt_public)):
        fresh = place.with_suffix(".new")
        shutil.copy2(source, fresh)
        fresh.replace(place)
