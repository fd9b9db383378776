"""Request bodies: what is understood, accepted, refused by name; and that nothing else ever happens."""

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core_rs import CoreError, InvalidRequest, UnsupportedParameter
from helixflow.gateway import conversation, ignored, schema

HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
PREFIX = b'{"model": "m", "messages": [{"role": "user", "content": "x"}]'


def chat(**options: Any) -> schema.Chat:
    body = schema.decode(schema.CHAT, json.dumps({"model": "m", "messages": HELLO, **options}).encode())
    body.prompt()
    return body


def flat(body: schema.Chat) -> list[tuple[str, str, str | None]]:
    return [message.flat(f"messages[{index}]") for index, message in enumerate(body.messages)]


def completion(**options: Any) -> schema.Completion:
    return schema.decode(schema.COMPLETION, json.dumps({"model": "m", "prompt": "p", **options}).encode())


def refused(kind: type[CoreError], param: str | None, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        chat(**options)
    assert caught.value.param == param
    return str(caught.value)


def test_everything_understood() -> None:
    body = chat(
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        max_tokens=5,
        max_completion_tokens=5,
        temperature=2,
        top_p=0.1,
        top_k=40,
        min_p=1,
        n=16,
        stop=["a", "b", "c", "d", "e"],
        seed=-(2**63),
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.1,
        logit_bias={"17": 100, "0": -100.0},
        logprobs=True,
        top_logprobs=20,
        ignore_eos=True,
    )
    assert body.stop == ["a", "b", "c", "d", "e"]
    assert body.logit_bias == {17: 100.0, 0: -100.0}
    assert body.seed == -(2**63)


def test_null_means_absent() -> None:
    fields = [name for name in schema.Chat.__struct_fields__ if name not in ("model", "messages")]
    assert chat(**dict.fromkeys(fields)).temperature is None
    fields = [name for name in schema.Completion.__struct_fields__ if name not in ("model", "prompt")]
    assert completion(**dict.fromkeys(fields)).max_tokens is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function"}),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("web_search_options", {}),
        ("best_of", 2),
        ("best_of", True),
        ("guided_json", {"type": "object"}),
        ("structured_outputs", {"regex": "a"}),
        ("grammar", "root ::= x"),
        ("chat_template", "{{ 1 }}"),
        ("documents", [{"text": "x"}]),
        ("echo", True),
        ("include_stop_str_in_output", True),
    ],
)
def test_known_and_not_built(name: str, value: Any) -> None:
    assert name in refused(UnsupportedParameter, name, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", []),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("functions", []),
        ("function_call", "auto"),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("best_of", 1),
        ("grammar", ""),
        ("use_beam_search", False),
    ],
)
def test_not_built_but_says_what_happens_anyway(name: str, value: Any) -> None:
    assert chat(**{name: value}).dropped() == []


def test_tools_that_may_not_be_called_are_dropped() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools, tool_choice="none").dropped() == ["tools"]
    assert chat(functions=[{}], function_call="none").dropped() == ["functions"]
    for choice in ("auto", "required", {"type": "function"}, None):
        with pytest.raises(UnsupportedParameter):
            chat(tools=tools, tool_choice=choice)


@pytest.mark.parametrize(
    "spelt",
    [
        b'"tools": [ ]',
        b'"tools": [\n]',
        b'"tool_choice": "\\u0061uto"',
        b'"tool_choice": "\\u006eone"',
        b'"response_format": { "type" : "te\\u0078t" }',
        b'"best_of": 1.0',
        b'"top_logprobs": 0, "logprobs": false',
    ],
)
def test_values_count_as_they_decode(spelt: bytes) -> None:
    assert schema.decode(schema.CHAT, PREFIX + b", " + spelt + b"}").dropped() == []


WISHED: list[tuple[str, Any]] = [
    ("store", True),
    ("verbosity", "low"),
    ("service_tier", "flex"),
    ("prediction", {"type": "content", "content": "x"}),
    ("metadata", {"a": [1, {"b": None}]}),
    ("user", {"name": "x"}),
    ("safety_identifier", 5),
    ("prompt_cache_key", "k"),
    ("prompt_cache_retention", "24h"),
    ("parallel_tool_calls", False),
]


