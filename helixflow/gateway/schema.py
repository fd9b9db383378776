"""The OpenAI request bodies, decoded and validated in one pass.

A parameter is one of four things: understood; a wish, accepted and without effect here (`user`, `store`); known and
not built although it would change what the answer means, which is refused by name unless its value says what happens
anyway; unknown, which is ignored, at the top level only without `gateway.strict_parameters`. What is ignored is named
in the answer (`ignored`). `null` means absent, and values count as they decode, not as they are spelt.
"""

import re
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
import orjson
from msgspec import Meta, Struct

from helixflow.core_rs import CoreError, InvalidRequest, Prompt, json_within
from helixflow.gateway import ignored
from helixflow.gateway.conversation import Function, Harmless, Message, Name, Part, ToolCall, refuse_unbuilt, unbuilt
from helixflow.refusals import refusal

COMPLETION_TOKENS = 16
"""`max_tokens` of a text completion that names none, as the OpenAI API documents it."""
MAX_MESSAGES = 4096
MAX_PROMPTS = 128
MAX_BIASES = 1024
MAX_STOPS = 16
"""Stop strings of a request; OpenAI allows four, other servers any number."""
SMALL_BODY = 65536
"""Bodies up to this size (bytes) are decoded within a few milliseconds whatever they hold."""
MAX_STRUCTURES = 10 * MAX_MESSAGES
"""Arrays, objects and members of a larger body: a message of one text part has eight."""
MAX_ELEMENTS = 65536
"""Elements of a larger body, besides the token ids of its prompts."""
MAX_VARIABLES = 65536
"""Bytes of `chat_template_kwargs` as JSON."""
MAX_TOKENS = 2**31 - 1
"""More is asked for by clients that mean: as many as fit."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
Choices = Annotated[int, Meta(ge=1, le=16)]
Tokens = Annotated[int, Meta(ge=1)]
TokensOrNone = Annotated[int, Meta(ge=0)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(ge=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(ge=0.01, le=10)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)]
MinTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopTokens = Annotated[list[TokenId], Meta(max_length=256)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]

WISHES = frozenset(
    (
        "cache_salt",
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "spaces_between_special_tokens",
        "store",
        "thinking",
        "user",
        "verbosity",
    )
)
"""Known to some API, and nothing that an answer has to follow: accepted whatever their values, in strict mode too."""


class StreamOptions(Struct, frozen=True):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Struct, frozen=True, kw_only=True):
    """What chat and text completions share. The last block is not built."""

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
    min_tokens: MinTokens | None = None
    stop_token_ids: StopTokens | None = None
    skip_special_tokens: bool | None = None

    best_of: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    grammar: Any = None
    json_schema: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    include_stop_str_in_output: Any = None
    prompt_logprobs: Any = None
    return_token_ids: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None

    NOT_BUILT: ClassVar[Harmless] = {
        "best_of": (1,),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": ([],),
        "guided_grammar": (),
        "grammar": ("",),
        "json_schema": (),
        "bad_words": ([],),
        "allowed_token_ids": ([],),
        "include_stop_str_in_output": (False,),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
    }

    def check(self) -> None:
        """What one field cannot say alone. Raises InvalidRequest and UnsupportedParameter."""
        limit = self.limit()
        if limit is not None and (self.min_tokens or 0) > limit:
            raise refusal(InvalidRequest, f"min_tokens: is more than max_tokens, which is {limit}", "min_tokens")
        refuse_unbuilt(self, self.NOT_BUILT)
        if self.response_format is not None and not _is_text(self.response_format):
            raise unbuilt("response_format")
        if self.stream_options is not None and not self.stream:
            raise refusal(InvalidRequest, "stream_options: only allowed with `stream: true`", "stream_options")

    def limit(self) -> int | None:
        """Tokens to generate at most; None for as many as fit."""
        raise NotImplementedError

    def dropped(self) -> list[str]:
        """Names of what was understood and has no effect."""
        return []


def _is_text(response_format: Any) -> bool:
    return isinstance(response_format, dict) and response_format.get("type") == "text"


class Chat(Sampling, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    reasoning_effort: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    documents: Any = None
    echo: Any = None
    add_special_tokens: Any = None

    NOT_BUILT: ClassVar[Harmless] = {
        **Sampling.NOT_BUILT,
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "add_special_tokens": (False,),
    }

    def check(self) -> None:
        """See `Sampling.check`."""
        Sampling.check(self)
        if self.continue_final_message and self.add_generation_prompt:
            raise refusal(
                InvalidRequest,
                "continue_final_message: the prompt ends in a message or begins an answer; leave out "
                "add_generation_prompt",
                "continue_final_message",
            )
        for name, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            if getattr(self, name) not in (None, []) and getattr(self, choice) != "none":
                raise unbuilt(name, f'leave it out, or send `{choice}: "none"`')
        if self.top_logprobs and not self.logprobs:
            raise refusal(InvalidRequest, "top_logprobs: only allowed with `logprobs: true`", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refusal(
                InvalidRequest, "max_tokens: differs from max_completion_tokens; send one of them", "max_tokens"
            )

    def limit(self) -> int | None:
        """See `Sampling.limit`."""
        return self.max_completion_tokens or self.max_tokens

    def dropped(self) -> list[str]:
        """Tools that may not be called: no template is told of them."""
        return [name for name in ("tools", "functions") if getattr(self, name)]

    def prompt(self) -> Prompt:
        """The chat as the pool takes it. Raises InvalidRequest and UnsupportedParameter."""
        options: dict[str, Any] = {}
        if self.continue_final_message:
            options["continue_final_message"] = True
        variables = self.variables()
        if variables:
            options["variables"] = variables
        return chat_prompt(self.messages, self.add_generation_prompt, options)

    def given_variables(self) -> list[str]:
        """Names of the parameters that are variables of the chat template."""
        given = [f"chat_template_kwargs.{name}" for name in self.chat_template_kwargs or ()]
        return [*given, "reasoning_effort"] if self.reasoning_effort is not None else given

    def variables(self) -> bytes:
        """Variables of the chat template as a JSON object; empty for none. Raises InvalidRequest."""
        given = dict(self.chat_template_kwargs or {})
        if isinstance(self.reasoning_effort, str):
            given.setdefault("reasoning_effort", self.reasoning_effort)
        if not given:
            return b""
        try:
            encoded = orjson.dumps(given)
        except (TypeError, ValueError):
            encoded = b" " * (MAX_VARIABLES + 1)  # nested beyond what can be written
        if len(encoded) > MAX_VARIABLES:
            raise refusal(
                InvalidRequest,
                f"chat_template_kwargs: at most {MAX_VARIABLES} bytes, and no integers beyond 64 bits",
                "chat_template_kwargs",
            )
        return encoded


def chat_prompt(messages: list[Message], add_generation_prompt: bool | None, options: dict[str, Any]) -> Prompt:
    """A chat as the pool takes it; by default it ends with the beginning of an answer.

    `options`: further arguments of `Prompt.chat`. Raises InvalidRequest and UnsupportedParameter.
    """
    flat = [message.flat(f"messages[{index}]") for index, message in enumerate(messages)]
    besides = [message.besides(index) for index, message in enumerate(messages)]
    if any(besides):
        options["extras"] = list(filter(None, besides))
    if add_generation_prompt is None:
        add_generation_prompt = not options.get("continue_final_message")
    return Prompt.chat(flat, add_generation_prompt, **options)


class Completion(Sampling, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    max_tokens: TokensOrNone | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    suffix: Any = None

    NOT_BUILT: ClassVar[Harmless] = {**Sampling.NOT_BUILT, "suffix": ("",)}

    def check(self) -> None:
        """See `Sampling.check`."""
        Sampling.check(self)
        if self.max_tokens == 0 and not self.echo:
            raise refusal(InvalidRequest, "max_tokens: 0 is only allowed with `echo: true`", "max_tokens")

    def limit(self) -> int:
        """See `Sampling.limit`."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

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


