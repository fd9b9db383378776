"""Chat, completions, tokenise, detokenise: a validated body in, the pool's bytes out."""

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from helixflow.config import GatewayConfig
from helixflow.core_rs import CoreError, GenerateRequest, InvalidRequest, Prompt
from helixflow.gateway import schema
from helixflow.gateway.bridge import Bridge, Running
from helixflow.gateway.errors import final_event, refusal
from helixflow.gateway.http import Request

KEEP_ALIVE = b": keep-alive\n\n"
"""An SSE comment: clients skip it, and everything on the way sees that the connection lives."""
COMPLETION_TOKENS = 16
"""`max_tokens` of a text completion that names none, as the OpenAI API documents it."""
MAX_TIMEOUT_MS = 86_400_000
_TIMEOUT = "x-request-timeout-ms"

_OPTIONAL = (
    "n",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)


class Inference:
    """The handlers that need a pool."""

    def __init__(self, bridge: Bridge, options: GatewayConfig) -> None:
        self._bridge = bridge
        self._timeout_ms = options.request_timeout_ms
        self._keep_alive_s = options.keepalive_s

    async def chat(self, request: Request) -> None:
        """POST /v1/chat/completions."""
        self._bridge.admit()
        body = await self._read(request, schema.CHAT)
        options = self._options(request, body)
        limit = body.max_completion_tokens or body.max_tokens
        if limit is not None:
            options["max_tokens"] = limit
        if body.logprobs:
            options["logprobs"] = body.top_logprobs or 0
        generate = GenerateRequest(prompts=[Prompt.chat(body.conversation())], **options)
        call = self._bridge.admit().chat(
            generate,
            completion_id="chatcmpl-" + request.token,
            created=int(time.time()),
            stream=bool(body.stream),
            include_usage=_include_usage(body),
        )
        await self._answer(request, self._bridge.follow(call, request.receive), body)

    async def complete(self, request: Request) -> None:
        """POST /v1/completions."""
        self._bridge.admit()
        body = await self._read(request, schema.COMPLETION)
        options = self._options(request, body)
        options["max_tokens"] = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if body.logprobs is not None:
            options["logprobs"] = body.logprobs
        if body.echo:
            options["echo"] = True
        generate = GenerateRequest(prompts=list(_prompts(body.prompts())), **options)
        call = self._bridge.admit().complete(
            generate,
            completion_id="cmpl-" + request.token,
            created=int(time.time()),
            stream=bool(body.stream),
            include_usage=_include_usage(body),
        )
        await self._answer(request, self._bridge.follow(call, request.receive), body)

    async def tokenize(self, request: Request) -> None:
        """POST /tokenize. A chat goes through the model's template, which brings its own special tokens."""
        body = await self._read(request, schema.TOKENIZE)
        request.facts["model"] = body.model
        if body.messages is None:
            prompt = Prompt.text(body.prompt or "")
            special = True
        else:
            conversation = [message.flat(f"messages[{index}]") for index, message in enumerate(body.messages)]
            prompt = Prompt.chat(conversation, body.add_generation_prompt is not False)
            special = False
        if body.add_special_tokens is not None:
            special = body.add_special_tokens
        call = self._bridge.admit().tokenize(body.model, prompt, request_id=request.id, add_special_tokens=special)
        with self._bridge.follow(call, request.receive) as running:
            await _whole(request, running)

    async def detokenize(self, request: Request) -> None:
        """POST /detokenize."""
        body = await self._read(request, schema.DETOKENIZE)
        request.facts["model"] = body.model
        call = self._bridge.admit().detokenize(body.model, body.tokens, request_id=request.id)
        with self._bridge.follow(call, request.receive) as running:
            await _whole(request, running)

    async def _read(self, request: Request, decoder: msgspec.json.Decoder[schema.Body]) -> schema.Body:
        """The checked body. Raises what `Request.json` and `schema.decode` raise."""
        body = await request.json()
        if len(body) > schema.SMALL_BODY:
            schema.check_size(body, max((model.max_model_len for model in self._bridge.models()), default=0))
        return schema.decode(decoder, body)

    def _options(self, request: Request, body: schema.Sampling) -> dict[str, Any]:
        """The arguments of GenerateRequest that chat and completions share; absent ones keep its defaults."""
        request.facts["model"] = body.model
        options: dict[str, Any] = {
            "request_id": request.id,
            "model": body.model,
            "timeout_ms": self._timeout(request),
        }
        for name in _OPTIONAL:
            value = getattr(body, name)
            if value is not None:
                options[name] = value
        if body.top_k is not None:
            options["top_k"] = max(body.top_k, 0)  # -1 switches it off in other servers, 0 here
        if body.seed is not None:
            options["seed"] = body.seed & 0xFFFF_FFFF_FFFF_FFFF
        if body.stop is not None:
            options["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
        if body.logit_bias:
            options["logit_bias"] = list(body.logit_bias.items())
        return options

    def _timeout(self, request: Request) -> int:
        """Milliseconds within which a slot must take the request up. Raises InvalidRequest."""
        header = request.headers.get(_TIMEOUT.encode())
        if header is None:
            return self._timeout_ms
        if header.isdigit() and len(header) <= 8 and 1 <= int(header) <= MAX_TIMEOUT_MS:
            return int(header)
        raise refusal(
            InvalidRequest, f"the header {_TIMEOUT} must be a whole number from 1 to {MAX_TIMEOUT_MS}", _TIMEOUT
        )

    async def _answer(self, request: Request, running: Running, body: schema.Sampling) -> None:
        with running:
            try:
                if body.stream:
                    await self._stream(request, running)
                else:
                    await _whole(request, running)
            finally:
                _note(request, running)

    async def _stream(self, request: Request, running: Running) -> None:
        """Passes on what the pool has rendered. A refusal before the pool has accepted is an HTTP error."""
        call = running.call
        while not (call.accepted or call.done):
            await running.changed()
        done = call.done
        data = call.take()
        await request.start_events()
        running.keep_alive(self._keep_alive_s)
        try:
            while not done:
                if data or running.silent:
                    await request.write(data or KEEP_ALIVE)
                    running.spoke()
                await running.changed()
                done = call.done
                data = call.take()
        except CoreError as error:
            request.facts["error"] = error.code
            data = final_event(error)
        await request.write(data, more=False)


async def _whole(request: Request, running: Running) -> None:
    call = running.call
    while not call.done:
        await running.changed()
    await request.respond(200, call.take())


def _include_usage(body: schema.Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage is True


def _prompts(prompts: Iterable[str | list[int]]) -> Iterable[Prompt]:
    for prompt in prompts:
        yield Prompt.text(prompt) if isinstance(prompt, str) else Prompt.tokens(prompt)


def _note(request: Request, running: Running) -> None:
    """Adds to the log line what the call has used."""
    call = running.call
    facts = request.facts
    usage = call.usage
    if usage is not None:
        facts["prompt_tokens"] = usage.prompt_tokens
        facts["cached_tokens"] = usage.cached_tokens
        facts["completion_tokens"] = usage.completion_tokens
        facts["queue_ms"] = usage.queue_us / 1000
        facts["first_token_ms"] = usage.first_token_us / 1000
    if call.finish_reason is not None:
        facts["finish"] = call.finish_reason
    if call.error_code is not None:
        facts.setdefault("error", call.error_code)  # what the gateway ended a call for comes first
    if call.pool is not None:
        facts["pool"] = call.pool
