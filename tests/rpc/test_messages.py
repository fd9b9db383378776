"""Messages and their JSON-able form."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core_rs import InvalidRequest
from helixflow.rpc import messages


def test_messages_are_found_by_name() -> None:
    assert messages.VerifyRequest(access_token="t").access_token == "t"
    assert messages.VerifyRequest is messages.VerifyRequest
    with pytest.raises(AttributeError, match="Nothing"):
        _ = messages.Nothing


def test_services_and_methods() -> None:
    found = messages.method("AuthService/Watch")
    assert (found.path, found.streaming) == ("/helixflow.v1.AuthService/Watch", True)
    assert found.request is messages.WatchEventsRequest
    assert not messages.method("AdminService/CreateUser").streaming
    for name in ("AuthService/Nothing", "Nothing/Verify", "AuthService"):
        with pytest.raises(KeyError):
            messages.method(name)


def test_plain_leaves_out_what_is_absent_only() -> None:
    principal = messages.Principal(kind=1, limits=[messages.SubjectLimits(subject="key:1", limits={})])
    principal.limits[0].limits.tokens_per_day = 2**63
    told = messages.plain(principal)
    assert told["kind"] == "key"
    assert told["limits"] == [{"subject": "key:1", "limits": {"tokens_per_day": 2**63}}]
    assert (told["models"], told["role"], told["expires_at"]) == ([], "", 0)
    assert "content" not in told
    assert messages.plain(messages.VerifyRequest()) == {}
    assert messages.plain(messages.VerifyRequest(key_digest=b"\x00\xff")) == {"key_digest": "00ff"}
    assert messages.plain(messages.LeaseItem(metric=2))["metric"] == "tokens_per_minute"
    assert messages.plain(messages.Event(resync=False)) == {"resync": False}


@pytest.mark.parametrize(
    ("name", "data", "param", "problem"),
    [
        ("LoginRequest", {"mail": "x"}, "mail", "not a field"),
        ("LoginRequest", {1: "x"}, "1", "not a field"),
        ("LoginRequest", {"email": 5}, "email", "a string, not a number"),
        ("LoginRequest", {"email": None}, "email", "a string, not null"),
        ("LoginRequest", {"email": "\ud800"}, "email", "surrogate"),
        ("LoginRequest", [], None, "an object, not a list"),
        ("ContentPolicy", {"store": 1}, "store", "a boolean, not a number"),
        ("ContentPolicy", {"redact": "x"}, "redact", "a list, not a string"),
        ("ContentPolicy", {"redact": ["x", {}]}, "redact[1]", "a string, not an object"),
        ("ContentPolicy", {"retention_days": True}, "retention_days", "an integer, not a boolean"),
        ("ContentPolicy", {"retention_days": 1.0}, "retention_days", "an integer"),
        ("ContentPolicy", {"retention_days": -1}, "retention_days", "between 0 and 4294967295"),
        ("ContentPolicy", {"retention_days": 2**32}, "retention_days", "between"),
        ("CreateKeyRequest", {"limits": {"tokens_per_day": 2**64}}, "limits.tokens_per_day", "between"),
        ("CreateKeyRequest", {"limits": 5}, "limits", "an object"),
        ("LeaseRequest", {"items": [{}, {"metric": "nonsense"}]}, "items[1].metric", "one of unspecified, requests"),
        ("LeaseRequest", {"items": [{"metric": 1}]}, "items[0].metric", "one of"),
        ("VerifyRequest", {"key_digest": "0g"}, "key_digest", "hexadecimal"),
        ("VerifyRequest", {"key_digest": 5}, "key_digest", "hexadecimal"),
        ("VerifyRequest", {"key_digest": "00", "access_token": "t"}, "access_token", "beside key_digest"),
        ("Sampling", {"temperature": "warm"}, "temperature", "a number"),
        ("Sampling", {"temperature": float("nan")}, "temperature", "between"),
        ("Sampling", {"temperature": 1e39}, "temperature", "between"),
        ("Sampling", {"temperature": 10**400}, "temperature", "between"),
    ],
)
def test_parse_refuses(name: str, data: Any, param: str | None, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        messages.parse(getattr(messages, name), data)
    assert caught.value.param == param


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return _messages(message_factory.GetMessageClass(field.message_type))
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_UINT32:
            return st.integers(0, 2**32 - 1)
        case FieldDescriptor.CPPTYPE_UINT64:
            return st.integers(0, 2**64 - 1)
        case FieldDescriptor.CPPTYPE_FLOAT:
            # The sum has no negative zero: it is no default, and looks like one.
            return st.floats(width=32, allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=8)
    return st.text(max_size=8)


def _messages(cls: Any) -> st.SearchStrategy[Any]:
    """Any value of a message: fields set or not, one member of a oneof at most."""
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for field in cls.DESCRIPTOR.fields:
        if field.message_type is cls.DESCRIPTOR:
            continue  # a message in itself: once is enough
        values = _values(field)
        optional[field.name] = st.lists(values, max_size=3) if field.is_repeated else values
    oneofs = [[field.name for field in oneof.fields] for oneof in cls.DESCRIPTOR.oneofs]

    def build(values: dict[str, Any]) -> Any:
        for names in oneofs:
            for name in [name for name in names if name in values][1:]:
                del values[name]
        return cls(**values)

    return st.fixed_dictionaries({}, optional=optional).map(build)


NAMES = (
    "Principal",
    "VerifyRequest",
    "Event",
    "LeaseRequest",
    "CreateKeyRequest",
    "UpdateOrganisationRequest",
    "Sampling",
)


@given(st.sampled_from(NAMES).flatmap(lambda name: _messages(getattr(messages, name))))
def test_any_message_survives_json(message: Any) -> None:
    data = json.loads(json.dumps(messages.plain(message)))
    assert messages.parse(type(message), data) == message
    # What is empty may be left out.
    short = {
        name: value for name, value in data.items() if value not in ("", 0, [], "unspecified") or _tells(message, name)
    }
    assert messages.parse(type(message), short) == message


def _tells(message: Any, name: str) -> bool:
    """Whether an empty value of this field says something."""
    presence: bool = message.DESCRIPTOR.fields_by_name[name].has_presence
    return presence


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(NAMES), st.data())
def test_anything_parses_or_is_refused_with_its_place(name: str, data: st.DataObject) -> None:
    cls = getattr(messages, name)
    fields = st.sampled_from([field.name for field in cls.DESCRIPTOR.fields]) | st.text(max_size=4)
    value: Any = data.draw(st.dictionaries(fields, JSON, max_size=4) | JSON)
    try:
        parsed = messages.parse(cls, value)
    except InvalidRequest as error:
        assert error.param is None or isinstance(value, Mapping)  # noqa: PT017 (both ways are right)
    else:
        assert set(messages.plain(parsed)) >= set(value)
