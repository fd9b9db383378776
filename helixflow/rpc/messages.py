"""The messages of `core_rs/proto`, built from the extension's descriptors, and their JSON-able form.

`messages.VerifyRequest(...)` works for every message of the package `helixflow.v1`.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, ServiceDescriptor

from helixflow import core_rs
from helixflow.core_rs import InvalidRequest

PACKAGE = "helixflow.v1"
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = {
    FieldDescriptor.CPPTYPE_FLOAT: (2 - 2**-23) * 2.0**127,
    FieldDescriptor.CPPTYPE_DOUBLE: sys.float_info.max,
}
"""The largest finite value of each kind."""


def _load() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(core_rs.descriptors()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _load()


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service: its path on the wire, its messages, and whether the answer is a stream."""

    path: str
    request: Any
    response: Any
    streaming: bool


@functools.cache
def service(name: str) -> dict[str, Method]:
    """The methods of a service (`AuthService`), as `AuthService/Verify`. Raises KeyError for an unknown name."""
    found: ServiceDescriptor = _POOL.FindServiceByName(f"{PACKAGE}.{name}")
    return {
        f"{name}/{method.name}": Method(
            f"/{found.full_name}/{method.name}",
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
            method.server_streaming,
        )
        for method in found.methods
    }


@functools.cache
def method(name: str) -> Method:
    """A method by its name, `AuthService/Verify`. Raises KeyError for an unknown one."""
    return service(name.partition("/")[0])[name]


def __getattr__(name: str) -> Any:
    try:
        found = _POOL.FindMessageTypeByName(f"{PACKAGE}.{name}")
    except KeyError:
        raise AttributeError(f"no message {name!r} in {PACKAGE}") from None
    made = message_factory.GetMessageClass(found)
    globals()[name] = made  # the next use finds it without this function
    return made


# --- out ------------------------------------------------------------------------


def plain(message: Any) -> dict[str, Any]:
    """A message as JSON-able values.

    Numbers stay numbers, enums become lower-case names without their prefix, bytes hex. Fields that can be absent
    (`optional`, messages, members of a oneof) and are, are left out; all others are there.
    """
    out = {}
    for name, presence, convert in _writers(message.DESCRIPTOR):
        if not presence or message.HasField(name):
            out[name] = convert(getattr(message, name))
    return out


def _same(value: Any) -> Any:
    return value


def _hex(value: bytes) -> str:
    return value.hex()


@functools.cache
def _writers(descriptor: Descriptor) -> tuple[tuple[str, bool, Callable[[Any], Any]], ...]:
    return tuple((field.name, field.has_presence, _writer(field)) for field in descriptor.fields)


def _writer(field: FieldDescriptor) -> Callable[[Any], Any]:
    if field.message_type is not None:
        convert: Callable[[Any], Any] = plain
    elif field.enum_type is not None:
        convert = {number: name for name, number in _enum(field.enum_type).items()}.__getitem__
    else:
        convert = _hex if field.type == FieldDescriptor.TYPE_BYTES else _same
    if field.is_repeated:
        return lambda values: [convert(value) for value in values]
    return convert


@functools.cache
def _enum(enum: EnumDescriptor) -> dict[str, int]:
    """The values by their lower-case names without the prefix that proto style asks for."""
    prefix = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in enum.name).lstrip("_") + "_"
    return {value.name.lower().removeprefix(prefix): value.number for value in enum.values}


# --- in -------------------------------------------------------------------------


def parse(cls: Any, data: Mapping[str, Any]) -> Any:
    """The message of such values: what `plain` gives, with or without what is empty.

    Raises InvalidRequest, whose `param` is the path of the field, for unknown fields, wrong types, numbers out of
    range, and two members of one oneof.
    """
    return _message(cls, data, "")


def _wrong(path: str, problem: str) -> InvalidRequest:
    error = InvalidRequest(f"{path} {problem}" if path else f"the value {problem}")
    error.param = path or None
    return error


def _message(cls: Any, data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(path, f"must be an object, not {_kind(data)}")
    fields = cls.DESCRIPTOR.fields_by_name
    values: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    for name, value in data.items():
        below = f"{path}.{name}" if path else str(name)
        field = fields.get(name) if isinstance(name, str) else None
        if field is None:
            raise _wrong(below, f"is not a field of this object; it has {', '.join(sorted(fields)) or 'none'}")
        if field.containing_oneof is not None:
            other = chosen.setdefault(field.containing_oneof.name, name)
            if other != name:
                raise _wrong(below, f"cannot stand beside {other}")
        values[name] = _repeated(field, value, below) if field.is_repeated else _single(field, value, below)
    return cls(**values)


def _repeated(field: FieldDescriptor, value: Any, path: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(path, f"must be a list, not {_kind(value)}")
    return [_single(field, item, f"{path}[{index}]") for index, item in enumerate(value)]


def _single(field: FieldDescriptor, value: Any, path: str) -> Any:
    if field.message_type is not None:
        return _message(message_factory.GetMessageClass(field.message_type), value, path)
    if field.enum_type is not None:
        return _of_enum(field.enum_type, value, path)
    if field.cpp_type in _INTEGERS:
        return _integer(value, path, *_INTEGERS[field.cpp_type])
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return _of_type(value, bool, "a boolean", path)
    if field.cpp_type in _FLOATS:
        return _number(value, path, _FLOATS[field.cpp_type])
    return _bytes(value, path) if field.type == FieldDescriptor.TYPE_BYTES else _text(value, path)


def _of_enum(enum: EnumDescriptor, value: Any, path: str) -> int:
    known = _enum(enum)
    number = known.get(value) if isinstance(value, str) else None
    if number is None:
        raise _wrong(path, f"must be one of {', '.join(known)}")
    return number


def _integer(value: Any, path: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(path, f"must be an integer, not {_kind(value)}")
    if not least <= value <= most:
        raise _wrong(path, f"must be between {least} and {most}")
    return value


def _number(value: Any, path: str, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(path, f"must be a number, not {_kind(value)}")
    if not -most <= value <= most:  # nor may it be NaN, which is between nothing
        raise _wrong(path, f"must be between {-most} and {most}")
    return float(value)


def _of_type(value: Any, kind: type, name: str, path: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong(path, f"must be {name}, not {_kind(value)}")
    return value


def _text(value: Any, path: str) -> str:
    text: str = _of_type(value, str, "a string", path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _wrong(path, "is not valid Unicode: it has half of a surrogate pair") from None
    return text


def _bytes(value: Any, path: str) -> bytes:
    text: str = _of_type(value, str, "a string of hexadecimal digits", path)
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise _wrong(path, "must be a string of hexadecimal digits, two for each byte") from None


def _kind(value: Any) -> str:
    """The type of a value in the words of JSON."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
