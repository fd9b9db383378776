"""Engines and checkpoints as operators meet them: answers that depend on nothing else, files in ruins."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .stack import GOLDEN, environment, running

Request = dict[str, Any]
WORDS = ["hello", "what", "is", "TLS", "count", "to", "five", "a", "story", "about", "the", "sea", "tokens", "3 + 4"]


def requests(count: int) -> list[Request]:
    """Chats that grow turn by turn from shared system prompts: greedy and seeded, one choice and several."""
    chance = random.Random(4)

    def text(longest: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(2, longest)))

    systems = [text(60), text(20)]
    chats: list[list[dict[str, str]]] = [[] for _ in range(6)]
    made = []
    for index in range(count):
        turns = chats[index % len(chats)]
        turns.append({"role": "assistant" if turns else "system", "content": text(9) if turns else systems[index % 2]})
        turns.append({"role": "user", "content": text(9)})
        made.append(
            {
                "model": "gpt-4",
                "messages": list(turns),
                "max_tokens": chance.choice([4, 12, 24]),
                "temperature": chance.choice([0, 0.8, 1.2]),
                "seed": chance.randrange(1000),
                "n": chance.choice([1, 1, 3]),
                "ignore_eos": chance.random() < 0.5,
            }
        )
    return made


def answer(client: httpx.Client, request: Request) -> tuple[list[str], int]:
    """Texts of all choices, and how many prompt tokens came from a cache."""
    response = client.post("/v1/chat/completions", json=request)
    assert response.status_code == 200, response.text
    body = response.json()
    return (
        [choice["message"]["content"] for choice in body["choices"]],
        body["usage"]["prompt_tokens_details"]["cached_tokens"],
    )


def leave_early(client: httpx.Client, request: Request) -> None:
    """Asks for a long answer and hangs up after a few lines."""
    body = {**request, "stream": True, "max_tokens": 200, "ignore_eos": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for count, _ in enumerate(response.iter_lines()):
            if count == request["seed"] % 8:
                break


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_prefix_reuse_neighbours_and_cancellations_change_no_answer(
    precision: str, certs: Path, tmp_path: Path
) -> None:
    wanted = requests(36)
    order = random.Random(1).sample(range(len(wanted)), len(wanted))
    options = {"HELIX_POOL_PRECISION": precision, "HELIX_POOL_SLOTS": "6", "HELIX_POOL_STEP_TOKENS": "48"}
    answers, cached = [], []
    for reuse in ("false", "true"):
        with (
            running(certs, tmp_path, **options, HELIX_POOL_PREFIX_REUSE=reuse) as stack,
            stack.client() as client,
            ThreadPoolExecutor(14) as threads,
        ):
            alone = [answer(client, request) for request in wanted]
            leavers = [threads.submit(leave_early, client, wanted[index]) for index in order[::2]]
            crowd = dict(zip(order, threads.map(lambda index: answer(client, wanted[index]), order), strict=True))
            for leaver in leavers:
                leaver.result()
            answers += [[texts for texts, _ in alone], [crowd[index][0] for index in range(len(wanted))]]
            cached.append(sum(tokens for _, tokens in alone))
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert cached[0] == 0
    assert cached[1] > 300, "prefixes must really be reused"
    assert len({tuple(texts) for texts in answers[0]}) > 20, "the answers must differ"


def test_a_token_that_only_the_tokeniser_knows_is_refused(certs: Path, tmp_path: Path) -> None:
    model = shutil.copytree(GOLDEN / "llama-tiny", tmp_path / "model")
    tokeniser = json.loads((model / "tokenizer.json").read_text("utf-8"))
    vocabulary = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    added = {**tokeniser["added_tokens"][0], "id": vocabulary, "content": "<late>", "special": False}
    tokeniser["added_tokens"].append(added)
    (model / "tokenizer.json").write_text(json.dumps(tokeniser), "utf-8")
    with running(certs, tmp_path / "stack", HELIX_MODEL=str(model)) as stack, stack.client() as client:
        for path, body, param in (
            ("/v1/completions", {"prompt": "one <late> two"}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<late>"}]}, "messages"),
        ):
            response = client.post(path, json={"model": "model", "max_tokens": 2, **body})
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
            assert f"token id {vocabulary}" in error["message"]
        good = client.post("/v1/completions", json={"model": "model", "max_tokens": 2, "prompt": "one two"})
        assert good.status_code == 200, "the engine must not have noticed"


def rewrite(file: str, **changes: Any) -> Callable[[Path], None]:
    """Changes keys of a JSON file; None removes."""

    def apply(model: Path) -> None:
        content = {**json.loads((model / file).read_text("utf-8")), **changes}
        kept = {key: value for key, value in content.items() if value is not None}
        (model / file).write_text(json.dumps(kept), "utf-8")

    return apply


def replace(file: str, content: str | None) -> Callable[[Path], None]:
    """Overwrites a file; None removes it."""

    def apply(model: Path) -> None:
        if content is None:
            (model / file).unlink()
        else:
            (model / file).write_text(content, "utf-8")

    return apply


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


RUINS: list[tuple[Callable[[Path], None], str, str]] = [
    (truncate, "model.safetensors", "the file is truncated"),
    (rewrite("config.json", hidden_size=None), "config.json", "hidden_size: is missing"),
    (replace("tokenizer.json", None), "tokenizer.json", "does not exist"),
    (replace("chat_template.jinja", "{% for m in messages %}"), "chat_template.jinja", "line 1"),
    (rewrite("generation_config.json", eos_token_id="end"), "generation_config.json", "`eos_token_id`"),
]


@pytest.mark.parametrize(("damage", "file", "reason"), RUINS, ids=[f"{file}-{why}" for _, file, why in RUINS])
def test_a_damaged_checkpoint_ends_serve_with_its_name(
    damage: Callable[[Path], None], file: str, reason: str, certs: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(GOLDEN / "llama-tiny", tmp_path / "model")
    damage(model)
    command = [sys.executable, "-m", "helixflow", "serve", "--model", str(model)]
    environ = environment(certs, tmp_path / "home", HELIX_MODEL=str(model))
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=25, check=False)
    printed = ended.stdout + ended.stderr
    assert ended.returncode not in (0, 1), printed
    told = [line for line in printed.splitlines() if f"{model / file}: " in line]
    assert len(told) == 1, printed
    assert reason in told[0]
    assert "Traceback" not in printed


def test_an_engine_damaged_after_its_build_is_built_again(certs: Path, tmp_path: Path) -> None:
    options = {"HELIX_MODEL": str(GOLDEN / "qwen2-tiny")}
    environ = environment(certs, tmp_path, **options)

    def engine(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "helixflow", "engine", *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=25, check=False)

    assert engine("build", options["HELIX_MODEL"], "--quiet").returncode == 0
    weights = next((tmp_path / "engines").glob("*/*/weights.bin"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    verified = engine("verify")
    assert verified.returncode == 1
    assert str(weights) in verified.stdout
    assert engine("build", options["HELIX_MODEL"], "--quiet").returncode == 0
    assert engine("verify").returncode == 0
