"""Refusals of requests, made on the Python side: the classes are the extension's."""

from typing import TypeVar

from helixflow.core_rs import CoreError

_ERROR = TypeVar("_ERROR", bound=CoreError)


def refusal(kind: type[_ERROR], message: str, param: str | None = None) -> _ERROR:
    """An error of this process. `param`: path of the request parameter at fault."""
    error = kind(message)
    error.param = param
    return error


def message_of(error: CoreError) -> str:
    """The sentence for people, without the class."""
    return str(error.args[0]) if error.args else error.code
