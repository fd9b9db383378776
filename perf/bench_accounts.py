"""What keys, limits and ledger cost: the gateway path with all of them on, beside the same with them off.

Client, gateway, pool, auth-service and PostgreSQL share the machine. 32 keep-alive connections, non-streaming.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from perf import lab
from perf.bench_gateway import chat

ROUNDS = 5
ENGINE = {"HELIX_POOL_ENGINE": "scripted", "HELIX_POOL_SLOTS": "64", "HELIX_POOL_MAX_LEN": "4096"}
SOAK_SAMPLES = 10
PATH = "/v1/chat/completions"


def command(environ: dict[str, str], *arguments: str) -> Any:
    """One `helixflow` command with `--json`."""
    done = subprocess.run(
        [sys.executable, "-m", "helixflow", *arguments, "--json"],
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def limited_key(running: lab.Running) -> str:
    """A key with limits of its own, of its user and of its organisation, all far away."""
    environ = {**os.environ, **running.environ}
    made = command(environ, "key", "add", "bench", "--user", "owner@localhost")
    key = made["key"]
    for subject in (f"key:{key['id']}", f"user:{key['user_id']}", f"organisation:{key['organisation_id']}"):
        far = ["--requests-per-minute", "100M", "--tokens-per-minute", "10G", "--tokens-per-month", "100G"]
        command(environ, "limits", "set", subject, *far)
    secret: str = made["secret"]
    return secret


def load(running: lab.Running, key: str, tokens: int, seconds: float) -> dict[str, Any]:
    """One load on a gateway; its report. Raises RuntimeError when a request failed."""
    report = lab.load(
        "requests", "--url", running.url + PATH, "--connections", "32", "--body", chat(tokens),
        "--ca", str(running.ca), "--header", f"Authorization: Bearer {key}",
        "--header", "Content-Type: application/json", "--duration", str(seconds), "--warmup", "1",
    )  # fmt: skip
    if report["errors"]:
        raise RuntimeError(f"the load met errors: {report['errors']}")
    return report


def compare(on: lab.Running, off: lab.Running, key: str, seconds: float) -> str:
    """Requests/s with and without, in turn, and a bare echo under the same TLS."""
    rows = []
    with lab.echo(on.ca) as echo:
        for tokens in (1, 16):
            mine: list[float] = []
            plain: list[float] = []
            bare: list[float] = []
            late: list[float] = []
            for _ in range(ROUNDS):
                plain_report = load(off, "demo-key", tokens, seconds)
                report = load(on, key, tokens, seconds)
                bare.append(load(lab.Running(echo, on.ca, 0), key, tokens, seconds)["requests_per_s"])
                plain.append(plain_report["requests_per_s"])
                mine.append(report["requests_per_s"])
                late.append(report["latency_ms"]["p99"] - plain_report["latency_ms"]["p99"])
            ratio = statistics.median(one / other for one, other in zip(mine, plain, strict=True))
            echoed = statistics.median(one / other for one, other in zip(mine, bare, strict=True))
            rows.append(
                f"| {tokens} | {lab.spread(mine)} | {lab.spread(plain)} | {ratio:.3f} | {echoed:.3f} | "
                f"{lab.spread(late, 2)} |"
            )
    head = (
        "| tokens an answer | on, requests/s | off, requests/s | on / off | on / bare echo | added p99 (ms) |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def soak(running: lab.Running, key: str, seconds: float) -> str:
    """Memory of every process at equal steps of a long load (PSS, MiB)."""
    rows = []
    for sample in range(SOAK_SAMPLES + 1):
        if sample:
            load(running, key, 16, seconds / SOAK_SAMPLES)
        time.sleep(1)  # what was freed is given back
        sizes = {name: lab.memory_mib(pid) for name, pid in processes(running.pid).items()}
        rows.append((sample * seconds / SOAK_SAMPLES, sizes))
    names = list(rows[0][1])
    lines = ["| after (s) | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    lines += [f"| {at:.0f} | " + " | ".join(f"{sizes[name]:.0f}" for name in names) + " |" for at, sizes in rows]
    return "\n".join(lines)


def processes(pid: int) -> dict[str, int]:
    """The services below a supervisor, by name: the gateway's worker, the auth-service, the pool."""
    found: dict[str, int] = {}
    for child in lab.tree(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        for name in ("gateway", "auth", "pool"):
            if words[-2:] == [name.encode(), b""]:
                found[name] = child  # the last one is the worker of the main process before it
    return found


def main() -> None:
    """Measures and writes `perf/results/accounts.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="measured seconds of each load")
    parser.add_argument("--soak", type=float, default=600.0, help="seconds of the load under which memory is watched")
    options = parser.parse_args()
    with lab.helixflow(ENGINE) as on, lab.helixflow({**ENGINE, "HELIX_GATEWAY_ACCOUNTS": "false"}) as off:
        key = limited_key(on)
        table = compare(on, off, key, options.seconds)
        memory = soak(on, key, options.soak)
    text = f"""# Keys, limits and ledger

{lab.machine()}
- method: `perf/bench_accounts.py`, release build, one gateway worker, TLS 1.3, scripted engine, 32 connections, not
  streamed; {ROUNDS} rounds of {options.seconds:g} s, the sides in turn; median (range); ratios are medians of the
  rounds'. On: an issued key with limits of key, user and organisation (requests/min, tokens/min, tokens/month each),
  every request in the ledger of the embedded PostgreSQL. Off: `HELIX_GATEWAY_ACCOUNTS=false`. All processes and the
  client share the cores, so the ratio holds the work of auth-service and PostgreSQL too.

{table}

Goal: on / off at least 0.8.

## Memory under {options.soak:g} s of the same load (PSS, MiB)

{memory}
"""
    lab.write("accounts.md", text)


if __name__ == "__main__":
    main()
