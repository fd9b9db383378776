"""Section `[ledger]`: the record of every request."""

from dataclasses import dataclass
from pathlib import Path

from helixflow.options import between, one_of, option


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """The record of every request."""

    spool: Path = option(Path(), "directory of the gateway's spool; empty: spool/ under home")
    spool_max_bytes: int = option(
        4 << 30, "most bytes a worker keeps until they are in the database", check=between(1 << 20, 1 << 44)
    )
    when_full: str = option(
        "refuse",
        "a full spool refuses requests, or serves them unrecorded (and says so in the log)",
        check=one_of("refuse", "serve"),
    )
    fsync_ms: int = option(10, "records are on the disk after this time (milliseconds)", check=between(1, 10_000))
    ship_ms: int = option(200, "records are sent to the database this often (milliseconds)", check=between(1, 60_000))
    batch_rows: int = option(1000, "most rows of one transaction", check=between(1, 10_000))
    rejected_max_bytes: int = option(
        256 << 20,
        "most bytes of records that the ledger refused and `helixflow ledger resend` has not sent; the oldest go",
        check=between(1 << 16, 1 << 44),
    )
    keep_months: int = option(0, "months of rows that are kept; 0: all", check=between(0, 1200))
