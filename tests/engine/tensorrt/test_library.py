"""Loading a TensorRT: what is said when there is none, or not the right one."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.library import MODULES, load
from helixflow.engine.tensorrt.numeric import NUMPY, trt_type, type_name
from helixflow.engine.tensorrt.options import KINDS, Kind

EXTRAS = {"tensorrt": "helixflow[tensorrt]", "tensorrt-rtx": "helixflow[rtx]"}


def again(kind: Kind) -> None:
    """Loads without what was loaded before."""
    load.__wrapped__(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_installed(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*MODULES[kind], "tensorrt_rtx_libs"):
        monkeypatch.setitem(sys.modules, name, cast("ModuleType", None))
    with pytest.raises(EngineError) as caught:
        again(kind)
    assert str(caught.value) == f"{kind} is not installed: run `pip install '{EXTRAS[kind]}'`"


def test_what_is_installed_without_its_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", cast("ModuleType", None))
    monkeypatch.delitem(sys.modules, "tensorrt_bindings", raising=False)
    (tmp_path / "tensorrt_bindings.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"cannot be loaded \(tensorrt_bindings: libnvinfer.*run `pip install"):
        again("tensorrt")


def test_a_library_that_is_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "tensorrt_rtx_libs"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "libtensorrt_rtx.so.1").write_bytes(b"\x7fELF, but no more of it")
    monkeypatch.delitem(sys.modules, "tensorrt_rtx_libs", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"libtensorrt_rtx\.so\.1 cannot be loaded \(.*: run `pip install"):
        again("tensorrt-rtx")


@pytest.mark.parametrize(("version", "oldest"), [("10.13.3.9", "11.4"), ("11.3.0.1", "11.4")])
def test_what_is_too_old(version: str, oldest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("tensorrt")
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(EngineError, match=f"tensorrt {version} is too old, {oldest} is needed: run `pip install"):
        again("tensorrt")


def test_an_unknown_kind() -> None:
    with pytest.raises(EngineError, match="'cuda' is unknown: choose one of tensorrt, tensorrt-rtx"):
        load(cast("Kind", "cuda"))


def test_one_library_per_process() -> None:
    library = load("tensorrt-rtx")
    assert library is load("tensorrt-rtx")
    assert library.rtx
    assert library.version.startswith("1.")
    builder = library.trt.Builder(library.log)
    library.log.take()
    assert builder.create_network(0).add_input("x", library.trt.float32, (-2,)) is None
    message = str(library.failure("the input cannot be added"))
    assert message.startswith(f"tensorrt-rtx {library.version}: the input cannot be added: ")
    assert "isValidDims" in message
    assert str(library.failure("nothing happened")).endswith("nothing happened: it gave no reason")


def test_names_of_types() -> None:
    trt = load("tensorrt-rtx").trt
    assert {type_name(trt, trt_type(trt, name)) for name in NUMPY} == set(NUMPY)
