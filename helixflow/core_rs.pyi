"""The contract of the Rust extension. Checked against the built module by `make lint`."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal, Self, final

import numpy as np
from numpy.typing import NDArray

__version__: str

# --- logs ---------------------------------------------------------------------

def init_logging(
    service: str,
    level: str,
    *,
    json: bool,
    unblock: bool = False,
    window_s: float = 60.0,
    file: str | None = None,
    max_bytes: int = 0,
    max_age_s: int = 0,
    keep: int = 0,
) -> None:
    """Sends the log lines of this process to standard error, or to `file`, from a queue that nobody waits for.

    `level`: of the extension's own lines. `unblock`: no other write to standard output and standard error waits
    either. `window_s`: repetitions are summed up this often (seconds). `max_bytes`, `max_age_s` (0: any), `keep`: when
    the file is set aside, and how many are kept. Raises ValueError for an unknown
    level, OSError for a file that cannot be opened. The first call of a process decides about `level`.
    """

def log_line(text: str) -> None:
    """Queues one line; `text` has no line feed. Never waits: what does not fit is dropped and counted."""

def log_text(descriptor: int, text: str) -> None:
    """Queues what a program prints to standard output (1) or standard error (2), as it is. Never waits."""

def log_first(level: str, component: str, event: str, what: str) -> bool:
    """Whether a line of this kind is to be written: the first of a window are, the others' sum is told at its end.

    `what` tells the kinds of one event apart. Raises ValueError for an unknown level.
    """

def log_counts() -> tuple[int, int]:
    """Lines of this process that were lost because nobody read them, and bytes that wait to be read."""

def log_forked() -> None:
    """Starts the log of a forked process, in it: the thread that writes has stayed behind. Raises OSError."""

def flush_logs(timeout_ms: int) -> bool:
    """Waits until every line is written, at most `timeout_ms`; false when some are not. Tells sums of repetitions."""

# --- files --------------------------------------------------------------------

def append(descriptor: int, data: bytes) -> int:
    """Writes to a file without letting go of the GIL, which would cost more than the copy; returns the bytes written.

    For small writes to files only: a descriptor that blocks would hold every thread. Raises OSError.
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
class InvalidToken(CoreError): ...
class InvalidCredentials(CoreError): ...
class PermissionDenied(CoreError): ...
class PasswordChangeRequired(CoreError): ...
class SecondFactorRequired(CoreError): ...
class SecondFactorMissing(CoreError): ...
class ModelNotFound(CoreError): ...
class NotFound(CoreError): ...
class Conflict(CoreError): ...
class MethodNotAllowed(CoreError): ...
class PayloadTooLarge(CoreError): ...
class UnsupportedMediaType(CoreError): ...
class QueueFull(CoreError): ...
class RateLimitExceeded(CoreError): ...
class InsufficientQuota(CoreError): ...
class AccountLocked(CoreError): ...
class DeadlineExceeded(CoreError): ...
class Cancelled(CoreError): ...
class EngineFailed(CoreError): ...
class Unavailable(CoreError): ...
class Draining(CoreError): ...
class LedgerFull(CoreError): ...
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
    def chat(
        messages: list[tuple[str, str, str | None]],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        extras: list[tuple[int, str | None, list[tuple[str, str, str]], str | None]] = ...,
        variables: bytes | None = None,
    ) -> Prompt:
        """`messages`: (role, content, name). `extras`: what a few of them have besides: (index, reasoning, calls of
        tools as (id, name, arguments), id of the call that it answers). `variables` of the template: a JSON object.
        """
    @staticmethod
    def text(text: str) -> Prompt: ...
    @staticmethod
    def tokens(ids: list[int]) -> Prompt: ...

@final
class Owner:
    """For whom a request runs. Identifiers have 16 bytes, or none: nobody in particular.

    `prefixes`: who may start from what the request leaves in the caches, and whose leavings it may use.
    `organisation`, `key`: whose share of the engine it takes, and how large these are beside others.
    """

    def __new__(
        cls,
        *,
        prefixes: bytes,
        organisation: bytes,
        key: bytes,
        organisation_weight: float = 1.0,
        key_weight: float = 1.0,
    ) -> Owner: ...

@final
class GenerateRequest:
    """A request as the pool understands it. Values were validated by the caller.

    One without an owner runs for a stranger, who shares no prefix with anybody.
    """

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
        owner: Owner | None = None,
        min_tokens: int = 0,
        stop_token_ids: list[int] = ...,
        skip_special_tokens: bool = True,
    ) -> GenerateRequest: ...

