"""Errors of the command line and of start-up. Errors of requests are `helixflow.core_rs.CoreError`."""

from collections.abc import Sequence

EX_USAGE = 64
"""Exit status of a wrong configuration (sysexits.h)."""
EX_SOFTWARE = 70
"""Exit status of a service whose engine or worker failed: the supervisor restarts it."""
EX_UNAVAILABLE = 69
"""Exit status of a service that could not start for want of another one."""


class HelixError(Exception):
    """Base of every error that ends a command with a message instead of a traceback."""

    exit_status = 1


class ConfigError(HelixError):
    """The configuration is wrong. Holds every problem found, not only the first."""

    exit_status = EX_USAGE

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"the configuration has {len(self.problems)} problem(s):\n{lines}")


class StartError(HelixError):
    """A service could not be started; the message says what to do."""

    exit_status = EX_UNAVAILABLE

    def __init__(self, message: str, status: int | None = None) -> None:
        """`status`: exit status of the process that failed, when there was one."""
        super().__init__(message)
        self.status = status
