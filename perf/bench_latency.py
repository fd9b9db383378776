"""What a user feels: time to first token and inter-token latency under locust, TLS handshakes, idle memory."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from perf import lab

NAMES = {"first token": "time to first token", "inter-token": "inter-token latency", "answer": "whole answer"}
"""What `perf/locustfile.py` reports in microseconds, in words."""


def percentile(histogram: dict[str, int], share: float) -> float:
    """The value below which `share` of a {value: count} histogram lies."""
    left = share * sum(histogram.values())
    for value, count in sorted((float(value), count) for value, count in histogram.items()):
        left -= count
        if left <= 0:
            return value
    return 0.0


def locust(running: lab.Running, users: int, seconds: int) -> str:
    """Chat users against the demo model."""
    command = [
        sys.executable, "-m", "locust", "-f", str(lab.ROOT / "perf" / "locustfile.py"), "--headless", "--json",
        "-u", str(users), "-r", str(users), "-t", f"{seconds}s", "--host", running.url, "--only-summary",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env={**os.environ, "CHAT_CA": str(running.ca)},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + 60,
    )
    stats: list[dict[str, Any]] = json.loads(done.stdout)
    rows = []
    for entry in stats:
        histogram = entry["response_times"]
        if entry["num_failures"]:
            raise RuntimeError(f"{entry['name']}: {entry['num_failures']} failures\n{done.stderr[-2000:]}")
        if entry["name"] in NAMES:
            half, worst = percentile(histogram, 0.5) / 1000, percentile(histogram, 0.99) / 1000
            rows.append(f"| {NAMES[entry['name']]} | {entry['num_requests']:,} | {half:.2f} | {worst:.2f} |")
    head = f"{users} user(s), {seconds} s\n\n| | count | p50 (ms) | p99 (ms) |\n| --- | --- | --- | --- |"
    return "\n".join([head, *rows])


def handshakes(running: lab.Running, key_type: str) -> str:
    """Full and resumed TLS handshakes, one after another."""
    report = lab.load("handshake", "--url", f"{running.url}/health", "--ca", str(running.ca), "--requests", "500")
    if report["resumed"] != report["resumed_ms"]["count"]:
        raise RuntimeError(f"only {report['resumed']} handshakes were resumed")
    rows = [
        f"| {key_type} | {kind} | {figures['count']} | {figures['p50']:.2f} | {figures['p99']:.2f} |"
        for kind, figures in (("full", report["full_ms"]), ("resumed", report["resumed_ms"]))
    ]
    return "\n".join(rows)


def memory(running: lab.Running) -> str:
    """Proportional set size of each process."""
    rows: list[str] = []
    seen = set()
    for pid in lab.tree(running.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        name = words[words.index("helixflow") + 1] if "helixflow" in words else " ".join(words[:3])
        name = f"{name} worker" if name in seen else name
        seen.add(name)
        rows.append(f"| {name} | {lab.memory_mib(pid):.0f} |")
    return "\n".join(["| process | PSS (MiB) |", "| --- | --- |", *rows])


def main() -> None:
    """Measures and writes `perf/results/latency.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="duration of each locust run")
    options = parser.parse_args()
    with lab.helixflow({}) as running:
        idle = memory(running)
        loads = "\n\n".join(locust(running, users, options.seconds) for users in (1, 8))
        tls = handshakes(running, "ECDSA P-256")
    with lab.helixflow({"HELIX_POOL_ENGINE": "scripted"}, "rsa-4096") as running:
        # This client takes the ECDSA pair that stands beside the other.
        tls += "\n" + handshakes(running, "RSA-4096, with ECDSA P-256 beside it")
    text = f"""# Latency with the demo model

{lab.machine()}
- method: `perf/bench_latency.py`, release build, onnx engine fp32, 16 slots; client and services share the cores.

## Locust (`perf/locustfile.py`)

{loads}

## TLS handshakes, from connect to the first byte that may be sent

| key | handshake | count | p50 (ms) | p99 (ms) |
| --- | --- | --- | --- | --- |
{tls}

Goal: under 50 ms.

## Memory after start, before any request

{idle}
"""
    lab.write("latency.md", text)


if __name__ == "__main__":
    main()
