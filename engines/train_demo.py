"""Train the demo model from nothing and write it as a Hugging Face checkpoint.

    python -m engines.train_demo --out engines/demo

Needs ``jax`` and ``optax``, which are extras of a developer and never of the product.
Everything is drawn from ``--seed``; the arithmetic of another machine still leads to
slightly different weights.
"""

import argparse
import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engines.corpus import SPECIAL_TOKENS, Document, generate
from engines.export_demo import DemoConfig, write_checkpoint, write_tokenizer

# Windows of training rows. Documents go to the smallest that holds them, because the
# cost of attention grows with the window and most conversations are short.
WINDOWS = (128, 256, 512)
HELD_OUT_SEED_OFFSET = 1_000_003
TOKENIZER_DOCUMENTS = 20_000

Params = dict[str, Any]
Encoded = tuple[list[int], list[bool]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed documents of one window: ids, document numbers and loss flags, [n, window]."""

    ids: NDArray[np.int32]
    document: NDArray[np.int32]
    learned: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the outcome of a run."""

    seed: int
    steps: int
    documents: int
    batch_tokens: int
    matrix_lr: float
    embedding_lr: float
    weight_decay: float


def train_tokenizer(seed: int, vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer fitted to the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # Rarer merges would be invented words, which must stay in pieces to be spelled.
        min_frequency=30,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The trainer would take the markers for text and spend merges on their letters.
    marker = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    documents = generate(seed, TOKENIZER_DOCUMENTS)
    texts = (marker.sub("", t) for document in documents for t, _ in document.segments())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, document: Document) -> Encoded:
    """Return the token ids of a document and which of them the loss is taken on."""
    ids: list[int] = []
    learned: list[bool] = []
    for text, flag in document.segments():
        piece = tokenizer.encode(text).ids
        ids += piece
        learned += [flag] * len(piece)
    return ids, learned


class Packer:
    """Best-fit packing into rows of one window, with a bounded number of open rows."""

    OPEN_ROWS = 64

    def __init__(self, window: int) -> None:
        """Start without rows."""
        self.rows: list[list[Encoded]] = []
        self._window = window
        self._open: dict[int, int] = {}

    def add(self, document: Encoded, open_row: bool) -> bool:
        """Put a document into the open row that it fills best, or into a new one.

        Returns False when nothing fits and no row may be opened.
        """
        length = len(document[0])
        fitting = [(room, row) for row, room in self._open.items() if room >= length]
        if not fitting and not open_row:
            return False
        room, row = min(fitting, default=(self._window, len(self.rows)))
        if not fitting:
            self.rows.append([])
        self.rows[row].append(document)
        self._open[row] = room - length
        if len(self._open) > self.OPEN_ROWS:
            del self._open[min(self._open, key=self._open.__getitem__)]
        return True


def pack(tokenizer: Tokenizer, seed: int, count: int) -> dict[int, Rows]:
    """Pack documents whole into rows; one longer than every window is left out.

    Short documents first fill the gaps that long ones leave in the larger windows.
    """
    packers = {window: Packer(window) for window in WINDOWS}
    for document in generate(seed, count):
        encoded = encode(tokenizer, document)
        fitting = [w for w in WINDOWS if len(encoded[0]) <= w]
        placed = any(packers[w].add(encoded, open_row=False) for w in reversed(fitting))
        if fitting and not placed:
            packers[fitting[0]].add(encoded, open_row=True)
    return {w: to_arrays(packer.rows, w) for w, packer in packers.items()}


def to_arrays(rows: list[list[Encoded]], window: int) -> Rows:
    """Lay out packed rows as arrays; padding has document number -1."""
    shape = (len(rows), window)
    ids = np.zeros(shape, np.int32)
    number = np.full(shape, -1, np.int32)
    learned = np.zeros(shape, np.bool_)
    for i, row in enumerate(rows):
        start = 0
        for j, (tokens, flags) in enumerate(row):
            end = start + len(tokens)
            ids[i, start:end] = tokens
            number[i, start:end] = j
            learned[i, start:end] = flags
            start = end
    return Rows(ids, number, learned)


def initial_params(config: DemoConfig, seed: int) -> Params:
    """Return fresh weights under their Hugging Face names, linear ones as [out, in]."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, shape in config.shapes().items():
        if len(shape) == 1:
            params[name] = jnp.ones(shape)
            continue
        # Layers that write to the residual stream start smaller, as in GPT-2.
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = 0.02 / math.sqrt(2 * config.num_hidden_layers) if residual else 0.02
        params[name] = jnp.asarray(rng.normal(0.0, scale, shape), jnp.float32)
    return params


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """Scale to unit root mean square over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x: Any, config: DemoConfig) -> Any:
    """Apply rotary positions to [batch, time, heads, dim], halves layout of Llama."""
    half = x.shape[-1] // 2
    inverse = config.rope_theta ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None] * inverse
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention(params: Params, prefix: str, x: Any, mask: Any, config: DemoConfig) -> Any:
    """Grouped-query self-attention over [batch, time, hidden]."""
    batch, length, _ = x.shape
    dim, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads

    def project(name: str, count: int) -> Any:
        return (x @ params[f"{prefix}{name}_proj.weight"].T).reshape(batch, length, count, dim)

    q = rotate(project("q", heads), config).reshape(batch, length, groups, -1, dim)
    k = rotate(project("k", groups), config)
    v = project("v", groups)
    scores = jnp.einsum("btgqd,bsgd->bgqts", q, k) / math.sqrt(dim)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e9), axis=-1)
    mixed = jnp.einsum("bgqts,bsgd->btgqd", weights, v).reshape(batch, length, heads * dim)
    return mixed @ params[f"{prefix}o_proj.weight"].T