@pytest.mark.parametrize(("name", "value"), WISHED)
def test_wishes_are_accepted_and_named(name: str, value: Any) -> None:
    body = json.dumps({"model": "m", "messages": HELLO, name: value}).encode()
    parsed = schema.decode(schema.CHAT, body)
    for strict in (False, True):
        assert schema.without_effect(body, parsed, strict) == [name]


def test_what_nobody_knows_is_named_or_refused_at_the_top_level() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}], "id": 7, "opts": {}}
    answer = {"role": "assistant", "content": "y", "id": None, "annotations": [{"url": "z"}], "id2": 1}
    body = json.dumps(
        {
            "model": "m",
            "messages": [message, answer, message],
            "foo": 1,
            "a.b": 2,
            "gone": None,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()
    parsed = schema.decode(schema.CHAT, body)
    below = [
        "messages[].id",
        "messages[].opts",
        "messages[].content[].cache_control",
        "messages[].annotations",
        "messages[].id2",
        "stream_options.continuous_usage_stats",
    ]
    assert schema.without_effect(body, parsed, False) == ["foo", "a.b", *below]
    with pytest.raises(InvalidRequest) as caught:
        schema.without_effect(body, parsed, True)
    assert caught.value.param == "foo"
    allowed = body.replace(b'"foo": 1, "a.b": 2, ', b"")
    assert schema.without_effect(allowed, schema.decode(schema.CHAT, allowed), True) == below


def test_the_header_is_bounded_and_clean() -> None:
    names = ["x\r\nset-cookie: a=b", "\u00e4" * 500, *(f"n{index}" for index in range(40))]
    value = ignored.header(names)
    assert len(value) < ignored.MAX_NAMES * (ignored.MAX_NAME_CHARS + 2) + 8
    assert value.startswith(b"x??set-cookie??a?b, ???")
    assert value.endswith(b"n13, +26")
    assert ignored.header(["a[].b-c_d"]) == b"a[].b-c_d"


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": "1"}),
        ("temperature", {"temperature": True}),
        ("top_p", {"top_p": -0.1}),
        ("top_p", {"top_p": 1.1}),
        ("top_k", {"top_k": -2}),
        ("top_k", {"top_k": 1.5}),
        ("min_p", {"min_p": 2}),
        ("presence_penalty", {"presence_penalty": 3}),
        ("frequency_penalty", {"frequency_penalty": -3}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("n", {"n": 0}),
        ("n", {"n": 17}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": ["a"] * 17}),
        ("stop[1]", {"stop": ["a", ""]}),
        ("seed", {"seed": 2**63}),
        ("seed", {"seed": 1.5}),
        ("logit_bias[...]", {"logit_bias": {"5": 101}}),
        ("logit_bias", {"logit_bias": {"five": 1}}),
        ("logit_bias", {"logit_bias": {"-5": 1}}),
        ("top_logprobs", {"top_logprobs": 5}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logprobs", {"logprobs": 5}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
        ("model", {"model": None}),
        ("model", {"model": ""}),
        ("messages", {"messages": []}),
        ("messages", {"messages": None}),
        ("messages", {"messages": "hi"}),
        ("messages[1].role", {"messages": [*HELLO, {"role": "pirate", "content": "x"}]}),
        ("messages[1].role", {"messages": [*HELLO, {"content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
        ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"text": "x"}]}]}),
        ("messages[0].name", {"messages": [{"role": "user", "content": "x", "name": ""}]}),
        ("messages[0].tool_calls[0].function", {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}),
        ("messages[0].tool_calls", {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}),
        ("min_tokens", {"min_tokens": -1}),
        ("min_tokens", {"min_tokens": 6, "max_tokens": 5}),
        ("stop_token_ids[0]", {"stop_token_ids": [-1]}),
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
        ("chat_template_kwargs", {"chat_template_kwargs": []}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"x": "y" * 70_000}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"x": 2**70}}),
    ],
)
def test_invalid_values_name_their_path(param: str, options: dict[str, Any]) -> None:
    message = refused(InvalidRequest, param, **options)
    assert message.startswith(f"{param}: ")
    assert "$" not in message
    assert "| null" not in message


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("messages[0].content[1].type", {"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}),
        ("messages[0].content[0].type", {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
        ("messages[0].audio", {"role": "assistant", "content": None, "audio": {"id": "x"}}),
        ("messages[0].images", {"role": "user", "content": "x", "images": ["aGk="]}),
    ],
)  # fmt: skip
def test_messages_that_are_not_built(param: str, message: dict[str, Any]) -> None:
    refused(UnsupportedParameter, param, messages=[message])


def test_conversation() -> None:
    body = chat(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "developer", "content": "d", "name": "ann"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": None, "refusal": "no"},
            {
                "role": "assistant",
                "content": [{"type": "refusal", "refusal": "n"}, {"type": "output_text", "text": "o"}],
            },
            {"role": "assistant", "content": "a", "reasoning_content": "r", "reasoning": {"x": 1}, "tool_calls": []},
        ]
    )
    expected = [
        ("system", "s", None),
        ("developer", "d", "ann"),
        ("user", "ab", None),
        ("assistant", "", None),
        ("user", "", None),
        ("assistant", "no", None),
        ("assistant", "no", None),
        ("assistant", "a", None),
    ]
    assert flat(body) == expected


def extras(*messages: dict[str, Any]) -> list[conversation.Extra | None]:
    body = chat(messages=list(messages))
    return [message.besides(index) for index, message in enumerate(body.messages)]


def test_what_templates_are_told_besides() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert extras(
        {"role": "user", "content": "x"},
        {**called, "reasoning_content": "r"},
        {"role": "tool", "content": None, "tool_call_id": "c1"},
        {"role": "assistant", "content": "x", "reasoning": "r"},
        {"role": "assistant", "content": "x", "reasoning": {"effort": "low"}, "tool_calls": []},
        {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": {"a": 1}}},
        {"role": "user", "content": "x", "reasoning_content": "r", "tool_call_id": "c1"},
    ) == [
        None,
        (1, "r", [("c1", "f", "{}")], None),
        (2, None, [], "c1"),
        (3, "r", [], None),
        None,
        (5, None, [("", "f", '{"a":1}')], None),
        None,
    ]
    body = chat(messages=[{"role": "user", "content": "x"}, {"role": "function", "name": "f", "content": "3"}])
    assert flat(body)[1] == ("tool", "3", "f")


def test_variables_of_the_template() -> None:
    assert chat().variables() == b""
    assert chat(reasoning_effort=None, chat_template_kwargs={}).variables() == b""
    body = chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False, "x": [1.5, None]})
    assert json.loads(body.variables()) == {"enable_thinking": False, "x": [1.5, None], "reasoning_effort": "low"}
    assert body.given_variables() == [
        "chat_template_kwargs.enable_thinking",
        "chat_template_kwargs.x",
        "reasoning_effort",
    ]
    assert json.loads(chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"}).variables()) == {
        "reasoning_effort": "high"
    }
    assert chat(reasoning_effort={"odd": 1}).variables() == b""


