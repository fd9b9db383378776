"""The dense numpy decoder against the golden logits and the float64 reference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.decoder import write_decoder
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.dense import NumpyBuilder, dense_logits
from tests.engine.support import GOLDEN, GOLDEN_NAMES, Reference, random_tensors, read_safetensors, tiny_config

MAX_LEN = 160


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_logits(name: str) -> None:
    tensors = read_safetensors(GOLDEN / name / "model.safetensors")
    spec = ModelSpec.load(GOLDEN / name, tensors)
    stored = np.load(GOLDEN / name / "golden_logits.npz")
    for i, case in enumerate(json.loads((GOLDEN / name / "golden.json").read_text())["cases"]):
        logits = dense_logits(spec, tensors.__getitem__, case["input_ids"], MAX_LEN)
        assert logits.dtype == np.float32
        assert np.abs(logits - stored[f"logits_{i}"]).max() <= 1e-4


def model(**options: Any) -> tuple[ModelSpec, dict[str, Any], dict[str, Float32]]:
    config = tiny_config(**options)
    tensors = random_tensors(config, biases=["o_proj", "up_proj"])
    return ModelSpec.parse(Path("config.json"), config).with_biases(tensors), config, tensors


def test_a_window_and_biases() -> None:
    spec, config, tensors = model(family="mistral", sliding_window=7)
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, 30).tolist()
    expected = Reference(config, tensors, windows=[7, 7]).logits(ids)
    assert np.allclose(dense_logits(spec, tensors.__getitem__, ids, 64), expected, atol=2e-4)


def test_several_sequences_do_not_see_each_other_and_weights_are_read_once() -> None:
    spec, _, tensors = model(family="qwen3")
    read: list[str] = []
    inputs: dict[str, Float32] = {}

    def counted(name: str) -> Float32:
        read.append(name)
        return tensors[name]

    sequences = [[5, 6, 7], [100], [8, 9, 8, 9, 8]]
    builder = NumpyBuilder(spec, counted, sequences, 64, watch=inputs.__setitem__)
    write_decoder(spec, builder)
    assert sorted(read) == sorted(tensors)
    alone = [dense_logits(spec, tensors.__getitem__, ids, 64) for ids in sequences]
    assert np.allclose(builder.logits, np.concatenate(alone), atol=1e-5)
    assert len(inputs) == 7 * spec.layers
    assert inputs["model.layers.1.mlp.down_proj"].shape == (9, spec.intermediate_size)


def test_without_a_head_the_head_is_not_read() -> None:
    spec, _, tensors = model()
    read: list[str] = []

    def counted(name: str) -> Float32:
        read.append(name)
        return tensors[name]

    builder = NumpyBuilder(spec, counted, [[1, 2]], 64, head=False)
    write_decoder(spec, builder)
    assert "lm_head.weight" not in read
    assert builder.logits.shape == (0, spec.vocab_size)


@pytest.mark.parametrize("ids", [[], [101], [-1], [1] * 65])
def test_ids_that_cannot_be_computed(ids: list[int]) -> None:
    spec, _, tensors = model()
    with pytest.raises(EngineError, match=r"tokens|vocabulary"):
        dense_logits(spec, tensors.__getitem__, ids, 64)