def forward(params: Params, ids: Any, document: Any, config: DemoConfig) -> Any:
    """Return logits [batch, time, vocab]; a token sees only its own document."""
    length = ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), jnp.bool_))
    mask = causal[None] & (document[:, :, None] == document[:, None, :])
    eps = config.rms_norm_eps
    x = params["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        h = rms_norm(x, params[name + "input_layernorm.weight"], eps)
        x = x + attention(params, name + "self_attn.", h, mask, config)
        h = rms_norm(x, params[name + "post_attention_layernorm.weight"], eps)
        gate = jax.nn.silu(h @ params[name + "mlp.gate_proj.weight"].T)
        up = h @ params[name + "mlp.up_proj.weight"].T
        x = x + (gate * up) @ params[name + "mlp.down_proj.weight"].T
    x = rms_norm(x, params["model.norm.weight"], eps)
    return x @ params["model.embed_tokens.weight"].T


def loss_sum(params: Params, batch: tuple[Any, ...], config: DemoConfig) -> tuple[Any, Any]:
    """Return the summed cross-entropy in nats and the number of tokens it is over.

    A batch is (ids, document numbers, learned flags), each [rows, window].
    """
    ids, document, learned = batch
    logits = forward(params, ids, document, config)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    counted = learned[:, 1:] & (document[:, 1:] == document[:, :-1])
    return jnp.sum(losses * counted), jnp.sum(counted)


def make_optimizer(params: Params, recipe: Recipe) -> Any:
    """Return Muon for the matrices and Adam for the embedding and the norms."""
    matrices = {name: optax.contrib.MuonDimensionNumbers() if "_proj" in name else None for name in params}
    return optax.contrib.muon(
        learning_rate=recipe.matrix_lr,
        adam_learning_rate=recipe.embedding_lr,
        weight_decay=recipe.weight_decay,
        adam_b2=0.99,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )


class Trainer:
    """Holds the weights and applies one batch at a time."""

    def __init__(self, config: DemoConfig, recipe: Recipe) -> None:
        """Draw the weights; nothing is compiled before the first batch."""
        self.config = config
        self.params = initial_params(config, recipe.seed)
        optimizer = make_optimizer(self.params, recipe)
        self._state = optimizer.init(self.params)

        def step(params: Params, state: Any, scale: Any, *batch: Any) -> Any:
            def mean(p: Params) -> Any:
                total, count = loss_sum(p, batch, config)
                return total / jnp.maximum(count, 1)

            loss, grads = jax.value_and_grad(mean)(params)
            updates, state = optimizer.update(grads, state, params)
            # The schedule scales the finished update, so weight decay follows it too.
            updates = jax.tree.map(lambda u: u * scale, updates)
            return optax.apply_updates(params, updates), state, loss

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._loss = jax.jit(lambda p, *batch: loss_sum(p, batch, config))

    def step(self, rows: Rows, picked: NDArray[np.int64], scale: float) -> float:
        """Train on some rows and return their mean loss in nats."""
        batch = (rows.ids[picked], rows.document[picked], rows.learned[picked])
        self.params, self._state, loss = self._step(self.params, self._state, scale, *batch)
        return float(loss)

    def mean_loss(self, packed: dict[int, Rows], batch_tokens: int) -> float:
        """Return the mean loss per learned token over whole batches of packed rows."""
        total, count = 0.0, 0.0
        for window, rows in packed.items():
            size = batch_tokens // window
            for start in range(0, len(rows.ids) - size + 1, size):
                part = slice(start, start + size)
                batch = (rows.ids[part], rows.document[part], rows.learned[part])
                nats, tokens = self._loss(self.params, *batch)
                total, count = total + float(nats), count + float(tokens)
        return total / max(count, 1.0)

    def numpy_params(self) -> dict[str, NDArray[np.float32]]:
        """Return the weights as numpy arrays, float32."""
        return {name: np.asarray(value) for name, value in self.params.items()}


def batch_order(
    packed: dict[int, Rows], batch_tokens: int, rng: np.random.Generator
) -> list[tuple[int, NDArray[np.int64]]]:
    """Return one shuffled pass as (window, row numbers) of equal token counts."""
    batches: list[tuple[int, NDArray[np.int64]]] = []
    for window, rows in packed.items():
        order = rng.permutation(len(rows.ids))
        size = batch_tokens // window
        batches += [(window, order[i : i + size]) for i in range(0, len(order) - size + 1, size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def learning_rate_scale(progress: float) -> float:
    """Return the schedule at a progress of 0..1: short warm-up, hold, linear to zero."""
    return min(progress / 0.02, 1.0, (1.0 - progress) / 0.5)


def train(config: DemoConfig, recipe: Recipe, out: Path, minutes: float) -> None:
    """Run the recipe and write the checkpoint, also now and then on the way.

    ``minutes`` is a guard for a busy machine: when time runs out before the steps do,
    the schedule is shortened and the card shows fewer steps than the recipe.
    """
    tokenizer = train_tokenizer(recipe.seed, config.vocab_size)
    write_tokenizer(tokenizer, out)
    packed = pack(tokenizer, recipe.seed, recipe.documents)
    held_out = pack(tokenizer, recipe.seed + HELD_OUT_SEED_OFFSET, 1500)
    for window, rows in packed.items():
        used = float(np.mean(rows.document >= 0))
        print(f"window {window}: {len(rows.ids)} rows, {used:.0%} used", flush=True)
    trainer = Trainer(config, recipe)
    rng = np.random.default_rng(recipe.seed)
    batches: list[tuple[int, NDArray[np.int64]]] = []
    recent: list[float] = []
    start = time.monotonic()
    saved, step, progress = start, 0, 0.0
    while progress < 1.0:
        batches = batches or batch_order(packed, recipe.batch_tokens, rng)
        window, picked = batches.pop()
        recent.append(trainer.step(packed[window], picked, learning_rate_scale(progress)))
        step += 1
        now = time.monotonic()
        progress = max(step / recipe.steps, (now - start) / (60 * minutes))
        if step % 50 == 0:
            recent = recent[-200:]
            mean = sum(recent) / len(recent)
            print(f"{step} {now - start:.0f}s loss {mean:.4f}", flush=True)
        if now - saved > 240:
            saved = now
            write_checkpoint(trainer.numpy_params(), config, out)
    write_checkpoint(trainer.numpy_params(), config, out)
    record = {
        "recipe": asdict(recipe),
        "steps_done": step,
        "tokens_seen": step * recipe.batch_tokens,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "train_loss": round(sum(recent[-200:]) / len(recent[-200:]), 4),
        "held_out_loss": round(trainer.mean_loss(held_out, recipe.batch_tokens), 4),
        "jax": jax.__version__,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record), flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--documents", type=int, default=120_000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    options = parser.parse_args()
    recipe = Recipe(
        seed=options.seed,
        steps=options.steps,
        documents=options.documents,
        batch_tokens=options.batch_tokens,
        matrix_lr=4e-3,
        embedding_lr=3e-3,
        weight_decay=0.02,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    train(DemoConfig(), recipe, options.out, options.minutes)


if __name__ == "__main__":
    main()
