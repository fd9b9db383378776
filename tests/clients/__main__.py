"""Unmodified foreign clients against a served gateway: `make test-clients`.

Each client lives in a folder of its own under `.build/clients`, is installed by its own package manager, and makes ten
requests over TLS that it checks with the CA's file. A client whose tools are missing is skipped with a line. Not a part
of `make test`: it needs registries, and guidellm brings torch.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.integration.stack import GOLDEN, ROOT, SCRIPTED, Stack, running

HERE = Path(__file__).parent
BUILD = ROOT / ".build" / "clients"
REQUESTS = 10
GUIDELLM = "guidellm==0.8.1"
OPENAI_GO = {"openai-go 1.12": ("github.com/openai/openai-go", "v1.12.0"),
             "openai-go 3.8": ("github.com/openai/openai-go/v3", "v3.8.1")}  # fmt: skip
AI = ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92")
INSTALL_S = 1800
RUN_S = 300


class Skipped(Exception):  # noqa: N818 -- nobody's mistake
    """A client whose tools are not here."""


def main() -> int:
    """Runs every client; 1 when one of them failed."""
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        certs = Path(folder) / "certs"
        command = [sys.executable, "-m", "helixflow", "pki", "init", "--dir", str(certs), "--key-type", "ecdsa-p256"]
        subprocess.run(command, check=True, capture_output=True)
        # A step takes longer than the pause after which a silent stream gets a comment.
        slow = {
            "HELIX_POOL_SCRIPT_STEP_MS": "150",
            "HELIX_GATEWAY_KEEPALIVE_S": "0.05",
            "HELIX_POOL_SCRIPT_TOKENS": "6",
        }
        with running(certs, Path(folder) / "run", **SCRIPTED, **slow) as stack:
            for name, client in clients().items():
                outcomes.append(outcome(name, client, stack))
    return int(not all(outcomes))


def clients() -> dict[str, Callable[[Stack, Path], int]]:
    """What runs a client, by its name: it is given a folder and returns the requests that were answered."""
    go = {
        name: lambda stack, folder, module=module, version=version: openai_go(stack, folder, module, version)
        for name, (module, version) in OPENAI_GO.items()
    }
    return {**go, "ai (npm)": npm_ai, "guidellm 0.8": guidellm}


def outcome(name: str, client: Callable[[Stack, Path], int], stack: Stack) -> bool:
    """Runs one client and prints a line; false when it failed."""
    folder = BUILD / name.replace(" ", "-").strip("()")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        answered = client(stack, folder)
    except Skipped as reason:
        print(f"skipped  {name}: {reason}", flush=True)
        return True
    except subprocess.SubprocessError as error:
        output = getattr(error, "stderr", None) or getattr(error, "output", None) or b""
        print(f"FAILED   {name}: {error}\n{output.decode(errors='replace')[-2000:]}", flush=True)
        return False
    fine = answered >= REQUESTS
    print(f"{'passed  ' if fine else 'FAILED  '} {name}: {answered} of {REQUESTS} requests answered", flush=True)
    return fine


def run(command: list[str], folder: Path, timeout_s: float, **environ: str) -> str:
    """The standard output of a command. Raises SubprocessError."""
    names = {**os.environ, **environ}
    names.pop("PIP_CONSTRAINT", None)
    done = subprocess.run(command, cwd=folder, env=names, check=True, capture_output=True, timeout=timeout_s)
    return done.stdout.decode()


def tool(name: str) -> str:
    """The path of a program. Raises Skipped."""
    found = shutil.which(name)
    if found is None:
        raise Skipped(f"{name} is not installed")
    return found


def trusting(stack: Stack) -> dict[str, str]:
    """The environment by which clients find the gateway and its CA."""
    return {"BASE_URL": stack.url + "/v1", "SSL_CERT_FILE": stack.ca, "NODE_EXTRA_CA_CERTS": stack.ca}


def openai_go(stack: Stack, folder: Path, module: str, version: str) -> int:
    """Streams through OpenAI's Go library."""
    go = tool("go")
    (folder / "main.go").write_text((HERE / "chat.go").read_text().replace("OPENAI_GO", module))
    (folder / "go.mod").write_text("module client\n\ngo 1.22\n")
    run([go, "get", f"{module}@{version}"], folder, INSTALL_S)
    run([go, "build", "-o", "client", "."], folder, INSTALL_S)
    return int(run([str(folder / "client")], folder, RUN_S, **trusting(stack)))


def npm_ai(stack: Stack, folder: Path) -> int:
    """Chats through Vercel's `ai`."""
    node, npm = tool("node"), tool("npm")
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    run([npm, "install", "--no-audit", "--no-fund", "--silent", *AI], folder, INSTALL_S)
    shutil.copy(HERE / "chat.mjs", folder)
    return int(run([node, "chat.mjs"], folder, RUN_S, **trusting(stack)))


def guidellm(stack: Stack, folder: Path) -> int:
    """Measures with guidellm; its report says how many requests were answered."""
    venv = folder / "venv"
    if not (venv / "bin" / "guidellm").exists():
        run([sys.executable, "-m", "venv", str(venv)], folder, INSTALL_S)
        run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", GUIDELLM], folder, INSTALL_S)
    report = folder / "benchmarks.json"
    report.unlink(missing_ok=True)
    backend = f"kind=openai_http,target={stack.url},model=gpt-4,api_key=demo-key,verify=true"
    command = [str(venv / "bin" / "guidellm"), "run", "--disable-console", "--backend", backend]
    command += ["--profile", "kind=synchronous", "--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={GOLDEN / 'llama-tiny'}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"]
    command += ["--output", f"kind=json,path={report}"]
    run(command, folder, RUN_S, **trusting(stack), HF_HUB_OFFLINE="1")
    benchmark = json.loads(report.read_text())["benchmarks"][0]
    return int(benchmark["metrics"]["request_totals"]["successful"])


if __name__ == "__main__":
    sys.exit(main())
