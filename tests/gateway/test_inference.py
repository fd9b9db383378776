"""Chat and completions through HTTP: streams, keep-alive, errors, disconnects, what reaches the pool."""

import contextlib
import json
import time
from typing import Any

import h2.connection
import h2.errors
import h2.events
import httpx
import httpx2
import openai
import pytest

from helixflow import core_rs
from helixflow.gateway.accounting import Unmetered
from helixflow.gateway.http import Request
from helixflow.pki.layout import Layout
from tests.gateway.conftest import KEY, Served, serving

HELLO = [{"role": "user", "content": "Hello"}]


def chat(model: str, **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, **options}


def request_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer demo-key\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data)
    )


def test_whole_answer(served: Served, client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=chat("echo"))
    assert answer.status_code == 200
    assert answer.json()["id"].startswith("chatcmpl-")
    assert answer.headers["content-length"] == str(len(answer.content))
    assert client.post("/v1/completions", json={"model": "echo", "prompt": "x"}).json()["id"].startswith("cmpl-")
    assert served.on_loop(lambda: served.bridge.outstanding) == 0


@pytest.mark.parametrize("http2", [False, True])
def test_stream(served: Served, http2: bool) -> None:
    with (
        served.client(headers=KEY, http1=not http2, http2=http2) as client,
        client.stream("POST", "/v1/chat/completions", json=chat("slow", stream=True)) as answer,
    ):
        began = time.monotonic()
        lines: list[str] = []
        for line in answer.iter_lines():
            if not lines:
                assert time.monotonic() - began < 0.5, "the first event must not wait for the last"
            lines += [line] if line else []
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert "content-length" not in answer.headers
    assert lines[0] == 'data: {"word":0}'
    assert lines[-1] == "data: [DONE]"
    assert len(lines) == 52


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_has_an_answer_is_in_the_ledger(
    served: Served, client: httpx.Client, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is written before the last byte leaves: a worker that is killed behind it leaves no unpaid answer."""
    order: list[str] = []
    end, respond, write = Unmetered.end, Request.respond, Request.write

    def ends(self: Unmetered, status: int, *rest: Any, **more: Any) -> None:
        order.append(f"end {status}")
        end(self, status, *rest, **more)

    async def responds(self: Request, *parts: Any) -> None:
        order.append("last byte")
        await respond(self, *parts)

    async def writes(self: Request, data: bytes, more: bool = True) -> None:
        order.append("" if more else "last byte")
        await write(self, data, more)

    monkeypatch.setattr(Unmetered, "end", ends)
    monkeypatch.setattr(Request, "respond", responds)
    monkeypatch.setattr(Request, "write", writes)
    assert client.post("/v1/chat/completions", json=chat("echo", stream=stream)).status_code == 200
    assert order.index("end 200") < order.index("last byte")
    assert served.on_loop(lambda: served.bridge.outstanding) == 0


def test_keep_alive_comments_while_waiting(served: Served) -> None:
    with (
        served.client(headers=KEY) as client,
        client.stream("POST", "/v1/chat/completions", json=chat("stuck", stream=True)) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line)
        assert [next(lines), next(lines)] == [": keep-alive", ": keep-alive"]


def test_a_comment_begins_no_event(served: Served) -> None:
    with (
        served.client(headers=KEY) as client,
        client.stream("POST", "/v1/chat/completions", json=chat("stuck", stream=True)) as answer,
    ):
        data = b""
        for piece in answer.iter_bytes():
            data += piece
            if data.count(b"keep-alive") == 3:
                break
    # Clients that split at empty lines (openai-go up to 3.8) would decode what stands between two of them.
    assert data == b": keep-alive\n" * 3


@pytest.mark.parametrize("stream", [False, True])
def test_refused_before_acceptance(client: httpx.Client, stream: bool) -> None:
    answer = client.post("/v1/chat/completions", json=chat("full", stream=stream))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["code"] == "queue_full"
    answer = client.post("/v1/chat/completions", json=chat("nobody", stream=stream))
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"


def test_failure_after_acceptance(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=chat("late"))
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "timeout_error"
    answer = client.post("/v1/chat/completions", json=chat("late", stream=True))
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    if answer.status_code == 200:  # the failure came after the stream had begun
        assert json.loads(events[-2])["error"]["code"] == "deadline_exceeded"
        assert events[-1] == "[DONE]"
    else:
        assert answer.status_code == 504


def test_unexpected_error_tells_nothing(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=chat("bug"), headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "find-me" in answer.text
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("options", [{"stream": True}, {}])
@pytest.mark.parametrize("model", ["slow", "stuck", "mute"])
def test_disconnect_cancels_within_100_ms(served: Served, model: str, options: dict[str, Any]) -> None:
    known = len(served.fake.calls)
    served.on_loop(served.fake.cancelled.clear)
    connection = served.raw()
    connection.sendall(request_bytes(chat(model, **options)))
    deadline = time.monotonic() + 5
    while len(served.fake.calls) == known:
        assert time.monotonic() < deadline
    if model != "mute" and options:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    gone = time.monotonic()
    connection.close()
    served.wait(served.fake.cancelled)
    assert time.monotonic() - gone < 0.1
    assert served.fake.calls[known].cancelled


def test_a_client_that_reads_nothing_is_cut(pki: Layout) -> None:
    options = {"HELIX_GATEWAY_STALL_TIMEOUT_S": "0.5", "HELIX_GATEWAY_KEEPALIVE_S": "0.2"}
    with serving(pki, **options) as served, contextlib.closing(served.raw("h2")) as wire:
        connection = h2.connection.H2Connection()
        connection.initiate_connection()
        headers = {
            ":method": "POST",
            ":path": "/v1/chat/completions",
            ":scheme": "https",
            ":authority": "localhost",
            "authorization": "Bearer demo-key",
            "content-type": "application/json",
        }
        connection.send_headers(1, list(headers.items()))
        connection.send_data(1, json.dumps(chat("flood", stream=True)).encode(), end_stream=True)
        wire.sendall(connection.data_to_send())
        events: list[h2.events.Event] = []
        while not any(isinstance(event, h2.events.ResponseReceived) for event in events):
            events = connection.receive_data(wire.recv(65536))
        served.wait(served.fake.cancelled)
        [call] = served.fake.calls
        assert call.rendered < 600_000, "what waits for it is bounded: by the socket between front and worker"
        assert served.on_loop(lambda: served.bridge.outstanding) == 0


def test_reset_of_an_http2_stream_cancels(served: Served) -> None:
    known = len(served.fake.calls)
    served.on_loop(served.fake.cancelled.clear)
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    body = json.dumps(chat("slow", stream=True)).encode()
    with contextlib.closing(served.raw("h2")) as wire:
        connection.send_headers(
            1,
            [
                (":method", "POST"),
                (":path", "/v1/chat/completions"),
                (":scheme", "https"),
                (":authority", "localhost"),
                ("authorization", "Bearer demo-key"),
                ("content-type", "application/json"),
            ],
        )
        connection.send_data(1, body, end_stream=True)
        wire.sendall(connection.data_to_send())
        while not any(isinstance(event, h2.events.DataReceived) for event in connection.receive_data(wire.recv(65536))):
            wire.sendall(connection.data_to_send())
        connection.reset_stream(1, h2.errors.ErrorCodes.CANCEL)
        wire.sendall(connection.data_to_send())
        began = time.monotonic()
        served.wait(served.fake.cancelled)
        assert time.monotonic() - began < 0.1
    assert served.fake.calls[known].cancelled


def test_disconnect_while_the_reader_is_slow(served: Served) -> None:
    known = len(served.fake.calls)
    served.on_loop(served.fake.cancelled.clear)
    connection = served.raw()
    connection.sendall(request_bytes(chat("flood", stream=True)))
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    call = served.fake.calls[known]
    before, settled = -1, 0
    deadline = time.monotonic() + 10
    while settled < 5:
        time.sleep(0.05)  # nothing tells that nothing happens
        settled = settled + 1 if call.rendered == before else 0
        before = call.rendered
        assert time.monotonic() < deadline, "an unread stream must stop taking output"
    assert call.rendered < 16 * 1024 * 1024
    connection.close()
    served.wait(served.fake.cancelled)
    assert call.cancelled


def sent(served: Served, client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The call that a request became, and the options of its GenerateRequest."""
    known = len(served.fake.calls)
    headers = {"x-request-id": "trace", "x-request-timeout-ms": "1500"}
    assert client.post(path, json=body, headers=headers).status_code == 200
    call = served.fake.calls[known]
    return call, call.arguments["payload"].options


def test_what_a_chat_becomes(served: Served, client: httpx.Client) -> None:
    body = chat(
        "gpt-4",
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=-1,
        stop="x",
        max_completion_tokens=7,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"5": -100},
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        ignore_eos=True,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        user="somebody",
    )
    call, options = sent(served, client, "/v1/chat/completions", body)
    assert call.stream
    assert call.arguments["flag"] is True
    assert isinstance(options.pop("owner"), core_rs.Owner)
    assert options == {
        "request_id": "trace",
        "model": "gpt-4",
        "prompts": [("chat", [("user", "Hello", None)], True)],
        "timeout_ms": 1500,
        "n": 2,
        "max_tokens": 7,
        "stop": ["x"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "seed": 2**64 - 1,
        "logit_bias": [(5, -100.0)],
        "logprobs": 3,
        "ignore_eos": True,
    }


def test_what_other_servers_parameters_become(served: Served, client: httpx.Client) -> None:
    body = chat(
        "echo",
        min_tokens=2,
        stop_token_ids=[5, 6],
        skip_special_tokens=False,
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
    )
    _call, options = sent(served, client, "/v1/chat/completions", body)
    assert (options["min_tokens"], options["stop_token_ids"], options["skip_special_tokens"]) == (2, [5, 6], False)
    kind, _messages, begins, further = options["prompts"][0]
    assert (kind, begins, further["continue_final_message"]) == ("chat", False, True)
    assert json.loads(further["variables"]) == {"enable_thinking": False, "reasoning_effort": "low"}
    _call, options = sent(served, client, "/v1/chat/completions", chat("echo", add_generation_prompt=False))
    assert options["prompts"] == [("chat", [("user", "Hello", None)], False)]
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["x-helixflow-ignored"] == "reasoning_effort", "the template does not read it"


def test_what_absent_parameters_become(served: Served, client: httpx.Client) -> None:
    _call, options = sent(served, client, "/v1/chat/completions", chat("echo", temperature=None, logprobs=False))
    assert set(options) == {"request_id", "model", "owner", "prompts", "timeout_ms"}
    _call, options = sent(served, client, "/v1/chat/completions", chat("echo", logprobs=True))
    assert options["logprobs"] == 0


def test_what_completions_become(served: Served, client: httpx.Client) -> None:
    body = {"model": "echo", "prompt": ["a", "b"], "echo": True, "logprobs": 0, "max_tokens": 0}
    _call, options = sent(served, client, "/v1/completions", body)
    assert options["prompts"] == [("text", "a"), ("text", "b")]
    assert (options["echo"], options["logprobs"], options["max_tokens"]) == (True, 0, 0)
    _call, options = sent(served, client, "/v1/completions", {"model": "echo", "prompt": [[1], [2, 3]]})
    assert options["prompts"] == [("tokens", [1]), ("tokens", [2, 3])]
    assert options["max_tokens"] == 16


@pytest.mark.parametrize("value", ["0", "-5", "1e3", "x", "", "999999999999"])
def test_timeout_header_is_checked(client: httpx.Client, value: str) -> None:
    answer = client.post("/v1/chat/completions", json=chat("echo"), headers={"x-request-timeout-ms": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-timeout-ms"


def test_tokenize_and_detokenize(served: Served, client: httpx.Client) -> None:
    known = len(served.fake.calls)
    assert client.post("/tokenize", json={"model": "echo", "prompt": "x"}).status_code == 200
    assert client.post("/tokenize", json={"model": "echo", "messages": HELLO}).status_code == 200
    assert client.post("/detokenize", json={"model": "echo", "tokens": [1, 2]}).status_code == 200
    plain, template, back = served.fake.calls[known:]
    assert plain.arguments["flag"] is True
    assert template.arguments["flag"] is False, "the template brings its own special tokens"
    assert back.arguments["payload"] == [1, 2]
    answer = client.post("/tokenize", json={"model": "echo"})
    assert answer.status_code == 400


def test_what_has_no_effect_is_named(client: httpx.Client) -> None:
    body = chat("echo", store=True, foo=1, stream=True, stream_options={"continuous_usage_stats": True})
    body["messages"] = [{"role": "user", "content": "x", "id": 7}]
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    named = "store, foo, stream_options.continuous_usage_stats, messages[].id"
    assert sorted(answer.headers["x-helixflow-ignored"].split(", ")) == sorted(named.split(", "))
    assert "x-helixflow-ignored" not in client.post("/v1/chat/completions", json=chat("echo")).headers


def test_strict_parameters(pki: Layout) -> None:
    with serving(pki, HELIX_GATEWAY_STRICT_PARAMETERS="true") as served, served.client(headers=KEY) as client:
        assert client.post("/v1/chat/completions", json=chat("echo", store=True, user="u")).status_code == 200
        answer = client.post("/v1/chat/completions", json=chat("echo", temprature=1))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "temprature"


def test_more_tokens_than_there_are_positions_are_cut(served: Served, client: httpx.Client) -> None:
    for wanted in (32_000, 2**40):
        _call, options = sent(served, client, "/v1/chat/completions", chat("gpt-4", max_tokens=wanted))
        assert options["max_tokens"] == 128
    _call, options = sent(served, client, "/v1/completions", {"model": "echo", "prompt": "x", "max_tokens": 2**40})
    assert options["max_tokens"] == 128


def test_official_client(served: Served) -> None:
    http = httpx2.Client(verify=served.context)
    with openai.OpenAI(base_url=served.url + "/v1", api_key="demo-key", http_client=http, max_retries=0) as client:
        assert client.models.retrieve("gpt-4").owned_by == "helixflow"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "x"}], temperature=3)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="full", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}])


def test_many_at_once_and_none_left(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with served.client(headers=KEY, limits=httpx.Limits(max_connections=16)) as client:

        def one(index: int) -> int:
            body = chat("slow" if index % 8 == 0 else "echo", stream=bool(index % 2))
            return client.post("/v1/chat/completions", json=body).status_code

        with ThreadPoolExecutor(16) as threads:
            assert set(threads.map(one, range(64))) == {200}
    assert served.on_loop(lambda: served.bridge.outstanding) == 0


def test_http1_without_length_or_host_is_answered(served: Served) -> None:
    with contextlib.closing(served.raw()) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer demo-key\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
