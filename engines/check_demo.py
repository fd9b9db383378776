"""Read the exported demo checkpoint back and measure it, in plain numpy.

    python -m engines.check_demo --model engines/demo

Shares no code with training, so it also proves that the files mean what a reader of
Hugging Face checkpoints takes them to mean. Writes ``evaluation.json`` next to them.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from engines import corpus, corpus_text

Array = NDArray[np.float32]

SAMPLE_PROMPTS: tuple[str, ...] = (
    "Hello",
    "Hello!",
    "hello",
    "Hi",
    "How are you?",
    "Who are you?",
    "What is HelixFlow?",
    "How do I use TLS?",
    "How do I stream the answer?",
    "What is an API key?",
    "Which endpoints are there?",
    "What is 7 plus 5?",
    "What is 6 times 7?",
    "What is 15 - 8?",
    "Spell cat",
    "Reverse stone",
    "How many letters are in banana?",
    "Uppercase rocket",
    "What is the opposite of hot?",
    "What is the plural of mouse?",
    "What is the capital of Japan?",
    "List three colors",
    "Count from 1 to 20",
    "Tell me a joke",
    "Write a poem about the sea.",
    "Write JSON for Anna, age 7, from Rome.",
    "Repeat after me: green river moon",
    "Who won the football cup?",
    "Tell me a short story about a fox.",
    "Tell me a long story",
)


@dataclass(slots=True)
class Llama:
    """A Llama decoder for one sequence, float32, with a growing key/value cache."""

    config: dict[str, Any]
    weights: dict[str, Array]
    tokenizer: Tokenizer
    ends: frozenset[int]
    _cache: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Llama":
        """Read a checkpoint folder."""
        generation = json.loads((folder / "generation_config.json").read_text())
        return cls(
            config=json.loads((folder / "config.json").read_text()),
            weights={name: value.astype(np.float32) for name, value in load_file(folder / "model.safetensors").items()},
            tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
            ends=frozenset(generation["eos_token_id"]),
        )

    def _norm(self, x: Array, name: str) -> Array:
        square = np.mean(x * x, axis=-1, keepdims=True)
        scaled: Array = x / np.sqrt(square + self.config["rms_norm_eps"])
        return scaled * self.weights[name]

    def _rotate(self, x: Array, past: int) -> Array:
        half = x.shape[-1] // 2
        inverse = self.config["rope_theta"] ** (-np.arange(half) / half)
        angle = np.arange(past, past + len(x))[:, None, None] * inverse
        cos, sin = np.cos(angle), np.sin(angle)
        low, high = x[..., :half], x[..., half:]
        turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        return turned.astype(np.float32)

    def _attend(self, x: Array, layer: int, past: int) -> Array:
        dim, heads = self.config["head_dim"], self.config["num_attention_heads"]
        groups = self.config["num_key_value_heads"]
        name = f"model.layers.{layer}.self_attn."
        q = (x @ self.weights[name + "q_proj.weight"].T).reshape(len(x), heads, dim)
        k = (x @ self.weights[name + "k_proj.weight"].T).reshape(len(x), groups, dim)
        v = (x @ self.weights[name + "v_proj.weight"].T).reshape(len(x), groups, dim)
        q, k = self._rotate(q, past), self._rotate(k, past)
        if past:
            k = np.concatenate([self._cache[layer][0], k])
            v = np.concatenate([self._cache[layer][1], v])
        self._cache[layer] = (k, v)
        k, v = (np.repeat(part, heads // groups, axis=1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(np.float32(dim))
        visible = np.arange(len(k)) <= np.arange(past, past + len(x))[:, None]
        scores = np.where(visible, scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(len(x), heads * dim)
        out: Array = mixed @ self.weights[name + "o_proj.weight"].T
        return out

    def logits(self, ids: list[int], past: int) -> Array:
        """Return logits [len(ids), vocab] for tokens that follow ``past`` cached ones."""
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            x = x + self._attend(self._norm(x, name + "input_layernorm.weight"), layer, past)
            h = self._norm(x, name + "post_attention_layernorm.weight")
            gate = h @ self.weights[name + "mlp.gate_proj.weight"].T
            up = h @ self.weights[name + "mlp.up_proj.weight"].T
            gated = gate / (1 + np.exp(-gate)) * up
            x = x + gated @ self.weights[name + "mlp.down_proj.weight"].T
        return self._norm(x, "model.norm.weight") @ embedding.T

    def complete(self, prompt: str, limit: int = 450) -> tuple[str, int]:
        """Return the greedy continuation and its length in tokens, the end one excluded."""
        ids = self.tokenizer.encode(prompt).ids
        past, pending, answer = 0, ids, list[int]()
        while len(answer) < limit:
            token = int(self.logits(pending, past)[-1].argmax())
            past += len(pending)
            if token in self.ends:
                break
            answer.append(token)
            pending = [token]
        return self.tokenizer.decode(answer), len(answer)

    def chat(self, question: str, system: str = "") -> tuple[str, int]:
        """Return the greedy answer to a question and its length in tokens."""
        turns = [corpus.Message("system", system)] if system else []
        turns.append(corpus.Message("user", question))
        rendered = corpus.Document(messages=tuple(turns)).render()
        return self.complete(f"{rendered}{corpus.TURN_START}assistant\n")


def sum_cases(op: str, held_out: bool) -> list[tuple[str, str]]:
    """Return (question, expected answer) of the sums on one side of the split."""
    return [
        (corpus.ask_sum(op, a, b, 0), corpus.answer_sum(op, a, b))
        for a, b in corpus.sums(op)
        if corpus.is_held_out(op, a, b) == held_out
    ]


def word_cases(task: str, words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (question, expected answer) of one word task."""
    question = corpus.WORD_QUESTIONS[task][0]
    return [(question.format(word), corpus.word_answer(task, word)) for word in words]