@final
class Usage:
    """Counts of a call (tokens) and its times (microseconds).

    From the pool, times since the arrival there, when the call reached its regular end or the pool says how far it
    came. Otherwise what has arrived here: `cached_tokens` and `queue_us` are 0, times are since the call was started,
    and `first_token_us` is 0 when no token came.
    """

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
    """The request has a slot. A failure from here on may still come before the first bytes: see `take`."""
    done: bool
    """Everything has been produced; `take()` may still hold the last bytes."""
    prompt_tokens: int | None
    """Of all prompts together, known once accepted."""
    usage: Usage | None
    """Once done, however it ended; None for a call that was never accepted."""
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
        """Ends the work at the pool. Nothing is rendered for it any more.

        The call is done, as cancelled, at once while it has no slot; else when the pool has told its counts, or after a
        second.
        """

@final
class ModelInfo:
    id: str
    aliases: list[str]
    created: int
    max_model_len: int
    template_variables: list[str]

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
    reason: str
    """Why it is not ready, as it last told: `engine_loading`, `engine_failed`, `engine_stuck`, `draining`; or empty."""

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
        stream_buffer_bytes: int = 16384,
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
        when it is done, and when it is accepted if that was asked for.
        """
    def chat(
        self,
        request: GenerateRequest,
        *,
        completion_id: str,
        created: int,
        stream: bool,
        include_usage: bool = False,
        wake_accepted: bool = False,
    ) -> Call:
        """Starts a chat completion. `wake_accepted`: a call without `stream` is ready when it is accepted, too."""
    def complete(
        self,
        request: GenerateRequest,
        *,
        completion_id: str,
        created: int,
        stream: bool,
        include_usage: bool = False,
        wake_accepted: bool = False,
    ) -> Call:
        """Starts a text completion, as `chat`."""
    def tokenize(
        self,
        model: str,
        prompt: Prompt,
        *,
        request_id: str,
        add_special_tokens: bool = True,
        timeout_ms: int = 30_000,
    ) -> Call: ...
    def detokenize(self, model: str, ids: list[int], *, request_id: str, timeout_ms: int = 30_000) -> Call: ...
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

# --- services that are written in Python ---------------------------------------

def descriptors() -> bytes:
    """The protos as an encoded `google.protobuf.FileDescriptorSet`, imports first."""

@final
class RpcIncoming:
    """One call to a service. Dropped without an end, it fails as Internal."""

    id: int
    method: str
    """For example `AuthService/Verify`."""
    message: bytes
    """The encoded request, copied at each access."""
    service: str | None
    """Whose client certificate the caller showed; None over plain TCP."""
    address: str
    """`host:port` that the connection comes from."""
    request_id: str
    """The header `x-request-id`, or empty."""
    cancelled: bool
    """Nobody waits for the answer any more."""
    def send(self, message: bytes) -> bool:
        """Queues one message. False, and not queued, when 1024 messages or 4 MiB wait already, or the call is over.

        In the first case `RpcServer.changed()` tells when there is room again.
        """
    def finish(self, message: bytes | None = None) -> None:
        """Ends the answer, behind `message` if given. What follows an end is ignored."""
    def fail(self, code: str, message: str, param: str | None = None, retry_after_s: int | None = None) -> None:
        """Ends the answer with an error. `code`: of the error table; ValueError otherwise.

        `draining` says that nothing was done: the client tries another server.
        """

@final
class RpcServer:
    """A gRPC server whose methods are handled in Python. Owns a tokio runtime; serves once."""

    def __new__(cls, services: list[str], *, max_calls: int = 8192) -> RpcServer:
        """`services`: names as in the protos (`AuthService`); InvalidRequest for one that they have not.

        While `max_calls` calls are open, more are refused as Unavailable.
        """
    def serve(self, listen: str, tls: TlsFiles | None, allow: list[str], threads: int = 1) -> str:
        """Starts the server (the services, health, reflection); returns the bound `host:port`.

        `allow`: services whose client certificates may connect. Without `tls` only a loopback address is served. The
        certificate files are watched. Health says "not serving" until `set_serving`. Requests are at most 16 MiB.
        Raises TlsError, InvalidRequest (not an address) or Unavailable (cannot be bound).
        """
    def fileno(self) -> int:
        """An eventfd that is readable while there are calls or changes: give it to `loop.add_reader`."""
    def calls(self) -> list[RpcIncoming]:
        """New calls since the last `calls()`; resets the eventfd."""
    def changed(self) -> list[int]:
        """Ids of earlier calls that were cancelled or have room again, as of the last `calls()`."""
    def set_serving(self, serving: bool) -> None:
        """What the health service answers."""
    def reload_tls(self) -> None:
        """Verifies the certificate files and swaps them in. Raises TlsError and keeps the old ones otherwise."""
    def stop(self, grace_ms: int) -> None:
        """Takes no new connection, lets calls end within this time, then cuts them. Blocks; releases the GIL."""

@final
class RpcCall:
    """A call under way. Dropping it, or `cancel()`, cancels it at the server."""

    id: int
    done: bool
    """Everything has come; `take()` may still hold the last messages."""
    def take(self) -> list[bytes]:
        """Messages since the last `take()`; raises the call's CoreError when it failed and none is left.

        While 1 MiB is not taken, the server is held back.
        """
    def cancel(self) -> None:
        """Ends the call at the server; it is done at once, as Cancelled."""

@final
class RpcClient:
    """Calls to one of several equal servers over one connection: the first that works, then the next.

    Owns a tokio runtime. Create it inside the process that uses it, never before a fork.
    """

    server: str | None
    """Address that calls go to now; None while nothing is connected."""
    last_error: str | None
    """Why the last connection was lost or not made; None once there is one again."""
    def __new__(
        cls,
        addresses: list[str],
        tls: TlsFiles | None,
        *,
        expect_service: str,
        connect_timeout_ms: int = 2000,
        threads: int = 1,
    ) -> RpcClient:
        """Connects in the background and looks at the certificate files every second.

        `tls` None: plain TCP, which only reaches loopback addresses. `expect_service`: whose certificate a server
        must show. Raises InvalidRequest for a bad address and TlsError for bad files.
        """
    def fileno(self) -> int:
        """An eventfd that is readable while calls are ready: give it to `loop.add_reader`."""
    def ready(self) -> list[int]:
        """Ids of the calls that changed since the last `ready()`; resets the eventfd.

        A stream changes with every message and at its end, any other call when it is done.
        """
    def call(self, path: str, message: bytes, *, request_id: str, timeout_ms: int) -> RpcCall:
        """Starts a call of a method (`/helixflow.v1.AuthService/Verify`). `timeout_ms` 0: no limit.

        It waits for a connection up to its time or 1 s, then it is Unavailable. It moves to another connection only
        while the server has not begun with it. Raises InvalidRequest for an unknown method and Unavailable once closed.
        """
    def reload_tls(self) -> None:
        """Verifies the files and swaps them in; a new connection replaces the old one without cutting a call.

        Raises TlsError and keeps the old files otherwise.
        """
    def close(self) -> None:
        """Ends the threads; calls under way end as Unavailable. May be called twice."""

# --- pool side ----------------------------------------------------------------

def gumbel(seeds: NDArray[np.uint64], positions: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Fills `out` [R, C] with the noise that a pool's sampler adds to the candidates of rank 0 .. C - 1.

    C is at most 65; rank 64 is everything beyond the candidates. `seeds`, `positions` (of the tokens to be drawn): [R].
    A row depends on its seed and position only. Releases the GIL for many rows. Raises ValueError for shapes that do
    not fit, negative positions and arrays that are not C-contiguous, TypeError for wrong dtypes.
    """

