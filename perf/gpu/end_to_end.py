"""Gateway and pool around the best engine, as `helixflow serve` runs them, against the engine alone."""

import asyncio
import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from helixflow.engine.kinds import BACKENDS, Backend, PrecisionChoice, Provider
from helixflow.engine.load import Kind, load_engine
from helixflow.engine.spec import ModelSpec
from perf import lab
from perf.gpu.drive import prefill, random_tokens
from perf.gpu.rows import Report, SkippedError, Task
from perf.gpu.sizes import FULL
from perf.gpu.work import SAMPLED, Work

DEMO = lab.ROOT / "engines" / "demo"
TOKENISER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
NEEDED = ("asyncpg", "cryptography", "granian", "msgspec", "orjson", "structlog", "uvloop")
"""What the services need beyond the engines; accounts, which need a database, are off."""
WORDS = 120
TOKENS = 128
SECONDS = 10.0
CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Shape:
    """The model: about that of Llama 3.2 1B, with the vocabulary of the demo's tokeniser."""

    hidden: int = 2048
    inner: int = 8192
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    positions: int = 2048
    past: int = 256


@dataclass(frozen=True, slots=True)
class Target:
    """What serves: as `helixflow.engine.recipe.Recipe` has it."""

    backend: Backend
    provider: Provider
    precision: PrecisionChoice = "bf16"


def check(task: Task) -> None:
    """Streams through the gateway, then the same decoding without it."""
    report = task.report
    ranking: list[str] = report.facts.get("ranking", [])
    if not ranking:
        raise SkippedError("no back end has passed the golden checkpoints")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SkippedError(f"packages are not installed: {', '.join(missing)}")
    if not _usable() and importlib.util.find_spec("httpx") is None:
        raise SkippedError(f"there is neither {lab.LOADGEN} nor the package httpx to make load with")
    backend = next(name for name in BACKENDS if name == ranking[0])
    run(report, Target(backend, "cuda" if backend == "onnx" else "cpu"), Shape(), streams=64, seconds=SECONDS)


def run(report: Report, target: Target, shape: Shape, streams: int, seconds: float) -> None:
    """The whole measurement."""
    with tempfile.TemporaryDirectory(prefix="helix-gpu-check-") as folder:
        Path(folder).chmod(0o755)
        checkpoint, engines = Path(folder) / "model", Path(folder) / "engines"
        spec = write_checkpoint(checkpoint, shape)
        report.row("model", f"{target.backend}, {spec.parameters() / 1e9:.2f} G parameters, {streams} slots")
        # First, because it says in full what is wrong with an engine; the services find it built.
        started = time.monotonic()
        rate = _alone(report, target, Path(folder), shape, streams)
        what = f"{streams} sequences, the engine alone, decoding only"
        report.row(what, f"{rate:,.0f} tokens/s; {time.monotonic() - started:.0f} s with its build", value=rate)
        report.need(3 * seconds)
        started = time.monotonic()
        with lab.helixflow(environment(target, checkpoint, engines, shape, streams)) as running:
            report.row("gateway and pool, until they are ready", f"{time.monotonic() - started:.0f} s")
            report.need(2 * seconds)
            figures = _load(running, streams, seconds)
        figure = (
            f"{figures['tokens']:,.0f} tokens/s, {figures['tokens'] / rate:.0%} of the engine alone; first token after "
            f"{figures['first']:,.0f} ms, 99 % within {figures['late']:,.0f} ms; load by {figures['by']}"
        )
        what = f"{streams} streams of {TOKENS} tokens through gateway and pool"
        report.row(what, figure, value=figures["tokens"])