def test_prompts() -> None:
    assert completion(prompt="x").prompts() == ["x"]
    assert completion(prompt=["x", "y"]).prompts() == ["x", "y"]
    assert completion(prompt=[1, 2]).prompts() == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]]).prompts() == [[1], [2, 3]]
    mixed: list[Any] = [["x", 1], [[1], "x"], [[]], ["x"] * 129]
    for bad in mixed:
        body = completion(prompt=bad)
        with pytest.raises(InvalidRequest, match="prompt"):
            body.prompts()
    wrong: list[Any] = [[], [-1], [1.5], [[[1]]], 5, None, {"a": 1}]
    for bad in wrong:
        with pytest.raises(InvalidRequest, match="prompt"):
            completion(prompt=bad)


def test_completion_parameters() -> None:
    assert completion(max_tokens=0, echo=True).max_tokens == 0
    assert completion(best_of=1, suffix="").echo is None
    for kind, options in (
        (InvalidRequest, {"max_tokens": 0}),
        (InvalidRequest, {"logprobs": 21}),
        (InvalidRequest, {"logprobs": True}),
        (InvalidRequest, {"max_tokens": -1}),
        (UnsupportedParameter, {"best_of": 2}),
        (UnsupportedParameter, {"suffix": "x"}),
    ):
        with pytest.raises(kind):
            completion(**options)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\udc00x"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}',
        PREFIX + b', "temperature": NaN}',
        PREFIX + b', "temperature": Infinity}',
        PREFIX + b', "temperature": 1e999}',
        PREFIX + b', "seed": 1e400}',
        PREFIX + b"} trailing",
        PREFIX + b', "tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "messages": ' + b'[{"role":' * 100_000,
        PREFIX + b', "response_format": ' + b'{"a":' * 50_000,
        PREFIX[:-1] + b',{"role": "user", "content": "x"}' * 4096 + b"]}",
        b'{"model": "m", "messages": [' + b"{}," * 1_000_000 + b"{}]}",
    ],
)  # fmt: skip
def test_broken_bodies_are_refused_at_once(body: bytes) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidRequest):
        schema.decode(schema.CHAT, body)
    assert time.thread_time() - began < 0.5, "quadratic work takes many times as long"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "prompt": [' + b"[1]," * 1_000_000 + b"[1]]}",
        b'{"model": "m", "prompt": [' + b"1," * 2_000_000 + b"1]}",
        b'{"model": "m", "prompt": [' + b'"",' * 1_300_000 + b'""]}',
        b'{"model": "m", "stop": ' + b"[" * 2_000_000,
        b'{"model": "m", "logit_bias": {' + b'"1":1,' * 700_000 + b'"1":1}}',
        b'{"model": "m", "messages": [' + b'{"role":"user","content":"x"},' * 100_000 + b"{}]}",
    ],
    ids=["lists", "ids", "texts", "deep", "members", "messages"],
)
def test_huge_bodies_are_refused_undecoded(body: bytes) -> None:
    began = time.perf_counter()
    with pytest.raises(InvalidRequest, match="holds too much"):
        schema.check_size(body, 1024)
    assert time.perf_counter() - began < 0.1