def sample(
    logits: NDArray[np.float32],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    position: int,
) -> int:
    """The token that a pool draws from one row of logits [V], C-contiguous. Minus infinity excludes a token.

    `temperature` 0 is greedy; `top_p` 1, `top_k` 0 and `min_p` 0 keep all. `position`: of the token to be drawn.
    Raises ValueError for values out of range and for rows that allow no choice.
    """

def encode(model_dir: str | PathLike[str], texts: list[str]) -> list[list[int]]:
    """Token ids of each text, special tokens included, by the tokeniser of a checkpoint.

    Raises ModelFileError when the checkpoint has none that can be used, InvalidRequest for a text it cannot encode.
    """

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
    sampling: Sampling | None
    """How to choose tokens; None when the engine's capacity has `candidates` 0."""

@final
class Sampling:
    """How the wanted rows of a step become tokens: C-contiguous arrays, one entry per row in the order of the batch."""

    inverse_temperature: NDArray[np.float32]
    """Factor of the logits; 0 is greedy, and `top_p`, `top_k` and `min_p` are neutral then."""
    top_p: NDArray[np.float32]
    """Share of the probability that is kept; 1 keeps all."""
    top_k: NDArray[np.int32]
    """Number of tokens that are kept; 0 keeps all."""
    min_p: NDArray[np.float32]
    """Smallest kept probability as a share of the best token's; 0 keeps all."""
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    """Position in its sequence of the token to be drawn."""
    on_host: NDArray[np.bool_]
    """Rows whose logits are wanted: penalties, biases, log-probabilities, or `top_k` beyond the candidates."""

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
        stall_yield_ms: int = 2000,
        default_timeout_ms: int = 120_000,
        prefix_reuse: bool = True,
        shared_prefixes: list[str] = ...,
        control_in_text: bool = False,
        decode_price: float = 2.0,
        step_budget_ms: int = 100,
    ) -> PoolOptions: ...

