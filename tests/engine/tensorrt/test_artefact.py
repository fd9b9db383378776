"""TensorRT engines on disk: what is written, when it is found again, and what is refused with which command."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.cli import build_parser
from helixflow.engine import build as building
from helixflow.engine.base import DamagedFileError, EngineError, UnsupportedModelError
from helixflow.engine.build import Built, build, find
from helixflow.engine.cli import recipe_of
from helixflow.engine.kinds import ATTENTION_CHOICES, BACKENDS, AnyPrecision
from helixflow.engine.manifest import Manifest
from helixflow.engine.recipe import Recipe
from helixflow.engine.spec import ModelSpec
from helixflow.engine.tensorrt import artefact
from helixflow.engine.tensorrt.artefact import checkpoint_sequences, open_artefact
from helixflow.engine.tensorrt.options import GPU_PRECISIONS
from tests.engine.support import GOLDEN, random_tensors, tiny_config, write_checkpoint, write_safetensors
from tests.engine.tensorrt.ground import RTX, Ground

RTX_89 = Recipe("tensorrt-rtx", slots=4, max_len=64, sms=(89,))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = tiny_config("qwen2", tie_word_embeddings=True)
    return write_checkpoint(tmp_path / "my model", config, random_tensors(config))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "engines"


def made(model: Path, root: Path, recipe: Recipe = RTX_89, ground: Ground | None = None, **changes: Any) -> Built:
    return build(model, root, dataclasses.replace(recipe, **changes), toolkit=(ground or Ground()).toolkit)


def opened(built: Built, ground: Ground | None = None) -> artefact.Artefact:
    toolkit = (ground or Ground()).toolkit
    library = toolkit.library("tensorrt-rtx" if built.manifest.backend == "tensorrt-rtx" else "tensorrt")
    return open_artefact(built.directory, built.manifest, library, toolkit.open_device(library, 0).info())


def command_in(message: str) -> Recipe:
    """The recipe of the command that a message tells to run."""
    found = re.search(r"run `(helixflow engine build .*)`", message)
    assert found, message
    return recipe_of(build_parser().parse_args(shlex.split(found[1])[1:]))


def test_files_manifest_and_what_is_opened(model: Path, root: Path) -> None:
    built = made(model, root, precision="bf16", chunk_tokens=16)
    names = {path.name for path in built.directory.iterdir()}
    assert names == {"plan.bin", "weights.bin", "weights.json", "config.json", "manifest.json"}
    manifest = Manifest.read(built.directory)
    assert manifest == built.manifest
    manifest.verify(built.directory)
    assert re.fullmatch("tensorrt-rtx-bf16-[0-9a-f]{16}", manifest.key)
    assert manifest.versions == {"helixflow": "0.1.0", "tensorrt-rtx": RTX.version}
    assert (manifest.slots, manifest.max_len, manifest.device, manifest.checkpoint) == (4, 64, "", str(model))
    assert manifest.shapes["cache_bytes_per_position"] == 2 * 2 * 2 * 2 * 16
    options = manifest.options
    assert (options["attention"], options["chunk_tokens"], options["sms"]) == ("posmask", 16, [89])
    found = opened(built)
    assert found.options == artefact.engine_options(manifest.recipe)
    assert found.spec == ModelSpec.load(model)
    assert set(found.weights) == set(found.spec.tensors())
    assert found.plan().startswith(b"interpreted network")
    again = made(model, root, precision="bf16", chunk_tokens=16)
    assert again == Built(built.directory, manifest, cached=True)


@pytest.mark.parametrize(
    ("dtype", "backend", "expected"),
    [
        ("BF16", "tensorrt-rtx", "bf16"),
        ("F16", "tensorrt-rtx", "fp16"),
        ("F32", "tensorrt", "fp16"),
        ("BF16", "onnx", "fp32"),
    ],
)
def test_precision_follows_the_checkpoint(tmp_path: Path, root: Path, dtype: str, backend: Any, expected: str) -> None:
    config = tiny_config()
    model = write_checkpoint(tmp_path / "model", config, {})
    write_safetensors(model / "model.safetensors", random_tensors(config), dtype)
    assert building.resolve(model, Recipe(backend)).precision == expected


def test_everything_that_matters_is_in_the_key(model: Path, root: Path) -> None:
    ground = Ground()
    recipes = [
        RTX_89,
        *(dataclasses.replace(RTX_89, **change) for change in ({"slots": 5}, {"max_len": 65}, {"sms": (89, 120)})),
        *(
            dataclasses.replace(RTX_89, **change)
            for change in ({"sms": ()}, {"chunk_tokens": 8}, {"precision": "bf16"})
        ),
        dataclasses.replace(RTX_89, attention="key_value_lengths"),
    ]
    keys = {made(model, root, recipe, ground).manifest.key for recipe in recipes}
    keys.add(made(model, root, ground=Ground(version="9.9")).manifest.key)
    for changes in ({}, {"name": "other"}, {"sm": 90}):
        keys.add(made(model, root, Recipe("tensorrt", slots=4, max_len=64), Ground(**changes)).manifest.key)
    assert len(keys) == len(recipes) + 4
    # Neither the order of a list nor a device that RTX does not need makes another engine.
    assert made(model, root, sms=(120, 89, 89), ground=Ground(name="other", sm=75)).cached
    assert made(model, root, chunk_tokens=64).cached


def test_weights_are_shared_between_engines(model: Path, root: Path) -> None:
    first = made(model, root)
    place = first.directory / "weights.bin"
    second = made(model, root, slots=2)
    assert place.samefile(second.directory / "weights.bin")
    assert not place.samefile(made(model, root, precision="bf16").directory / "weights.bin")
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    for directory in (first.directory, second.directory):
        with pytest.raises(DamagedFileError, match=r"weights\.bin: differs") as caught:
            Manifest.read(directory).verify(directory)
        assert caught.value.key == "files.weights.bin"
    repaired = made(model, root, slots=2)
    assert not repaired.cached
    sound = repaired.directory / "weights.bin"
    assert not place.samefile(sound)
    repaired.manifest.verify(repaired.directory)
    # The sound one is taken, and the damaged one left alone.
    assert sound.samefile(made(model, root, slots=3).directory / "weights.bin")


@pytest.mark.parametrize("precision", GPU_PRECISIONS)
def test_quantised_weights_are_in_the_plan_and_the_rest_beside_it(
    tmp_path: Path, root: Path, precision: AnyPrecision
) -> None:
    config = tiny_config("qwen3", hidden_size=128, intermediate_size=192, attention_bias=True)
    model = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    built = made(model, root, precision=precision)
    weights = opened(built).weights
    linear = {name for name in ModelSpec.load(model).tensors() if "_proj.weight" in name}
    narrow = {name for name in linear if "down_proj" in name or "o_proj" in name}
    inputs = {"fp16": linear, "bf16": linear, "int4": narrow}.get(precision, set())
    assert {name for name in weights if name in linear} == inputs
    assert {name + ".weight" for name in built.manifest.options["unquantised"]} == (
        narrow if precision == "int4" else set()
    )
    assert set(weights) == set(ModelSpec.load(model).tensors()) - linear | inputs
    dtype = "bfloat16" if precision == "bf16" else "float16"
    assert {str(tensor.dtype) for tensor in weights.values()} == {dtype}
    assert built.manifest.options["calibration"] == ("ids" if precision == "fp8" else "")


def test_fp8_is_calibrated_with_text_where_there_is_a_tokeniser(model: Path) -> None:
    golden = GOLDEN / "llama-tiny"
    spec = ModelSpec.load(golden)
    name, texts = checkpoint_sequences(golden, spec)
    assert (name, len(texts)) == ("text", 5)
    assert all(0 <= token < spec.vocab_size for text in texts for token in text)
    assert checkpoint_sequences(model, spec)[0] == "ids"
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError, match=r"fp8 cannot be calibrated: .*tokenizer\.json"):
        checkpoint_sequences(model, spec)


def test_what_a_checkpoint_holds_is_refused_by_name(model: Path, root: Path) -> None:
    tensors = random_tensors(tiny_config("qwen2", tie_word_embeddings=True))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    write_safetensors(model / "model.safetensors", tensors)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj\.weight: .* --precision bf16"):
        made(model, root)
    assert not made(model, root, precision="bf16").cached
    tensors["model.norm.weight"][0] = np.nan
    write_safetensors(model / "model.safetensors", tensors)
    for precision in ("bf16", "int8", "fp8"):
        with pytest.raises(EngineError, match=r"finite"):
            made(model, root, precision=precision)
    assert {path.name for path in (root / "my-model").glob("*")} - {".build"} == {
        path.parent.name for path in (root / "my-model").glob("*/manifest.json")
    }


def test_another_version_device_or_library_is_refused_with_the_command(model: Path, root: Path) -> None:
    built = made(model, root)
    with pytest.raises(EngineError, match=rf"built with tensorrt-rtx {RTX.version}, 1.99 is installed: run") as caught:
        opened(built, Ground(version="1.99"))
    assert command_in(str(caught.value)) == built.manifest.recipe
    assert str(model) in shlex.split(str(caught.value).partition("`")[2].rstrip("`"))
    assert f"--engines {root}" in str(caught.value)
    with pytest.raises(EngineError, match=r"built for SM 89, this device is host \(SM 120\): run") as caught:
        opened(built, Ground(sm=120))
    assert command_in(str(caught.value)).sms == (89, 120)
    opened(made(model, root, sms=(89, 120)), Ground(sm=120))
    opened(made(model, root, sms=()), Ground(sm=86))
    with pytest.raises(EngineError, match=r"built for SM 80 and newer, this device is host \(SM 75\): run") as caught:
        opened(made(model, root, sms=()), Ground(sm=75))
    assert command_in(str(caught.value)).sms == (75,)
    bound = made(model, root, Recipe("tensorrt", "cpu", "int8", 3, 50), Ground(name="A card"))
    assert bound.manifest.device == "A card (SM 89)"
    opened(bound, Ground(name="A card"))
    with pytest.raises(
        EngineError, match=r"built on A card \(SM 89\), this device is Another \(SM 89\): run"
    ) as caught:
        opened(bound, Ground(name="Another"))
    assert command_in(str(caught.value)) == bound.manifest.recipe
    toolkit = Ground().toolkit
    with pytest.raises(EngineError, match="is an engine of tensorrt: set HELIX_POOL_ENGINE=tensorrt, or run") as caught:
        open_artefact(bound.directory, bound.manifest, toolkit.library("tensorrt-rtx"), Ground().make().info())
    assert command_in(str(caught.value)).backend == "tensorrt-rtx"


def test_an_engine_with_more_slots_is_found(model: Path, root: Path) -> None:
    toolkit = Ground().toolkit

    def found(sm: int = 89, **changes: Any) -> Path | None:
        built = find(model, root, dataclasses.replace(RTX_89, **changes), sm, toolkit)
        return built.directory if built else None

    assert found() is None
    many = made(model, root, slots=9, sms=()).directory
    assert found() == many
    assert found(sm=120, sms=(120,)) == many
    assert found(sm=75, sms=(75,)) is None
    few = made(model, root, slots=5).directory
    assert (found(), found(slots=5), found(slots=6)) == (few, few, many)
    assert found(sm=120, sms=(120,)) == many
    assert found(slots=10) is found(max_len=63) is found(precision="bf16") is found(attention="split") is None


def test_what_cannot_be_built(model: Path, root: Path) -> None:
    with pytest.raises(EngineError, match="attention 'split' needs weights as inputs, which int8 ones are not"):
        made(model, root, precision="int8", attention="split")
    with pytest.raises(EngineError, match="no engine of precision fp16 and attention auto"):
        made(model, root, attention="auto")
    with pytest.raises(EngineError, match="does not build for SM 90: choose among"):
        made(model, root, sms=(90,))
    with pytest.raises(EngineError, match=r"fp8 needs SM 89 \(Ada\) or newer, this device is host \(SM 86\)"):
        made(model, root, Recipe("tensorrt", precision="fp8"), Ground(sm=86))
    with pytest.raises(EngineError, match="max-len 257 is more than the 256 positions"):
        made(model, root, max_len=257)
    assert not list(root.glob("*/*/manifest.json"))


RECIPES = st.builds(
    Recipe,
    st.sampled_from(BACKENDS),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from(["auto", "fp32", "fp16", "bf16", "int8", "int4", "fp8"]),
    st.integers(0, 64),
    st.integers(0, 4096),
    st.sampled_from(ATTENTION_CHOICES),
    st.integers(0, 512),
    st.lists(st.sampled_from([75, 89, 120]), unique=True).map(tuple),
    st.integers(0, 3),
)


@given(RECIPES)
def test_a_command_line_means_its_recipe(recipe: Recipe) -> None:
    if recipe.backend == "onnx":
        recipe = dataclasses.replace(recipe, attention="posmask", chunk_tokens=0, sms=(), device=0)
    else:
        recipe = dataclasses.replace(recipe, provider="cpu")
    words = shlex.split(recipe.command("/models/a model", Path("/some where/engines")))
    arguments = build_parser().parse_args(words[1:])
    assert recipe_of(arguments) == recipe
    assert (arguments.model, arguments.engines) == (Path("/models/a model"), Path("/some where/engines"))


def test_the_index_of_the_weights_is_part_of_the_engine(model: Path, root: Path) -> None:
    built = made(model, root)
    index = built.directory / "weights.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "more": {}}))
    with pytest.raises(DamagedFileError, match=r"weights\.json: differs .* which replaces a damaged engine") as caught:
        built.manifest.verify(built.directory)
    assert command_in(str(caught.value)) == built.manifest.recipe
