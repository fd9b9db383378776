"""What every benchmark needs: the machine in words, HelixFlow started for the run, figures as text."""

import contextlib
import json
import os
import platform
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"
LOADGEN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "helix-loadgen"


def machine() -> str:
    """Processor, cores, memory, versions: one Markdown list."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("granian", "uvloop", "onnxruntime", "numpy"))
    return "\n".join(
        [
            f"- machine: {cpu}, {os.cpu_count()} cores, {pages / 2**30:.0f} GiB, Linux {platform.release()}",
            f"- versions: Python {platform.python_version()}, {versions}",
        ]
    )


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Running:
    """A HelixFlow started for a benchmark."""

    url: str
    ca: Path
    pid: int
    environ: Mapping[str, str] = field(default_factory=dict)
    """What a `helixflow` command needs to reach it."""


@contextlib.contextmanager
def helixflow(options: Mapping[str, str], key_type: str = "ecdsa-p256") -> Iterator[Running]:
    """`helixflow serve` in the development profile with `options` as its environment; stopped at the end."""
    port, auth_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="helix-bench-") as folder:
        # The embedded PostgreSQL runs under an account of its own.
        Path(folder).chmod(0o711)
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HELIX_")},
            "HELIX_PROFILE": "development",
            "HELIX_HOME": f"{folder}/home",
            "HELIX_DATABASE_DIRECTORY": f"{folder}/postgres",
            "HELIX_AUTH_LISTEN": f"127.0.0.1:{auth_port}",
            "HELIX_CERTS": f"{folder}/certs",
            "HELIX_GATEWAY_LISTEN": f"127.0.0.1:{port}",
            "HELIX_POOL_LISTEN": "127.0.0.1:0",
            "HELIX_LOG_FORMAT": "json",
            **options,
        }
        subprocess.run(
            [sys.executable, "-m", "helixflow", "pki", "init", "--dir", f"{folder}/certs", "--key-type", key_type],
            check=True,
            env=environ,
            stdout=subprocess.DEVNULL,
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "helixflow", "serve"],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("HelixFlow is ready"):
                    break
            else:
                raise RuntimeError("helixflow serve ended before it was ready")
            ca = Path(folder) / "certs" / "helixflow-ca.pem"
            yield Running(f"https://localhost:{port}", ca, process.pid, environ)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=90)


@contextlib.contextmanager
def echo(ca: Path) -> Iterator[str]:
    """The bare Granian echo with one worker, under the gateway's own certificate."""
    port = free_port()
    folder = ca.parent
    command = [
        sys.executable, "-m", "granian", "perf.echo:app", "--interface", "asgi", "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1", "--loop", "uvloop", "--no-ws", "--log-level", "warning",
        "--ssl-certificate", str(folder / "api-gateway.crt"), "--ssl-keyfile", str(folder / "api-gateway-key.pem"),
        "--ssl-protocol-min", "tls1.3",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield f"https://localhost:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def load(*arguments: str) -> dict[str, Any]:
    """One run of the load generator; its JSON report."""
    done = subprocess.run([str(LOADGEN), *arguments], check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in tree(int(child)))]


def memory_mib(pid: int) -> float:
    """Proportional set size of one process (MiB)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no Pss of process {pid}")


def command(pid: int) -> str:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()


def processor_s(pid: int) -> float:
    """Processor time that a process has used (seconds)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def handshake(context: ssl.SSLContext, port: int) -> None:
    """One TLS connection to this machine, closed at once."""
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost"),
    ):
        pass


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, and the range behind it."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def write(name: str, text: str) -> None:
    """Writes one result file and prints it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(text.rstrip() + "\n", "utf-8")
    print(text, flush=True)