@final
class PoolStats:
    slots: int
    running: int
    parked: int
    """Running sequences that pause because their reader is behind."""
    queued: int
    queued_tokens: int
    prompt_token_nanos: int
    """What a prompt token adds to a step, as learnt from steps; 0: not yet."""
    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    interrupted: int
    """How often a sequence gave its slot to somebody with a better claim."""
    requests_accepted: int
    requests_refused: int
    requests_finished: int
    requests_cancelled: int
    requests_failed: int

@final
class Stuck:
    """An engine thread that stands still."""

    stood_s: float
    """How long the step has taken so far."""
    limit_s: float
    """How long it might have taken."""
    tokens: int
    """Of the step."""

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
        the wrong shape, type or layout, or a token for a row that is `on_host`. The pool is not ready then until `run`
        is called again.
        """

    def watch(self, step_timeout_ms: int) -> Stuck | None:
        """Blocks until the pool is stopped (None), or until the engine thread stands still.

        Then the pool is not ready, every request has ended as EngineFailed, and the caller must replace the process.
        When it cannot even be told, because the engine holds the GIL, the process dumps its stacks and aborts.
        `step_timeout_ms`: what no step may take; one that computes no more than others before it may take ten times as
        long as these, and 6 s in any case.
        """

    def drain(self) -> None:
        """Not ready at once; new requests are refused as Draining; running ones go on."""

    def idle(self) -> bool:
        """Whether no request is in work or on its way to its client."""

    def stop(self) -> None:
        """Cuts what still runs with an error frame and ends `run()` and the server (after at most 2 s)."""

    def stats(self) -> PoolStats: ...
    def pulse(self) -> int:
        """Grows as long as the server's I/O threads go on."""

    def reload_tls(self) -> None:
        """Verifies the certificate files and swaps them in. Raises TlsError and keeps the old ones otherwise."""

@final
class FrontOptions:
    """Limits of the endpoint: times in seconds, sizes in bytes, rates in bytes per second, all else counts."""

    def __new__(
        cls,
        *,
        handshake_s: float,
        first_byte_s: float,
        head_s: float,
        body_rate: int,
        body_grace_s: float,
        idle_s: float,
        write_stall_s: float,
        connections: int,
        connections_per_client: int,
        handshakes: int,
        strangers_per_client: int,
        streams: int,
        resets: int,
        head_bytes: int,
        unfolded_bytes: int,
        trusted: Sequence[str],
        proxy_protocol: bool,
        worker_wait_s: float,
    ) -> Self:
        """`trusted`: networks of proxies, as 10.0.0.0/8. Raises ValueError for one that is none."""

@final
class Front:
    """Accepts connections, ends TLS, and forwards requests to workers on Unix sockets. Lives until `close`."""

    def __new__(
        cls,
        listener: int,
        options: FrontOptions,
        *,
        pairs: Sequence[tuple[str, str]],
        client_ca: str | PathLike[str] | None = None,
        client_crl: str | PathLike[str] | None = None,
        threads: int = 1,
    ) -> Self:
        """Serves at once. `listener`: descriptor of a listening TCP socket, which is the front's from now on.

        `pairs`: certificate and key files (PEM), the preferred first; none: plain HTTP. `client_ca`: authorities of
        clients that may show a certificate, less what `client_crl` (need not exist) names. Raises TlsError.
        """
    def set_workers(self, paths: Sequence[str]) -> None:
        """From now on requests go to the workers on these sockets; what runs in others goes on."""
    def reload(self) -> None:
        """Reads the certificate files again, for new connections. Raises TlsError; then the old ones stay."""
    def drain(self) -> None:
        """Accepts nothing more; connections end when their requests are answered."""
    def connections(self) -> int:
        """Connections that are open."""
    def stats(self) -> dict[str, int]:
        """Counts since the start, by name."""
    def close(self) -> None:
        """Ends everything at once."""
