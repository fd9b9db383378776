"""The sampler inside the network against the host's: the same token, or none."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow import core_rs
from helixflow.engine.base import Float32
from helixflow.engine.tensorrt.interpreter import Interpreter
from helixflow.engine.tensorrt.library import load
from helixflow.engine.tensorrt.ops import Ops
from helixflow.engine.tensorrt.options import CANDIDATES
from helixflow.engine.tensorrt.sampler import EXCLUDED, Sampler, candidates

VOCABS = (1, 2, 30, 64, 65, 100, 700)
Kind = Literal["normal", "peaked", "flat", "high", "coarse", "equal", "masked", "nan", "infinite", "nothing"]
SOUND: tuple[Kind, ...] = ("normal", "peaked", "flat", "high", "coarse", "equal", "masked")


@functools.cache
def sampler(vocab: int, reverse_ties: bool) -> Interpreter:
    """A network that is nothing but the sampler; input `logits` [R, vocab]."""
    library = load("tensorrt-rtx")
    # Networks live only as long as their builder.
    builder = library.trt.Builder(library.log)
    definition = builder.create_network(0)
    ops = Ops(library, definition, "fp32")
    Sampler(ops, ops.input("logits", ("R", vocab), "fp32"), vocab)
    return Interpreter(library.trt, definition, reverse_ties=reverse_ties)


@dataclass(frozen=True)
class Row:
    """A row of logits and how to draw from it; `temperature` 0: greedy."""

    logits: Float32
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def on_device(rows: list[Row], reverse_ties: bool = False) -> tuple[list[int], list[int]]:
    """(next_ids, undecided) of rows over one vocabulary, with the inputs that the runner makes of the parameters."""
    vocab = len(rows[0].logits)
    columns = candidates(vocab) + 1
    noise = np.zeros((len(rows), columns), np.float32)
    seeds, positions = np.array([row.seed for row in rows], np.uint64), np.array([row.position for row in rows])
    core_rs.gumbel(seeds, positions, noise)
    greedy = np.array([row.temperature == 0 for row in rows])
    noise[greedy] = 0

    def column(values: list[Any], dtype: Any) -> Any:
        return np.array(values, dtype)[:, None]

    with np.errstate(divide="ignore"):
        low = np.log(column([row.min_p for row in rows], np.float32))
    out = sampler(vocab, reverse_ties).run(
        {
            "logits": np.stack([row.logits for row in rows]),
            "inv_temp": np.float32(1) / column([row.temperature or 1 for row in rows], np.float32),
            "top_p": column([1 if row.temperature == 0 else row.top_p for row in rows], np.float32),
            "top_k": column([1 if row.temperature == 0 else row.top_k for row in rows], np.int32),
            "min_z": np.where(greedy[:, None], EXCLUDED, np.maximum(low, np.float32(EXCLUDED))).astype(np.float32),
            "gumbel": noise,
        }
    )
    return out["next_ids"].tolist(), out["undecided"].tolist()


def on_host(row: Row) -> int:
    return core_rs.sample(
        row.logits,
        temperature=row.temperature,
        top_p=row.top_p,
        top_k=row.top_k,
        min_p=row.min_p,
        seed=row.seed,
        position=row.position,
    )


def make(kind: Kind, vocab: int, random: np.random.Generator) -> Float32:
    """Logits [vocab] of some kind; "nan", "infinite" and "nothing" allow no choice."""
    x = random.standard_normal(vocab).astype(np.float32) * 3
    if kind == "peaked":
        x[random.integers(0, vocab, 3)] += 12
    elif kind == "flat":
        x *= np.float32(0.05)
    elif kind == "high":  # Rounded to less than the host's limit for min_p is.
        x += 90
    elif kind == "coarse":  # As of a 16-bit product: many ties.
        x = np.rint(x * 2) * np.float32(0.5)
    elif kind == "equal":
        x[:] = 1.5
    elif kind == "masked":
        keep = random.integers(0, vocab)
        x[random.random(vocab) < 0.9] = -np.inf
        x[keep] = random.standard_normal()
    elif kind == "nan":
        x[random.integers(0, vocab)] = np.nan
    elif kind == "infinite":
        x[random.integers(0, vocab)] = np.inf
    elif kind == "nothing":
        x[:] = -np.inf
    return x


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    vocab = draw(st.sampled_from(VOCABS))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        row = Row(
            make(draw(st.sampled_from((*SOUND, "nan", "infinite", "nothing"))), vocab, random),
            temperature=draw(st.sampled_from([0.0, 0.01, 0.02, 0.3, 0.7, 1.0, 1.0, 1.7, 5.0])),
            top_p=draw(st.sampled_from([1.0, 1.0, 0.95, 0.9, 0.5, 0.01])),
            top_k=draw(st.sampled_from([0, 0, 1, 2, 40, CANDIDATES])),
            min_p=draw(st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.5, 1.0])),
            seed=draw(st.integers(0, 2**64 - 1)),
            position=draw(st.integers(0, 2**31)),
        )
        if row.min_p and row.temperature and draw(st.booleans()):
            move_to_the_edge(row, random)
        rows.append(row)
    return rows


def move_to_the_edge(row: Row, random: np.random.Generator) -> None:
    """Puts some logits within a few roundings of the smallest one that min_p keeps."""
    best = row.logits.max()
    edge = best + np.log(np.float32(row.min_p)) * np.float32(row.temperature)
    for at in random.integers(0, len(row.logits), 3):
        if row.logits[at] != best:
            row.logits[at] = min(edge + random.integers(-3, 4) * np.spacing(edge), best)


@given(rows=any_rows(), reverse_ties=st.booleans())
@settings(max_examples=400, deadline=None)
def test_a_decided_row_has_the_token_of_the_host(rows: list[Row], reverse_ties: bool) -> None:
    """Whatever the order in which TopK gives equal logits."""
    for row, token, undecided in zip(rows, *on_device(rows, reverse_ties), strict=True):
        assert 0 <= token < len(row.logits)
        best = row.logits.max()
        if np.isfinite(best):
            assert undecided or token == on_host(row)
        else:
            assert undecided
            with pytest.raises(ValueError, match="logits"):
                on_host(row)


def share_undecided(rows: list[Row]) -> float:
    return float(np.mean(on_device(rows)[1]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 40},
        {"min_p": 0.05},
        {"temperature": 0.7, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
        {"temperature": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [30, 700])
def test_peaked_rows_are_decided(vocab: int, options: dict[str, Any]) -> None:
    """Rows as language models make them: a few likely tokens, a long tail that hardly weighs."""
    random = np.random.default_rng(7)
    rows = [Row(make("peaked", vocab, random), seed=i, position=3 * i, **options) for i in range(400)]
    assert share_undecided(rows) <= 0.02


@pytest.mark.parametrize(
    "options", [{"top_p": 0.99}, {"top_k": 64}, {"top_k": 7, "min_p": 0.2}, {"min_p": 0.3}], ids=str
)
def test_cut_rows_are_decided(options: dict[str, Any]) -> None:
    """The candidates are all there is to choose from, as long as no ties cross their end."""
    random = np.random.default_rng(8)
    rows = [Row(make("normal", 100, random), temperature=0.5, seed=i, **options) for i in range(400)]
    assert share_undecided(rows) <= 0.02


def test_greedy_rows_with_one_best_token_are_decided() -> None:
    random = np.random.default_rng(9)
    kinds: tuple[Kind, ...] = ("normal", "peaked", "flat", "high", "masked")
    rows = [Row(make(kinds[i % 4], 700, random), temperature=0.0) for i in range(200)]
    tokens, undecided = on_device(rows)
    assert not any(undecided)
    assert tokens == [int(row.logits.argmax()) for row in rows]


def test_a_flat_row_is_left_to_the_host_when_its_tail_wins() -> None:
    """636 of 700 equal tokens are behind the candidates: most draws end there, and none of them may be decided."""
    rows = [Row(np.zeros(700, np.float32), seed=i) for i in range(200)]
    for row, token, undecided in zip(rows, *on_device(rows), strict=True):
        assert undecided or token == on_host(row)
    assert share_undecided(rows) >= 0.8
