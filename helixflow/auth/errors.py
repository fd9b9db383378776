"""Errors of the auth-service, and what becomes of the database's."""

import contextlib
from collections.abc import Iterator

import asyncpg

from helixflow import log, traces
from helixflow.core_rs import CoreError, Unavailable
from helixflow.db.errors import DatabaseError
from helixflow.errors import StartError
from helixflow.refusals import refusal

__all__ = ["PepperError", "SigningKeyError", "database_errors"]

logger = log.get("auth")

_AWAY = (
    DatabaseError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,
    OSError,
)
"""The server is away, overloaded, shutting down, a standby, or gave up on us: another try may succeed."""


class PepperError(StartError):
    """The secret behind the key digests is missing, unsafe, or not the one of this database."""


class SigningKeyError(StartError):
    """The key of access tokens cannot be used."""


@contextlib.contextmanager
def database_errors() -> Iterator[None]:
    """Turns what a database that is away raises into Unavailable; the log has the reason, the caller has not."""
    try:
        yield
    except CoreError:
        raise
    except _AWAY as error:
        logger.warning("the database did not answer", error=traces.message_of(error), kind=type(error).__name__)
        raise refusal(Unavailable, "the account database does not answer now; try again") from None
