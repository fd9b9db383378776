"""Errors of the database. No message holds a password."""

from helixflow.errors import EX_UNAVAILABLE, EX_USAGE, HelixError, StartError


class DatabaseError(HelixError):
    """Base of every error here."""


class DatabaseUnavailableError(DatabaseError):
    """The server cannot be reached or does not answer now; worth another try."""

    exit_status = EX_UNAVAILABLE


class DatabaseRefusedError(DatabaseError):
    """The server, or our check of its certificate, said no; another try gives the same."""


class DatabaseVersionError(DatabaseError):
    """The server's version is not supported."""


class PoolExhaustedError(DatabaseUnavailableError):
    """No connection of the pool became free in time."""


class MigrationError(DatabaseError):
    """The migrations on disk and the database do not fit, or one failed; nothing of the failed one stays."""


class BackupError(DatabaseError):
    """A backup cannot be written, is damaged, or does not fit the database."""


class UrlError(DatabaseError):
    """A database URL is wrong."""

    exit_status = EX_USAGE


class EmbeddedError(StartError):
    """The embedded PostgreSQL cannot be started."""


class AlreadyRunningError(EmbeddedError):
    """Another process of this machine runs the embedded PostgreSQL of this directory."""
