"""Log lines: JSON, one request id through gateway and pool, never a prompt, an answer or a key."""

import json
from pathlib import Path

from .stack import Process, Stack, running, until

SECRET = "xylophone-marmalade-4711"


def lines(process: Process) -> list[dict[str, object]]:
    return [json.loads(line) for line in process.text().splitlines() if line.startswith("{")]


def test_request_id_and_no_content(demo: Stack) -> None:
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "user": "someone"}
    with demo.client() as client:
        answer = client.post("/v1/chat/completions", json=body, headers={"x-request-id": "trace-me-1"})
        assert answer.headers["x-request-id"] == "trace-me-1"
        client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {SECRET}"})
        client.post("/v1/chat/completions", content=f'{{"model": "{SECRET}", '.encode())
    for process in (demo.gateway, demo.pool):
        until(lambda p=process: "trace-me-1" in p.text(), "the request id is logged")
        assert SECRET not in process.text()
        assert "demo-key" not in process.text()
        for line in lines(process):
            assert {"timestamp", "level", "service", "event"} <= line.keys(), line
    entry = next(line for line in lines(demo.gateway) if line.get("request_id") == "trace-me-1")
    assert entry["status"] == 200
    assert entry["completion_tokens"] == 5


def test_console_format(certs: Path, tmp_path: Path) -> None:
    with running(certs, tmp_path, HELIX_POOL_ENGINE="scripted", HELIX_LOG_FORMAT="console") as stack:
        assert "gateway ready" in stack.gateway.text()
        assert not lines(stack.gateway)
