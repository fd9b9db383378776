"""Shape of the demo model and its Hugging Face files. Needs numpy and safetensors only."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from engines.corpus import BOUNDARY, SPECIAL_TOKENS, TURN_END

# A developer message is what newer clients send in place of a system message, so it is
# written as one: the model then has a single way of being instructed.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + ('system' if m['role'] == 'developer' else m['role'])"
    " + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Llama shape; field names are those of ``config.json``."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every stored tensor. The output head is the embedding."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_rows = self.num_attention_heads * self.head_dim
        kv_rows = self.num_key_value_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_rows, hidden),
            "self_attn.k_proj.weight": (kv_rows, hidden),
            "self_attn.v_proj.weight": (kv_rows, hidden),
            "self_attn.o_proj.weight": (hidden, q_rows),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            # Both spellings, because readers older than transformers 5 know the second.
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
            "pad_token_id": SPECIAL_TOKENS.index(BOUNDARY),
            "use_cache": True,
        }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file that diffs well."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer with its configuration and the chat template."""
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": BOUNDARY,
            "unk_token": None,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": DemoConfig().max_position_embeddings,
        },
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_checkpoint(params: dict[str, NDArray[np.float32]], config: DemoConfig, out: Path) -> None:
    """Write weights in half precision, and the configuration files.

    The weights go through a temporary file, so that a reader never sees a half-written
    checkpoint while training still runs.
    """
    halves = {name: value.astype(np.float16) for name, value in params.items()}
    partial = out / "model.safetensors.partial"
    save_file(halves, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the writer leaves it private
    partial.replace(out / "model.safetensors")
    write_json(out / "config.json", config.to_json())
    ends = [SPECIAL_TOKENS.index(TURN_END), SPECIAL_TOKENS.index(BOUNDARY)]
    write_json(
        out / "generation_config.json",
        {"eos_token_id": ends, "pad_token_id": ends[1], "do_sample": False},
    )
