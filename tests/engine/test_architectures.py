"""Options of the families against an independent dense decoder."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.support import Float64, Reference, open_engine, random_tensors, step, tiny_config, write_checkpoint

IDS = [int(i) for i in np.random.default_rng(11).integers(0, 101, 90)]


def check(tmp_path: Path, config: dict[str, Any], biases: tuple[str, ...] = (), **reference: Any) -> None:
    """Chunked prefill, then single tokens, compared with the reference at every position."""
    tensors = random_tensors(config, biases)
    engine = open_engine(write_checkpoint(tmp_path / "model", config, tensors), tmp_path / "engines", max_len=200)
    expected = Reference(config, tensors, **reference).logits(IDS)
    rows = [step(engine, (3, 0, IDS[:37], 37)), step(engine, (3, 37, IDS[37:80], 43))]
    rows += [step(engine, (3, i, [IDS[i]], 1)) for i in range(80, 90)]
    engine.close()
    assert np.abs(np.concatenate(rows) - expected).max() <= 2e-4 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 24},
        {"head_dim": 80},
        {"head_dim": 2},
        {"head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 3},
        {"head_dim": None, "hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1},
        {"num_attention_heads": 7, "num_key_value_heads": 7},
        {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 33},
    ],
    ids=str,
)
def test_any_heads(tmp_path: Path, options: dict[str, Any]) -> None:
    check(tmp_path, tiny_config(**options))


def test_odd_head_with_norms_of_q_and_k(tmp_path: Path) -> None:
    check(tmp_path, tiny_config("qwen3", head_dim=24, attention_bias=True))


def test_biases_by_config(tmp_path: Path) -> None:
    check(tmp_path, tiny_config(attention_bias=True, mlp_bias=True))


def test_biases_that_only_the_weights_have(tmp_path: Path) -> None:
    check(
        tmp_path, tiny_config("qwen2", tie_word_embeddings=True), biases=("o_proj", "gate_proj", "up_proj", "down_proj")
    )


def test_window_of_mistral(tmp_path: Path) -> None:
    check(tmp_path, tiny_config("mistral", sliding_window=9), windows=[9, 9])


def test_window_of_qwen_by_layer_number(tmp_path: Path) -> None:
    config = tiny_config("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1)
    check(tmp_path, config, windows=[None, 5])


def test_window_of_qwen_by_layer_types(tmp_path: Path) -> None:
    config = tiny_config(
        "qwen3", sliding_window=1, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]
    )
    check(tmp_path, config, windows=[1, None])


def plain(theta: float = 10000.0) -> Float64:
    return np.array([theta ** (-2 * i / 16) for i in range(8)])


def llama3(factor: float, low: float, high: float, trained: int) -> Float64:
    speeds = []
    for speed in plain():
        wave = 2 * math.pi / speed
        if wave < trained / high:
            speeds.append(speed)
        elif wave > trained / low:
            speeds.append(speed / factor)
        else:
            smooth = (trained / wave - low) / (high - low)
            speeds.append((1 - smooth) * speed / factor + smooth * speed)
    return np.array(speeds)


def yarn(factor: float, trained: int, fast: float, slow: float, truncate: bool = True) -> Float64:
    def dim(turns: float) -> float:
        return 16 * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = dim(fast), dim(slow)
    if truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, 15.0)
    speeds = []
    for i, speed in enumerate(plain()):
        kept = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
        speeds.append(speed / factor * (1 - kept) + speed * kept)
    return np.array(speeds)


def log_factor(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS: list[tuple[str, dict[str, Any], Float64, float]] = [
    ("linear", {"factor": 2.5}, plain() / 2.5, 1.0),
    ("llama3", LLAMA3, llama3(8.0, 1.0, 4.0, 32), 1.0),
    ("yarn", YARN, yarn(4.0, 32, 32, 1), log_factor(4)),
    (
        "yarn",
        {**YARN, "beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 0.7, "truncate": False},
        yarn(4.0, 32, 8, 0.5, truncate=False),
        0.7,
    ),
    (
        "yarn",
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        yarn(4.0, 32, 32, 1),
        log_factor(4, 0.7) / log_factor(4, 1.3),
    ),
]


@pytest.mark.parametrize("spelling", ["rope_scaling/type", "rope_scaling/rope_type", "rope_parameters/rope_type"])
@pytest.mark.parametrize(
    ("kind", "options", "speeds", "factor"), SCALINGS, ids=[f"{s[0]}-{len(s[1])}" for s in SCALINGS]
)
def test_rope_scaling(
    tmp_path: Path, spelling: str, kind: str, options: dict[str, Any], speeds: Float64, factor: float
) -> None:
    key, _, name = spelling.partition("/")
    if key == "rope_parameters":
        config = tiny_config(rope_theta=None, rope_parameters={name: kind, "rope_theta": 10000.0, **options})
    else:
        config = tiny_config(rope_scaling={name: kind, **options})
    check(tmp_path, config, frequencies=speeds, attention_factor=factor)


def test_dynamic_rope_is_plain_within_the_trained_length(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=200)
    check(tmp_path, config, frequencies=plain())


def test_dynamic_rope_beyond_the_trained_length(tmp_path: Path) -> None:
    """The engine's slots hold 200 positions: the stretch is that of a sequence of 200."""
    config = tiny_config(rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=64)
    theta = 10000.0 * (4.0 * 200 / 64 - 3.0) ** (16 / 14)
    check(tmp_path, config, frequencies=plain(theta))
