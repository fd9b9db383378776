"""AdminService: limits, prices, usage, the audit log. Counting and summing up are the limiter's and the ledger's."""

from typing import Any
from uuid import UUID

from helixflow.auth import api_keys, audit, fields, organisations, roles, users
from helixflow.auth.actors import Actor, permit
from helixflow.auth.desk import Desk, Handler, filled
from helixflow.core_rs import NotFound, PermissionDenied
from helixflow.ledger import content, query
from helixflow.ledger.proof import Proof
from helixflow.limits import settings
from helixflow.limits.model import Limits, Price, SubjectLimits
from helixflow.limits.remote import price_list
from helixflow.refusals import refusal
from helixflow.rpc import messages
from helixflow.rpc.server import Caller


class UsageMethods:
    """Answers the methods about what may be used and what was."""

    def __init__(self, desk: Desk, proof: Proof, currency: str) -> None:
        """`currency`: name of what prices are in."""
        self._desk = desk
        self._proof = proof
        self._currency = currency

    def methods(self) -> dict[str, Handler]:
        """By name."""
        return {
            "SetLimits": self._set_limits,
            "ListLimits": self._list_limits,
            "SetPrice": self._set_price,
            "DeletePrice": self._delete_price,
            "ListPrices": self._list_prices,
            "QueryUsage": self._query_usage,
            "ListRequests": self._list_requests,
            "GetTexts": self._get_texts,
            "ListAudit": self._list_audit,
            "VerifyLedger": self._verify_ledger,
            "AnchorLedger": self._anchor_ledger,
        }

    async def _set_limits(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("SetLimits", request, caller) as (connection, actor):
            subject, limits = settings.check_subject(request.subject), Limits.of(request.limits)
            organisation, own = await _limited(connection, actor, subject)
            before, by = await settings.found(connection, subject)
            setter = roles.Setter(by.rank or "", own=by.user_id is not None and actor.owns(by.user_id))
            permit(roles.sets_limits(actor.power, setter, before, limits, own=own), "limits")
            # Whoever may not lift what stands there leaves it whose it was, when they tighten it.
            kept = by if roles.sets_limits(actor.power, setter, before, Limits(), own=own) else None
            result = await set_limits(connection, actor, subject, organisation, limits, kept)
        return result.message()

    async def _list_limits(self, request: Any, caller: Caller) -> Any:
        rows = fields.page(request.limit)
        after = settings.check_subject(request.after) if request.after else ""
        async with self._desk.act("ListLimits", request, caller) as (connection, actor):
            scope = await organisations.scope(connection, actor, request.organisation)
            data, following = await settings.limits_of(connection, scope, after, rows)
        return messages.AllLimits(data=[item.message() for item in data], next=following)

    async def _set_price(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("SetPrice", request, caller) as (connection, actor):
            price = Price.whole(request.price)
            result = await settings.set_price(connection, price)
            detail = {"prompt": price.prompt, "cached": price.cached, "completion": price.completion}
            await audit.record(connection, actor, "price.set", price.model, actor.organisation_id, detail)
        return result.message()

    async def _delete_price(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("DeletePrice", request, caller) as (connection, actor):
            model = fields.text(request.model, "model", settings.MAX_MODEL)
            if not await settings.delete_price(connection, model):
                raise refusal(NotFound, f"the model {model!r} has no price", "model")
            await audit.record(connection, actor, "price.delete", model, actor.organisation_id)
        return messages.Deleted(id=model)

    async def _list_prices(self, request: Any, caller: Caller) -> Any:
        # All on one page: there are no more prices than models.
        async with self._desk.act("ListPrices", request, caller) as (connection, _actor):
            found, _ = await settings.prices(connection)
        return price_list(found, self._currency)

    async def _query_usage(self, request: Any, caller: Caller) -> Any:
        first, last = query.period(getattr(request, "from"), request.to)
        key = fields.uuid(request.key, "key") if request.key else None
        model = fields.text(request.model, "model", fields.LONGEST_ITEM) if request.model else ""
        async with self._desk.act("QueryUsage", request, caller) as (connection, actor):
            rows = await query.usage(
                connection,
                first=first,
                last=last,
                group_by=list(request.group_by),
                organisation_id=await organisations.scope(connection, actor, request.organisation),
                key_id=_used_with(actor, key),
                user_id=await _used_by(connection, actor, request.user),
                model=model,
            )
        return messages.UsageReport(currency=self._currency, data=[filled(messages.UsageRow, row) for row in rows])

    async def _list_requests(self, request: Any, caller: Caller) -> Any:
        first, last = query.period(getattr(request, "from"), request.to)
        limit = fields.page(request.limit)
        async with self._desk.act("ListRequests", request, caller) as (connection, actor):
            scope = await organisations.scope(connection, actor, request.organisation)
            rows, following = await query.requests(
                connection, first=first, last=last, organisation_id=scope, after=request.after, limit=limit
            )
        return messages.LedgerRows(data=[filled(messages.LedgerRow, row) for row in rows], next=following)

    async def _get_texts(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("GetTexts", request, caller) as (connection, actor):
            number = fields.uuid(request.request, "request")
            found = await content.find(connection, number, actor.organisation_id)
            if found is None:
                raise refusal(NotFound, "no texts are kept of this request", "request")
            texts, organisation = found
            await audit.record(connection, actor, "texts.read", str(number), organisation)
        return filled(messages.Texts, texts)

    async def _list_audit(self, request: Any, caller: Caller) -> Any:
        first, last = fields.days(getattr(request, "from"), request.to)
        limit, before = fields.page(request.limit), fields.number_after(request.after)
        async with self._desk.act("ListAudit", request, caller) as (connection, actor):
            scope = await organisations.scope(connection, actor, request.organisation)
            found = await audit.entries(
                connection, scope, first, last, limit + 1, before, own_names_only=not actor.installation
            )
        following = found[limit - 1].id if len(found) > limit else ""
        return messages.AuditRows(data=[filled(messages.AuditRow, row) for row in found[:limit]], next=following)

    async def _verify_ledger(self, request: Any, caller: Caller) -> Any:
        first, last = fields.days(getattr(request, "from"), request.to)
        async with self._desk.act("VerifyLedger", request, caller):
            pass
        # Each day is a transaction of its own.
        report = await self._proof.verify(first, last, request.anchor)
        return messages.VerifyLedgerReply(
            days=report.days,
            rows=report.rows,
            faults=[filled(messages.LedgerFault, fault) for fault in report.faults],
            entries=report.entries,
            dropped=report.dropped,
            lost=report.lost,
        )

    async def _anchor_ledger(self, request: Any, caller: Caller) -> Any:
        async with self._desk.act("AnchorLedger", request, caller):
            pass
        return messages.Anchor(anchor=await self._proof.anchor())


async def set_limits(
    connection: Any,
    actor: Actor,
    subject: str,
    organisation: UUID,
    limits: Limits,
    by: settings.Setter | None = None,
) -> SubjectLimits:
    """Sets the limits of a subject of an organisation, and writes it down. `by`: whose they are, if not the actor's.

    Raises InvalidRequest.
    """
    rank = roles.OPERATOR if actor.operator else actor.role.word
    result = await settings.set_limits(connection, subject, limits, by or settings.Setter(actor.user_id, rank))
    detail = {metric.name.lower(): limit for metric, limit in limits}
    await audit.record(connection, actor, "limits.set", subject, organisation, detail)
    return result


async def _limited(connection: Any, actor: Actor, subject: str) -> tuple[UUID, bool]:
    """The organisation of a subject whose limits the actor may set, locked, and whether it is the actor's own.

    What an organisation may use is decided above it: its own admins divide it up. Raises NotFound or PermissionDenied.
    """
    kind, _, name = subject.partition(":")
    if kind == "organisation":
        if not actor.installation or actor.power.by_key:
            raise refusal(
                PermissionDenied, "limits of organisations are left to the operator and the owners of the first one"
            )
        found = await organisations.find(connection, name, "subject", lock=True)
        return found["id"], False
    if kind == "key":
        row, facts = await api_keys.target(connection, actor, name, "subject")
        return row["organisation_id"], facts.own
    row = await users.target(connection, actor, name, "subject")
    return row["organisation_id"], actor.owns(row["id"])


def _used_with(actor: Actor, key: UUID | None) -> UUID | None:
    """The key whose usage is asked for; None: any. Raises PermissionDenied for another one than a key may see."""
    own = actor.only_key
    if own is not None and key not in (None, own):
        raise refusal(PermissionDenied, "this API key may see its own usage only", "key")
    return own or key


async def _used_by(connection: Any, actor: Actor, user: str) -> UUID | None:
    """Whose usage is asked for; None: everybody's. Raises PermissionDenied for a member who asks for another's."""
    own = actor.user_id if actor.only_key else api_keys.own_only(actor)
    if not user:
        return own
    # By UUID also of somebody who was removed: the ledger remembers.
    found: UUID = fields.as_uuid(user) or (await users.find(connection, actor, user))["id"]
    if own is not None and found != own:
        raise refusal(PermissionDenied, "you may see your own usage only", "user")
    return found
