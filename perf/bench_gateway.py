"""The path around an engine: gateway and pool with the scripted engine, beside a bare Granian echo under the same TLS.

Client, gateway and pool share the machine. Requests: 32 keep-alive connections, non-streaming. Streams: 200 at once.
"""

import argparse
import json
import statistics
from typing import Any

from perf import lab

ROUNDS = 3
STREAMS = 200
STREAM_TOKENS = 400
PACED_MS = 3.5
"""57,000 tokens/s offered to 200 streams, were the steps free of any other cost (milliseconds)."""
WITHOUT_ACCOUNTS = {"HELIX_GATEWAY_ACCOUNTS": "false"}
"""`perf.bench_accounts` measures what issued keys, limits and ledger add."""


def chat(max_tokens: int, **options: Any) -> str:
    """A request body."""
    messages = [{"role": "user", "content": "Hello"}]
    return json.dumps({"model": "gpt-4", "messages": messages, "max_tokens": max_tokens, "ignore_eos": True, **options})


def common(running: lab.Running, seconds: float) -> list[str]:
    """Options of every load."""
    return [
        "--ca", str(running.ca), "--header", "Authorization: Bearer demo-key",
        "--header", "Content-Type: application/json", "--duration", str(seconds), "--warmup", "1",
    ]  # fmt: skip


def requests(seconds: float) -> str:
    """Requests/s of the gateway path and of the echo, in turn."""
    options = {
        "HELIX_POOL_ENGINE": "scripted",
        "HELIX_POOL_SLOTS": "64",
        "HELIX_POOL_MAX_LEN": "4096",
        **WITHOUT_ACCOUNTS,
    }
    rows = []
    with lab.helixflow(options) as running, lab.echo(running.ca) as echo:
        path = "/v1/chat/completions"
        for tokens in (1, 16):
            body = chat(tokens)
            ours, bare, latency = [], [], []
            for _ in range(ROUNDS):
                load = ["--connections", "32", "--body", body, *common(running, seconds)]
                bare.append(lab.load("requests", "--url", echo + path, *load)["requests_per_s"])
                report = lab.load("requests", "--url", running.url + path, *load)
                if report["errors"]:
                    raise RuntimeError(f"the load met errors: {report['errors']}")
                ours.append(report["requests_per_s"])
                latency.append(report["latency_ms"]["p99"])
            ratio = statistics.median(mine / other for mine, other in zip(ours, bare, strict=True))
            rows.append(
                f"| {tokens} | {lab.spread(ours)} | {lab.spread(bare)} | {ratio:.3f} | {lab.spread(latency, 1)} |"
            )
    head = (
        "| tokens an answer | gateway, requests/s | bare echo, requests/s | ratio | gateway p99 (ms) |\n"
        "| --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def streams(seconds: float, step_ms: float) -> str:
    """Streamed tokens/s at 200 streams, with engine steps of `step_ms` milliseconds (0: as fast as it goes)."""
    options = {
        "HELIX_POOL_ENGINE": "scripted",
        "HELIX_POOL_SLOTS": str(STREAMS),
        "HELIX_POOL_MAX_LEN": "4096",
        "HELIX_POOL_SCRIPT_STEP_MS": str(step_ms),
        **WITHOUT_ACCOUNTS,
    }
    reports = []
    with lab.helixflow(options) as running:
        body = chat(STREAM_TOKENS, stream=True, stream_options={"include_usage": True})
        for _ in range(ROUNDS):
            report = lab.load(
                "stream", "--url", f"{running.url}/v1/chat/completions", "--connections", str(STREAMS), "--body", body,
                *common(running, seconds),
            )  # fmt: skip
            if report["errors"]:
                raise RuntimeError(f"the load met errors: {report['errors']}")
            reports.append(report)
    tokens = lab.spread([report["tokens_per_s"] for report in reports])
    events = lab.spread([report["events_per_s"] for report in reports])
    first = lab.spread([report["first_token_ms"]["p50"] for report in reports], 1)
    gap = lab.spread([report["event_gap_ms"]["p99"] for report in reports], 1)
    return f"| {step_ms:g} | {tokens} | {events} | {first} | {gap} |"


def main() -> None:
    """Measures and writes `perf/results/gateway.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="measured seconds of each load")
    options = parser.parse_args()
    text = f"""# Gateway path with the scripted engine

{lab.machine()}
- method: `perf/bench_gateway.py`, release build, one gateway worker, TLS 1.3 and key check on; {ROUNDS} rounds of
  {options.seconds:g} s, the two sides in turn; median (range); the ratio is the median of the rounds' ratios.
  Client, gateway and pool share the cores. Request log on; issued keys, limits and ledger off: see `accounts.md`.

## Requests, 32 connections, not streamed

{requests(options.seconds)}

Goal: ratio at least 0.15.

## {STREAMS} streams of {STREAM_TOKENS} tokens

| engine step (ms) | tokens/s | SSE events/s | time to first token p50 (ms) | gap between events p99 (ms) |
| --- | --- | --- | --- | --- |
{streams(options.seconds, PACED_MS)}
{streams(options.seconds, 0)}

Goal: 50,000 tokens/s. A step gives each stream one token; tokens that wait together travel in one event, so the unpaced
engine shows how the path degrades: into larger events, not into a queue.
"""
    lab.write("gateway.md", text)


if __name__ == "__main__":
    main()
