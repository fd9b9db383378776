"""The official client, as a user would write it, against the demo model."""

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from .stack import Stack, context

ANSWER = "Hello! I'm HelixFlow AI assistant. How can I help you today?"


@pytest.fixture
def client(demo: Stack) -> Iterator[openai.OpenAI]:
    with openai.DefaultHttpxClient(verify=context(demo.certs)) as http:
        yield openai.OpenAI(base_url=f"{demo.url}/v1", api_key="demo-key", http_client=http, max_retries=0)


@pytest.fixture
async def async_client(demo: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.DefaultAsyncHttpxClient(verify=context(demo.certs)) as http:
        yield openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="demo-key", http_client=http, max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert names == {"helixflow-demo", "gpt-4", "gpt-3.5-turbo"}
    assert client.models.retrieve("gpt-4").object == "model"


def test_hello(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="gpt-3.5-turbo", messages=[{"role": "user", "content": "Hello"}], temperature=0
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_answer_equals_the_whole_one(client: openai.OpenAI) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "user", "content": "Tell me a long story."}
    ]
    whole = client.chat.completions.create(model="gpt-4", messages=messages, temperature=0, max_tokens=120)
    chunks = list(
        client.chat.completions.create(
            model="gpt-4",
            messages=messages,
            temperature=0,
            max_tokens=120,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_seed_decides(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        answer = client.chat.completions.create(
            model="gpt-4",
            messages=[{"role": "user", "content": "Tell me a story."}],
            seed=seed,
            temperature=1.5,
            max_tokens=40,
        )
        return answer.choices[0].message.content or ""

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_stop_n_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="gpt-4",
        messages=[{"role": "user", "content": "Hello"}],
        temperature=0,
        n=2,
        stop=["assistant"],
        logprobs=True,
        top_logprobs=3,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.content == "Hello! I'm HelixFlow AI "
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for token in choice.logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)


def test_completions_with_lists_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="gpt-4", prompt=["One", "Two"], max_tokens=4, temperature=0, echo=True, n=2
    )
    assert len(answer.choices) == 4
    assert [choice.text[:3] for choice in answer.choices] == ["One", "One", "Two", "Two"]
    assert answer.choices[0].text == answer.choices[1].text


def test_typed_errors(client: openai.OpenAI, demo: Stack) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="gpt-4", prompt="word " * 4000, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="gpt-4",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert tools.value.param == "tools"
    with (
        openai.DefaultHttpxClient(verify=context(demo.certs)) as http,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        openai.OpenAI(
            base_url=f"{demo.url}/v1", api_key="wrong", http_client=http, max_retries=0
        ).chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == "invalid_api_key"


@pytest.mark.anyio
async def test_many_async_streams(async_client: openai.AsyncOpenAI) -> None:
    import asyncio

    async def ask() -> str:
        stream = await async_client.chat.completions.create(
            model="gpt-4", messages=[{"role": "user", "content": "Hello"}], temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answers = await asyncio.gather(*(ask() for _ in range(24)))
    assert set(answers) == {ANSWER}
