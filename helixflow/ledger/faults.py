"""What verification has to say."""

from dataclasses import dataclass, field

LEDGER = "ledger"
AUDIT = "audit"
CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class LedgerFault:
    """The first thing that is wrong with a day, or with the audit log."""

    day: str
    sequence: int
    """Of the row in its chain; 0: not of a row."""
    id: str
    """UUID of the request, number of the entry; empty when it is missing."""
    problem: str
    chain: str = LEDGER
    """`ledger`, `audit`, or `checkpoint`."""


@dataclass(slots=True)
class Report:
    """What `verify` has found."""

    days: int = 0
    rows: int = 0
    faults: list[LedgerFault] = field(default_factory=list)
    """At most one for each day, one for the audit log, one for each checkpoint or anchor."""
    entries: int = 0
    """Of the audit log."""
    dropped: list[str] = field(default_factory=list)
    """What retention has removed, a line each."""
    lost: list[str] = field(default_factory=list)
    """What was chained with a pepper that is lost, a line each: nobody can check it."""
