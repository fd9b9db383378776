"""/admin/v1: the auth-service's AdminService as HTTP and JSON.

Path, query and body become the fields of one message; who acts comes from the credential alone, which goes with the
call: the auth-service checks it again and decides what each may do.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from helixflow.core_rs import CoreError, InvalidRequest, PermissionDenied
from helixflow.gateway.accounts import NO_STORE, Call, ask, read_object
from helixflow.gateway.auth import presented
from helixflow.gateway.credentials import passed_on
from helixflow.gateway.http import Request
from helixflow.gateway.routes import Policy, Route, parameters
from helixflow.refusals import message_of, refusal
from helixflow.rpc import messages

MAX_BODY = 64 * 1024
"""Largest body (bytes): an organisation's redaction patterns are the longest."""
TIMEOUT_S = 5.0
QUERY_TIMEOUT_S = 30.0
"""For questions that read many rows."""
VERIFY_TIMEOUT_S = 300.0
"""For recomputing the ledger's hash chains."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One act: its route, and how a request becomes the message of the call.

    `query`: fields that the query string may set. `inner`: the field of the message that the body is. `lists`:
    fields that are arrays here and `StringList` in the message.
    """

    method: str
    path: str
    call: str
    message: str
    query: tuple[str, ...] = ()
    inner: str = ""
    lists: tuple[str, ...] = ()
    status: int = 200
    timeout_s: float = TIMEOUT_S


PAGE = ("organisation", "limit", "after")
DAYS = ("from", "to")
USAGE = ("organisation", *DAYS, "group_by", "key", "user", "model")

ENDPOINTS = (
    Endpoint("GET", "/admin/v1/organisations", "ListOrganisations", "ListRequest", PAGE),
    Endpoint("POST", "/admin/v1/organisations", "CreateOrganisation", "CreateOrganisationRequest", status=201),
    Endpoint(
        "PATCH",
        "/admin/v1/organisations/{organisation}",
        "UpdateOrganisation",
        "UpdateOrganisationRequest",
        lists=("domains",),
    ),
    Endpoint("PUT", "/admin/v1/organisations/{organisation}/second-factor", "RequireFactor", "RequireFactorRequest"),
    Endpoint("GET", "/admin/v1/users", "ListUsers", "ListRequest", PAGE),
    Endpoint("POST", "/admin/v1/users", "CreateUser", "CreateUserRequest", status=201),
    Endpoint("PATCH", "/admin/v1/users/{user}", "UpdateUser", "UpdateUserRequest"),
    Endpoint("DELETE", "/admin/v1/users/{user}", "DeleteUser", "UserRequest"),
    Endpoint("POST", "/admin/v1/users/{user}/password", "ResetPassword", "ResetPasswordRequest"),
    Endpoint("DELETE", "/admin/v1/users/{user}/second-factor", "ResetFactor", "UserRequest"),
    Endpoint("DELETE", "/admin/v1/users/{user}/sessions", "EndSessions", "UserRequest"),
    Endpoint("POST", "/admin/v1/users/{user}/unlock", "UnlockUser", "UserRequest"),
    Endpoint("GET", "/admin/v1/sessions", "ListSessions", "SessionsRequest", ("user", "limit", "after")),
    Endpoint("DELETE", "/admin/v1/sessions/{session}", "EndSession", "SessionRequest"),
    Endpoint("GET", "/admin/v1/keys", "ListKeys", "ListRequest", PAGE),
    Endpoint("POST", "/admin/v1/keys", "CreateKey", "CreateKeyRequest", status=201),
    Endpoint("PATCH", "/admin/v1/keys/{key}", "UpdateKey", "UpdateKeyRequest", lists=("models", "endpoints")),
    Endpoint("DELETE", "/admin/v1/keys/{key}", "RevokeKey", "KeyRequest"),
    Endpoint("POST", "/admin/v1/keys/{key}/rotate", "RotateKey", "RotateKeyRequest", status=201),
    Endpoint("GET", "/admin/v1/limits", "ListLimits", "ListRequest", PAGE),
    Endpoint("PUT", "/admin/v1/limits/{subject}", "SetLimits", "SetLimitsRequest", inner="limits"),
    Endpoint("GET", "/admin/v1/prices", "ListPrices", "ListRequest", PAGE),
    Endpoint("PUT", "/admin/v1/prices/{id}", "SetPrice", "SetPriceRequest", inner="price"),
    Endpoint("DELETE", "/admin/v1/prices/{id}", "DeletePrice", "PriceRequest"),
    Endpoint("GET", "/admin/v1/usage", "QueryUsage", "UsageRequest", USAGE, timeout_s=QUERY_TIMEOUT_S),
    Endpoint("GET", "/admin/v1/requests", "ListRequests", "RequestsRequest", (*PAGE, *DAYS), timeout_s=QUERY_TIMEOUT_S),
    Endpoint("GET", "/admin/v1/requests/{request}/texts", "GetTexts", "TextsRequest"),
    Endpoint("GET", "/admin/v1/audit", "ListAudit", "AuditRequest", (*PAGE, *DAYS), timeout_s=QUERY_TIMEOUT_S),
    Endpoint("GET", "/admin/v1/audit/verify", "VerifyLedger", "VerifyLedgerRequest", DAYS, timeout_s=VERIFY_TIMEOUT_S),
    Endpoint("GET", "/admin/v1/audit/anchor", "AnchorLedger", "AnchorLedgerRequest", timeout_s=QUERY_TIMEOUT_S),
)


