"""What a request costs: admitted within the limits, begun and ended in the ledger, settled for what was used."""

import time
from collections import Counter
from typing import Any, Protocol

import msgspec

from helixflow.config import LimitsConfig
from helixflow.core_rs import Call, CoreError
from helixflow.gateway.auth import Principal
from helixflow.gateway.capture import Capture
from helixflow.gateway.http import Request
from helixflow.ledger.record import CANCELLED, TEXT_MAX, UNKNOWN, Begin, new_id
from helixflow.ledger.spool import Spool
from helixflow.limits.limiter import Limiter, Reservation

UNTOUCHED = frozenset({"queue_full", "unavailable", "draining"})
"""Refusals of a pool that has not looked at the request: it does not count against requests per minute."""


class Prices:
    """Nano currency units per token, by model: (prompt, cached, completion)."""

    def __init__(self) -> None:
        self._prices: dict[str, tuple[int, int, int]] = {}
        self.currency = ""

    def replace(self, message: Any) -> None:
        """Takes over a `helixflow.v1.PriceList`."""
        self.currency = message.currency
        self._prices = {price.model: (price.prompt, price.cached, price.completion) for price in message.prices}

    def of(self, model: str) -> tuple[int, int, int] | None:
        """The price of a model; None when it has none."""
        return self._prices.get(model)


class Admission(Protocol):
    """One admitted request."""

    exact: bool
    """The size of the prompt must be told as soon as it is known: a limit that counts it is near."""

    async def prompt(self, tokens: int) -> None:
        """The prompt's size, in tokens. Raises RateLimitExceeded or InsufficientQuota: the request must end then."""

    def capture(self) -> Capture | None:
        """Takes the texts of the request; None when they are not kept."""

    def end(
        self,
        status: int,
        call: Call | None,
        error: CoreError | None = None,
        finish: str = "",
        *,
        nameless: bool = False,
    ) -> None:
        """Settles and writes the end. `finish`: the reason when it is not the call's.

        `nameless`: its model's name may be anybody's invention; the row shall not have it.
        """


class Accountant(Protocol):
    """Admits requests."""

    async def admit(self, request: Request, model: str, prompt: int = 0, completion: int = 0) -> Admission:
        """`prompt`, `completion`: tokens to reserve; `completion` negative: so many choices without a maximum.

        Raises RateLimitExceeded, InsufficientQuota or LedgerFull.
        """


class Unmetered:
    """A gateway without accounts: nothing is limited, nothing is written."""

    exact = False

    async def admit(self, request: Request, model: str, prompt: int = 0, completion: int = 0) -> Admission:  # noqa: ARG002
        """Lets everything in."""
        return self

    async def prompt(self, tokens: int) -> None:
        """Nobody counts."""

    def capture(self) -> Capture | None:
        """Nothing is kept."""
        return None

    def end(
        self,
        status: int,
        call: Call | None,
        error: CoreError | None = None,
        finish: str = "",
        *,
        nameless: bool = False,
    ) -> None:
        """Nothing to settle."""


class Metered:
    """Limits and ledger of one worker."""

    def __init__(self, limiter: Limiter, spool: Spool, prices: Prices, options: LimitsConfig, gateway: bytes) -> None:
        """`gateway`: 16 bytes that tell this worker from others."""
        self._limiter = limiter
        self._prices = prices
        self._default_completion = options.default_max_tokens
        self.spool = spool
        self.gateway = gateway
        self.counts: Counter[str] = Counter()
        """Since the start: requests, refused, prompt_tokens, cached_tokens, completion_tokens, and one
        `refused.<code>`, `finish.<reason>` and `error.<code>` each."""

    async def admit(self, request: Request, model: str, prompt: int = 0, completion: int = 0) -> Admission:
        """Reserves, then begins the ledger's row: from here on it is written whatever happens.

        See `Accountant.admit`.
        """
        principal: Principal = request.caller
        choices = max(0, -completion)
        if choices:
            completion = self.unbounded(principal, prompt, choices)
        price = self._prices.of(model)
        cost = prompt * price[0] + completion * price[2] if price else 0
        reservation = self._limiter.try_reserve(principal.limits, prompt + completion, cost)
        try:
            if reservation is None:
                reservation = await self._limiter.reserve(principal.limits, prompt + completion, cost)
            admitted = Admitted(self, request, model, (completion, choices), price, reservation)
            self.spool.begin(admitted.begin)
        except CoreError as error:
            self.counts["refused"] += 1
            self.counts["refused." + error.code] += 1
            request.extra_headers += self._limiter.headers(principal.limits)
            _give_back(reservation)
            raise
        except BaseException:
            _give_back(reservation)
            raise
        request.extra_headers += reservation.headers()
        self.counts["requests"] += 1
        return admitted

    def unbounded(self, principal: Principal, prompt: int, choices: int) -> int:
        """Tokens to reserve for choices without a maximum: no more than the limits could ever let in."""
        wanted = choices * self._default_completion
        if principal.token_ceiling is None:
            return wanted
        return max(choices, min(wanted, principal.token_ceiling - prompt))


