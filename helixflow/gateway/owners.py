"""For whom a request runs at the pool: whose prefixes it may use, and whose share of the engine it takes."""

from helixflow.config import GatewayConfig
from helixflow.core_rs import Owner
from helixflow.gateway.auth import Principal
from helixflow.sections.gateway import weights

_DEPTH = {"organisation": 1, "user": 2, "key": 3}
"""How many identifiers of a principal, from the organisation on, a scope looks at."""

NOBODY = Owner(prefixes=b"", organisation=b"", key=b"")
"""Who calls a gateway without accounts."""


class Owners:
    """Turns principals into owners, as the configuration says."""

    def __init__(self, options: GatewayConfig) -> None:
        self._depth = _DEPTH[options.prefix_scope]
        self._weights = weights(options.weights)

    def of(self, principal: Principal) -> Owner:
        """The owner of a principal's requests."""
        if not any(principal.ids):
            return NOBODY
        return Owner(
            prefixes=_narrowest(principal, self._depth),
            organisation=_narrowest(principal, 1),
            key=_narrowest(principal, 3),
            organisation_weight=self._weight(principal.organisation, principal.organisation_id),
            key_weight=self._weight(principal.key_id),
        )

    def _weight(self, *names: str) -> float:
        return next((self._weights[name] for name in names if name in self._weights), 1.0)


def _narrowest(principal: Principal, depth: int) -> bytes:
    """The last identifier that a principal has among the first `depth`: a session has a user, but no key."""
    return next((found for found in reversed(principal.ids[:depth]) if found), b"")
