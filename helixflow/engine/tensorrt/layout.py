"""The small inputs of a launch: where each lies in the one block that is uploaded before it.

The block begins with what every launch has, then comes the noise, of which only as many rows as the launch has are
uploaded, then what only launches with pieces of prompts have.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.tensorrt.options import EngineOptions
from helixflow.engine.tensorrt.sampler import candidates

Shape = tuple[int | str, ...]

ALIGNMENT = 256
"""Of every address that TensorRT is given, and of the parts of every block."""
ZEROS = 256
"""Bytes of zeros that stand for inputs of one element."""
NOISE = "gumbel"
UNREAD = "pre_view"
"""Only its length matters: it has a place, and is never uploaded."""
INPUTS: Mapping[str, tuple[str, ...]] = {
    "cu_q": ("B+1",),
    "write_idx": ("B",),
    "dec_idx": ("B",),
    "dec_pos": ("B",),
    "kv_len": ("B",),
    "input_ids": ("T",),
    "position_ids": ("T",),
    "back_idx": ("T",),
    "last_idx": ("R",),
    "inv_temp": ("R", "1"),
    "top_p": ("R", "1"),
    "top_k": ("R", "1"),
    "min_z": ("R", "1"),
    NOISE: ("R", "K+1"),
    "pre_slot": ("P",),
    "pre_idx": ("P", "C"),
    "pre_pos": ("P", "C"),
    UNREAD: ("W",),
}
"""Shape of each input: letters are sizes of a launch, K the number of candidates. See `network` for their meaning."""
PROMPT_INPUTS = tuple(name for name in INPUTS if name.startswith("pre_"))
"""What decode launches have one zero of."""
FLOATS = frozenset({"inv_temp", "top_p", "min_z", NOISE})
"""Inputs that are fp32; the others are int32."""


def input_shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input; `sizes`: of every letter in it."""
    shape = []
    for size in INPUTS[name]:
        letter, _, more = size.partition("+")
        shape.append(sizes[letter] + int(more or 0) if letter in sizes else int(letter))
    return tuple(shape)


def aligned(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Layout:
    """`offsets`: byte offset of each input; `nbytes`: of the whole block; `columns`: K + 1, of the noise."""

    def __init__(self, options: EngineOptions, vocab: int) -> None:
        """Room for the largest launch that `options` allow."""
        self.columns = candidates(vocab) + 1
        limits = {
            "T": options.step_tokens,
            "B": options.cache_rows,
            "P": options.chunks,
            "C": options.chunk_tokens,
            "W": options.positions,
            "R": options.rows,
            "K": self.columns - 1,
        }
        self.sizes = {name: math.prod(input_shape(name, limits)) for name in INPUTS}
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, size in self.sizes.items():
            self.offsets[name] = self.nbytes
            self.nbytes += aligned(size * 4)

    def arrays(self, block: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Every input as a flat array over a block of host memory; the noise as [rows, K + 1]."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, size in self.sizes.items():
            part = block[self.offsets[name] :][: size * 4]
            arrays[name] = part.view(np.float32 if name in FLOATS else np.int32)
        arrays[NOISE] = arrays[NOISE].reshape(-1, self.columns)
        return arrays

    def addresses(self, block: int) -> dict[str, int]:
        """Every input's address in a block of device memory."""
        return {name: block + offset for name, offset in self.offsets.items()}

    def used(self, rows: int, *, prompts: bool) -> int:
        """Bytes to upload, from the beginning, for a launch with so many rows of logits."""
        if prompts:
            return self.offsets[UNREAD]
        return self.offsets[NOISE] + rows * self.columns * 4
