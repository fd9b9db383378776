"""Chat, completions, tokenise, detokenise: a validated body in, the pool's bytes out."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

from helixflow import log
from helixflow.config import GatewayConfig
from helixflow.core_rs import Call, CoreError, DeadlineExceeded, GenerateRequest, InvalidRequest, Prompt, Unavailable
from helixflow.gateway import ignored, schema
from helixflow.gateway.accounting import Accountant, Admission
from helixflow.gateway.bridge import Bridge, Running
from helixflow.gateway.errors import final_event
from helixflow.gateway.http import ClientGone, Request
from helixflow.gateway.owners import Owners
from helixflow.refusals import refusal

KEEP_ALIVE = b": keep-alive\n"
"""An SSE comment: clients skip it, and everything on the way sees that the connection lives.

One newline: an empty line ends an event, and some clients decode the empty one that they have read then.
"""
BYTES_PER_TOKEN = 4
"""A prompt is guessed to have a token for so many bytes of the body, until the pool has counted it."""
CLIENT_GONE = 499
"""Written into log and ledger (never sent) for a client that went away before its answer."""
MAX_TIMEOUT_MS = 86_400_000
_TIMEOUT = "x-request-timeout-ms"

Answer = Callable[[Request, Running, Admission], Awaitable[CoreError | None]]

logger = log.get("gateway")

_OPTIONAL = (
    "n",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
    "stop_token_ids",
    "skip_special_tokens",
)


class Inference:
    """The handlers that need a pool."""

    def __init__(self, bridge: Bridge, options: GatewayConfig, accountant: Accountant) -> None:
        self._bridge = bridge
        self._accountant = accountant
        self._timeout_ms = options.request_timeout_ms
        self._keep_alive_s = options.keepalive_s
        self._owners = Owners(options)
        self._strict = options.strict_parameters
        self._stall_s = options.stall_timeout_s

    async def chat(self, request: Request) -> None:
        """POST /v1/chat/completions."""
        self._bridge.admit()
        body, size = await self._read(request, schema.CHAT)
        options = self._options(request, body)
        limit = body.limit()
        if limit is not None:
            limit = options["max_tokens"] = self._fitting(body.model, limit)
        if body.logprobs:
            options["logprobs"] = body.top_logprobs or 0
        generate = GenerateRequest(prompts=[body.prompt()], **options)

        def start(wake: bool) -> Call:
            return self._bridge.admit().chat(
                generate,
                completion_id="chatcmpl-" + request.token,
                created=int(time.time()),
                stream=bool(body.stream),
                include_usage=_include_usage(body),
                wake_accepted=wake,
            )

        choices = body.n or 1
        await self._generate(request, body, start, size, choices * limit if limit is not None else -choices)

    async def complete(self, request: Request) -> None:
        """POST /v1/completions."""
        self._bridge.admit()
        body, size = await self._read(request, schema.COMPLETION)
        options = self._options(request, body)
        options["max_tokens"] = self._fitting(body.model, body.limit())
        if body.logprobs is not None:
            options["logprobs"] = body.logprobs
        if body.echo:
            options["echo"] = True
        prompts = list(_prompts(body.prompts()))
        generate = GenerateRequest(prompts=prompts, **options)

        def start(wake: bool) -> Call:
            return self._bridge.admit().complete(
                generate,
                completion_id="cmpl-" + request.token,
                created=int(time.time()),
                stream=bool(body.stream),
                include_usage=_include_usage(body),
                wake_accepted=wake,
            )

        await self._generate(request, body, start, size, len(prompts) * (body.n or 1) * options["max_tokens"])

    async def tokenize(self, request: Request) -> None:
        """POST /tokenize. A chat goes through the model's template, which brings its own special tokens."""
        body, _ = await self._read(request, schema.TOKENIZE)
        request.facts["model"] = body.model
        if body.messages is None:
            prompt = Prompt.text(body.prompt or "")
            special = True
        else:
            prompt = schema.chat_prompt(body.messages, body.add_generation_prompt, {})
            special = False
        if body.add_special_tokens is not None:
            special = body.add_special_tokens

        def start(_wake: bool) -> Call:
            return self._bridge.admit().tokenize(
                body.model, prompt, request_id=request.id, add_special_tokens=special, timeout_ms=timeout_ms
            )

        timeout_ms = self._timeout(request)
        admission = await self._accountant.admit(request, self._model(request, body.model))
        await self._run(request, admission, start, _whole)

    async def detokenize(self, request: Request) -> None:
        """POST /detokenize."""
        body, _ = await self._read(request, schema.DETOKENIZE)
        request.facts["model"] = body.model

        def start(_wake: bool) -> Call:
            return self._bridge.admit().detokenize(
                body.model, body.tokens, request_id=request.id, timeout_ms=timeout_ms
            )

        timeout_ms = self._timeout(request)
        admission = await self._accountant.admit(request, self._model(request, body.model))
        await self._run(request, admission, start, _whole)

    def _model(self, request: Request, name: str) -> str:
        """The model behind a name. Raises PermissionDenied when the caller may not use it."""
        canonical = self._bridge.canonical(name)
        request.caller.check_model(name, canonical)
        return canonical

    async def _read(self, request: Request, decoder: msgspec.json.Decoder[schema.Body]) -> tuple[schema.Body, int]:
        """The checked body and its size (bytes). Raises what `Request.json` and `schema.decode` raise."""
        body = await request.json()
        if len(body) > schema.SMALL_BODY:
            schema.check_size(body, max((model.max_model_len for model in self._bridge.models()), default=0))
        if request.caller.content is not None:
            request.body = body
        parsed = schema.decode(decoder, body)
        names = schema.without_effect(body, parsed, self._strict)
        if isinstance(parsed, schema.Chat):
            known = self._bridge.template_variables(parsed.model)
            names += [name for name in parsed.given_variables() if name.rpartition(".")[2] not in known]
        if names:
            request.extra_headers.append((ignored.HEADER, ignored.header(names)))
            logger.debug("parts of a request have no effect", request_id=request.id, names=names[: ignored.MAX_NAMES])
        return parsed, len(body)

    def _fitting(self, model: str, wanted: int) -> int:
        """Tokens to ask for: no more than the model has positions, which the pool cuts to what the prompt leaves."""
        return min(wanted, self._bridge.positions(model), schema.MAX_TOKENS)

    def _options(self, request: Request, body: schema.Sampling) -> dict[str, Any]:
        """The arguments of GenerateRequest that chat and completions share; absent ones keep its defaults."""
        request.facts["model"] = body.model
        options: dict[str, Any] = {
            "request_id": request.id,
            "model": body.model,
            "timeout_ms": self._timeout(request),
            "owner": self._owners.of(request.caller),
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

    async def _generate(
        self, request: Request, body: schema.Sampling, start: Callable[[bool], Call], size: int, completion: int
    ) -> None:
        """`size` of the body (bytes); `completion`: tokens asked for, or minus the choices that have no maximum."""
        model = self._model(request, body.model)
        admission = await self._accountant.admit(request, model, size // BYTES_PER_TOKEN + 1, completion)
        await self._run(request, admission, start, self._read_stream if body.stream else _whole)

    async def _run(self, request: Request, admission: Admission, start: Callable[[bool], Call], answer: Answer) -> None:
        """Runs an admitted request to its end, which the admission hears of whatever it is.

        `answer` tells it of a good one before the last byte leaves: whoever has an answer finds it in the ledger, also
        when this process is killed right behind it.
        """
        call: Call | None = None
        try:
            call = start(admission.exact)
            with self._bridge.follow(call, request.receive) as running:
                try:
                    failure = await answer(request, running, admission)
                finally:
                    await running.settled()
                    _note(request, running)
        except ClientGone:
            admission.end(CLIENT_GONE, call, finish="cancelled")
            raise
        except CoreError as error:
            # While no pool tells which models there are, clients could fill the ledger's sums with invented names.
            nameless = isinstance(error, Unavailable) and not self._bridge.has_seen(request.facts.get("model", ""))
            admission.end(error.http_status, call, error, nameless=nameless)
            raise
        except BaseException:
            admission.end(500, call, finish="error")
            raise
        admission.end(request.status, call, failure)

    async def _read_stream(self, request: Request, running: Running, admission: Admission) -> CoreError | None:
        """`_stream`, as long as the client reads it. Raises DeadlineExceeded when it does not."""
        try:
            return await self._stream(request, running, admission)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not running.stalled or task is None:
                raise
            task.uncancel()
            message = f"the client has read nothing for {self._stall_s:g} s (gateway.stall_timeout_s), so it was cut"
            raise refusal(DeadlineExceeded, message) from None

    async def _stream(self, request: Request, running: Running, admission: Admission) -> CoreError | None:
        """Passes on what the pool has rendered; returns what ended it early.

        Whatever ends it before it has a slot is an HTTP error.
        """
        call = running.call
        while not (call.accepted or call.done):
            await running.changed()
        if admission.exact and call.prompt_tokens is not None:
            await admission.prompt(call.prompt_tokens)
        capture = admission.capture()
        done = call.done
        data = call.take()
        await request.start_events()
        running.keep_alive(self._keep_alive_s, self._stall_s)
        failure: CoreError | None = None
        try:
            while not done:
                if data or running.silent:
                    running.speaks()
                    await request.write(data or KEEP_ALIVE)
                    running.spoke()
                    if capture is not None:
                        capture.answer(data)
                await running.changed()
                done = call.done
                data = call.take()
        except CoreError as error:
            failure = error
            request.facts["error"] = error.code
            data = final_event(error)
        if capture is not None:
            capture.answer(data)
        if failure is None:
            admission.end(request.status, call)
        running.speaks()
        await request.write(data, more=False)
        return failure


async def _whole(request: Request, running: Running, admission: Admission) -> CoreError | None:
    call = running.call
    exact = admission.exact
    while not call.done:
        if exact and call.accepted and call.prompt_tokens is not None:
            exact = False
            await admission.prompt(call.prompt_tokens)
        else:
            await running.changed()
    data = call.take()
    capture = admission.capture()
    if capture is not None:
        capture.answer(data)
    admission.end(200, call)
    await request.respond(200, data)
    return None


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