class Admin:
    """The handlers of /admin/v1."""

    def __init__(self, call: Call) -> None:
        """`call`: of a client that reaches the auth-service."""
        self._call = call

    def routes(self) -> list[Route]:
        """Every route. All of them need an account."""
        return [
            Route(endpoint.method, endpoint.path, _Handler(self._call, endpoint), Policy.ACCOUNT)
            for endpoint in ENDPOINTS
        ]


class _Handler:
    """Answers the requests of one endpoint."""

    def __init__(self, call: Call, endpoint: Endpoint) -> None:
        self._call = call
        self._endpoint = endpoint
        self._message: Any = getattr(messages, endpoint.message)

    async def __call__(self, request: Request) -> None:
        """Raises what the parts of the request, or the auth-service, are refused with."""
        request.extra_headers.append(NO_STORE)
        endpoint = self._endpoint
        request.facts["call"] = endpoint.call
        path = {"model" if name == "id" else name: value for name, value in parameters(endpoint.path, request).items()}
        actor = _actor(request)
        fields = _query(request, endpoint.query) | path
        if endpoint.method != "GET":
            body = await read_object(request, MAX_BODY)
            fields = _fields(endpoint, path, body)
        try:
            message = messages.parse(self._message, fields)
            message.actor.CopyFrom(actor)
            answer = await ask(self._call, f"AdminService/{endpoint.call}", message, request, endpoint.timeout_s)
        except CoreError as error:
            raise _outward(error, endpoint) from None
        await request.respond(endpoint.status, orjson.dumps(messages.plain(answer)))


def _actor(request: Request) -> Any:
    """Who acts: the caller's own credential. Raises PermissionDenied for a caller without an account."""
    if not request.caller.organisation_id:
        raise refusal(PermissionDenied, "this credential belongs to no account; send a key or an access token of one")
    shown = passed_on(presented(request))
    return messages.Actor(address=request.client, request_id=request.id, **shown)


def _query(request: Request, allowed: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the query string. Raises InvalidRequest for one that is unknown, or that stands there twice."""
    fields: dict[str, Any] = {}
    for name, values in request.query.items():
        if name not in allowed:
            shown = name[:100]
            known = f"; there are {', '.join(allowed)}" if allowed else ""
            raise refusal(InvalidRequest, f"{shown}: is not a query parameter here{known}", shown)
        if len(values) > 1:
            raise refusal(InvalidRequest, f"{name}: stands twice in the query string", name)
        fields[name] = _value(name, values[0])
    return fields


def _value(name: str, text: str) -> Any:
    if name == "limit":
        if not (text.isascii() and text.isdecimal() and len(text) <= 9):
            raise refusal(InvalidRequest, "limit: expected a whole number", name)
        return int(text)
    if name == "group_by":
        return text.split(",") if text else []
    return text


def _fields(endpoint: Endpoint, path: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
    """The fields of path and body. Raises InvalidRequest for what only the path, or nobody, may say."""
    for name in ("actor", *path):
        if name in body:
            where = "stands in the path" if name in path else "is not a parameter here"
            raise refusal(InvalidRequest, f"{name}: {where}; leave it out of the body", name)
    for name in endpoint.lists:
        if name in body:
            if not isinstance(body[name], list):
                raise refusal(InvalidRequest, f"{name}: expected an array of strings", name)
            body[name] = {"values": body[name]}
    if endpoint.inner == "price":
        return {"price": body | path}
    return {endpoint.inner: body, **path} if endpoint.inner else body | path


def _outward(error: CoreError, endpoint: Endpoint) -> CoreError:
    """The refusal with the parameter named as the client knows it, not as the message does."""
    param = error.param
    if param is None:
        return error
    public = param.removeprefix(endpoint.inner + ".") if endpoint.inner else param
    for name in endpoint.lists:
        public = public.replace(f"{name}.values", name)
    # A field that only the gateway sets is none of the client's.
    message = message_of(error).replace("it has actor, ", "it has ").replace(param, public)
    renamed = refusal(type(error), message, public)
    renamed.retry_after_s = error.retry_after_s
    return renamed
