"""Checkpoints on disk: every layout loads the same, every damage is named by file and key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from helixflow.engine.base import DamagedFileError, ModelError, UnsupportedModelError
from helixflow.engine.build import read_checkpoint
from helixflow.engine.weights import Checkpoint
from tests.engine.support import (
    DTYPES,
    GOLDEN,
    open_engine,
    random_tensors,
    read_safetensors,
    step,
    tiny_config,
    write_checkpoint,
    write_safetensors,
    write_shards,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
V_PROJ = "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_golden_checkpoint_saved_otherwise_computes_the_same(tmp_path: Path, dtype: str, sharded: bool) -> None:
    """The fp32 logits, from weights that were rounded to the dtype beforehand."""
    source = GOLDEN / "qwen3-tiny"
    config = json.loads((source / "config.json").read_text())
    tensors = {
        name: tensor.astype(DTYPES[dtype]).astype(np.float32)
        for name, tensor in read_safetensors(source / SINGLE).items()
    }
    expected_dir = write_checkpoint(tmp_path / "rounded", config, tensors)
    if sharded:
        other = write_shards(tmp_path / "other", config, tensors, dtype)
    else:
        other = write_checkpoint(tmp_path / "other", config, {})
        write_safetensors(other / SINGLE, tensors, dtype)
    ids = list(range(3, 40))
    rows = []
    for directory in (expected_dir, other):
        engine = open_engine(directory, tmp_path / "engines")
        rows.append(step(engine, (0, 0, ids, 37)))
        engine.close()
    assert np.array_equal(rows[0], rows[1])


def test_every_value_of_bfloat16_is_exact(tmp_path: Path) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    values = values[np.isfinite(values)]
    write_safetensors(tmp_path / SINGLE, {"x": values, "empty": values[:0]}, "BF16")
    checkpoint = Checkpoint(tmp_path)
    assert np.array_equal(checkpoint.tensor("x").view(np.uint32), values.view(np.uint32))
    assert checkpoint.tensor("empty").shape == (0,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = tiny_config()
    return write_checkpoint(tmp_path / "model", config, random_tensors(config))


def edit_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    result = change(header)
    text = json.dumps(header if result is None else result).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def shift(entry: dict[str, Any], by: int) -> None:
    entry["data_offsets"] = [entry["data_offsets"][0] + by, entry["data_offsets"][1] + by]


HEADER_DAMAGES: list[tuple[str, Callable[[dict[str, Any]], Any], str, str]] = [
    ("a list", lambda h: [1], "header", "not a JSON object"),
    ("no description", lambda h: h.update({V_PROJ: 3}), V_PROJ, "no description"),
    ("unknown dtype", lambda h: h[V_PROJ].update(dtype="F33"), V_PROJ, "'F33'"),
    ("negative shape", lambda h: h[V_PROJ].update(shape=[-1, 2]), V_PROJ, "[-1, 2]"),
    ("shape of text", lambda h: h[V_PROJ].update(shape=["a"]), V_PROJ, "['a']"),
    ("shape and size disagree", lambda h: h[V_PROJ].update(shape=[32, 47]), V_PROJ, "which is not F32"),
    ("three offsets", lambda h: h[V_PROJ].update(data_offsets=[0, 1, 2]), V_PROJ, "[0, 1, 2]"),
    ("overlap", lambda h: shift(h[V_PROJ], -4), V_PROJ, "begins at byte"),
    ("missing", lambda h: h.__delitem__("model.norm.weight"), "", "bytes after its last tensor"),
]


@pytest.mark.parametrize(
    ("change", "key", "reason"), [d[1:] for d in HEADER_DAMAGES], ids=[d[0] for d in HEADER_DAMAGES]
)
def test_damaged_header(model: Path, change: Callable[[dict[str, Any]], Any], key: str, reason: str) -> None:
    if key == "":
        # The norm is not the last tensor: without it there is a hole, reported at the tensor that follows.
        key, reason = "lm_head.weight", "begins at byte"
    edit_header(model / SINGLE, change)
    with pytest.raises(DamagedFileError) as caught:
        read_checkpoint(model)
    assert caught.value.file == str(model / SINGLE)
    assert caught.value.key == key
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated or not safetensors"),
        (b"\x80\x02}q", "truncated or not safetensors"),
        (b"\xff" * 64, "truncated or not safetensors"),
        (b"\x04" + bytes(7) + b"abcd", "is not JSON"),
        (b"\x02" + bytes(7) + b"\xff\xfe", "is not JSON"),
        (b"\x0f" + bytes(7) + b'{"a":{},"a":{}}', "appears twice"),
    ],
    ids=["empty", "pickle", "huge header", "text", "not utf-8", "duplicate"],
)
def test_not_safetensors(model: Path, content: bytes, reason: str) -> None:
    (model / SINGLE).write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        read_checkpoint(model)
    assert (caught.value.file, caught.value.key) == (str(model / SINGLE), "header")
    assert reason in caught.value.reason


@pytest.mark.parametrize("lost", [1, 4, 5000])
def test_truncated_file(model: Path, lost: int) -> None:
    data = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(data[:-lost])
    with pytest.raises(DamagedFileError, match=r"lm_head\.weight: ends at byte .* truncated"):
        read_checkpoint(model)


def test_bytes_behind_the_last_tensor(model: Path) -> None:
    with (model / SINGLE).open("ab") as file:
        file.write(b"xyz")
    with pytest.raises(DamagedFileError, match="has 3 bytes after its last tensor"):
        read_checkpoint(model)


def rewrite(model: Path, change: Callable[[dict[str, Any]], Any], dtype: str = "F32") -> None:
    tensors: dict[str, Any] = dict(read_safetensors(model / SINGLE))
    change(tensors)
    write_safetensors(model / SINGLE, tensors, dtype)


def test_missing_tensor(model: Path) -> None:
    rewrite(model, lambda t: t.pop(V_PROJ))
    with pytest.raises(DamagedFileError) as caught:
        read_checkpoint(model)
    assert (caught.value.file, caught.value.key, caught.value.reason) == (str(model / SINGLE), V_PROJ, "is missing")


def test_bias_in_one_layer_only(model: Path) -> None:
    rewrite(model, lambda t: t.update({"model.layers.0.mlp.up_proj.bias": np.zeros(72, np.float32)}))
    with pytest.raises(DamagedFileError, match=r"model\.layers\.1\.mlp\.up_proj\.bias: is missing"):
        read_checkpoint(model)


def test_wrong_shape(model: Path) -> None:
    rewrite(model, lambda t: t.update({V_PROJ: t[V_PROJ].T}))
    with pytest.raises(DamagedFileError, match=r"v_proj\.weight: has shape \[48, 32\], config\.json says \[32, 48\]"):
        read_checkpoint(model)


def test_wrong_dtype(model: Path) -> None:
    edit_header(model / SINGLE, lambda h: h[V_PROJ].update(dtype="I32"))
    with pytest.raises(UnsupportedModelError, match=r"v_proj\.weight: dtype I32 is not"):
        read_checkpoint(model)


def test_tensor_of_another_architecture(model: Path) -> None:
    rewrite(model, lambda t: t.update({"model.layers.0.mlp.router.weight": np.zeros(4, np.float32)}))
    with pytest.raises(UnsupportedModelError, match=r"router\.weight: is no tensor of this architecture"):
        read_checkpoint(model)


def test_derived_buffers_are_ignored(model: Path) -> None:
    rewrite(model, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}))
    assert "model.norm.weight" in read_checkpoint(model)[0].entries


def test_head_beside_a_tied_embedding_is_ignored(tmp_path: Path) -> None:
    untied = tiny_config()
    tensors = random_tensors(untied)
    directory = write_checkpoint(tmp_path / "model", {**untied, "tie_word_embeddings": True}, tensors)
    assert "lm_head.weight" not in read_checkpoint(directory)[1].tensors()


def test_a_value_that_is_no_number(model: Path, tmp_path: Path) -> None:
    rewrite(model, lambda t: t.update({V_PROJ: np.full_like(t[V_PROJ], np.nan)}))
    with pytest.raises(DamagedFileError, match=r"v_proj\.weight: holds a value that is not a finite number"):
        open_engine(model, tmp_path / "engines")


def test_no_weights(model: Path) -> None:
    (model / SINGLE).rename(model / "pytorch_model.bin")
    with pytest.raises(DamagedFileError, match=r"found pytorch_model\.bin: convert it"):
        read_checkpoint(model)


INDEX_DAMAGES: list[tuple[str, Callable[[Path, dict[str, Any]], Any], str]] = [
    ("no map", lambda d, m: m.clear(), "weight_map: is missing or empty"),
    ("missing shard", lambda d, m: (d / m[V_PROJ]).unlink(), "which is not there"),
    ("other folder", lambda d, m: m.update({V_PROJ: "../model.safetensors"}), "is not a file name"),
    ("not a name", lambda d, m: m.update({V_PROJ: 7}), "7 is not a file name"),
    (
        "wrong shard",
        lambda d, m: m.update({V_PROJ: next(f for f in m.values() if f != m[V_PROJ])}),
        f"{V_PROJ}: is missing; {INDEX} says it is here",
    ),
    ("not in the index", lambda d, m: m.pop(V_PROJ), f"{V_PROJ}: is not in {INDEX}"),
]


@pytest.mark.parametrize(("change", "reason"), [d[1:] for d in INDEX_DAMAGES], ids=[d[0] for d in INDEX_DAMAGES])
def test_damaged_index(tmp_path: Path, change: Callable[[Path, dict[str, Any]], Any], reason: str) -> None:
    config = tiny_config()
    directory = write_shards(tmp_path / "model", config, random_tensors(config), "F32")
    index = json.loads((directory / INDEX).read_text())
    change(directory, index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError) as caught:
        read_checkpoint(directory)
    assert reason in str(caught.value)
    assert str(directory) in caught.value.file
