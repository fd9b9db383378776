"""Section `[pool]`: the inference pool: one model on one engine."""

from dataclasses import dataclass
from pathlib import Path

from helixflow.engine.kinds import (
    ATTENTION_CHOICES,
    BACKENDS,
    DEFAULT_CHUNK_TOKENS,
    PRECISION_CHOICES,
    PROVIDERS,
    TENSORRT_MAX_LEN,
)
from helixflow.options import Address, between, one_of, option


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """The inference pool: one model on one engine."""

    listen: Address = option(Address("127.0.0.1", 8501), "address of the gRPC server")
    model: Path = option(Path(), "checkpoint directory (Hugging Face layout); empty: the demo model", env="HELIX_MODEL")
    model_id: str = option("", "name of the model in the API; empty: the directory's name")
    aliases: tuple[str, ...] = option((), "further names of the model in the API")
    engine: str = option(
        "onnx",
        "onnx, tensorrt, tensorrt-rtx (both on an NVIDIA GPU), or scripted (tokens from a script; for tests)",
        check=one_of(*BACKENDS, "scripted"),
    )
    provider: str = option("cpu", "where the onnx engine runs: cpu, or cuda (an NVIDIA GPU)", check=one_of(*PROVIDERS))
    device: int = option(0, "number of the GPU, as CUDA counts them", check=between(0, 255))
    precision: str = option(
        "auto",
        "of the weights; auto: fp32 on the CPU, on a GPU bf16 or fp16, as the checkpoint is stored",
        check=one_of(*PRECISION_CHOICES),
    )
    attention: str = option(
        "auto",
        "TensorRT: form of attention; auto: the first one that passes the self-test on the GPU",
        check=one_of(*ATTENTION_CHOICES),
    )
    chunk_tokens: int = option(
        DEFAULT_CHUNK_TOKENS, "TensorRT: longest piece of a prompt in one launch (tokens)", check=between(16, 1 << 16)
    )
    slots: int = option(16, "sequences that run at once", check=between(1, 1024))
    max_len: int = option(
        0,
        f"positions of a slot; 0: what the model was trained for, with TensorRT at most {TENSORRT_MAX_LEN}",
        check=between(0, 1 << 20),
    )
    threads: int = option(0, "engine threads; 0: one per core", check=between(0, 1024))
    step_tokens: int = option(512, "most tokens in one engine step", check=between(1, 1 << 20))
    step_budget_ms: int = option(
        100,
        "a step may take this long while answers are being generated (milliseconds), or 2.5 times a step without "
        "prompts, if that is more; longer prompts are cut; 0: no budget",
        check=between(0, 60_000),
    )
    queue_requests: int = option(1024, "most sequences that wait", check=between(1, 1 << 20))
    queue_tokens: int = option(1 << 20, "most prompt tokens that wait", check=between(1, 1 << 30))
    prefix_reuse: bool = option(True, "start a request from the longest prefix any slot holds")
    decode_price: float = option(
        2.0, "what a generated token counts in an organisation's share, a prompt token being 1", check=between(0.1, 100)
    )
    shared_prefixes: tuple[Path, ...] = option(
        (),
        "text files, each a system prompt or the beginning of prompts that everybody may know: all organisations start "
        "from one copy in the caches",
    )
    control_in_text: bool = option(
        False, "what looks like a control token (<|im_end|> …) in the text of a message is one; otherwise it is text"
    )
    stall_timeout_ms: int = option(60_000, "a reader may stall this long (milliseconds)", check=between(10, 86_400_000))
    stall_yield_ms: int = option(
        2000,
        "a stalled reader's slot is taken after this time when others wait (milliseconds)",
        check=between(10, 3_600_000),
    )
    step_timeout_s: float = option(
        300.0,
        "an engine step that takes longer stands still, and the pool is restarted (seconds); one that computes no more "
        "than others before it: after ten times the longest of them, at least 6 s",
        check=between(0.5, 86_400),
    )
    default_timeout_ms: int = option(
        120_000, "deadline to the first slot when a call brings none (milliseconds)", check=between(1, 86_400_000)
    )
    drain_timeout_s: float = option(30.0, "requests may run this long after SIGTERM (seconds)", check=between(0, 3600))
    script_step_ms: float = option(0.0, "scripted engine: duration of a step (milliseconds)", check=between(0, 60_000))
    script_tokens: int = option(
        0, "scripted engine: tokens before it ends; 0: as many as asked for", check=between(0, 1 << 20)
    )
    script_hang_step: int = option(
        0, "scripted engine: the step that never ends, counted from 1; 0: none", check=between(0, 1 << 30)
    )
