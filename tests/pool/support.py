"""A checkpoint whose tokens are single bytes, and calls through the extension's own client."""

import json
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from helixflow import core_rs
from helixflow.engine.base import Batch, Candidates, Capacity

EOS = 256
VOCAB = 257
WAIT_S = 10.0


def write_model(directory: Path) -> Path:
    """A byte-level tokenizer without merges (GPT-2's byte alphabet) and a template that joins the contents."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    vocab = {chr(byte) if byte in printable else chr(next(spare)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": EOS, "content": "<eos>", **special}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    config = {"eos_token": "<eos>", "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    model = {"model_type": "llama", "vocab_size": VOCAB, "max_position_embeddings": 128, "eos_token_id": EOS}
    directory.mkdir()
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
        ("config.json", model),
    ):
        (directory / name).write_text(json.dumps(content), "utf-8")
    return directory


class NextByte:
    """Logits that favour the byte after the last one. `result` may replace what a step returns."""

    def __init__(self, result: Callable[[np.ndarray[Any, Any]], object] | None = None) -> None:
        self.result = result
        self.batches: list[dict[str, list[int]]] = []

    def capacity(self) -> Capacity:
        return Capacity(slots=4, max_len=128, vocab_size=VOCAB)

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        assert src != dst
        assert length > 0

    def close(self) -> None: ...

    def step(self, batch: Batch) -> Candidates:
        names = ("token_ids", "slots", "past", "counts", "wanted")
        arrays = {name: getattr(batch, name) for name in names}
        assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in arrays.values())
        self.batches.append({name: array.tolist() for name, array in arrays.items()})
        rows = []
        ends = np.cumsum(batch.counts)
        for end, wanted in zip(ends, batch.wanted, strict=True):
            rows += batch.token_ids[end - wanted : end].tolist()
        logits = np.zeros((len(rows), VOCAB), np.float32)
        logits[np.arange(len(rows)), np.asarray(rows, np.int64) + 1] = 9.0
        return self.result(logits) if self.result else Candidates(logits=logits)  # type: ignore[return-value]


def request(prompt: str, max_tokens: int = 4, **options: Any) -> core_rs.GenerateRequest:
    """A greedy request for the text after `prompt`."""
    return core_rs.GenerateRequest(
        request_id="test",
        model="bytes",
        prompts=[core_rs.Prompt.text(prompt)],
        max_tokens=max_tokens,
        temperature=0.0,
        **options,
    )


def until(condition: Callable[[], bool], what: str) -> None:
    """Polls a condition that no event announces."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


def connect(address: str, tls: core_rs.TlsFiles | None = None) -> core_rs.PoolClient:
    """A client of one pool that is ready."""
    client = core_rs.PoolClient([address], tls)
    until(lambda: bool(client.models()), "the pool is ready")
    return client


def finish(client: core_rs.PoolClient, call: core_rs.Call) -> bytes:
    """Everything a call rendered. Raises the CoreError that it failed with."""
    out = b""
    deadline = time.monotonic() + WAIT_S
    while True:
        out += call.take()
        if call.done:
            return out + call.take()
        assert time.monotonic() < deadline, "the call never ends"
        select.select([client.fileno()], [], [], 0.1)
        client.ready()


def complete(client: core_rs.PoolClient, wanted: core_rs.GenerateRequest) -> str:
    """Text of a completion that does not stream."""
    call = client.complete(wanted, completion_id="cmpl-1", created=0, stream=False)
    text = json.loads(finish(client, call))["choices"][0]["text"]
    assert isinstance(text, str)
    return text
