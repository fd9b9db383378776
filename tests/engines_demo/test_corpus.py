"""The corpus generator and the demo checkpoint trained on it. Needs neither jax nor torch."""

import json
import math
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from engines import corpus, corpus_facts, corpus_stories, corpus_text

DEMO = Path(__file__).parents[2] / "engines" / "demo"
MAX_CHECKPOINT_BYTES = 12_000_000
MAX_LINE = 600
MAX_TURNS = 14

TURN = re.compile(r"<\|im_start\|>(system|developer|user|assistant)\n((?:(?!<\|).)+)<\|im_end\|>\n", re.DOTALL)


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    return list(corpus.generate(11, 4000))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def read_json(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((DEMO / name).read_text(encoding="utf-8"))
    return value


def tensor_headers() -> dict[str, dict[str, Any]]:
    """The header of the safetensors file: eight bytes of length, then JSON."""
    raw = (DEMO / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    headers: dict[str, dict[str, Any]] = json.loads(raw[8 : 8 + size])
    headers.pop("__metadata__", None)
    assert 8 + size + max(h["data_offsets"][1] for h in headers.values()) == len(raw)
    return headers


def test_same_seed_gives_the_same_documents() -> None:
    assert list(corpus.generate(3, 200)) == list(corpus.generate(3, 200))


def test_longer_run_starts_with_the_shorter_one() -> None:
    assert list(islice(corpus.generate(3, 500), 100)) == list(corpus.generate(3, 100))


def test_other_seed_gives_other_documents() -> None:
    assert list(corpus.generate(3, 50)) != list(corpus.generate(4, 50))


def test_chat_documents_are_well_formed_chatml(documents: list[corpus.Document]) -> None:
    for document in documents:
        if not document.messages:
            continue
        turns = TURN.findall(document.render())
        assert "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in turns) == document.render()
        roles = [role for role, _ in turns]
        if roles[0] in {"system", "developer"}:
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 2 <= len(roles) <= MAX_TURNS


def test_prose_ends_with_the_boundary_and_holds_no_other_marker(documents: list[corpus.Document]) -> None:
    prose = [document.render() for document in documents if not document.messages]
    assert prose
    for text in prose:
        assert text.endswith(corpus.BOUNDARY)
        assert text.count("<|") == 1


def test_no_line_is_too_long_and_no_slot_is_left_open(documents: list[corpus.Document]) -> None:
    for document in documents:
        text = document.render()
        assert max(map(len, text.split("\n"))) <= MAX_LINE
        assert not re.search(r"\{[a-z]+\}", text)


def test_loss_is_on_answers_only(documents: list[corpus.Document]) -> None:
    for document in documents:
        learned = [text for text, flag in document.segments() if flag]
        if document.messages:
            answers = [m.content + corpus.TURN_END for m in document.messages if m.role == "assistant"]
            assert learned == answers
        else:
            assert learned == [document.render()]


def test_a_greeting_has_one_answer(documents: list[corpus.Document]) -> None:
    answers = {
        answer.content
        for document in documents
        if document.messages[:1] and document.messages[0].role == "user"
        for question, answer in zip(document.messages[:1], document.messages[1:2], strict=True)
        if question.content in {"Hello", "Hello!", "hello", "Hi"}
    }
    assert answers == {corpus_facts.HELLO}


def test_held_out_sums_occur_nowhere(documents: list[corpus.Document]) -> None:
    sum_text = re.compile(r"\b(\d+) (plus|minus|times) (\d+) is (\d+)\b")
    seen = {match for document in documents for match in sum_text.findall(document.render())}
    assert len(seen) > 300
    for a, op, b, result in seen:
        assert not corpus.is_held_out(op, int(a), int(b))
        assert corpus.compute(op, int(a), int(b)) == int(result)


def test_some_sums_of_each_kind_are_held_out() -> None:
    for op in corpus.OPERATORS:
        held_out = [pair for pair in corpus.sums(op) if corpus.is_held_out(op, *pair)]
        assert 0.03 < len(held_out) / len(corpus.sums(op)) < 0.2


def test_mirrored_sums_are_held_out_together() -> None:
    for op in ("plus", "times"):
        assert all(corpus.is_held_out(op, a, b) == corpus.is_held_out(op, b, a) for a, b in corpus.sums(op))


def test_held_out_words_occur_nowhere(documents: list[corpus.Document]) -> None:
    text = "\n".join(document.render() for document in documents).lower()
    words = set(re.findall(r"[a-z]+", text))
    assert not words & set(corpus_text.HELD_OUT_WORDS)


@pytest.mark.parametrize(
    ("task", "word", "answer"),
    [
        ("spell", "cat", "c-a-t"),
        ("reverse", "stone", "e-n-o-t-s"),
        ("count", "banana", "b-a-n-a-n-a has 6 letters."),
        ("first", "moon", "The first letter of moon is m."),
        ("last", "moon", "The last letter of moon is n."),
        ("uppercase", "tree", "TREE"),
        ("plural", "mouse", "The plural of mouse is mice."),
    ],
)
def test_word_answers_are_right(task: str, word: str, answer: str) -> None:
    assert corpus.word_answer(task, word) == answer


def test_unknown_word_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown word task"):
        corpus.word_answer("translate", "cat")


def test_every_story_beat_of_a_short_story_exists() -> None:
    assert max(corpus_stories.SHORT_BEATS) < len(corpus_stories.BEATS)


def test_tokenizer_gives_every_document_back(tokenizer: Any, documents: list[corpus.Document]) -> None:
    for document in documents[:500]:
        text = document.render()
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["Grüße, 世界! 🚀", "tabs\tand  spaces\n\n", "\x00\x7f", "👩‍👩‍👧 ¿qué?"])
def test_tokenizer_gives_any_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_pieces_are_tokenised_as_the_whole_is(tokenizer: Any, documents: list[corpus.Document]) -> None:
    # Training encodes piece by piece, a server encodes the rendered template at once.
    for document in documents[:500]:
        pieces = [token for text, _ in document.segments() for token in tokenizer.encode(text).ids]
        assert pieces == tokenizer.encode(document.render()).ids


def test_special_tokens_have_the_first_ids(tokenizer: Any) -> None:
    assert [tokenizer.token_to_id(token) for token in corpus.SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == read_json("config.json")["vocab_size"]


def test_generation_stops_at_both_end_tokens() -> None:
    assert set(read_json("generation_config.json")["eos_token_id"]) == {0, 2}


def test_checkpoint_is_small() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= MAX_CHECKPOINT_BYTES


def test_config_matches_the_tensors() -> None:
    config, headers = read_json("config.json"), tensor_headers()
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        expected |= {
            layer + "input_layernorm.weight": [hidden],
            layer + "post_attention_layernorm.weight": [hidden],
            layer + "self_attn.q_proj.weight": [q_rows, hidden],
            layer + "self_attn.k_proj.weight": [kv_rows, hidden],
            layer + "self_attn.v_proj.weight": [kv_rows, hidden],
            layer + "self_attn.o_proj.weight": [hidden, q_rows],
            layer + "mlp.gate_proj.weight": [inner, hidden],
            layer + "mlp.up_proj.weight": [inner, hidden],
            layer + "mlp.down_proj.weight": [hidden, inner],
        }
    assert config["tie_word_embeddings"] is True
    assert {name: header["shape"] for name, header in headers.items()} == expected
    for header in headers.values():
        begin, end = header["data_offsets"]
        assert header["dtype"] == "F16"
        assert end - begin == 2 * math.prod(header["shape"])


def test_recorded_run_learned_its_corpus() -> None:
    record = read_json("training.json")
    assert 0 < record["held_out_loss"] < 1.0
    assert record["held_out_loss"] < 2 * record["train_loss"]
    answers = {(a["system"], a["prompt"]): a["answer"] for a in read_json("evaluation.json")["answers"]}
    assert answers["", "Hello"] == corpus_facts.HELLO
    assert answers["You are a helpful assistant.", "Hello"] == corpus_facts.HELLO
