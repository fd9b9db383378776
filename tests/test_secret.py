"""Secrets show themselves to nobody."""

import copy
import dataclasses
import importlib
import json
import pickle
import pkgutil
from dataclasses import dataclass

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import helixflow
from helixflow import config
from helixflow.secret import MASK, Secret

TEXT = "correct-horse-battery"


@dataclass(frozen=True)
class Holder:
    name: str
    password: Secret


class Struct(msgspec.Struct):
    password: Secret


def test_whatever_prints_it_prints_the_mask() -> None:
    secret = Secret(TEXT)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>20}", "%s %r" % (secret, secret), f"{secret!a}"]  # noqa: UP031
    shown += [
        repr(Holder("x", secret)),
        repr(Struct(secret)),
        repr([secret, {"a": secret}]),
        str(dataclasses.asdict(Holder("x", secret))),
    ]
    for text in shown:
        assert TEXT not in text
        assert MASK in text


@pytest.mark.parametrize("dump", [pickle.dumps, json.dumps, orjson.dumps, msgspec.json.encode, msgspec.msgpack.encode])
def test_it_cannot_be_stored(dump: object) -> None:
    with pytest.raises((TypeError, orjson.JSONEncodeError)) as raised:
        dump(Secret(TEXT))  # type: ignore[operator]
    assert TEXT not in str(raised.value)


@given(st.text(), st.text())
def test_it_compares_as_its_text(one: str, other: str) -> None:
    assert (Secret(one) == Secret(other)) == (one == other)
    assert Secret(one) != one
    assert bool(Secret(one)) == bool(one)
    assert copy.deepcopy(Secret(one)).reveal() == one
    assert len({Secret(one), Secret(one)}) == 1


def test_options_that_are_secret_are_of_this_type() -> None:
    for name, section in config.SECTIONS.items():
        for field in dataclasses.fields(section):
            if field.metadata.get("secret"):
                assert isinstance(field.default, Secret), f"{name}.{field.name}"


SECRET = {"password", "secret", "token", "pepper", "private", "prompt", "answer"}


def test_no_dataclass_shows_a_secret_in_its_representation() -> None:
    """Every dataclass of the package: what is called a secret is a Secret, or left out of the representation."""
    seen = 0
    for module in pkgutil.walk_packages(helixflow.__path__, "helixflow."):
        if module.name.endswith("__main__") or ".tensorrt" in module.name:
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.name):
                continue
            for field in dataclasses.fields(cls):
                words = SECRET & set(field.name.split("_"))
                if words and str in _types(field.type):
                    seen += 1
                    assert not field.repr, f"{cls.__module__}.{cls.__qualname__}.{field.name}: repr=False, or a Secret"
    assert seen


def _types(annotation: object) -> set[object]:
    return {str} if annotation in (str, bytes, str | None, bytes | None, "str", "bytes", "str | None") else set()