def _give_back(reservation: Reservation | None) -> None:
    if reservation is not None:
        reservation.cancel()


class Admitted:
    """One request between its admission and its end."""

    __slots__ = (
        "_captured",
        "_choices",
        "_completion",
        "_ended",
        "_metered",
        "_price",
        "_request",
        "_reservation",
        "begin",
        "exact",
    )

    def __init__(
        self,
        metered: Metered,
        request: Request,
        model: str,
        completion: tuple[int, int],
        price: tuple[int, int, int] | None,
        reservation: Reservation,
    ) -> None:
        """`completion`: tokens reserved, and the choices that they stand for when those have no maximum."""
        at_us = time.time_ns() // 1000
        organisation, user, key = request.caller.ids
        self._metered = metered
        self._request = request
        self._completion, self._choices = completion
        self._price = price
        self._reservation = reservation
        self._captured: Capture | None = None
        self._ended = False
        self.exact = bool(self._completion) and reservation.tight
        self.begin = Begin(
            id=new_id(at_us),
            at_us=at_us,
            organisation=organisation,
            user=user,
            key=key,
            model=model[:TEXT_MAX],
            endpoint=request.route,
            client=request.client,
            request_id=request.id,
            gateway=metered.gateway,
        )

    async def prompt(self, tokens: int) -> None:
        """Reserves for the prompt as it is instead of as it was guessed."""
        if self._choices:
            wanted = self._metered.unbounded(self._request.caller, tokens, self._choices)
            self._completion = min(self._completion, wanted)
        price = self._price
        cost = tokens * price[0] + self._completion * price[2] if price else 0
        await self._reservation.adjust(tokens + self._completion, cost)

    def capture(self) -> Capture | None:
        """Takes the texts when the organisation keeps them."""
        policy = self._request.caller.content
        if policy is not None and self._captured is None:
            self._captured = Capture(policy)
        return self._captured

    def end(
        self,
        status: int,
        call: Call | None,
        error: CoreError | None = None,
        finish: str = "",
        *,
        nameless: bool = False,
    ) -> None:
        """Settles for what was used and writes the ledger's row, once. See `Admission.end`."""
        if self._ended:
            return
        self._ended = True
        code = error.code if error is not None else (call.error_code if call is not None else None) or ""
        if code == CANCELLED and error is None:
            code = ""  # an end of its own, no error
        usage = call.usage if call is not None else None  # none without a slot: nothing has read its prompt
        prompt = cached = completion = queue_us = first_us = 0
        if usage is not None:
            prompt, cached, completion = usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
            queue_us, first_us = usage.queue_us, usage.first_token_us
        finish = finish or (call.finish_reason if call is not None else None) or ("error" if call is not None else "")
        cost = 0
        if self._price is not None:
            cost = (prompt - cached) * self._price[0] + cached * self._price[1] + completion * self._price[2]
        if usage is None and code in UNTOUCHED:
            self._reservation.cancel()
        else:
            self._reservation.settle(prompt + completion, cost)
        row = (msgspec.structs.replace(self.begin, model=UNKNOWN) if nameless else self.begin).row(
            finish=finish,
            error=code,
            status=status,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
            queue_us=queue_us,
            first_token_us=first_us,
            total_us=int((time.perf_counter() - self._request.started) * 1_000_000),
            cost=cost,
        )
        captured = self._captured
        self._metered.spool.end(row, captured.content(self.begin, self._request.body) if captured is not None else None)
        counts = self._metered.counts
        counts["prompt_tokens"] += prompt
        counts["cached_tokens"] += cached
        counts["completion_tokens"] += completion
        counts["finish." + finish] += 1
        if code:
            counts["error." + code] += 1
