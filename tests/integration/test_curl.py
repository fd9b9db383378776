"""The three commands of the README, over HTTP/2, and over HTTP/1.1."""

import json
import shutil
import subprocess
from datetime import datetime
from typing import Any

import pytest

from .stack import Stack

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def curl(*arguments: str) -> tuple[str, Any]:
    """(HTTP version, JSON body)."""
    done = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_version}", *arguments], capture_output=True, text=True, check=True, timeout=25
    )
    body, _, version = done.stdout.rpartition("\n")
    return version, json.loads(body)


@pytest.mark.parametrize(("option", "version"), [("--http2", "2"), ("--http1.1", "1.1")])
def test_health(demo: Stack, option: str, version: str) -> None:
    got, body = curl(option, "-k", f"{demo.url}/health")
    assert got == version
    assert body.keys() == {"service", "status", "timestamp"}
    assert (body["service"], body["status"]) == ("api-gateway", "healthy")
    assert datetime.fromisoformat(body["timestamp"]).tzinfo is not None


def test_models(demo: Stack) -> None:
    _, body = curl("-k", f"{demo.url}/v1/models")
    assert {"gpt-4", "gpt-3.5-turbo"} <= {model["id"] for model in body["data"]}


@pytest.mark.parametrize(("option", "version"), [("--http2", "2"), ("--http1.1", "1.1")])
def test_chat(demo: Stack, option: str, version: str) -> None:
    got, body = curl(
        option, "--cacert", demo.ca, f"{demo.url}/v1/chat/completions",
        "-H", "Authorization: Bearer demo-key", "-H", "Content-Type: application/json",
        "-d", '{"model": "gpt-3.5-turbo", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}',
    )  # fmt: skip
    assert got == version
    assert body["choices"][0]["message"]["content"] == "Hello! I'm HelixFlow AI assistant. How can I help you today?"


def test_a_tls_1_2_client_is_refused(demo: Stack) -> None:
    done = subprocess.run(
        ["curl", "-sS", "-k", "--tls-max", "1.2", f"{demo.url}/health"],
        capture_output=True,
        text=True,
        check=False,
        timeout=25,
    )
    assert done.returncode == 35, done.stderr
