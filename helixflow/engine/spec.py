"""What a checkpoint computes, read from its config.json; everything that is not understood is refused."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helixflow.engine.reader import Reader, read_json
from helixflow.engine.rope import RopeSpec, read_rope

CONFIG = "config.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """Defaults of one model family, as `transformers` applies them to keys that config.json leaves out."""

    name: str
    architecture: str
    max_positions: int
    kv_heads: int | None
    head_dim: int | None = None
    biases: tuple[str, ...] = ()
    qk_norm: bool = False


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", 2048, None),
        Family("mistral", "MistralForCausalLM", 131072, 8),
        Family("qwen2", "Qwen2ForCausalLM", 32768, 32, biases=("q_proj", "k_proj", "v_proj")),
        Family("qwen3", "Qwen3ForCausalLM", 32768, 32, head_dim=128, qk_norm=True),
    )
}

# Options of related models that change the function computed: refused unless they hold a neutral value.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "quantization_config": (),
    "compression_config": (),
    "text_config": (),
    "vision_config": (),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "query_pre_attn_scalar": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
    "dim_model_base": (),
    "qkv_bias": (),
    "use_bias": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False, 0),
    "rope_interleaved": (False,),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_layers": ([],),
}


LARGEST = {
    "num_hidden_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 27,
}
"""Eight times the largest model in use (Llama 3.1 405B: 126 layers of 16,384), and more. A file that says a billion
layers would be worked on for hours before the first missing tensor is noticed."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: sizes and options. `windows[i]`: positions that layer i sees, itself included; None: all.

    `biases` names the projections that add a bias (the same ones in every layer).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope: RopeSpec
    tied: bool
    qk_norm: bool
    biases: frozenset[str]
    windows: tuple[int | None, ...]
    max_positions: int

    @classmethod
    def load(cls, model_dir: Path, tensors: Iterable[str] = ()) -> "ModelSpec":
        """Reads `model_dir/config.json`; `tensors`: names the checkpoint holds, whose biases are then used too.

        Raises UnsupportedModelError or DamagedFileError.
        """
        path = model_dir / CONFIG
        return cls.parse(path, read_json(path)).with_biases(tensors)

    @classmethod
    def parse(cls, path: Path, config: Mapping[str, Any]) -> "ModelSpec":
        """Reads a parsed config.json; `path` is for messages."""
        read = Reader(path, config)
        family = _family(read)
        _refuse_unknown_functions(read)
        hidden, heads, layers = (_size(read, k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        kv_heads = _size(read, "num_key_value_heads", heads if family.kv_heads is None else family.kv_heads)
        if heads % kv_heads:
            raise read.unsupported("num_key_value_heads", f"{heads} heads do not divide into {kv_heads} groups")
        head_dim = _size(read, "head_dim", family.head_dim or hidden // heads)
        if head_dim % 2:
            raise read.unsupported("head_dim", f"{head_dim} is odd: rotary embedding needs pairs")
        max_positions = _size(read, "max_position_embeddings", family.max_positions)
        return cls(
            family=family.name,
            vocab_size=_size(read, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(read, "intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=read.number("rms_norm_eps", 1e-6),
            rope=read_rope(read, max_positions),
            tied=read.flag("tie_word_embeddings", default=False),
            qk_norm=family.qk_norm,
            biases=_biases(read, family),
            windows=_windows(read, family, layers),
            max_positions=max_positions,
        )

    def with_biases(self, tensors: Iterable[str]) -> "ModelSpec":
        """The same decoder, with the biases that the checkpoint holds beyond those its config announces."""
        held = {name.split(".")[-2] for name in tensors if name.endswith("_proj.bias")}
        return replace(self, biases=self.biases | (held & {*ATTENTION, *MLP}))

    @property
    def longest(self) -> int:
        """The most positions that the rotary embedding was made for (extended ones included)."""
        return max(self.max_positions, self.rope.longest)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of every tensor the decoder reads, in the order of their use."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
            for name, size in sizes.items():
                shapes[f"{prefix}{name}.weight"] = size
                if name.rpartition(".")[2] in self.biases:
                    shapes[f"{prefix}{name}.bias"] = size[:1]
            if self.qk_norm:
                shapes[prefix + "self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[prefix + "self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def _size(read: Reader, key: str, default: int | None = None) -> int:
    return read.count(key, default, LARGEST[key])


def _family(read: Reader) -> Family:
    known = ", ".join(sorted(family.architecture for family in FAMILIES.values()))
    architectures = read.config.get("architectures")
    if architectures:
        if not isinstance(architectures, list) or len(architectures) != 1:
            raise read.unsupported("architectures", f"is {architectures!r}, expected a list of one name")
        for family in FAMILIES.values():
            if architectures[0] == family.architecture:
                return family
        raise read.unsupported("architectures", f"{architectures[0]!r} is not supported; supported are {known}")
    name = read.config.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise read.unsupported("model_type", f"{name!r} is not supported; supported are {known}")


def _refuse_unknown_functions(read: Reader) -> None:
    activation = read.config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise read.unsupported("hidden_act", f"{activation!r} is not supported, only 'silu'")
    for key, neutral in NEUTRAL.items():
        value = read.config.get(key)
        if value is not None and value not in neutral:
            raise read.unsupported(key, f"{_short(value)} is not supported")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _biases(read: Reader, family: Family) -> frozenset[str]:
    biases = set(family.biases)
    if read.flag("attention_bias", default=False):
        biases.update(ATTENTION)
    if read.flag("mlp_bias", default=False):
        biases.update(MLP)
    return frozenset(biases)


def _windows(read: Reader, family: Family, layers: int) -> tuple[int | None, ...]:
    """Window of each layer. Rules of `transformers`: Mistral slides in every layer; Qwen only when
    `use_sliding_window`, from layer `max_window_layers` on, or as `layer_types` says."""
    default = 4096 if family.name in ("mistral", "qwen2", "qwen3") else None
    window = read.count("sliding_window", default) if read.config.get("sliding_window", default) is not None else None
    if family.name == "llama" and window is not None:
        raise read.unsupported("sliding_window", "is not an option of Llama")
    if family.name in ("qwen2", "qwen3"):
        if not read.flag("use_sliding_window", default=False):
            window = None
        first = read.whole("max_window_layers", 28)
    else:
        first = 0
    windows = tuple(window if layer >= first else None for layer in range(layers))
    types = read.config.get("layer_types")
    if types is None:
        return windows
    if not isinstance(types, list) or len(types) != layers:
        raise read.damaged("layer_types", f"must be a list of {layers} names, one per layer")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise read.unsupported("layer_types", f"{name!r} is not supported")
        if name == "sliding_attention" and window is None:
            raise read.damaged("layer_types", "has sliding layers, but there is no sliding window")
    chosen = tuple(window if name == "sliding_attention" else None for name in types)
    if family.name in ("llama", "mistral") and chosen != windows:
        raise read.unsupported("layer_types", f"different windows per layer are not an option of {family.name}")
    return chosen
