"""Activation scales for fp8."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from helixflow.engine.base import EngineError, Float32
from helixflow.engine.decoder import write_decoder
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.calibrate import TEXTS, activation_scales, calibration_sequences
from helixflow.engine.tensorrt.dense import NumpyBuilder
from tests.engine.support import GOLDEN, GOLDEN_NAMES, Tensors, random_tensors, read_safetensors, tiny_config

LINEARS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


def tiny(family: str = "llama") -> tuple[ModelSpec, Tensors]:
    config = tiny_config(family)
    return ModelSpec.parse(Path("config.json"), config), random_tensors(config)


def inputs(spec: ModelSpec, tensors: Tensors, sequences: Sequence[Sequence[int]]) -> dict[str, Float32]:
    seen: dict[str, Float32] = {}
    write_decoder(spec, NumpyBuilder(spec, tensors.__getitem__, sequences, 64, watch=seen.__setitem__))
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_largest_input_becomes_the_largest_fp8_number(family: str) -> None:
    spec, tensors = tiny(family)
    sequences = [[1, 2, 3, 4], [50, 60]]
    scales = activation_scales(spec, tensors.__getitem__, sequences)
    assert scales.keys() == {f"model.layers.{i}.{name}" for i in range(spec.layers) for name in LINEARS}
    expected = inputs(spec, tensors, sequences)
    for name, scale in scales.items():
        assert scale * 448 == pytest.approx(np.abs(expected[name]).max(), rel=1e-6)


def test_every_weight_but_the_head_is_read_once_with_progress() -> None:
    spec, tensors = tiny()
    read: list[str] = []
    shown: list[tuple[str, int, int]] = []

    def counted(name: str) -> Float32:
        read.append(name)
        return tensors[name]

    activation_scales(spec, counted, [[1], [2, 3]], lambda *progress: shown.append(progress))
    assert sorted(read) == sorted(set(tensors) - {"lm_head.weight"})
    done = [at for _, at, _ in shown]
    assert done == sorted(done)
    assert shown[-1][1] == shown[-1][2]
    assert {what for what, _, _ in shown} == {"calibrating fp8"}


def test_inputs_that_are_all_zero() -> None:
    spec, tensors = tiny()
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 0
    assert activation_scales(spec, tensors.__getitem__, [[1, 2]])["model.layers.0.mlp.down_proj"] == 1.0


def test_inputs_that_are_not_finite() -> None:
    spec, tensors = tiny()
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 3e38
    with pytest.raises(EngineError, match=r"model\.layers\.1\.mlp\.down_proj is not finite"):
        activation_scales(spec, tensors.__getitem__, [[1, 2]])


def test_nothing_to_calibrate_with() -> None:
    spec, tensors = tiny()
    with pytest.raises(EngineError, match="tokens"):
        activation_scales(spec, tensors.__getitem__, [])


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_texts_through_the_tokeniser_of_a_checkpoint(name: str) -> None:
    tensors = read_safetensors(GOLDEN / name / "model.safetensors")
    spec = ModelSpec.load(GOLDEN / name, tensors)
    tokenizer = Tokenizer.from_file(str(GOLDEN / name / "tokenizer.json"))
    sequences = calibration_sequences(spec, lambda text: tokenizer.encode(text).ids)
    assert len(sequences) == len(TEXTS)
    scales = activation_scales(spec, tensors.__getitem__, sequences)
    # The golden prompts are other texts; their activations hardly leave the range that was found.
    cases = json.loads((GOLDEN / name / "golden.json").read_text())["cases"]
    for linear, x in inputs(spec, tensors, [case["input_ids"][:64] for case in cases]).items():
        assert np.abs(x).max() <= 2 * 448 * scales[linear]


def test_without_a_tokeniser_the_ids_spread_over_the_vocabulary() -> None:
    spec, _ = tiny()
    sequences = calibration_sequences(spec)
    assert sequences == calibration_sequences(spec)
    ids = [token for sequence in sequences for token in sequence]
    assert set(ids) == set(range(spec.vocab_size))


def test_sequences_fit_the_model() -> None:
    spec, _ = tiny()
    sequences = calibration_sequences(spec, lambda text: [-1, 101, *range(100)] * 5 if "def" in text else [101])
    assert sequences == [(list(range(100)) * 5)[:256]]
