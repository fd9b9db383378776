"""Engines on disk: found again, verified, replaced, built once by many."""

import dataclasses
import errno
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import helixflow.engine.build as build_module
from helixflow.cli import main
from helixflow.engine.base import DamagedFileError, EngineError, Precision
from helixflow.engine.build import Built, build, build_engine, model_name
from helixflow.engine.load import load_engine
from helixflow.engine.manifest import FORMAT, Manifest, digest, engine_key, file_sha256
from helixflow.engine.recipe import Recipe
from tests.engine.support import (
    batch,
    random_tensors,
    read_safetensors,
    tiny_config,
    write_checkpoint,
    write_safetensors,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = tiny_config()
    return write_checkpoint(tmp_path / "my model", config, random_tensors(config))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "engines"


def test_layout_and_manifest(model: Path, root: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    built = build_engine(model, root, "int8", max_len=64, progress=lambda *step: seen.append(step))
    assert not built.cached
    assert built.directory.parent == root / "my-model"
    files = {path.name for path in built.directory.iterdir()}
    assert files == {"graph.onnx", "weights.bin", "config.json", "manifest.json"}
    manifest = Manifest.read(built.directory)
    assert manifest == built.manifest
    assert (manifest.model, manifest.precision, manifest.max_len, manifest.slots) == ("my model", "int8", 64, 0)
    assert set(manifest.sources) == {"config.json", "model.safetensors"}
    assert set(manifest.versions) == {"helixflow", "onnx", "onnxruntime"}
    assert manifest.shapes["vocab_size"] == 101
    assert {what for what, _, _ in seen} == {"reading the checkpoint", "building my model int8"}
    assert all(0 <= done <= total for _, done, total in seen)
    assert seen[-1][1] == seen[-1][2]
    manifest.verify(built.directory)


def test_cache_hit_and_key(model: Path, root: Path) -> None:
    first = build_engine(model, root)
    times = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    again = build_engine(model, root)
    assert again == Built(first.directory, first.manifest, cached=True)
    assert times == {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    assert build_engine(model, root, "int4").directory != first.directory
    tensors = {name: tensor * np.float32(2) for name, tensor in read_safetensors(model / "model.safetensors").items()}
    write_safetensors(model / "model.safetensors", tensors)
    assert build_engine(model, root).directory != first.directory
    manifest = first.manifest
    older = {**manifest.versions, "onnxruntime": "1.0"}
    assert engine_key(manifest.sources, manifest.recipe, manifest.versions) == manifest.key
    assert engine_key(manifest.sources, manifest.recipe, older) != manifest.key


def test_defaults_change_without_a_new_build(model: Path, root: Path) -> None:
    first = build_engine(model, root, slots=3, max_len=40)
    weights = (first.directory / "weights.bin").stat().st_mtime_ns
    second = build_engine(model, root, max_len=50)
    assert second.directory == first.directory
    assert (second.manifest.slots, second.manifest.max_len) == (3, 50)
    assert (second.directory / "weights.bin").stat().st_mtime_ns == weights
    capacity = load_engine(second.directory, threads=1).capacity()
    assert (capacity.slots, capacity.max_len, capacity.vocab_size) == (3, 50, 101)


def test_an_old_checkpoint_is_not_hashed_again(model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_engine(model, root)
    later = time.time() + 10
    os.utime(first.directory / "manifest.json", (later, later))  # as if the files had been there for long
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    monkeypatch.setattr(build_module, "file_sha256", counted)
    assert build_engine(model, root).cached
    assert hashed == []
    (model / "config.json").write_text((model / "config.json").read_text())
    assert build_engine(model, root).cached
    assert hashed == [model / "config.json"]


@pytest.mark.parametrize("file", ["graph.onnx", "weights.bin", "config.json"])
def test_tampering_is_refused_and_repaired(model: Path, root: Path, file: str) -> None:
    built = build_engine(model, root)
    path = built.directory / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for source in (built.directory, model):
        with pytest.raises(DamagedFileError, match=r"differs .* run `helixflow engine build") as caught:
            load_engine(source, engines=root, threads=1)
        assert (caught.value.file, caught.value.key) == (str(path), f"files.{file}")
    assert not build_engine(model, root).cached
    load_engine(model, engines=root, threads=1).close()


def test_missing_file_is_refused(model: Path, root: Path) -> None:
    built = build_engine(model, root)
    (built.directory / "weights.bin").unlink()
    with pytest.raises(DamagedFileError, match=r"weights\.bin: is missing; run"):
        load_engine(built.directory)


MANIFEST_DAMAGES: list[tuple[str, Any]] = [
    ("format", 99),
    ("precision", "fp7"),
    ("files", {"../config.json": "0"}),
    ("files", []),
    ("sources", {"x": {"sha256": "0"}}),
    ("max_len", "long"),
    ("extra", 1),
]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("key", "value"), MANIFEST_DAMAGES, ids=str)
def test_damaged_manifest(model: Path, root: Path, key: str, value: Any, signed: bool) -> None:
    built = build_engine(model, root)
    path = built.directory / "manifest.json"
    content = {**json.loads(path.read_text()), key: value}
    if signed:
        del content["sha256"]
        content["sha256"] = digest(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=r"manifest\.json: "):
        load_engine(built.directory)


def test_a_wrong_hash_in_a_manifest_does_not_spoil_the_next_build(model: Path, root: Path) -> None:
    built = build_engine(model, root)
    path = built.directory / "manifest.json"
    source = built.manifest.sources["config.json"].sha256
    path.write_text(path.read_text().replace(source, source[::-1]))
    with pytest.raises(DamagedFileError, match="differs from the content"):
        Manifest.read(built.directory)
    again = build_engine(model, root)
    assert (again.cached, again.manifest.sources) == (False, built.manifest.sources)


def test_what_a_killed_build_left_is_removed(model: Path, root: Path) -> None:
    left = root / "my-model" / ".build" / "int4-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "weights.bin").write_bytes(bytes(1000))
    build_engine(model, root)
    assert [path.name for path in left.parent.iterdir()] == ["lock"]


def test_a_full_disk_is_reported_and_leaves_nothing(model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_spec: Any, _precision: Any, _read: Any, directory: Path, _provider: Any) -> dict[str, str]:
        (directory / "weights.bin").write_bytes(b"begun")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build_module, "write_onnx", full)
    with pytest.raises(EngineError, match=r"my-model/fp32-.*: cannot be written: No space left on device"):
        build_engine(model, root)
    assert [path.name for path in (root / "my-model").rglob("*")] == [".build", "lock"]


def test_a_failed_build_leaves_nothing(model: Path, root: Path) -> None:
    tensors = dict(read_safetensors(model / "model.safetensors"))
    tensors["lm_head.weight"] = np.full_like(tensors["lm_head.weight"], np.inf)
    write_safetensors(model / "model.safetensors", tensors)
    with pytest.raises(DamagedFileError, match=r"lm_head\.weight"):
        build_engine(model, root)
    assert [path.name for path in (root / "my-model").rglob("*")] == [".build", "lock"]


def test_two_builders_build_once(model: Path, root: Path) -> None:
    started = threading.Barrier(4)

    def build(_: int) -> Built:
        started.wait()
        return build_engine(model, root)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(build, range(4)))
    assert sorted(result.cached for result in results) == [False, True, True, True]
    assert len({result.directory for result in results}) == 1


def test_wrong_arguments(model: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="is not a directory"):
        build_engine(tmp_path / "absent", root)
    with pytest.raises(EngineError, match="max-len 9999 is more than the 256 positions"):
        build_engine(model, root, max_len=9999)
    precision: Any = "fp64"
    with pytest.raises(EngineError, match="'fp64' is unknown"):
        build_engine(model, root, precision)
    kind: Any = "tensorrt-3"
    with pytest.raises(EngineError, match="'tensorrt-3' is unknown"):
        load_engine(model, kind, engines=root)
    with pytest.raises(EngineError, match="max-len 300 is more than"):
        load_engine(model, engines=root, max_len=300)
    with pytest.raises(EngineError, match=r"need .* GiB beside .* of weights, .* are available"):
        load_engine(model, engines=root, max_len=256, slots=1 << 30)
    monkeypatch.setattr("helixflow.engine.onnx_engine.available_bytes", lambda: 100_000)
    with pytest.raises(EngineError, match=r"beside 0\.0 GiB of weights"):
        load_engine(model, engines=root, max_len=1, slots=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="HELIX_ENGINES"):
        build_engine(model, tmp_path / "file" / "engines")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_load_from_a_checkpoint(model: Path, root: Path, precision: Precision) -> None:
    engine = load_engine(model, precision=precision, engines=root, slots=2, threads=1)
    assert engine.capacity().max_len == 256
    logits = engine.step(batch((1, 0, [1, 2, 3], 1))).logits
    assert logits is not None
    assert logits.shape == (1, 101)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.step(batch((1, 3, [1], 1)))


def test_length_follows_memory(model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    position = 2 * 4 * 2 * 2 * 16
    config = tiny_config(max_position_embeddings=4096)
    (model / "config.json").write_text(json.dumps(config))
    directory = build_engine(model, root).directory
    weights = sum((directory / name).stat().st_size for name in ("weights.bin", "graph.onnx", "config.json"))
    monkeypatch.setattr("helixflow.engine.load.available_bytes", lambda: weights + 2 * 16 * position * 300)
    assert load_engine(model, engines=root, threads=1).capacity().max_len == 256
    monkeypatch.setattr("helixflow.engine.load.available_bytes", lambda: weights + position * 300)
    with pytest.raises(EngineError, match="do not fit into memory"):
        load_engine(model, engines=root, threads=1)


@pytest.mark.parametrize(("name", "expected"), [("Llama-3.2 1B", "Llama-3.2-1B"), ("..", "model"), ("ü", "model")])
def test_model_name(name: str, expected: str) -> None:
    assert model_name(Path("/models") / name) == expected


def test_command_line(model: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["engine", *arguments, "--engines", str(root)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    assert run("list") == (0, f"no engines in {root}: build one with `helixflow engine build MODEL_DIR`\n", "")
    status, out, err = run("build", str(model), "--precision", "int8", "--slots", "4")
    assert status == 0
    assert out.endswith("(built)\n")
    assert "building my model int8 100%" in err
    status, out, _ = run("build", str(model), "--json")
    built = json.loads(out)
    assert (built["cached"], built["precision"], built["shapes"]["layers"]) == (False, "fp32", 2)
    engines = json.loads(run("list", "--json")[1])
    assert {engine["precision"] for engine in engines} == {"fp32", "int8"}
    assert all(engine["key"] in run("list")[1] for engine in engines)
    assert json.loads(run("show", built["key"], "--json")[1])["files"] == built["files"]
    assert "onnxruntime" in run("show", built["directory"])[1]
    status, _, err = run("show", "my-model")
    assert (status, "has 2 engines" in err) == (1, True)
    assert run("show", "other")[0] == 1
    assert run("verify")[0] == 0
    (Path(built["directory"]) / "graph.onnx").write_bytes(b"")
    status, out, _ = run("verify", "--json")
    assert status == 1
    assert [result["ok"] for result in json.loads(out)] == [False, True]
    assert "DAMAGED" in run("verify", built["key"])[1]


def test_manifest_survives_a_round_trip(model: Path, root: Path, tmp_path: Path) -> None:
    manifest = dataclasses.replace(build_engine(model, root).manifest, slots=9)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


def test_an_engine_for_the_gpu_is_another_one(model: Path, root: Path) -> None:
    built = build_engine(model, root, "fp16", provider="cuda", slots=2, max_len=9)
    assert re.fullmatch("onnx-cuda-fp16-[0-9a-f]{16}", built.directory.name)
    assert (built.manifest.backend, built.manifest.provider) == ("onnx", "cuda")
    # Half of what fp32 takes.
    assert built.manifest.shapes["cache_bytes_per_position"] == 2 * 2 * 2 * 2 * 16
    assert build(model, root, Recipe("onnx", "cuda")).directory == built.directory
    assert build_engine(model, root, "fp16").directory != built.directory
    with pytest.raises(
        EngineError, match=r"is an engine of onnx-cuda, not of onnx: set .*_PROVIDER=cuda, or run"
    ) as caught:
        load_engine(built.directory)
    assert f"`helixflow engine build '{model}' --precision auto" in str(caught.value)
    with pytest.raises(EngineError, match="was built with precision fp32, int8 is wanted: run"):
        load_engine(build_engine(model, root).directory, precision="int8")
    with pytest.raises(EngineError, match="precision of onnx-cuda: 'fp32' is unknown: choose one of auto, fp16, bf16"):
        build_engine(model, root, provider="cuda")


def test_an_engine_of_an_older_version_is_damaged_to_this_one(model: Path, root: Path) -> None:
    path = build_engine(model, root).directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT - 1}))
    with pytest.raises(
        DamagedFileError, match=rf"format: is {FORMAT - 1}, this version reads {FORMAT}; run `helixflow engine build"
    ):
        load_engine(path.parent)
