"""How large everything is that the GPU check makes; tests use tiny ones."""

from dataclasses import dataclass, replace

from helixflow.engine.rope import RopeSpec
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt.options import ATTENTION_FORMS, AttentionForm


def decoder(
    *, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, positions: int
) -> ModelSpec:
    """A Llama of these sizes."""
    return ModelSpec(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=1e-5,
        rope=RopeSpec("default", 5e5, trained=positions),
        tied=False,
        qk_norm=False,
        biases=frozenset(),
        windows=(None,) * layers,
        max_positions=positions,
    )


def cut(spec: ModelSpec, layers: int) -> ModelSpec:
    """The same with fewer layers."""
    return replace(spec, layers=layers, windows=spec.windows[:layers])


LARGE = decoder(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab=128256, positions=32768)
"""The shape of Llama 3.1 8B."""
NARROW = decoder(hidden=1024, inner=3072, layers=28, heads=16, kv_heads=8, head_dim=128, vocab=32000, positions=4096)
"""Many layers, each of which is soon done: the time of launches shows."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes, tokens, positions.

    `random_block`: bytes that are drawn on the host and copied around on the device; `copy`: bytes of a copy; `matrix`:
    side of the large product; `features`: of a row; of the numeric checks: `positions` of a cache, `vocab` of the
    sampler, `widths` (head_dim), `groups` (query heads per kv head). `large`, `narrow`: shapes of models; `layers`: as
    many of the large one where all would take too long. Decode attention: `rows` sequences, `lengths` of them,
    `capacities` of a slot. `tokens`: of a launch; `vocabularies`, `sampled` rows: of the sampler's cost. The whole
    engine: `slots` of `max_len` positions, `sequences` that decode at `past` positions, `prompts`: lengths; `steps`
    that are timed together, `rounds` of them. `halves`: 16-bit types that ONNX Runtime
    computes in; `forms`: of attention; `golden`: checkpoints.
    """

    random_block: int = 8 << 20
    copy: int = 4 << 30
    matrix: int = 8192
    positions: int = 2048
    vocab: int = 128256
    widths: tuple[int, ...] = (64, 128)
    groups: tuple[int, ...] = (1, 4, 8)
    features: int = 1024
    large: ModelSpec = LARGE
    narrow: ModelSpec = NARROW
    layers: int = 2
    rows: int = 16
    lengths: tuple[int, ...] = (128, 2000, 8000, 32000)
    capacities: tuple[int, ...] = (2048, 8192, 32768)
    tokens: tuple[int, ...] = (1, 16, 64, 512, 2048)
    vocabularies: tuple[int, ...] = (128256, 151936)
    sampled: int = 64
    slots: int = 64
    max_len: int = 2559
    sequences: tuple[int, ...] = (1, 8, 32, 64)
    past: int = 1024
    prompts: tuple[int, ...] = (512, 2048)
    chunk: int = 512
    steps: int = 16
    rounds: int = 5
    halves: tuple[str, ...] = ("fp16", "bf16")
    forms: tuple[AttentionForm, ...] = ATTENTION_FORMS
    golden: tuple[str, ...] = ("qwen3-tiny", "llama-tiny", "qwen2-tiny", "mistral-tiny")


FULL = Sizes()
