"""Errors of the commands that talk to the auth-service."""

from helixflow.errors import EX_UNAVAILABLE, HelixError


class AdminError(HelixError):
    """The auth-service refused, or what was asked for cannot be done."""


class UnreachableError(AdminError):
    """No auth-service answers."""

    exit_status = EX_UNAVAILABLE
