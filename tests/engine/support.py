"""What the engine tests share: batches, checkpoints made on the spot, and a dense decoder to compare with."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import Float32, Precision
from helixflow.engine.build import build_engine
from helixflow.engine.onnx_engine import OnnxEngine
from helixflow.engine.onnx_graph import NUMPY_TYPES
from helixflow.engine.onnx_memory import HostMemory
from helixflow.engine.spec import ModelSpec

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
GOLDEN_NAMES = ("llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny")
DTYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Tensors = dict[str, Float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """See `helixflow.engine.base.Batch`."""

    token_ids: NDArray[np.int32]
    slots: NDArray[np.int32]
    past: NDArray[np.int32]
    counts: NDArray[np.int32]
    wanted: NDArray[np.int32]
    sampling: None = None


def batch(*items: tuple[int, int, Sequence[int], int]) -> Batch:
    """Packs (slot, past, tokens, wanted) of each sequence."""

    def int32(values: Sequence[int]) -> NDArray[np.int32]:
        return np.array(values, np.int32)

    return Batch(
        int32([token for item in items for token in item[2]]),
        int32([item[0] for item in items]),
        int32([item[1] for item in items]),
        int32([len(item[2]) for item in items]),
        int32([item[3] for item in items]),
    )


def step(engine: OnnxEngine, *items: tuple[int, int, Sequence[int], int]) -> Float32:
    """Logits of one step, copied out of the engine's buffer."""
    logits = engine.step(batch(*items)).logits
    assert logits is not None
    return logits.copy()


def open_engine(
    model_dir: Path, root: Path, precision: Precision = "fp32", slots: int = 6, max_len: int = 160
) -> OnnxEngine:
    """Builds and loads; the caches begin full of garbage, as after a long run."""
    built = build_engine(model_dir, root, precision, replace_damaged=False)
    engine = OnnxEngine(
        built.directory, ModelSpec.load(built.directory), precision, slots=slots, max_len=max_len, threads=1
    )
    caches(engine)[:] = 7.0
    return engine


def caches(engine: OnnxEngine) -> NDArray[Any]:
    """What an engine on the CPU remembers, [2 * layers, slots, kv_heads, positions, width]; may be written."""
    memory, cache = engine._memory, engine._cache
    assert isinstance(memory, HostMemory)
    shape = (cache.planes, cache.slots, cache.heads, cache.positions, cache.width)
    return memory.view(cache.address, shape, NUMPY_TYPES[cache.compute])


def read_safetensors(path: Path) -> Tensors:
    """Every tensor of an fp32 file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            raw = np.frombuffer(data[8 + length + start : 8 + length + end], np.float32)
            tensors[name] = raw.reshape(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Float32], dtype: str = "F32") -> None:
    """Writes tensors in one dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, tensor in tensors.items():
        raw = tensor.astype(DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(raw)]}
        parts.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def write_checkpoint(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Float32]) -> Path:
    """A single-file fp32 checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def write_shards(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Float32], dtype: str) -> Path:
    """The same in three shards with an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    names, places = list(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = names[i::3]
        write_safetensors(directory / file, {name: tensors[name] for name in part}, dtype)
        places.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def tiny_config(family: str = "llama", **options: Any) -> dict[str, Any]:
    """A small model of any family; options overwrite, None removes."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config: dict[str, Any] = {
        "architectures": [f"{names[family]}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 101,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    return {key: value for key, value in {**config, **options}.items() if value is not None or key == "sliding_window"}


def random_tensors(config: Mapping[str, Any], biases: Sequence[str] = (), seed: int = 3) -> Tensors:
    """Random weights for a config; `biases`: projections that get one although the config is silent."""
    spec = ModelSpec.parse(Path("config.json"), config).with_biases(f"x.{name}.bias" for name in biases)
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in spec.tensors().items():
        values = random.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            tensors[name] = 1 + values * np.float32(0.2)
        elif name.endswith(".bias"):
            tensors[name] = values * np.float32(0.5)
        else:
            tensors[name] = values * np.float32(1.0 if "embed" in name else 1.5 / math.sqrt(shape[1]))
    return tensors


class Reference:
    """A dense decoder in float64, written from the papers and independent of the engine's modules.

    `frequencies`: angle per position of each rotary pair; `windows`: positions each layer sees, None: all.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Float32],
        frequencies: Float64 | None = None,
        attention_factor: float = 1.0,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        self.layers = config["num_hidden_layers"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim", config["hidden_size"] // self.heads)
        self.eps = config["rms_norm_eps"]
        self.windows = windows or [None] * self.layers
        if frequencies is None:
            theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
            frequencies = np.array([theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)])
        self.frequencies, self.attention_factor = frequencies, attention_factor

    def logits(self, ids: Sequence[int]) -> Float64:
        """Logits of every position, float64 [len(ids), vocab]."""
        x = self.tensors["model.embed_tokens.weight"][np.array(ids)]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, prefix + "input_layernorm"), layer)
            y = self._norm(x, prefix + "post_attention_layernorm")
            gate, up = self._linear(y, prefix + "mlp.gate_proj"), self._linear(y, prefix + "mlp.up_proj")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, prefix + "mlp.down_proj")
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return self._norm(x, "model.norm") @ head.T

    def _norm(self, x: Float64, name: str) -> Float64:
        scaled: Float64 = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return scaled * self.tensors[name + ".weight"]

    def _linear(self, x: Float64, name: str) -> Float64:
        y: Float64 = x @ self.tensors[name + ".weight"].T
        return y + self.tensors.get(name + ".bias", np.float64(0))

    def _rotate(self, x: Float64) -> Float64:
        half = self.head_dim // 2
        angles = np.arange(len(x))[:, None, None] * self.frequencies
        turn = np.exp(1j * angles) * self.attention_factor
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def _attention(self, x: Float64, layer: int) -> Float64:
        prefix, length = f"model.layers.{layer}.self_attn.", len(x)
        q = self._linear(x, prefix + "q_proj").reshape(length, self.heads, self.head_dim)
        k = self._linear(x, prefix + "k_proj").reshape(length, self.kv_heads, self.head_dim)
        v = self._linear(x, prefix + "v_proj").reshape(length, self.kv_heads, self.head_dim)
        if prefix + "q_norm.weight" in self.tensors:
            q, k = self._norm(q, prefix + "q_norm"), self._norm(k, prefix + "k_norm")
        q, k = self._rotate(q), self._rotate(k)
        out = np.empty((length, self.heads, self.head_dim))
        window = self.windows[layer] or length
        for i in range(length):
            seen = slice(max(0, i - window + 1), i + 1)
            for head in range(self.heads):
                group = head * self.kv_heads // self.heads
                scores = k[seen, group] @ q[i, head] / math.sqrt(self.head_dim)
                weights = np.exp(scores - scores.max())
                out[i, head] = weights / weights.sum() @ v[seen, group]
        return self._linear(out.reshape(length, -1), prefix + "o_proj")
