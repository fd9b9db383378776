"""The messages of a chat, as OpenAI's clients and those of other servers send them.

What a history brings back from other servers (`id`, `cache_control`, citations, reasoning) is tolerated; what would
change the meaning of a message and is not built (images, audio, files) is refused by name.
"""

from typing import Annotated, Any, ClassVar

import orjson
from msgspec import Meta, Struct

from helixflow.core_rs import CoreError, InvalidRequest, UnsupportedParameter
from helixflow.refusals import refusal

MAX_PARTS = 1024
MAX_CALLS = 256
ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
TEXT_PARTS = frozenset(("text", "input_text", "output_text"))
"""Types of a text part: the chat API's, and the two of the Responses API, which some clients carry over."""

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Extra = tuple[int, str | None, list[tuple[str, str, str]], str | None]
"""Index of a message, its reasoning, its calls of tools (id, name, arguments), the call that it answers."""
Harmless = dict[str, tuple[Any, ...]]
"""Parameters that are not built, each with the values that say what happens anyway."""


class Part(Struct, frozen=True):
    """One part of a message's content. Only texts are built."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Function(Struct, frozen=True):
    """The function of a call."""

    name: Name
    arguments: str | dict[str, Any] | None = None

    def text(self) -> str:
        """The arguments as JSON; some clients send them decoded."""
        if isinstance(self.arguments, dict):
            return orjson.dumps(self.arguments).decode()
        return self.arguments or ""


class ToolCall(Struct, frozen=True):
    """One call of a tool in an assistant's earlier answer."""

    function: Function
    id: str | None = None
    type: str | None = None


class Message(Struct, frozen=True):
    """One message of a chat."""

    role: str
    content: str | Annotated[list[Part], Meta(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    refusal: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None
    function_call: Function | None = None
    audio: Any = None
    images: Any = None

    NOT_BUILT: ClassVar[Harmless] = {"audio": (), "images": ([],)}

    def flat(self, path: str) -> tuple[str, str, str | None]:
        """(role, text, name). Raises InvalidRequest and UnsupportedParameter."""
        if self.role not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise refusal(
                InvalidRequest, f"{path}.role: {self.role[:100]!r} is not a role; use {known}", f"{path}.role"
            )
        refuse_unbuilt(self, self.NOT_BUILT, f"{path}.")
        if self.role != "assistant" and (self.tool_calls or self.function_call):
            raise refusal(InvalidRequest, f"{path}.tool_calls: only an assistant calls tools", f"{path}.tool_calls")
        return "tool" if self.role == "function" else self.role, self._content(path), self.name

    def besides(self, index: int) -> Extra | None:
        """What the template is told beside role, text and name; None when there is nothing. `index`: of the message."""
        if self.role == "assistant":
            thoughts = (self.reasoning_content, self.reasoning)
            thought = next((text for text in thoughts if isinstance(text, str) and text), None)
            calls = [(call.id or "", call.function.name, call.function.text()) for call in self.tool_calls or ()]
            if self.function_call is not None and not calls:
                calls = [("", self.function_call.name, self.function_call.text())]
            return (index, thought, calls, None) if thought or calls else None
        if self.role == "tool" and self.tool_call_id:
            return index, None, [], self.tool_call_id
        return None

    def _content(self, path: str) -> str:
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            if self.role in ("assistant", "tool", "function"):
                return self.refusal or ""
            raise refusal(
                InvalidRequest, f"{path}.content: expected a string or an array of text parts", f"{path}.content"
            )
        return "".join(_text(part, f"{path}.content[{index}]") for index, part in enumerate(self.content))


def _text(part: Part, path: str) -> str:
    if part.type in TEXT_PARTS:
        if part.text is None:
            raise refusal(InvalidRequest, f"{path}.text: a text part needs its text", f"{path}.text")
        return part.text
    if part.type == "refusal":
        return part.refusal or ""
    raise refusal(
        UnsupportedParameter, f"{path}.type: {part.type[:100]!r} is not built; only text parts are", f"{path}.type"
    )


def refuse_unbuilt(body: Struct, table: Harmless, path: str = "") -> None:
    """Raises UnsupportedParameter for the first parameter that asks for something that is not built."""
    for name, harmless in table.items():
        value = getattr(body, name)
        if value is not None and not any(_same(value, one) for one in harmless):
            raise unbuilt(path + name)


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON: 1.0 is 1, false is not 0."""
    return bool(value == other) and isinstance(value, bool) is isinstance(other, bool)


def unbuilt(path: str, instead: str = "leave it out") -> CoreError:
    """The refusal of a parameter that is known and not built."""
    return refusal(UnsupportedParameter, f"{path}: this is not built; {instead}", path)