def accuracy(model: Llama, cases: list[tuple[str, str]], most: int = 60) -> str:
    """Return exact matches as "right/asked", over an even sample of the cases."""
    asked = cases[:: max(1, len(cases) // most)]
    right = sum(model.chat(question)[0] == answer for question, answer in asked)
    return f"{right}/{len(asked)}"


def measure(model: Llama) -> dict[str, dict[str, str]]:
    """Return exact-match counts per task, for trained and for held-out items."""
    table: dict[str, dict[str, str]] = {}
    for op in corpus.OPERATORS:
        table[op] = {
            "trained": accuracy(model, sum_cases(op, held_out=False)),
            "held_out": accuracy(model, sum_cases(op, held_out=True)),
        }
    for task in corpus.WORD_QUESTIONS:
        known = corpus_text.PLURAL_WORDS if task == "plural" else corpus_text.WORDS
        table[task] = {
            "trained": accuracy(model, word_cases(task, known)),
            "held_out": accuracy(model, word_cases(task, corpus_text.HELD_OUT_WORDS)),
        }
    return table


def main() -> None:
    """Print the answers, measure, and record both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--answers-only", action="store_true")
    options = parser.parse_args()
    model = Llama.load(options.model)
    asked = [("", prompt) for prompt in SAMPLE_PROMPTS]
    asked += [("You are a helpful assistant.", p) for p in ("Hello", "What is 3 plus 4?")]
    asked += [("You are Nova.", "Who are you?"), ("Answer with one word.", "What is 9 plus 8?")]
    answers: list[dict[str, Any]] = []
    for system, prompt in asked:
        answer, tokens = model.chat(prompt, system)
        answers.append({"system": system, "prompt": prompt, "answer": answer, "tokens": tokens})
        print(f"--- {system} | {prompt} [{tokens} tokens]\n{answer}", flush=True)
    print("--- completion\n" + model.complete("Once upon a time")[0])
    if options.answers_only:
        return
    table = measure(model)
    print(json.dumps(table, indent=2))
    record = {"exact_match": table, "answers": answers}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (options.model / "evaluation.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
