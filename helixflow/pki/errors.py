"""The error of everything in this package."""

from pathlib import Path

from helixflow.errors import HelixError


class PkiError(HelixError):
    """A file or an option cannot be used: which, why, and what to do about it."""

    def __init__(self, file: Path | None, reason: str, hint: str = "") -> None:
        """`file`: the file at fault, or None when an option is."""
        self.file = file
        self.reason = reason
        self.hint = hint
        where = f"{file}: " if file is not None else ""
        advice = f"\n  {hint}" if hint else ""
        super().__init__(f"{where}{reason}{advice}")
