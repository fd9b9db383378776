"""The contract of the Rust extension. Checked against the built module by `make lint`."""

from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

__version__: str

# --- logs ---------------------------------------------------------------------

def init_logging(service: str, level: str, json: bool) -> None:
    """Sends the log lines of the extension to standard error, in the form of the Python side.

    The first call of a process counts. Raises ValueError for an unknown level.
    """

# --- errors -------------------------------------------------------------------

class CoreError(Exception):
    """Base of every error that the extension raises on purpose.

    `args` is `(message,)`. Every concrete class carries its row of the error table.
    """

    code: str
    retryable: bool
    http_status: int
    param: str | None
    retry_after_s: int | None

class InvalidRequest(CoreError): ...
class UnsupportedParameter(CoreError): ...
class ContextLengthExceeded(CoreError): ...
class InvalidApiKey(CoreError): ...
class PermissionDenied(CoreError): ...
class ModelNotFound(CoreError): ...
class NotFound(CoreError): ...
class MethodNotAllowed(CoreError): ...
class PayloadTooLarge(CoreError): ...
class UnsupportedMediaType(CoreError): ...
class QueueFull(CoreError): ...
class DeadlineExceeded(CoreError): ...
class Cancelled(CoreError): ...
class EngineFailed(CoreError): ...
class Unavailable(CoreError): ...
class Draining(CoreError): ...
class Internal(CoreError): ...
class ModelFileError(CoreError): ...
class TlsError(CoreError): ...

@final
class ErrorRow:
    """One row of the error table: code <-> HTTP <-> gRPC <-> OpenAI type <-> class."""

    code: str
    http_status: int
    grpc_status: int
    openai_type: str
    retryable: bool
    exception: type[CoreError]

def error_table() -> list[ErrorRow]: ...

# --- TLS ----------------------------------------------------------------------

@final
class TlsFiles:
    """Paths of one identity: PEM files, key PKCS#8. `crl` is optional."""

    def __new__(cls, ca: str, cert: str, key: str, crl: str | None = None) -> TlsFiles: ...

# --- gateway side: calls to inference pools -----------------------------------

def json_within(body: bytes, structures: int, elements: int) -> bool:
    """Whether a JSON text has at most so many arrays, objects and members, and elements in them. Releases the GIL.

    One pass that ends at the first limit; text that is no JSON may pass.
    """

@final
class Prompt:
    """One prompt: a chat, a text, or token ids."""

    @staticmethod
    def chat(messages: list[tuple[str, str, str | None]], add_generation_prompt: bool = True) -> Prompt:
        """`messages`: (role, content, name)."""
    @staticmethod
    def text(text: str) -> Prompt: ...
    @staticmethod
    def tokens(ids: list[int]) -> Prompt: ...

@final
class GenerateRequest:
    """A request as the pool understands it. Values were validated by the caller."""

    def __new__(
        cls,
        *,
        request_id: str,
        model: str,
        prompts: list[Prompt],
        n: int = 1,
        max_tokens: int | None = None,
        stop: list[str] = ...,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        logit_bias: list[tuple[int, float]] = ...,
        logprobs: int | None = None,
        echo: bool = False,
        ignore_eos: bool = False,
        timeout_ms: int = 0,
    ) -> GenerateRequest: ...

