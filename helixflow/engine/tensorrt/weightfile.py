"""Weights that are inputs of a network: one file in the type of the activations, and an index of what lies where.

A checkpoint is converted piece by piece, so that a build takes a few megabytes of memory whatever its size. Tensors
begin at page boundaries, and are mapped when the engine is loaded.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import DamagedFileError, ModelError, UnsupportedModelError
from helixflow.engine.reader import read_json
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import Compute
from helixflow.engine.weights import FLOATS, LARGEST_INDEX, Checkpoint, Entry

WEIGHTS = "weights.bin"
INDEX = "weights.json"
ALIGNMENT = 4096
PIECE = 1 << 22
"""Values of a checkpoint that are converted at once."""
LARGEST: Mapping[Compute, float] = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp32": math.inf}
# Exponent bits; where all are set, the value is infinite or no number.
EXPONENTS: Mapping[tuple[str, Compute], int] = {("F16", "fp16"): 0x7C00, ("BF16", "bf16"): 0x7F80}

Pieces = Callable[[str], Iterator[NDArray[Any]]]
"""Values of a tensor by name, in order and in the type of the file, flat pieces of any length."""


def checkpoint_pieces(checkpoint: Checkpoint, compute: Compute) -> Pieces:
    """Reads tensors of a checkpoint. Raises ModelError for values that are not finite or too large for the type."""

    def pieces(name: str) -> Iterator[NDArray[Any]]:
        entry = checkpoint.entries[name]
        count = math.prod(entry.shape)
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.start)
                for start in range(0, count, PIECE):
                    wanted = min(PIECE, count - start)
                    values = np.fromfile(file, FLOATS[entry.dtype], wanted)
                    if len(values) != wanted:
                        raise DamagedFileError(entry.file, name, "ends early: the file was changed")
                    yield _converted(values, entry, compute, name)
        except OSError as error:
            raise DamagedFileError(entry.file, name, f"cannot be read: {error.strerror or error}") from error

    return pieces


def _converted(values: NDArray[Any], entry: Entry, compute: Compute, name: str) -> NDArray[Any]:
    """`values`: as stored, bf16 as its bits."""
    exponent = EXPONENTS.get((entry.dtype, compute))
    if exponent is not None:
        bits = values.view(np.uint16) & np.uint16(exponent)
        if (bits == exponent).any():
            raise _not_finite(entry, name)
        return values.view(NUMPY[compute])
    if entry.dtype == "BF16":
        wide = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        wide = values.astype(np.float32, copy=False)
    if not np.isfinite(wide).all():
        raise _not_finite(entry, name)
    peak = max(float(wide.max()), -float(wide.min()))
    if peak > LARGEST[compute]:
        advice = "build with --precision bf16" if compute == "fp16" else "no type of an engine holds it"
        reason = f"holds {peak:.6g}, the largest number of {compute} is {LARGEST[compute]:.6g}: {advice}"
        raise UnsupportedModelError(entry.file, name, reason)
    return wide.astype(NUMPY[compute])


def _not_finite(entry: Entry, name: str) -> ModelError:
    return DamagedFileError(entry.file, name, "holds a value that is not a finite number")


def write_weights(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Pieces,
    compute: Compute,
    wrote: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Writes both files; returns the SHA-256 of each. `wrote`: called with the number of values after each piece.

    Raises OSError, and whatever `pieces` raises.
    """
    index: dict[str, dict[str, Any]] = {}
    with (directory / WEIGHTS).open("wb") as file:
        writer = _Writer(file)
        for name, shape in shapes.items():
            writer.write(bytes(-writer.size % ALIGNMENT))
            index[name] = {"offset": writer.size, "shape": list(shape), "dtype": compute}
            for piece in pieces(name):
                writer.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                wrote(piece.size)
    text = json.dumps(index, indent=1).encode()
    (directory / INDEX).write_bytes(text)
    return {WEIGHTS: writer.sha256.hexdigest(), INDEX: hashlib.sha256(text).hexdigest()}


class _Writer:
    """Hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: "bytes | memoryview") -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def read_weights(directory: Path) -> dict[str, NDArray[Any]]:
    """Every tensor, mapped, in its own type. Raises DamagedFileError for an index that does not fit the file."""
    path = directory / INDEX
    index = read_json(path, LARGEST_INDEX)
    try:
        # What is empty cannot be mapped.
        size = (directory / WEIGHTS).stat().st_size
        file = np.memmap(directory / WEIGHTS, np.uint8, "r") if size else np.zeros(0, np.uint8)
    except (OSError, ValueError) as error:
        raise DamagedFileError(directory / WEIGHTS, "", f"cannot be mapped: {error}") from error
    weights = {}
    for name, entry in index.items():
        try:
            offset, shape, dtype = entry["offset"], tuple(entry["shape"]), NUMPY[entry["dtype"]]
            end = offset + math.prod(shape) * dtype.itemsize
            weights[name] = file[offset:end].view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(path, name, f"does not fit {WEIGHTS}: {error}") from error
    return weights


def stored_bytes(shapes: Mapping[str, tuple[int, ...]], compute: Compute) -> int:
    """Size of the weights in the file, without what lies between them."""
    return sum(math.prod(shape) for shape in shapes.values()) * NUMPY[compute].itemsize
