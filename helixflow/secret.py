"""A text that nobody is to see: passwords, tokens, URLs that hold one."""

import hmac
from typing import Any, NoReturn

MASK = "***"


class Secret:
    """Keeps a secret and shows `***` instead, however it is printed, formatted or put into a log.

    It cannot be pickled. Two are compared in constant time. `reveal` is the one way to the text: look for it when you
    want to know who reads secrets.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself. Hand it on at once, to what needs it; keep the Secret."""
        return self._text

    def __repr__(self) -> str:
        return MASK

    def __str__(self) -> str:
        return MASK

    def __format__(self, _spec: str) -> str:
        return MASK

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(
            self._text.encode("utf-8", "surrogatepass"), other._text.encode("utf-8", "surrogatepass")
        )

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, _memo: Any) -> "Secret":
        return self

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError("a secret is not to be stored: it cannot be pickled")
