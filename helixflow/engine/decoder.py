"""The decoder, written down once. A builder turns each step into nodes of its own kind of graph.

Pre-norm transformer of Llama, Mistral, Qwen2 and Qwen3: grouped-query attention and a gated MLP, each with a residual.
"""

from typing import Protocol, TypeVar

from helixflow.engine.spec import ModelSpec

T = TypeVar("T")


class Builder(Protocol[T]):
    """What a decoder is made of. A handle stands for one row of features per token of the step.

    Weights go by the name of their tensor in the checkpoint; a linear weight is [out, in].
    """

    def embed(self, weight: str) -> T:
        """Rows of `weight` [vocab, hidden] for the token ids of the step."""

    def rms_norm(self, x: T, weight: str, eps: float, groups: int = 1) -> T:
        """`x / sqrt(mean(x^2) + eps) * weight`, over each of `groups` equal parts of a row."""

    def linear(self, x: T, name: str, bias: bool) -> T:
        """`x @ name.weight.T`, plus `name.bias` when `bias`."""

    def attention(self, layer: int, q: T, k: T, v: T, window: int | None) -> T:
        """Rotates q and k by their positions, writes k and v into the layer's cache, attends causally over the cache.

        A position sees itself and the `window - 1` before it; None: all before it. Scale 1 / sqrt(head_dim).
        """

    def swiglu(self, gate: T, up: T) -> T:
        """`silu(gate) * up`."""

    def add(self, a: T, b: T) -> T:
        """Sum of two handles."""

    def wanted(self, x: T) -> T:
        """Only the rows whose logits are wanted."""

    def lm_head(self, x: T, weight: str) -> None:
        """The logits: `x @ weight.T`, `weight` [vocab, hidden]."""


def write_decoder(spec: ModelSpec, build: Builder[T]) -> None:
    """Writes the whole decoder into a builder."""
    x = build.embed("model.embed_tokens.weight")
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        normed = build.rms_norm(x, prefix + "input_layernorm.weight", spec.eps)
        mixed = _attention(spec, build, layer, normed)
        if layer == spec.layers - 1:
            # Nothing after the last attention looks at other rows, so rows without a reader stop here.
            x, mixed = build.wanted(x), build.wanted(mixed)
        x = build.add(x, build.linear(mixed, prefix + "self_attn.o_proj", "o_proj" in spec.biases))
        normed = build.rms_norm(x, prefix + "post_attention_layernorm.weight", spec.eps)
        x = build.add(x, _mlp(spec, build, prefix + "mlp.", normed))
    x = build.rms_norm(x, "model.norm.weight", spec.eps)
    build.lm_head(x, "model.embed_tokens.weight" if spec.tied else "lm_head.weight")


def _attention(spec: ModelSpec, build: Builder[T], layer: int, x: T) -> T:
    """Projections, norms of q and k where the family has them, and the attention itself; without o_proj."""
    prefix = f"model.layers.{layer}.self_attn."
    q, k, v = (build.linear(x, prefix + name, name in spec.biases) for name in ("q_proj", "k_proj", "v_proj"))
    if spec.qk_norm:
        q = build.rms_norm(q, prefix + "q_norm.weight", spec.eps, spec.heads)
        k = build.rms_norm(k, prefix + "k_norm.weight", spec.eps, spec.kv_heads)
    return build.attention(layer, q, k, v, spec.windows[layer])


def _mlp(spec: ModelSpec, build: Builder[T], prefix: str, x: T) -> T:
    gate, up = (build.linear(x, prefix + name, name in spec.biases) for name in ("gate_proj", "up_proj"))
    return build.linear(build.swiglu(gate, up), prefix + "down_proj", "down_proj" in spec.biases)