def environment(target: Target, checkpoint: Path, engines: Path, shape: Shape, streams: int) -> dict[str, str]:
    """Configuration of the services."""
    return {
        "HELIX_GATEWAY_ACCOUNTS": "false",
        "HELIX_MODEL": str(checkpoint),
        "HELIX_ENGINES": str(engines),
        "HELIX_POOL_ENGINE": target.backend,
        "HELIX_POOL_PROVIDER": target.provider,
        "HELIX_POOL_PRECISION": target.precision,
        "HELIX_POOL_SLOTS": str(streams),
        "HELIX_POOL_MAX_LEN": str(shape.positions // 2),
        # Prompts of a benchmark are alike; those of users are not.
        "HELIX_POOL_PREFIX_REUSE": "false",
        "HELIX_SUPERVISE_READY_TIMEOUT_S": "600",
    }


def write_checkpoint(directory: Path, shape: Shape) -> ModelSpec:
    """A checkpoint with random weights in bf16, and the demo's tokeniser."""
    directory.mkdir(parents=True)
    for name in TOKENISER:
        shutil.copyfile(DEMO / name, directory / name)
    demo = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    config = {
        **demo,
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.positions,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    spec = ModelSpec.load(directory)
    shapes, header, offset = spec.tensors(), {}, 0
    for name, sizes in shapes.items():
        end = offset + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    block = np.random.default_rng().standard_normal(CHUNK // 2, np.float32) * np.float32(0.02)
    noise, ones = block.astype(ml_dtypes.bfloat16).tobytes(), np.ones(1, ml_dtypes.bfloat16).tobytes()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for sizes in shapes.values():
            left = 2 * math.prod(sizes)
            while left:
                part = ones * (left // 2) if len(sizes) == 1 else noise[:left]
                file.write(part)
                left -= len(part)
    return spec


def _body() -> dict[str, Any]:
    words = " ".join(["lighthouse", "keeper", "weather", "evening"] * (WORDS // 4))
    return {
        "model": "model",
        "messages": [{"role": "user", "content": words}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _load(running: lab.Running, streams: int, seconds: float) -> dict[str, Any]:
    """Tokens per second, and first-token latency (median and 99th percentile, ms), of so many streams at once."""
    url = f"{running.url}/v1/chat/completions"
    if not _usable():
        return asyncio.run(_client(url, running.ca, streams, seconds))
    report = lab.load(
        "stream", "--url", url, "--connections", str(streams), "--body", json.dumps(_body()),
        "--ca", str(running.ca), "--header", "Authorization: Bearer demo-key",
        "--header", "Content-Type: application/json", "--duration", str(seconds), "--warmup", "2",
    )  # fmt: skip
    if report["errors"]:
        raise RuntimeError(f"the load met errors: {report['errors']}")
    first = report["first_token_ms"]
    return {"tokens": report["tokens_per_s"], "first": first["p50"], "late": first["p99"], "by": "helix-loadgen"}


def _usable() -> bool:
    """Whether the load generator is here, and one for this machine."""
    try:
        return subprocess.run([str(lab.LOADGEN), "--help"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


async def _client(url: str, ca: Path, streams: int, seconds: float) -> dict[str, Any]:
    """The same by a client in Python, which may be what limits it."""
    import ssl  # noqa: PLC0415 - only here

    import httpx  # noqa: PLC0415 - only without the load generator

    until = time.monotonic() + seconds
    tokens, firsts, started = 0, [], time.monotonic()  # type: tuple[int, list[float], float]

    async def stream(client: httpx.AsyncClient) -> None:
        nonlocal tokens
        while time.monotonic() < until:
            sent, first = time.monotonic(), None
            headers = {"Authorization": "Bearer demo-key"}
            async with client.stream("POST", url, json=_body(), headers=headers) as response:
                response.raise_for_status()
                async for text in response.aiter_lines():
                    if not text.startswith("data: {"):
                        continue
                    event = json.loads(text[6:])
                    if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                        first = time.monotonic() - sent
                        firsts.append(first)
                    if event.get("usage"):
                        tokens += event["usage"]["completion_tokens"]

    limits = httpx.Limits(max_connections=streams)
    context = ssl.create_default_context(cafile=str(ca))
    async with httpx.AsyncClient(verify=context, limits=limits, timeout=120) as client:
        await asyncio.gather(*(stream(client) for _ in range(streams)))
    took = time.monotonic() - started
    late = sorted(firsts)[max(math.ceil(len(firsts) * 0.99) - 1, 0)]
    return {"tokens": tokens / took, "first": statistics.median(firsts) * 1e3, "late": late * 1e3, "by": "httpx"}


def _alone(report: Report, target: Target, folder: Path, shape: Shape, streams: int) -> float:
    """Tokens per second of the engine in this process: as many sequences, drawn the same way."""
    checkpoint, kind = folder / "model", cast("Kind", target.backend)
    engine = load_engine(
        checkpoint,
        kind,
        provider=target.provider,
        precision=target.precision,
        slots=streams,
        max_len=shape.positions // 2,
        engines=folder / "engines",
    )
    try:
        sizes = replace(FULL, past=shape.past)
        work = Work(report, target.backend, ModelSpec.load(checkpoint), sizes, np.random.default_rng())
        tokens = random_tokens(work.rng, shape.past, work.spec.vocab_size)
        for slot in range(streams):
            prefill(engine, slot, tokens)
        return streams / work.step_seconds(engine, streams, SAMPLED)
    finally:
        engine.close()