def test_what_a_model_can_take_is_not_too_much() -> None:
    schema.check_size(b'{"prompt": "' + b"[1,2],{}" * 500_000 + b'"}', 1024)
    prompt = b"[" + b",".join([b"1"] * 1024) + b"]"
    schema.check_size(b'{"prompt": [' + b",".join([prompt] * schema.MAX_PROMPTS) + b"]}", 1024)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = sorted(
    {
        name
        for cls in (schema.Chat, schema.Completion, schema.Tokenize, schema.Detokenize)
        for name in cls.__struct_fields__
    }
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "x"])},
    optional={name: JSON for name in conversation.Message.__struct_fields__ if name != "role"},
)
BODY = st.dictionaries(st.sampled_from(NAMES), JSON) | st.fixed_dictionaries(
    {"model": st.just("m"), "messages": st.lists(MESSAGE, max_size=3)},
    optional={name: JSON for name in schema.Chat.__struct_fields__ if name not in ("model", "messages")},
)
DECODERS: list[msgspec.json.Decoder[Any]] = [schema.CHAT, schema.COMPLETION, schema.TOKENIZE, schema.DETOKENIZE]


def valid_or_refused(decoder: msgspec.json.Decoder[Any], data: bytes) -> None:
    refusal: CoreError | None = None
    try:
        body = schema.decode(decoder, data)
        if isinstance(body, schema.Chat):
            assert body.prompt() is not None
        if isinstance(body, schema.Completion):
            assert body.prompts()
    except CoreError as error:
        refusal = error
    assert refusal is None or (refusal.http_status == 400 and str(refusal))


@given(st.sampled_from(DECODERS), BODY)
def test_any_json_is_valid_or_refused(decoder: msgspec.json.Decoder[Any], body: Any) -> None:
    valid_or_refused(decoder, json.dumps(body).encode())


@given(st.sampled_from(DECODERS), st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_refused(decoder: msgspec.json.Decoder[Any], data: bytes) -> None:
    valid_or_refused(decoder, data)


@given(st.integers(0, 120), st.binary(min_size=1, max_size=3))
def test_damaged_bodies(position: int, noise: bytes) -> None:
    whole = (
        b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x\\u00e9"}]}], "seed": 5}'
    )
    valid_or_refused(schema.CHAT, whole[:position] + noise + whole[position + len(noise) :])
