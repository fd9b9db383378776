"""How the tokens of a step are drawn, as the sampler inside the network takes it (see `sampler`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow import core_rs
from helixflow.engine.base import EngineError, Sampling
from helixflow.engine.tensorrt.launches import Arrays
from helixflow.engine.tensorrt.layout import NOISE
from helixflow.engine.tensorrt.options import CANDIDATES
from helixflow.engine.tensorrt.sampler import EXCLUDED

COLUMNS = (
    ("inv_temp", np.float32, 1),
    ("top_p", np.float32, 1),
    ("top_k", np.int32, 1),
    ("min_z", np.float32, EXCLUDED),
)
"""Inputs of one number per row: name, type, and what a greedy row has there."""


class Draws:
    """One entry per wanted row of a batch, and a last one for rows without a reader, which is greedy.

    `host`: rows [R] that only the caller can choose: those it asked for, and those that need more than 64 candidates.
    """

    def __init__(self, columns: Sequence[NDArray[Any]], seed: NDArray[Any], position: NDArray[Any], host: Any) -> None:
        self.columns, self.seed, self.position, self.host = columns, seed, position, host
        self.noisy = columns[2] != 1
        """Rows that need noise: all but those with one candidate."""

    @classmethod
    def of(cls, sampling: Sampling | None, rows: int) -> "Draws":
        """Of the rows of a batch; without `sampling`, the host chooses all. Raises EngineError for a wrong length."""
        if sampling is None:
            columns = [np.full(rows + 1, greedy, dtype) for _, dtype, greedy in COLUMNS]
            none = np.zeros(rows + 1, np.uint64)
            return cls(columns, none, none.astype(np.int64), np.ones(rows, np.bool_))
        wide = (sampling.inverse_temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        arrays = (*wide, sampling.seed, sampling.position, sampling.on_host)
        if any(array.shape != (rows,) for array in arrays):
            raise EngineError(f"the sampling of the batch is not for its {rows} rows")
        if rows and sampling.position.min() < 0:
            raise EngineError("a position of the sampling is negative")
        host = sampling.on_host | (sampling.top_k > CANDIDATES)
        greedy = host | (sampling.inverse_temperature == 0)
        low = np.full(rows, EXCLUDED, np.float32)
        np.log(sampling.min_p, out=low, where=sampling.min_p > 0)
        values = (sampling.inverse_temperature, sampling.top_p, sampling.top_k, low)
        columns = []
        for (_, dtype, default), value in zip(COLUMNS, values, strict=True):
            column = np.full(rows + 1, default, dtype)
            np.copyto(column[:rows], value, where=~greedy, casting="same_kind")
            columns.append(column)
        seed, position = np.zeros(rows + 1, np.uint64), np.zeros(rows + 1, np.int64)
        seed[:rows], position[:rows] = sampling.seed, sampling.position
        return cls(columns, seed, position, host)

    def write(self, arrays: Arrays, rows: Sequence[int]) -> None:
        """Writes parameters and noise for rows of logits; `rows`: entry of each, -1 for a row without a reader."""
        index, count = np.array(rows), len(rows)
        for (name, _, _), column in zip(COLUMNS, self.columns, strict=True):
            arrays[name][:count] = column[index]
        noise, noisy = arrays[NOISE][:count], self.noisy[index]
        if not noisy.any():
            noise[:] = 0
            return
        core_rs.gumbel(self.seed[index], self.position[index], noise)
        if not noisy.all():
            noise[~noisy] = 0

    def following(self, rows: Sequence[int]) -> "Draws":
        """Of the tokens that come next in the sequences of some rows."""
        index = np.array([*rows, -1])
        return Draws(
            [column[index] for column in self.columns],
            self.seed[index],
            self.position[index] + 1,
            self.host[index[:-1]],
        )

    def same(self, rows: Sequence[int], other: "Draws", others: Sequence[int]) -> NDArray[np.bool_]:
        """Which of some rows are drawn on the device, just as those of `other`."""
        mine, its = np.array(rows, np.int64), np.array(others, np.int64)
        equal: NDArray[np.bool_] = ~self.host[mine] & ~other.host[its]
        # A row without noise is the same whatever its seed; one with the noise of another position is not.
        drawn = (self.seed[mine] == other.seed[its]) & (self.position[mine] == other.position[its])
        equal &= drawn | ~self.noisy[mine]
        for column, another in zip(self.columns, other.columns, strict=True):
            equal &= column[mine] == another[its]
        return equal
