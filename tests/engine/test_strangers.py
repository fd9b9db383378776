"""Checkpoints from strangers: what is too large, endless, or leads elsewhere is refused before it costs anything."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from helixflow.engine.base import DamagedFileError, ModelError, UnsupportedModelError
from helixflow.engine.build import build_engine, read_checkpoint
from helixflow.engine.folder import TEXT_FILES, contained, read_bounded
from helixflow.engine.manifest import Manifest, digest
from helixflow.engine.reader import LARGEST_JSON, read_json
from helixflow.engine.spec import LARGEST, ModelSpec
from tests.engine.support import GOLDEN, tiny_config

NAME = "llama-tiny"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / NAME, tmp_path / "model"))


@pytest.mark.parametrize("key", LARGEST)
def test_a_size_beyond_every_model_is_refused_by_its_key(key: str) -> None:
    path = Path("config.json")
    with pytest.raises(UnsupportedModelError) as caught:
        ModelSpec.parse(path, {**tiny_config(), key: LARGEST[key] + 1})
    assert caught.value.key == key
    assert f"at most {LARGEST[key]}" in caught.value.reason


def test_a_billion_layers_cost_nothing(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers: is 1000000000; at most 1024"):
        read_checkpoint(model)


def test_an_endless_config_is_not_read(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    with pytest.raises(DamagedFileError, match="is not a regular file"):
        read_checkpoint(model)


def test_a_pipe_does_not_hold_anybody_up(model: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(DamagedFileError, match="is not a regular file"):
        read_checkpoint(model)


def test_a_large_config_is_refused_by_its_size(model: Path) -> None:
    with (model / "config.json").open("ab") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(DamagedFileError, match="is larger than"):
        read_json(model / "config.json")


def test_a_header_that_would_fill_the_memory_is_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:
        file.write((64 << 20).to_bytes(8, "little"))
        file.truncate(65 << 20)
    with pytest.raises(DamagedFileError, match="header"):
        read_checkpoint(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", *TEXT_FILES])
def test_a_link_out_of_the_folder_is_not_followed(model: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((model / name).read_bytes() if (model / name).exists() else b"{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(DamagedFileError, match="leads out of the model's folder") as caught:
        build_engine(model, tmp_path / "engines")
    assert Path(caught.value.file).name == name
    assert not [path for path in (tmp_path / "engines").rglob("*") if path.name == name]


def test_a_cache_of_hugging_face_links_into_its_own_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted((GOLDEN / NAME).iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    assert read_checkpoint(snapshot)[1].family == "llama"
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(GOLDEN / NAME / "config.json", other / "x")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other / "x")
    with pytest.raises(DamagedFileError, match="leads out of"):
        read_checkpoint(snapshot)


def test_links_inside_the_folder_and_to_it_are_fine(model: Path, tmp_path: Path) -> None:
    (model / "real.json").write_bytes((model / "config.json").read_bytes())
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("real.json")
    (tmp_path / "alias").symlink_to(model)
    assert contained(tmp_path / "alias" / "config.json").read_bytes()
    assert read_bounded(tmp_path / "alias" / "config.json", 1 << 20)


def test_a_built_engine_is_open_to_nobody_else(model: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        built = build_engine(model, tmp_path / "engines")
    finally:
        os.umask(before)
    assert built.directory.stat().st_mode & 0o777 == 0o700


def texts(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in TEXT_FILES if (directory / name).exists()}


def test_tokeniser_and_template_are_in_the_manifest_and_verified(model: Path, tmp_path: Path) -> None:
    built = build_engine(model, tmp_path / "engines")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(built.manifest.texts)
    assert texts(built.directory) == texts(model)
    built.manifest.verify(built.directory)
    (built.directory / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(DamagedFileError, match=r"files\.tokenizer\.json"):
        built.manifest.verify(built.directory)


@pytest.mark.parametrize("verify", [True, False])
def test_another_template_is_taken_over_without_another_engine(model: Path, tmp_path: Path, verify: bool) -> None:
    first = build_engine(model, tmp_path / "engines")
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (model / "generation_config.json").unlink(missing_ok=True)
    second = build_engine(model, tmp_path / "engines", replace_damaged=verify)
    assert (second.directory, second.cached) == (first.directory, True)
    assert texts(second.directory) == texts(model)
    assert Manifest.read(second.directory) == second.manifest
    second.manifest.verify(second.directory)
    assert "generation_config.json" not in second.manifest.files


@pytest.mark.parametrize(
    "value", [None, ["x"], "x", 1.5, {"a": 1}, {"../a": {"sha256": "", "size": 0, "changed_ns": 0}}]
)
def test_a_manifest_with_other_texts_is_none(model: Path, tmp_path: Path, value: Any) -> None:
    built = build_engine(model, tmp_path / "engines")
    content = built.manifest.to_json()
    content["texts"] = value
    content["sha256"] = digest(content)
    (built.directory / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ModelError):
        Manifest.read(built.directory)
