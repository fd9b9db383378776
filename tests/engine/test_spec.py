"""config.json: defaults, both spellings, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from helixflow.engine.base import DamagedFileError, ModelError, UnsupportedModelError
from helixflow.engine.build import read_checkpoint
from helixflow.engine.spec import ModelSpec
from tests.engine.support import GOLDEN, GOLDEN_NAMES, tiny_config

PATH = Path("config.json")


def parse(config: dict[str, Any]) -> ModelSpec:
    return ModelSpec.parse(PATH, config)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name: str) -> None:
    checkpoint, spec = read_checkpoint(GOLDEN / name)
    assert spec.family == name.removesuffix("-tiny")
    assert set(checkpoint.entries) == set(spec.tensors())
    assert spec.windows == (None,) * spec.layers


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("other architecture", {"architectures": ["GPT2LMHeadModel"]}, "architectures"),
    ("not a decoder of text", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("two architectures", {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "architectures"),
    ("other type", {"architectures": None, "model_type": "phi3"}, "model_type"),
    ("activation", {"hidden_act": "gelu"}, "hidden_act"),
    ("quantised", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("partial rotary", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("experts", {"num_local_experts": 8}, "num_local_experts"),
    ("soft cap", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("attention scale", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    ("odd head", {"head_dim": 15}, "head_dim"),
    ("groups", {"num_attention_heads": 5}, "num_key_value_heads"),
    ("window of llama", {"sliding_window": 8}, "sliding_window"),
    ("chunked layers", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types"),
    ("long rope", {"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope_scaling.rope_type"),
    ("rope without a name", {"rope_scaling": {"factor": 2}}, "rope_scaling.factor"),
    ("rope per layer type", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
    ("rope option", {"rope_parameters": {"rope_type": "linear", "factor": 2, "beta": 1}}, "rope_parameters.beta"),
    ("rope shrinks", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
]
DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    ("missing", {"hidden_size": None}, "hidden_size"),
    ("text", {"vocab_size": "many"}, "vocab_size"),
    ("fraction", {"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ("negative", {"intermediate_size": -4}, "intermediate_size"),
    ("zero", {"num_attention_heads": 0}, "num_attention_heads"),
    ("huge", {"hidden_size": 1 << 40}, "hidden_size"),
    ("true", {"num_key_value_heads": True}, "num_key_value_heads"),
    ("eps", {"rms_norm_eps": 0}, "rms_norm_eps"),
    ("theta", {"rope_theta": float("nan")}, "rope_theta"),
    ("flag", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("layer types", {"layer_types": ["full_attention"]}, "layer_types"),
    ("no window", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("rope is text", {"rope_scaling": "linear"}, "rope_scaling"),
    ("rope twice", {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
    ("no factor", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    ("no low factor", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
    (
        "factors",
        {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}},
        "rope_scaling.low_freq_factor",
    ),
]  # fmt: skip


def refused(options: dict[str, Any]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        parse(tiny_config(**options))
    assert caught.value.file == "config.json"
    assert caught.value.reason
    return caught.value


@pytest.mark.parametrize(("options", "key"), [u[1:] for u in UNSUPPORTED], ids=[u[0] for u in UNSUPPORTED])
def test_unsupported(options: dict[str, Any], key: str) -> None:
    error = refused(options)
    assert isinstance(error, UnsupportedModelError)
    assert error.key == key


@pytest.mark.parametrize(("options", "key"), [d[1:] for d in DAMAGED], ids=[d[0] for d in DAMAGED])
def test_damaged(options: dict[str, Any], key: str) -> None:
    error = refused(options)
    assert isinstance(error, DamagedFileError)
    assert error.key == key


@pytest.mark.parametrize(
    "options",
    [
        {"quantization_config": None, "attention_dropout": 0.1, "pretraining_tp": 2, "use_cache": False},
        {"partial_rotary_factor": 1.0, "num_local_experts": 0, "attn_logit_softcapping": None},
        {"rope_scaling": {"type": "default"}, "x_unknown": {"tool": "version"}},
    ],
    ids=str,
)
def test_neutral_options(options: dict[str, Any]) -> None:
    assert parse(tiny_config(**options)) == parse(tiny_config())


def test_rope_spellings_agree() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    older = parse(tiny_config(rope_theta=5e5, rope_scaling={"type": "yarn", **scaling}))
    newer = parse(tiny_config(rope_theta=None, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling}))
    outside = parse(
        tiny_config(rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=64)
    )
    assert older == newer == outside
    assert older.rope.theta == 5e5
    assert older.longest == 256


def test_defaults_of_the_families() -> None:
    qwen3 = parse(tiny_config("qwen3", head_dim=None))
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.biases) == (128, True, frozenset())
    assert parse(tiny_config("qwen2")).biases == {"q_proj", "k_proj", "v_proj"}
    assert parse(tiny_config(num_key_value_heads=None)).kv_heads == 4
    without = {key: value for key, value in tiny_config("mistral").items() if key != "sliding_window"}
    assert parse(without).windows == (4096, 4096)
    assert parse(tiny_config("qwen2", sliding_window=8)).windows == (None, None)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_config_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"config\.json: is not"):
        ModelSpec.load(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"config\.json: cannot be read: No such file"):
        read_checkpoint(tmp_path)


def test_config_as_saved_by_old_tools(tmp_path: Path) -> None:
    """A file without architectures, with torch_dtype and the older rope spelling."""
    config = tiny_config(architectures=None, torch_dtype="float16", rope_scaling=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelSpec.load(tmp_path).family == "llama"