class Tokenize(Struct, frozen=True, kw_only=True):
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

    def dropped(self) -> list[str]:
        """Nothing."""
        return []


class Detokenize(Struct, frozen=True, kw_only=True):
    """The body of POST /detokenize."""

    model: Name
    tokens: list[TokenId]

    def check(self) -> None:
        """Nothing beyond the types."""

    def dropped(self) -> list[str]:
        """Nothing."""
        return []


Body = TypeVar("Body", Chat, Completion, Tokenize, Detokenize)

CHAT = msgspec.json.Decoder(Chat)
COMPLETION = msgspec.json.Decoder(Completion)
TOKENIZE = msgspec.json.Decoder(Tokenize)
DETOKENIZE = msgspec.json.Decoder(Detokenize)

_CALL = ignored.Shape(ToolCall, function=ignored.Shape(Function))
_MESSAGE = ignored.Shape(Message, content=ignored.Shape(Part), tool_calls=_CALL)
_STREAM_OPTIONS = ignored.Shape(StreamOptions)
_SHAPES: dict[type[Struct], ignored.Shape] = {
    Chat: ignored.Shape(Chat, messages=_MESSAGE, stream_options=_STREAM_OPTIONS),
    Completion: ignored.Shape(Completion, stream_options=_STREAM_OPTIONS),
    Tokenize: ignored.Shape(Tokenize, messages=_MESSAGE),
    Detokenize: ignored.Shape(Detokenize),
}

_AT = re.compile(r"(?s)(?P<what>.*?) - at (?:`key` in )?`\$\.?(?P<path>.*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)


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


def without_effect(body: bytes, parsed: Body, strict: bool) -> list[str]:
    """Names of what a body holds and the answer does not follow. `body`: what `parsed` was decoded from.

    `strict`: raises InvalidRequest for an unknown key at the top level.
    """
    top, below = ignored.unknown(body, _SHAPES[type(parsed)])
    for name in top if strict else ():
        if name not in WISHES:
            raise refusal(InvalidRequest, f"{name[:200]}: is not a parameter here", name[:200])
    return parsed.dropped() + top + below


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
    missing = _MISSING.fullmatch(what)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
        what = "is required"
    what = what.replace(" | null", "")
    what = what[:1].lower() + what[1:]
    if not path:
        return refusal(InvalidRequest, f"the body: {what}")
    return refusal(InvalidRequest, f"{path}: {what}", path)
