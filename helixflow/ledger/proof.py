"""What the auth-service does for whoever wants proof: verification with every witness there is, and anchors."""

from datetime import date

from helixflow.core_rs import Conflict, InvalidRequest, NotFound
from helixflow.db.pool import Pool
from helixflow.ledger import sealer, seals
from helixflow.ledger.audit_chain import ChainError
from helixflow.ledger.faults import CHECKPOINT, LedgerFault, Report
from helixflow.ledger.sealer import Sealer
from helixflow.ledger.seals import AnchorError, Witness
from helixflow.ledger.verify import verify
from helixflow.refusals import refusal


class Proof:
    """Verifies and makes anchors."""

    def __init__(self, pool: Pool, seal: Sealer) -> None:
        self._pool = pool
        self._sealer = seal

    async def anchor(self) -> str:
        """A signed statement of where every chain ends now. Raises NotFound when there is nothing, or Conflict."""
        try:
            checkpoint = await self._sealer.round(whole=True)
        except (ChainError, AnchorError) as error:
            raise refusal(Conflict, f"Nothing is sealed before this is settled: {error}.") from None
        if not checkpoint.number:
            raise refusal(NotFound, "There is nothing to be sealed yet.")
        return seals.dump(checkpoint, self._sealer.keys).decode()

    async def verify(self, first: date | None, last: date | None, anchor: str) -> Report:
        """Seals what is new, then verifies. `anchor`: one that was kept elsewhere; empty: none.

        Raises InvalidRequest.
        """
        problem = ""
        try:
            await self._sealer.round(whole=True)
        except (ChainError, AnchorError) as error:
            problem = str(error)
        async with self._pool.acquire() as connection:
            installation = (await sealer.load(connection)).installation
            witnesses: list[Witness] = []
            try:
                if (own := self._sealer.own(installation)) is not None:
                    witnesses.append(Witness("the anchor of this machine", own))
            except AnchorError as error:
                problem = f"{self._sealer.path(installation)}: {error}"
            if anchor:
                try:
                    witnesses.append(
                        Witness("the anchor", seals.parse(anchor.encode(), self._sealer.keys, installation))
                    )
                except AnchorError as error:
                    raise refusal(InvalidRequest, f"{error}.", "anchor") from None
            report = await verify(connection, self._sealer.keys.chain, first, last, witnesses)
        if problem and not report.faults:
            report.faults.append(LedgerFault("", 0, "", problem, CHECKPOINT))
        return report
