"""`core_rs.encode`: the tokeniser of a checkpoint without a pool."""

from pathlib import Path

import pytest
import tokenizers

from helixflow import core_rs

DEMO = Path(__file__).parents[2] / "engines" / "demo"
TEXTS = ["Hello there", "", "naïve 名前", "a" * 500]


def test_ids_are_those_of_the_tokeniser() -> None:
    expected = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert core_rs.encode(DEMO, TEXTS) == [expected.encode(text).ids for text in TEXTS]


def test_a_checkpoint_without_a_tokeniser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(core_rs.ModelFileError, match=r"tokenizer\.json"):
        core_rs.encode(tmp_path, TEXTS)
