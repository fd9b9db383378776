"""The golden checkpoints through the whole path: HTTPS, gateway, gRPC, scheduler, engine, text."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .stack import GOLDEN, Stack

MODELS = ("llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny")
TOLERANCE = 1e-3


def reference(name: str) -> tuple[dict[str, Any], Any]:
    return json.loads((GOLDEN / name / "golden.json").read_text("utf-8")), np.load(GOLDEN / name / "golden_logits.npz")


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text(name: str, golden: Callable[[str], Stack]) -> None:
    cases = reference(name)[0]["cases"]
    with golden(name).client() as client:
        for case in cases:
            body = {"model": name, "prompt": case["prompt"], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == case["greedy_text"]
            assert answer.json()["usage"]["prompt_tokens"] == len(case["input_ids"])
            assert answer.json()["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_streamed_and_from_token_ids(name: str, golden: Callable[[str], Stack]) -> None:
    case = reference(name)[0]["cases"][1]
    body = {
        "model": name,
        "prompt": case["input_ids"],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    with golden(name).client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == case["greedy_text"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_through_logprobs(name: str, golden: Callable[[str], Stack]) -> None:
    document, logits = reference(name)
    with golden(name).client() as client:
        for index, case in enumerate(document["cases"]):
            expected = log_softmax(logits[f"logits_{index}"].astype(np.float64))
            body = {
                "model": name,
                "prompt": case["input_ids"],
                "max_tokens": 1,
                "temperature": 0,
                "echo": True,
                "logprobs": 5,
            }
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            got = answer.json()["choices"][0]["logprobs"]
            ids = [*case["input_ids"], case["greedy_24"][0]]
            assert got["token_logprobs"][0] is None
            assert len(got["token_logprobs"]) == len(ids)
            wanted = [expected[position, ids[position + 1]] for position in range(len(ids) - 1)]
            assert np.abs(np.array(got["token_logprobs"][1:]) - wanted).max() <= TOLERANCE
            for position, top in enumerate(got["top_logprobs"][1:]):
                best = np.sort(expected[position])[::-1][: len(top)]
                assert np.abs(np.sort(list(top.values()))[::-1][:4] - best[:4]).max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_tokenise_and_back(name: str, golden: Callable[[str], Stack]) -> None:
    with golden(name).client() as client:
        for case in reference(name)[0]["cases"]:
            answer = client.post("/tokenize", json={"model": name, "prompt": case["prompt"]}).json()
            assert answer["tokens"] == case["input_ids"]
            assert answer["count"] == len(case["input_ids"])
            back = client.post("/detokenize", json={"model": name, "tokens": answer["tokens"]}).json()
            assert back["prompt"] == case["prompt"]


@pytest.mark.parametrize("name", MODELS)
def test_chat_template(name: str, golden: Callable[[str], Stack]) -> None:
    with golden(name).client() as client:
        for chat in reference(name)[0]["chats"]:
            answer = client.post("/tokenize", json={"model": name, "messages": chat["messages"]}).json()
            assert answer["tokens"] == chat["input_ids"]


def test_a_developer_message_is_a_system_message_to_a_template_that_knows_no_other(
    golden: Callable[[str], Stack],
) -> None:
    with golden("mistral-tiny").client() as client:
        ids = [
            client.post(
                "/tokenize", json={"model": "mistral-tiny", "messages": [{"role": role, "content": "Be terse."}]}
            )
            for role in ("developer", "system")
        ]
    assert ids[0].status_code == 200, ids[0].text
    assert ids[0].json() == ids[1].json()


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_request_alone_and_among_others_gives_the_same_tokens(
    temperature: float, golden: Callable[[str], Stack]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    cases = reference("qwen3-tiny")[0]["cases"]
    body = {
        "model": "qwen3-tiny",
        "prompt": cases[0]["prompt"],
        "max_tokens": 48,
        "temperature": temperature,
        "seed": 7,
        "ignore_eos": True,
        "logprobs": 1,
    }
    others = [
        {**body, "prompt": cases[index % len(cases)]["prompt"] + " more" * index, "seed": index} for index in range(16)
    ]
    with golden("qwen3-tiny").client() as client:

        def tokens(request: dict[str, Any]) -> Any:
            answer = client.post("/v1/completions", json=request)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["logprobs"]["tokens"]

        alone = tokens(body)
        with ThreadPoolExecutor(17) as threads:
            crowd = list(threads.map(tokens, [*others[:8], body, *others[8:]]))
    assert crowd[8] == alone
    assert len(alone) == 48
    assert len({tuple(answer) for answer in crowd}) > 8, "the crowd must be a real crowd"
