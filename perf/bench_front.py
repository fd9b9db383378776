"""The front door: what nuisances cost others, what idle connections cost memory, what a handshake costs.

python -m perf.bench_front [--seconds S]
"""

import argparse
import contextlib
import resource
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from perf import lab
from perf.bench_gateway import WITHOUT_ACCOUNTS, chat, common

STREAMS = 50
STEP_MS = 25.0
ROUNDS = 3
ELSEWHERE = "127.0.0.2"
"""Nuisances come from another address than those they are to disturb."""
NUISANCES = {
    "4,300 silent connections": ("silent", 4300),
    "4,096 bodies of 1 byte a second": ("dribble", 4096),
    "1,000 heads of 1 byte a second": ("slowloris", 1000),
    "200 readers of 10 bytes a second": ("sip", 200),
}
IDLE = 10_000
HANDSHAKES = 300
OPTIONS = {
    "HELIX_POOL_ENGINE": "scripted",
    "HELIX_POOL_SLOTS": "512",
    "HELIX_POOL_MAX_LEN": "4096",
    "HELIX_POOL_SCRIPT_STEP_MS": str(STEP_MS),
    **WITHOUT_ACCOUNTS,
}


@contextlib.contextmanager
def nuisance(running: lab.Running, kind: str, count: int) -> Iterator["subprocess.Popen[str]"]:
    """Runs a crowd; the block begins when it stands, or has tried for 15 s."""
    port = running.url.rpartition(":")[2]
    command = [sys.executable, "-m", "perf.nuisance", kind, str(count), port, str(running.ca), ELSEWHERE]
    crowd = subprocess.Popen(command, cwd=lab.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert crowd.stdout is not None
        until, last = time.monotonic() + 15, -1
        for line in crowd.stdout:
            standing = int(line)
            if standing == last > 0 or standing == count or time.monotonic() > until:
                break
            last = standing
        yield crowd
    finally:
        crowd.kill()
        crowd.communicate()


def streams(running: lab.Running, seconds: float) -> dict[str, Any]:
    """50 streams, paced."""
    body = chat(60, stream=True)
    report = lab.load(
        "stream", "--url", f"{running.url}/v1/chat/completions", "--connections", str(STREAMS), "--body", body,
        *common(running, seconds),
    )  # fmt: skip
    if report["errors"]:
        raise RuntimeError(f"the load met errors: {report['errors']}")
    return report


def disturbed(seconds: float) -> str:
    """Gaps and first tokens of the streams beside each nuisance, by those without, in turn."""
    rows = []
    with lab.helixflow(OPTIONS) as running:
        for name, (kind, count) in NUISANCES.items():
            alone, beside = [], []
            for _ in range(ROUNDS):
                alone.append(streams(running, seconds))
                with nuisance(running, kind, count):
                    beside.append(streams(running, seconds))
            ratio = {
                part: statistics.median(b[part]["p99"] / a[part]["p99"] for a, b in zip(alone, beside, strict=True))
                for part in ("event_gap_ms", "first_token_ms")
            }
            gaps = [lab.spread([each["event_gap_ms"]["p99"] for each in side], 1) for side in (alone, beside)]
            ratios = " | ".join(f"{ratio[part]:.2f}" for part in ("event_gap_ms", "first_token_ms"))
            rows.append(f"| {name} | {gaps[0]} | {gaps[1]} | {ratios} |")
    head = (
        "| beside | gap p99 alone (ms) | gap p99 beside (ms) | ratio | first token p99, ratio |\n"
        "| --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def idle() -> str:
    """What 10,000 idle connections cost the gateway's main process."""
    options = {
        **OPTIONS,
        "HELIX_GATEWAY_MAX_CONNECTIONS": str(2 * IDLE),
        "HELIX_GATEWAY_MAX_CONNECTIONS_PER_CLIENT": str(2 * IDLE),
        "HELIX_GATEWAY_IDLE_TIMEOUT_S": "600",
    }
    with lab.helixflow(options) as running:
        [gateway] = [pid for pid in lab.tree(running.pid) if lab.command(pid).endswith("helixflow gateway")]
        before = lab.memory_mib(gateway)
        with nuisance(running, "idle", IDLE) as crowd:
            assert crowd.stdout is not None
            standing = next(int(line) for line in crowd.stdout if int(line) >= IDLE)
            after = lab.memory_mib(gateway)
    return f"{standing:,} idle connections (TLS, one request each): {after - before:.0f} MiB. Goal: under 150 MiB."


def handshakes() -> str:
    """Full handshakes of a client that takes what it is given, one after another."""
    with lab.helixflow(OPTIONS, "rsa-4096") as running:
        port = int(running.url.rpartition(":")[2])
        [gateway] = [pid for pid in lab.tree(running.pid) if lab.command(pid).endswith("helixflow gateway")]
        context = ssl.create_default_context(cafile=str(running.ca))
        begun = lab.processor_s(gateway)
        for _ in range(HANDSHAKES):
            lab.handshake(context, port)
        spent = (lab.processor_s(gateway) - begun) / HANDSHAKES * 1e3
    return (
        f"A full handshake costs the gateway {spent:.2f} ms of a processor (RSA-4096 and ECDSA certificates there, the "
        "client takes ECDSA and X25519MLKEM768 where its library has it). Goal: under 0.5 ms."
    )


def providers() -> str:
    """What TLS costs a server with each crypto provider of rustls, by `core_rs/crates/front/examples/providers.rs`."""
    command = ["cargo", "run", "--quiet", "--release", "--package", "helix-front", "--example", "providers"]
    return subprocess.run(command, cwd=lab.ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measures and writes `perf/results/front.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="measured seconds of each load")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    text = f"""# Front door

{lab.machine()}
- method: `perf/bench_front.py`, release build; {STREAMS} streams of a scripted engine ({STEP_MS:g} ms a step) from one
  address, nuisances from another, {ROUNDS} rounds of {options.seconds:g} s in turn; medians of ratios. Clients,
  nuisances, gateway and pool share the cores.

## Streams beside nuisances

{disturbed(options.seconds)}

Goal: p99 within 10 %.

## Idle connections

{idle()}

## Handshakes

{handshakes()}

## Providers

What the server computes, in memory, ECDSA P-256, medians of 7 rounds in turn (`front/examples/providers.rs`):

{providers()}
"""
    lab.write("front.md", text)


if __name__ == "__main__":
    main()