@final
class Usage:
    """Final counts of a call (tokens) and its times (microseconds since arrival at the pool)."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_us: int
    first_token_us: int
    total_us: int

@final
class Call:
    """A running call. Wake-ups arrive through `PoolClient.ready()`.

    Dropping it, or `cancel()`, ends the work at the pool.
    """

    id: int
    accepted: bool
    """The pool has queued the request. A failure from here on may still come before the first bytes: see `take`."""
    done: bool
    """Everything has been produced; `take()` may still hold the last bytes."""
    usage: Usage | None
    finish_reason: str | None
    """`stop`, `length`, `cancelled` or `error` (the first choice's), once done."""
    error_code: str | None
    """Code of the error that ended the call, once done."""
    pool: str | None
    """Address of the pool that serves the call."""
    def take(self) -> bytes:
        """Everything rendered since the last call: SSE events, or the JSON body once done. Empty when nothing is new.

        Raises the call's CoreError when it failed before anything was rendered; a later failure is rendered as an
        error event and `[DONE]`. While `stream_buffer_bytes` are not taken, the pool parks the call.
        """
    def cancel(self) -> None:
        """Ends the work at the pool; the call is done at once, as cancelled. Nothing is rendered for it."""

@final
class ModelInfo:
    id: str
    aliases: list[str]
    created: int
    max_model_len: int

@final
class PoolInfo:
    """What the client knows of one pool."""

    address: str
    state: Literal["connecting", "ready", "not_ready", "draining", "ejected"]
    outstanding: int
    """Sequences (prompts times choices) of this client that are under way there."""
    models: list[ModelInfo]
    slots: int
    running: int
    """Sequences, of all its clients, that have a slot; `queued` ones wait for it. As the pool last told."""
    queued: int
    last_error: str | None

@final
class PoolClient:
    """Calls to a set of inference pools: least outstanding work first, failing ones ejected.

    Owns a tokio runtime. Create it inside a worker, never before a fork.
    """

    def __new__(
        cls,
        addresses: list[str],
        tls: TlsFiles | None,
        *,
        expect_service: str = "inference-pool",
        connect_timeout_ms: int = 2000,
        threads: int = 1,
        stream_buffer_bytes: int = 65536,
    ) -> PoolClient:
        """Connects in the background and looks at the certificate files every second.

        `tls` None: plain TCP, which only reaches loopback addresses. `expect_service`: whose certificate a pool must
        show. Raises InvalidRequest for a bad address and TlsError for bad files.
        """
    def fileno(self) -> int:
        """An eventfd that is readable while calls are ready: give it to `loop.add_reader`."""
    def ready(self) -> list[int]:
        """Ids of the calls that changed since the last `ready()`; resets the eventfd.

        A streaming call changes when it is accepted, when bytes are rendered and when it is done; any other call
        when it is done.
        """
    def chat(
        self, request: GenerateRequest, *, completion_id: str, created: int, stream: bool, include_usage: bool = False
    ) -> Call: ...
    def complete(
        self, request: GenerateRequest, *, completion_id: str, created: int, stream: bool, include_usage: bool = False
    ) -> Call: ...
    def tokenize(self, model: str, prompt: Prompt, *, request_id: str, add_special_tokens: bool = True) -> Call: ...
    def detokenize(self, model: str, ids: list[int], *, request_id: str) -> Call: ...
    def models(self) -> list[ModelInfo]:
        """Models of the pools that are ready now, each once."""
    def pools(self) -> list[PoolInfo]:
        """What is known of every pool now, in the order of the addresses."""
    def reload_tls(self) -> None:
        """Verifies the files and swaps them in; new connections replace the old ones without cutting a call.

        Raises TlsError and keeps the old files otherwise.
        """
    def close(self) -> None:
        """Ends the threads; calls under way end as Unavailable. May be called twice."""

# --- pool side ----------------------------------------------------------------

@final
class Batch:
    """One engine step, packed. All arrays int32 and C-contiguous.

    `slots`, `past`, `counts`, `wanted` have one entry per sequence; a sequence owns the next
    `counts[b]` of `token_ids`, which go to positions `past[b] ...` of slot `slots[b]`; the
    logits of its last `wanted[b]` tokens are returned, in order.
    """

    token_ids: NDArray[np.int32]
    slots: NDArray[np.int32]
    past: NDArray[np.int32]
    counts: NDArray[np.int32]
    wanted: NDArray[np.int32]

@final
class PoolOptions:
    def __new__(
        cls,
        *,
        model_id: str,
        aliases: list[str] = ...,
        created: int = 0,
        queue_requests: int = 1024,
        queue_tokens: int = 1_048_576,
        step_tokens: int = 512,
        stream_frames: int = 64,
        stall_timeout_ms: int = 60_000,
        default_timeout_ms: int = 120_000,
        prefix_reuse: bool = True,
    ) -> PoolOptions: ...

@final
class PoolStats:
    slots: int
    running: int
    parked: int
    """Running sequences that pause because their reader is behind."""
    queued: int
    queued_tokens: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    requests_accepted: int
    requests_refused: int
    requests_finished: int
    requests_cancelled: int
    requests_failed: int

@final
class Pool:
    """Text, scheduler and gRPC server of one model; the engine is a Python object."""

    def __new__(cls, model_dir: str, options: PoolOptions) -> Pool:
        """Loads tokenizer, template and generation config. Raises ModelFileError (file, key, reason)."""

    def serve(self, listen: str, tls: TlsFiles | None, *, allow: list[str] | None = None, threads: int = 1) -> str:
        """Starts the gRPC server (inference, health, reflection); returns the bound `host:port`.

        `allow`: services whose client certificates may call (default: api-gateway and monitoring). Without `tls` only
        a loopback address is served. The server answers before `run`, as not ready. The certificate files are watched.
        Raises TlsError, InvalidRequest (not an address) or Unavailable (cannot be bound).
        """

    def run(self, engine: Any) -> None:
        """The engine loop: blocks the calling thread until `stop()`. GIL held only inside the engine.

        `engine`: see `helixflow.engine.base.Engine`. An exception of the engine fails the requests of that step with
        EngineFailed and all others with Unavailable, and is raised; so is EngineFailed when `step` returns an array of
        the wrong shape, type or layout. The pool is not ready then until `run` is called again.
        """

    def drain(self) -> None:
        """Not ready at once; new requests are refused as Draining; running ones go on."""

    def idle(self) -> bool:
        """Whether no request is in work or on its way to its client."""

    def stop(self) -> None:
        """Cuts what still runs with an error frame and ends `run()` and the server (after at most 2 s)."""

    def stats(self) -> PoolStats: ...
    def reload_tls(self) -> None:
        """Verifies the certificate files and swaps them in. Raises TlsError and keeps the old ones otherwise."""
