"""The OpenAI request bodies, decoded and validated in one pass.

Every parameter is one of four things: understood; accepted and without effect here (`user`, `metadata`); known to
the OpenAI API but not built, which is refused by name unless it says what happens anyway; unknown, which is refused.
`null` means absent.
"""

import re
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from helixflow.core_rs import CoreError, InvalidRequest, UnsupportedParameter, json_within
from helixflow.refusals import refusal

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_PROMPTS = 128
MAX_BIASES = 1024
SMALL_BODY = 65536
"""Bodies up to this size (bytes) are decoded within a few milliseconds whatever they hold."""
MAX_STRUCTURES = 10 * MAX_MESSAGES
"""Arrays, objects and members of a larger body: a message of one text part has eight."""
MAX_ELEMENTS = 65536
"""Elements of a larger body, besides the token ids of its prompts."""
ROLES = frozenset(("system", "developer", "user", "assistant"))

Absent = Raw(b"null")
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=4)]
Choices = Annotated[int, Meta(ge=1, le=16)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokensOrNone = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(ge=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(ge=0.01, le=10)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)]
Metadata = Annotated[dict[str, str], Meta(max_length=16)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a message's content. Only `text` parts are built."""

    type: str
    text: str | None = None
    image_url: Raw = Absent
    input_audio: Raw = Absent
    file: Raw = Absent
    refusal: Raw = Absent


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a chat."""

    role: str
    content: str | Annotated[list[Part], Meta(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    refusal: Raw = Absent
    annotations: Raw = Absent
    audio: Raw = Absent
    tool_calls: Raw = Absent
    tool_call_id: Raw = Absent
    function_call: Raw = Absent
    reasoning_content: Raw = Absent

    UNSUPPORTED: ClassVar[dict[str, tuple[bytes, ...]]] = {
        "refusal": (b"null",),
        "annotations": (b"null", b"[]"),
        "audio": (b"null",),
        "tool_calls": (b"null", b"[]"),
        "tool_call_id": (b"null",),
        "function_call": (b"null",),
        "reasoning_content": (b"null",),
    }

    def flat(self, path: str) -> tuple[str, str, str | None]:
        """(role, text, name). Raises InvalidRequest and UnsupportedParameter."""
        if self.role not in ROLES:
            known = ", ".join(sorted(ROLES))
            if self.role in ("tool", "function"):
                raise refusal(
                    UnsupportedParameter, f"{path}.role: {self.role!r} is not built; use {known}", f"{path}.role"
                )
            raise refusal(
                InvalidRequest, f"{path}.role: {self.role[:100]!r} is not a role; use {known}", f"{path}.role"
            )
        for name, harmless in self.UNSUPPORTED.items():
            raw = getattr(self, name)
            if raw is not Absent and bytes(raw) not in harmless:
                raise _unsupported(f"{path}.{name}")
        if isinstance(self.content, str):
            return self.role, self.content, self.name
        if self.content is None:
            if self.role == "assistant":
                return self.role, "", self.name
            raise refusal(
                InvalidRequest, f"{path}.content: expected a string or an array of text parts", f"{path}.content"
            )
        texts = [_text(part, f"{path}.content[{index}]") for index, part in enumerate(self.content)]
        return self.role, "".join(texts), self.name


def _text(part: Part, path: str) -> str:
    if part.type != "text":
        raise refusal(
            UnsupportedParameter, f"{path}.type: {part.type[:100]!r} is not built; only text parts are", f"{path}.type"
        )
    if part.text is None:
        raise refusal(InvalidRequest, f"{path}.text: a text part needs its text", f"{path}.text")
    return part.text


class Sampling(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What chat and text completions share."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    stop: Stop | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    seed: Seed | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: Metadata | None = None

    UNSUPPORTED: ClassVar[dict[str, tuple[bytes, ...]]] = {}

    def check(self) -> None:
        """What one field cannot say alone. Raises InvalidRequest and UnsupportedParameter."""
        for name, harmless in self.UNSUPPORTED.items():
            raw = getattr(self, name)
            if raw is not Absent and bytes(raw) not in harmless:
                raise _unsupported(name)
        if self.stream_options is not None and not self.stream:
            raise refusal(InvalidRequest, "stream_options: only allowed with `stream: true`", "stream_options")


class Chat(Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    tools: Raw = Absent
    tool_choice: Raw = Absent
    parallel_tool_calls: Raw = Absent
    functions: Raw = Absent
    function_call: Raw = Absent
    response_format: Raw = Absent
    modalities: Raw = Absent
    audio: Raw = Absent
    prediction: Raw = Absent
    reasoning_effort: Raw = Absent
    verbosity: Raw = Absent
    web_search_options: Raw = Absent
    store: Raw = Absent
    service_tier: Raw = Absent

    UNSUPPORTED: ClassVar[dict[str, tuple[bytes, ...]]] = {
        "tools": (b"null", b"[]"),
        "tool_choice": (b"null", b'"none"', b'"auto"'),
        "parallel_tool_calls": (b"null", b"true", b"false"),
        "functions": (b"null", b"[]"),
        "function_call": (b"null", b'"none"', b'"auto"'),
        "audio": (b"null",),
        "prediction": (b"null",),
        "reasoning_effort": (b"null", b'"none"'),
        "verbosity": (b"null", b'"medium"'),
        "web_search_options": (b"null",),
        "store": (b"null", b"false"),
        "service_tier": (b"null", b'"auto"', b'"default"'),
    }

    def check(self) -> None:
        """See `Sampling.check`."""
        for name, harmless in (("response_format", {"type": "text"}), ("modalities", ["text"])):
            raw = getattr(self, name)
            if raw is not Absent and bytes(raw) != b"null" and _plain(raw, name) != harmless:
                raise _unsupported(name)
        Sampling.check(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal(InvalidRequest, "top_logprobs: only allowed with `logprobs: true`", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refusal(
                InvalidRequest, "max_tokens: differs from max_completion_tokens; send one of them", "max_tokens"
            )

    def conversation(self) -> list[tuple[str, str, str | None]]:
        """(role, text, name) of every message. Raises InvalidRequest and UnsupportedParameter."""
        return [message.flat(f"messages[{index}]") for index, message in enumerate(self.messages)]


class Completion(Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    max_tokens: TokensOrNone | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    suffix: Raw = Absent
    best_of: Raw = Absent

    UNSUPPORTED: ClassVar[dict[str, tuple[bytes, ...]]] = {
        "suffix": (b"null", b'""'),
        "best_of": (b"null", b"1"),
    }

    def check(self) -> None:
        """See `Sampling.check`."""
        Sampling.check(self)
        if self.max_tokens == 0 and not self.echo:
            raise refusal(InvalidRequest, "max_tokens: 0 is only allowed with `echo: true`", "max_tokens")

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids. Raises InvalidRequest."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = set(map(type, self.prompt))
        if len(kinds) > 1:
            raise refusal(
                InvalidRequest,
                "prompt: an array holds strings, token ids, or arrays of token ids, never a mix",
                "prompt",
            )
        prompts: list[Any] = [self.prompt] if kinds == {int} else self.prompt
        if len(prompts) > MAX_PROMPTS:
            raise refusal(InvalidRequest, f"prompt: at most {MAX_PROMPTS} prompts in one request", "prompt")
        for index, prompt in enumerate(prompts):
            if prompt == []:
                raise refusal(InvalidRequest, f"prompt[{index}]: no token ids", f"prompt[{index}]")
        return prompts


class Tokenize(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /tokenize: a text, or a chat through the model's template."""

    model: Name
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None

    def check(self) -> None:
        """Exactly one of the two. Raises InvalidRequest."""
        if (self.prompt is None) == (self.messages is None):
            raise refusal(InvalidRequest, "prompt: send either prompt or messages", "prompt")


class Detokenize(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /detokenize."""

    model: Name
    tokens: list[TokenId]

    def check(self) -> None:
        """Nothing beyond the types."""


Body = TypeVar("Body", Chat, Completion, Tokenize, Detokenize)

CHAT = msgspec.json.Decoder(Chat)
COMPLETION = msgspec.json.Decoder(Completion)
TOKENIZE = msgspec.json.Decoder(Tokenize)
DETOKENIZE = msgspec.json.Decoder(Detokenize)

_AT = re.compile(r"(?s)(?P<what>.*?) - at (?:`key` in )?`\$\.?(?P<path>.*)`")
_FIELD = re.compile(r"Object (?P<how>contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)


def decode(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """Reads a body. Raises InvalidRequest or UnsupportedParameter, which name the path of the parameter."""
    try:
        parsed = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise refusal(InvalidRequest, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise refusal(InvalidRequest, "the body is nested too deeply") from None
    parsed.check()
    return parsed


def check_size(body: bytes, longest: int) -> None:
    """Refuses a body that would keep the event loop busy decoding what no model can take. Raises InvalidRequest.

    `longest`: positions of the longest model; so many token ids each prompt may have.
    """
    elements = MAX_ELEMENTS + MAX_PROMPTS * longest
    if not json_within(body, MAX_STRUCTURES, elements):
        raise refusal(
            InvalidRequest,
            f"the body holds too much: at most {MAX_STRUCTURES} arrays, objects and members, and {elements} elements",
        )


def _explain(problem: str) -> CoreError:
    """Turns msgspec's sentence into ours: the path first, in the form `messages[2].role`."""
    at = _AT.fullmatch(problem)
    what, path = (at["what"], at["path"]) if at else (problem, "")
    field = _FIELD.fullmatch(what)
    if field:
        path = f"{path}.{field['name']}" if path else field["name"]
        path = path[:200]
        unknown = field["how"] == "contains unknown"
        what = "is not a parameter here" if unknown else "is required"
        return refusal(InvalidRequest, f"{path}: {what}", path)
    what = what.replace(" | null", "")
    what = what[:1].lower() + what[1:]
    if not path:
        return refusal(InvalidRequest, f"the body: {what}")
    return refusal(InvalidRequest, f"{path}: {what}", path)


def _unsupported(path: str) -> CoreError:
    return refusal(UnsupportedParameter, f"{path}: this is not built; leave it out", path)


def _plain(raw: Raw, name: str) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise refusal(InvalidRequest, f"{name}: is not JSON", name) from None
