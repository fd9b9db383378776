"""A stand-in for the pool client: the model's name says how a call behaves.

`echo` answers at once; `slow` streams a word every 20 ms; `stuck` is accepted and says nothing; `mute` is never
accepted; `full` is refused; `late` fails after it was accepted; `flood` produces as fast as it is read;
`bug` raises something that is no CoreError.
"""

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from helixflow.config import Config
from helixflow.core_rs import CoreError, DeadlineExceeded, ModelNotFound, PoolClient, QueueFull
from helixflow.gateway import inference, schema
from helixflow.gateway.bridge import Bridge
from helixflow.refusals import refusal

WORDS = 50
MODELS = ("echo", "slow", "stuck", "mute", "full", "late", "flood", "bug")


class FakeRequest:
    """Keeps what GenerateRequest was given; the real one can be sent, not read."""

    def __init__(self, **options: Any) -> None:
        self.options = options


class FakePrompt:
    """Keeps what Prompt was given."""

    @staticmethod
    def chat(messages: Any, add_generation_prompt: bool = True, **options: Any) -> Any:
        return (
            ("chat", messages, add_generation_prompt, options) if options else ("chat", messages, add_generation_prompt)
        )

    @staticmethod
    def text(text: str) -> Any:
        return "text", text

    @staticmethod
    def tokens(ids: list[int]) -> Any:
        return "tokens", ids


@dataclass
class FakeUsage:
    prompt_tokens: int = 3
    cached_tokens: int = 1
    completion_tokens: int = 5
    queue_us: int = 10
    first_token_us: int = 20
    total_us: int = 30


@dataclass
class FakeModel:
    id: str
    aliases: list[str]
    created: int = 1_700_000_000
    max_model_len: int = 128
    template_variables: tuple[str, ...] = ("enable_thinking",)


@dataclass
class FakePool:
    state: str
    reason: str = ""


@dataclass(eq=False)
class FakeCall:
    """One call; `produce` runs on the event loop."""

    client: "FakeClient"
    id: int
    arguments: dict[str, Any]
    stream: bool
    accepted: bool = False
    done: bool = False
    cancelled: bool = False
    usage: FakeUsage | None = None
    finish_reason: str | None = None
    error_code: str | None = None
    pool: str | None = "127.0.0.1:8501"
    prompt_tokens: int | None = None
    wake_accepted: bool = False
    failure: CoreError | None = None
    pending: bytearray = field(default_factory=bytearray)
    rendered: int = 0

    def take(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        if self.arguments["model"] == "flood" and not self.done:
            self.pending += b"data: " + b"x" * 16384 + b"\n\n"
            self.client.announce(self)
        data = bytes(self.pending)
        self.pending.clear()
        self.rendered += len(data)
        return data

    def cancel(self) -> None:
        if not self.done:
            self.cancelled = True
            self._end("cancelled", "cancelled")
            self.client.cancelled.set()

    def say(self, data: bytes) -> None:
        self.accepted = True
        self.prompt_tokens = FakeUsage().prompt_tokens
        self.pending += data
        self.client.announce(self)

    def finish(self, data: bytes) -> None:
        self.done = True
        self.usage = FakeUsage()
        self.finish_reason = "stop"
        self.say(data)

    def fail(self, error: CoreError) -> None:
        if not self.done:
            self.failure = error
            self._end("error", error.code)
            self.client.announce(self)

    def _end(self, reason: str, code: str) -> None:
        self.done = True
        self.finish_reason = reason
        self.error_code = code
        if self.accepted:
            self.usage = FakeUsage(cached_tokens=0, completion_tokens=0, queue_us=0, first_token_us=0)


class FakeClient:
    """The interface of PoolClient, on an eventfd as the real one."""

    def __init__(self) -> None:
        self.calls: list[FakeCall] = []
        self.cancelled = asyncio.Event()
        self.closed = False
        self.listed = [FakeModel("echo", ["gpt-4", "team/echo"]), *(FakeModel(name, []) for name in MODELS[1:])]
        self.pool_list: list[FakePool] = []
        self._loop = asyncio.get_running_loop()
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._changed: set[int] = set()

    def fileno(self) -> int:
        return self._event

    def ready(self) -> list[int]:
        os.eventfd_read(self._event)
        changed, self._changed = self._changed, set()
        return list(changed)

    def announce(self, call: FakeCall) -> None:
        self._changed.add(call.id)
        os.eventfd_write(self._event, 1)

    def chat(
        self,
        request: Any,
        *,
        completion_id: str,
        created: int,
        stream: bool,
        include_usage: bool = False,
        wake_accepted: bool = False,
    ) -> Any:
        call = self._start("chat", request.options["model"], stream, request, completion_id, include_usage)
        call.wake_accepted = wake_accepted
        return call

    complete = chat

    def tokenize(
        self, model: str, prompt: Any, *, request_id: str, add_special_tokens: bool = True, timeout_ms: int = 0
    ) -> Any:
        assert timeout_ms > 0
        return self._start("tokenize", model, False, prompt, request_id, add_special_tokens)

    def detokenize(self, model: str, ids: list[int], *, request_id: str, timeout_ms: int = 0) -> Any:
        assert timeout_ms > 0
        return self._start("detokenize", model, False, ids, request_id, False)

    def models(self) -> Any:
        return self.listed

    def pools(self) -> Any:
        return self.pool_list

    def close(self) -> None:
        self.closed = True

    def _start(self, kind: str, model: str, stream: bool, payload: Any, name: str, flag: bool) -> FakeCall:
        arguments = {"kind": kind, "model": model, "payload": payload, "name": name, "flag": flag}
        call = FakeCall(self, len(self.calls), arguments, stream)
        self.calls.append(call)
        if model == "bug":
            raise RuntimeError("secret detail")
        if model not in MODELS and model != "gpt-4":
            raise refusal(ModelNotFound, f"no model {model}", "model")
        self._loop.call_soon(self._behave, call, model, 0)
        return call

    def _behave(self, call: FakeCall, model: str, step: int) -> None:
        if call.cancelled or model == "mute":
            return
        if model == "full":
            error = refusal(QueueFull, "the queue is full")
            error.retry_after_s = 7
            call.fail(error)
        elif model == "late":
            call.say(b"")
            self._loop.call_soon(call.fail, refusal(DeadlineExceeded, "too late"))
        elif model in ("stuck", "flood"):
            call.say(b"")
        elif not call.stream:
            if call.wake_accepted:
                call.say(b"")
            delay = WORDS * 0.02 if model == "slow" else 0.0
            self._loop.call_later(
                delay, self._finish, call, orjson.dumps({"object": "answer", "id": call.arguments["name"]})
            )
        elif model == "slow" and step < WORDS:
            call.say(b'data: {"word":%d}\n\n' % step)
            self._loop.call_later(0.02, self._behave, call, model, step + 1)
        else:
            call.finish(b'data: {"last":true}\n\ndata: [DONE]\n\n')

    @staticmethod
    def _finish(call: FakeCall, body: bytes) -> None:
        if not call.cancelled:
            call.finish(body)


def connect(_config: Config) -> Bridge:
    """A bridge over the stand-in; the handlers fill in requests that can be read back."""
    vars(inference).update(GenerateRequest=FakeRequest, Prompt=FakePrompt)
    vars(schema).update(Prompt=FakePrompt)
    return Bridge(cast("PoolClient", FakeClient()))
