"""Calls through a real pool: what is rendered, and when."""

import json
import select

import pytest

from helixflow.core_rs import Call, InvalidRequest, PoolClient, Prompt, Unavailable
from helixflow.engine.scripted import Gate

from .harness import LIMIT_S, Harness, events, poll, request, run, serving, text_of


def test_a_chat_streams_events_to_done() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.chat(usage=True)
        await harness.until(call, lambda call: call.accepted)
        assert call.pool == served.address
        chunks = events(await harness.finish(call))
        assert chunks[0]["id"] == "chatcmpl-1"
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert text_of(chunks)
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["usage"]["completion_tokens"] == call.usage.completion_tokens if call.usage else None
        assert (call.done, call.finish_reason, call.error_code) == (True, "stop", None)
        assert call.take() == b""

    with serving(tokens=5) as served:
        run(test, [served.address])


def test_a_chat_without_stream_is_one_body() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.chat(stream=False, n=2)
        body = json.loads(await harness.finish(call))
        assert body["object"] == "chat.completion"
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert call.usage is not None
        assert body["usage"]["completion_tokens"] == call.usage.completion_tokens > 0
        assert call.usage.total_us >= call.usage.first_token_us > 0
        assert harness.wakes == 1

    with serving() as served:
        run(test, [served.address])


def test_acceptance_wakes_when_asked_for_and_tells_the_prompt_size() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        prompts = [Prompt.text("a"), Prompt.tokens([5, 6])]

        def complete(*, wake: bool) -> Call:
            return harness.client.complete(
                request(prompts=prompts), completion_id="cmpl-1", created=5, stream=False, wake_accepted=wake
            )

        calls = [complete(wake=True)]
        await harness.changed(calls[0])
        assert (calls[0].accepted, calls[0].done, calls[0].take(), calls[0].usage) == (True, False, b"", None)
        prompt_tokens = calls[0].prompt_tokens
        assert prompt_tokens is not None
        assert prompt_tokens > 2
        calls.append(complete(wake=False))
        await poll(served.pool.stats, lambda stats: stats.running + stats.queued == 4)
        gate.allow()  # it came too late for the first step and has its slots with the next one
        await poll(lambda: calls[1].accepted, bool)
        assert harness.wakes == 1
        gate.open()
        for call in calls:
            body = json.loads(await harness.finish(call))
            assert body["usage"]["prompt_tokens"] == call.prompt_tokens == prompt_tokens

    gate = Gate()
    with serving(gate=gate) as served:
        run(test, [served.address])


def test_the_length_limit_is_a_finish_reason() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.client.complete(
            request(max_tokens=3, prompts=[Prompt.text("a"), Prompt.tokens([5, 6])]),
            completion_id="cmpl-1",
            created=5,
            stream=False,
        )
        body = json.loads(await harness.finish(call))
        assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]
        assert call.finish_reason == "length"

    with serving(tokens=0) as served:
        run(test, [served.address])


def test_tokenize_and_detokenize() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        tokenize = harness.client.tokenize(
            "gpt-4", Prompt.text("Hello there"), request_id="r", add_special_tokens=False
        )
        body = json.loads(await harness.finish(tokenize))
        assert body["count"] == len(body["tokens"]) > 0
        detokenize = harness.client.detokenize("tiny", body["tokens"], request_id="r")
        assert json.loads(await harness.finish(detokenize)) == {"prompt": "Hello there"}
        assert (detokenize.pool, detokenize.finish_reason) == (served.address, "stop")

    with serving() as served:
        run(test, [served.address])


def test_refusals_raise_their_own_class() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        unknown = harness.chat(model="gpt-9")
        error = await harness.failure(unknown)
        assert (error.code, error.http_status, error.param) == ("model_not_found", 404, "model")
        assert (unknown.accepted, unknown.error_code, unknown.finish_reason) == (False, "model_not_found", "error")
        long = harness.chat("word " * 5000)
        assert (await harness.failure(long)).code == "context_length_exceeded"
        tokens = harness.client.detokenize("tiny", [2**32 - 1], request_id="r")
        assert (await harness.failure(tokens)).code == "invalid_request"

    with serving() as served:
        run(test, [served.address])


def test_models_and_pools_are_told() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        (model,) = harness.client.models()
        assert (model.id, model.aliases, model.created) == ("tiny", ["gpt-4"], 7)
        assert model.max_model_len > 0
        (pool,) = harness.client.pools()
        assert (pool.address, pool.state, pool.outstanding, pool.last_error) == (served.address, "ready", 0, None)
        assert [model.id for model in pool.models] == ["tiny"]

    with serving() as served:
        run(test, [served.address])


def test_the_eventfd_is_readable_exactly_while_calls_are_ready() -> None:
    client = PoolClient(["127.0.0.1:1"], None)
    descriptor = client.fileno()
    assert client.ready() == []
    assert select.select([descriptor], [], [], 0)[0] == []
    calls = [client.detokenize("tiny", [1], request_id="r") for _ in range(3)]
    seen: list[int] = []
    while len(seen) < len(calls):
        assert select.select([descriptor], [], [], LIMIT_S)[0] == [descriptor]
        seen += client.ready()
    assert sorted(seen) == [call.id for call in calls]
    assert select.select([descriptor], [], [], 0)[0] == []
    client.close()


def test_a_closed_client_takes_no_calls() -> None:
    client = PoolClient(["127.0.0.1:1"], None)
    client.close()
    client.close()
    with pytest.raises(Unavailable, match="closed"):
        client.detokenize("tiny", [1], request_id="r")


@pytest.mark.parametrize("address", ["", "host", "host:0", "host:port"])
def test_bad_addresses_are_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        PoolClient([address], None)


def test_any_integer_is_a_seed() -> None:
    for seed in (0, -1, 2**63, 2**64 - 1, -(2**63)):
        request(seed=seed)
    with pytest.raises(OverflowError):
        request(max_tokens=-1)
