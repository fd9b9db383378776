"""Checkpoints on disk: single or sharded safetensors, memory-mapped, one tensor at a time as float32.

The header is parsed here rather than by a library: numpy has no bfloat16 for one to return, and a damaged file is to be
refused with the key that is wrong. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from helixflow.engine.base import DamagedFileError, Float32, UnsupportedModelError
from helixflow.engine.folder import contained
from helixflow.engine.reader import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 16 << 20
"""Bytes: 100,000 tensors in one file. Parsed, a header takes ten times as much memory."""
LARGEST_INDEX = 32 << 20
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
FLOATS: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
# Buffers that old exports carry along; they follow from config.json.
DERIVED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attn.masked_bias")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes `start` .. `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The tensors of a model directory. Raises DamagedFileError or UnsupportedModelError (file, key, reason)."""

    def __init__(self, model_dir: Path) -> None:
        self.directory = model_dir
        self.entries: dict[str, Entry] = {}
        index = model_dir / INDEX
        if (model_dir / SINGLE).exists() or not index.exists():
            self.files = [_existing(model_dir / SINGLE)]
            self.entries = read_header(self.files[0])
        else:
            self._read_index(index)

    def _read_index(self, index: Path) -> None:
        places = read_json(index, LARGEST_INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise DamagedFileError(index, "weight_map", "is missing or empty")
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file or file in (".", ".."):
                raise DamagedFileError(index, f"weight_map.{name}", f"{file!r} is not a file name")
        shards: dict[str, dict[str, Entry]] = {}
        for name, file in places.items():
            if file not in shards:
                if not (self.directory / file).is_file():
                    raise DamagedFileError(index, f"weight_map.{name}", f"names {file}, which is not there")
                shards[file] = read_header(self.directory / file)
            if name not in shards[file]:
                raise DamagedFileError(self.directory / file, name, f"is missing; {index.name} says it is here")
            self.entries[name] = shards[file][name]
        for file, entries in shards.items():
            for name in entries:
                if name not in places:
                    raise DamagedFileError(self.directory / file, name, f"is not in {index.name}")
        self.files = [index, *(self.directory / file for file in sorted(shards))]

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()) -> None:
        """Compares names, shapes and dtypes with what the decoder reads; `ignored` names may be there unused."""
        for name, shape in expected.items():
            entry = self.entries.get(name)
            if entry is None:
                raise DamagedFileError(self.files[0], name, "is missing")
            if entry.shape != shape:
                raise DamagedFileError(
                    entry.file, name, f"has shape {list(entry.shape)}, config.json says {list(shape)}"
                )
            if entry.dtype not in FLOATS:
                raise UnsupportedModelError(entry.file, name, f"dtype {entry.dtype} is not F32, F16 or BF16")
        for name, entry in self.entries.items():
            if name not in expected and name not in ignored and not name.endswith(DERIVED):
                raise UnsupportedModelError(entry.file, name, "is no tensor of this architecture")

    def tensor(self, name: str) -> Float32:
        """One tensor as float32, in the shape on disk. The file is mapped for as long as the result refers to it."""
        entry = self.entries[name]
        dtype = FLOATS[entry.dtype]
        if entry.end == entry.start:
            return np.zeros(entry.shape, np.float32)
        try:
            raw = np.memmap(entry.file, np.uint8, "r", entry.start, (entry.end - entry.start,))
        except (OSError, ValueError) as error:
            raise DamagedFileError(entry.file, name, f"cannot be read: {error}") from error
        values: NDArray[Any] = np.asarray(raw).view(dtype).reshape(entry.shape)
        if entry.dtype == "BF16":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return np.asarray(values, np.float32)


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of one safetensors file, every offset checked. Raises DamagedFileError."""
    size = _existing(path).stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise DamagedFileError(
                    path, "header", f"says {length} bytes in a file of {size}: truncated or not safetensors"
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise DamagedFileError(path, "", f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, "header", f"is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise DamagedFileError(path, "header", "is not a JSON object")
    header.pop("__metadata__", None)
    base = 8 + length
    entries = {name: _entry(path, name, value, base) for name, value in header.items()}
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise DamagedFileError(path, name, f"begins at byte {entry.start}, expected {position}")
        if entry.end > size:
            raise DamagedFileError(path, name, f"ends at byte {entry.end} of {size}: the file is truncated")
        position = entry.end
    if position != size:
        raise DamagedFileError(path, "", f"has {size - position} bytes after its last tensor")
    return entries


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    """One header entry; offsets become absolute."""
    if not isinstance(value, dict):
        raise DamagedFileError(path, name, "has no description")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise DamagedFileError(path, name, f"has the unknown dtype {dtype!r}")
    if not _wholes(shape) or not _wholes(offsets) or len(offsets) != 2:
        raise DamagedFileError(path, name, f"has shape {shape!r} at offsets {offsets!r}")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise DamagedFileError(path, name, f"holds {end - start} bytes, which is not {dtype} {shape}")
    return Entry(path, dtype, tuple(shape), base + start, base + end)


def _wholes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} appears twice")
        found[name] = value
    return found


def _existing(path: Path) -> Path:
    if path.exists():
        return contained(path)
    others = sorted(p.name for p in path.parent.glob("*.bin")) + sorted(p.name for p in path.parent.glob("*.gguf"))
    hint = f" (found {others[0]}: convert it to safetensors first)" if others else ""
    raise DamagedFileError(path, "", f"is not there, and no {INDEX} beside it{hint}")
