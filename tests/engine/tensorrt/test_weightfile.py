"""Weights of an engine on disk: converted piece by piece, refused when they do not fit the type, mapped again."""

import hashlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from helixflow.engine.base import DamagedFileError, ModelError, UnsupportedModelError
from helixflow.engine.tensorrt import weightfile
from helixflow.engine.tensorrt.numeric import NUMPY
from helixflow.engine.tensorrt.options import Compute
from helixflow.engine.tensorrt.weightfile import ALIGNMENT, checkpoint_pieces, read_weights, write_weights
from helixflow.engine.weights import Checkpoint
from tests.engine.support import DTYPES, write_safetensors

COMPUTES: tuple[Compute, ...] = ("fp16", "bf16", "fp32")


def checkpoint(directory: Path, tensors: dict[str, Any], dtype: str) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors, dtype)
    return Checkpoint(directory)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@settings(max_examples=12, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    piece=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_files_hold_what_the_checkpoint_holds(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    piece: int,
    seed: int,
    dtype: str,
    compute: Compute,
) -> None:
    directory = tmp_path_factory.mktemp("weights")
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.integers(-6, 4)
    tensors = {f"t{i}": (random.standard_normal(shape) * scale).astype(np.float32) for i, shape in enumerate(shapes)}
    stored = checkpoint(directory, tensors, dtype)
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weightfile, "PIECE", piece)
        pieces = checkpoint_pieces(stored, compute)
        hashes = write_weights(directory, {n: t.shape for n, t in tensors.items()}, pieces, compute, sizes.append)
    assert sum(sizes) == sum(tensor.size for tensor in tensors.values())
    assert max(sizes, default=0) <= piece
    assert set(hashes) == {"weights.bin", "weights.json"}
    for name, expected in hashes.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == expected
    index = json.loads((directory / "weights.json").read_text())
    assert all(entry["offset"] % ALIGNMENT == 0 and entry["dtype"] == compute for entry in index.values())
    weights = read_weights(directory)
    assert list(weights) == list(tensors)
    for name in tensors:
        expected_values = stored.tensor(name).astype(NUMPY[compute])
        assert weights[name].dtype == NUMPY[compute]
        np.testing.assert_array_equal(weights[name], expected_values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_what_is_no_number_is_refused(tmp_path: Path, dtype: str, compute: Compute, value: float) -> None:
    tensor = np.ones((3, 5), np.float32)
    tensor[2, 4] = value
    pieces = checkpoint_pieces(checkpoint(tmp_path, {"good": np.ones(2, np.float32), "bad": tensor}, dtype), compute)
    assert list(next(pieces("good"))) == [1, 1]
    with pytest.raises(DamagedFileError, match="bad: holds a value that is not a finite number"):
        list(pieces("bad"))


def test_what_a_type_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    tensor = np.array([1, -70000, 3], np.float32)
    for dtype in ("F32", "BF16"):
        stored = checkpoint(tmp_path, {"model.norm.weight": tensor}, dtype)
        with pytest.raises(UnsupportedModelError) as caught:
            list(checkpoint_pieces(stored, "fp16")("model.norm.weight"))
        assert (caught.value.key, caught.value.file) == ("model.norm.weight", str(tmp_path / "model.safetensors"))
        assert "the largest number of fp16 is 65504: build with --precision bf16" in str(caught.value)
        assert len(list(checkpoint_pieces(stored, "bf16")("model.norm.weight"))) == 1
    stored = checkpoint(tmp_path, {"x": np.array([3.4e38], np.float32)}, "F32")
    with pytest.raises(UnsupportedModelError, match=r"of bf16 is .*: no type of an engine holds it"):
        list(checkpoint_pieces(stored, "bf16")("x"))
    stored = checkpoint(tmp_path, {"x": np.array([65504, -65504], np.float32)}, "F32")
    assert next(checkpoint_pieces(stored, "fp16")("x")).tolist() == [65504, -65504]


def test_a_checkpoint_that_shrinks_or_goes_meanwhile(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path, {"x": np.ones(1000, np.float32)}, "F32")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="x: ends early: the file was changed"):
        list(checkpoint_pieces(stored, "fp16")("x"))
    path.unlink()
    with pytest.raises(ModelError, match="x: cannot be read: No such file"):
        list(checkpoint_pieces(stored, "fp16")("x"))


def test_memory_does_not_follow_the_size(tmp_path: Path) -> None:
    def pieces(name: str) -> Iterator[NDArray[Any]]:
        yield from (np.zeros(weightfile.PIECE, np.float16) for _ in range(12))

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    write_weights(tmp_path, {"x": (weightfile.PIECE,)}, lambda name: iter([next(pieces(name))]), "fp16")
    before = peak()
    write_weights(tmp_path, {"x": (12, weightfile.PIECE)}, pieces, "fp16")
    assert (tmp_path / "weights.bin").stat().st_size == 12 * weightfile.PIECE * 2
    assert peak() - before < 48 << 20


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"offset": 0, "shape": [999], "dtype": "fp16"}, "x: does not fit"),
        ({"offset": 0, "shape": [2], "dtype": "fp17"}, "x: does not fit"),
        ({"offset": "a", "shape": [2], "dtype": "fp16"}, "x: does not fit"),
        ([], "x: does not fit"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, entry: Any, reason: str) -> None:
    write_weights(tmp_path, {"x": (2,)}, lambda _: iter([np.ones(2, np.float16)]), "fp16")
    (tmp_path / "weights.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(DamagedFileError, match=reason):
        read_weights(tmp_path)


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    write_weights(tmp_path, {}, lambda _: iter(()), "fp16")
    assert read_weights(tmp_path) == {}
    write_weights(tmp_path, {"x": (2,)}, lambda _: iter([np.ones(2, np.float16)]), "fp16")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(DamagedFileError, match=r"weights\.bin: cannot be mapped"):
        read_weights(tmp_path)
