"""Rotary position embedding: scaling options of config.json, and the tables of cosines and sines.

Formulas: RoFormer (arXiv 2104.09864); YaRN and dynamic NTK (arXiv 2309.00071, §3.1 to 3.4, appendix A.2); `llama3` as
published with Llama 3.1. Conventions (pairs are `(i, i + head_dim / 2)`, key names, defaults) are those of
`transformers`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import Float32
from helixflow.engine.reader import Reader

OPTIONS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Options of a rotary embedding. `trained` is the number of positions before scaling.

    `attention_factor` multiplies cosines and sines (YaRN; 1 for the other kinds).
    """

    kind: str
    theta: float
    factor: float = 1.0
    trained: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @property
    def longest(self) -> int:
        """Positions that the scaling reaches to; `dynamic` is bounded by its factor as well."""
        return int(self.trained * self.factor)


def read_rope(read: Reader, max_positions: int) -> RopeSpec:
    """Reads `rope_parameters` (newer spelling) or `rope_theta` with `rope_scaling` (older spelling) of config.json.

    Raises UnsupportedModelError or DamagedFileError.
    """
    newer, older = read.config.get("rope_parameters"), read.config.get("rope_scaling")
    key = "rope_parameters" if newer is not None else "rope_scaling"
    chosen = newer if newer is not None else older
    if newer is not None and older is not None and newer != older:
        raise read.damaged("rope_scaling", "disagrees with rope_parameters; keep one of the two")
    if chosen is None:
        return RopeSpec("default", read.number("rope_theta", 10000.0), trained=max_positions)
    if not isinstance(chosen, dict):
        raise read.damaged(key, f"is {chosen!r}, expected an object or null")
    inner = Reader(read.path, chosen, f"{key}.")
    kind = chosen.get("rope_type", chosen.get("type", "default"))
    if not isinstance(kind, str) or kind not in OPTIONS:
        supported = ", ".join(OPTIONS)
        raise inner.unsupported("rope_type", f"{kind!r} is not supported; supported are {supported}")
    known = OPTIONS[kind] | {"rope_type", "type", "rope_theta"}
    for name, value in chosen.items():
        neutral = value is None or (name == "partial_rotary_factor" and value == 1)
        if name not in known and not neutral:
            raise inner.unsupported(name, f"is not an option of rope type {kind!r}")
    theta = inner.number("rope_theta", read.number("rope_theta", 10000.0))
    return _read_kind(read, inner, kind, theta, max_positions)


def _read_kind(read: Reader, inner: Reader, kind: str, theta: float, max_positions: int) -> RopeSpec:
    if kind == "default":
        return RopeSpec(kind, theta, trained=max_positions)
    original = inner.count("original_max_position_embeddings", max_positions)
    if kind in ("llama3", "yarn") and read.config.get("original_max_position_embeddings") is not None:
        original = read.count("original_max_position_embeddings")
    stretch = max_positions / original if kind == "yarn" else None
    factor = inner.number("factor", stretch)
    if factor < 1:
        raise inner.unsupported("factor", f"is {factor}, expected at least 1")
    if kind in ("linear", "dynamic"):
        # `transformers` stretches from max_position_embeddings, whatever the original length says.
        return RopeSpec(kind, theta, factor, max_positions)
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise inner.damaged("low_freq_factor", f"is {low}, expected less than high_freq_factor ({high})")
        return RopeSpec(kind, theta, factor, original, low, high)
    return RopeSpec(
        kind,
        theta,
        factor,
        original,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        truncate=inner.flag("truncate", default=True),
        attention_factor=_attention_factor(inner.config, inner, factor),
    )


def _attention_factor(config: Mapping[str, Any], inner: Reader, factor: float) -> float:
    """YaRN, equation 22: 0.1 ln(s) + 1; a ratio of two of them where mscale and mscale_all_dim are given (DeepSeek)."""
    if config.get("attention_factor") is not None:
        return inner.number("attention_factor")
    if config.get("mscale") and config.get("mscale_all_dim"):
        return _mscale(factor, inner.number("mscale")) / _mscale(factor, inner.number("mscale_all_dim"))
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def frequencies(rope: RopeSpec, head_dim: int, max_len: int) -> NDArray[np.float64]:
    """Angle per position of each pair, float64 [head_dim / 2].

    `dynamic` depends on the length of the running sequence in the original; a cache of rotated keys needs one answer
    for all of them, so it is taken at `max_len`: exact for a sequence of that length, and the unscaled embedding
    while `max_len` is within what the model was trained for.
    """
    if rope.kind == "dynamic" and max_len > rope.trained:
        stretch = rope.factor * max_len / rope.trained - (rope.factor - 1)
        theta = rope.theta * stretch ** (head_dim / (head_dim - 2)) if head_dim > 2 else rope.theta
    else:
        theta = rope.theta
    plain: NDArray[np.float64] = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, head_dim)
    return plain


def tables(rope: RopeSpec, head_dim: int, max_len: int, rows: int) -> tuple[Float32, Float32]:
    """Cosines and sines of positions 0 .. rows - 1, for slots of `max_len`: each float32 [rows, head_dim / 2]."""
    # float32 angles, as the reference computes them: a checkpoint was trained with these very roundings.
    speed = frequencies(rope, head_dim, max_len).astype(np.float32)
    angles = np.outer(np.arange(rows, dtype=np.float32), speed)
    scale = np.float32(rope.attention_factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def _llama3(plain: NDArray[np.float64], rope: RopeSpec) -> NDArray[np.float64]:
    """Long waves are stretched by `factor`, short ones kept, those between blended linearly in waves per context."""
    turns = rope.trained * plain / (2 * math.pi)
    blend = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return plain * (blend + (1 - blend) / rope.factor)


def _yarn(plain: NDArray[np.float64], rope: RopeSpec, head_dim: int) -> NDArray[np.float64]:
    """NTK-by-parts: pairs that turn more than beta_fast times are kept, below beta_slow stretched, a ramp between."""

    def pair_at(turns: float) -> float:
        return head_dim * math.log(rope.trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_at(rope.beta_fast), pair_at(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    blend: NDArray[np.float64] = stretched / rope.factor + 1 - stretched
    return plain * blend
