import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helixflow.engine.onnx_engine import OnnxEngine
from tests.engine.support import GOLDEN, GOLDEN_NAMES, caches, open_engine


@pytest.fixture(scope="session")
def engines_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


class Golden:
    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root, self.directory = name, root, GOLDEN / name
        self.config: dict[str, Any] = json.loads((self.directory / "config.json").read_text())
        self.cases: list[dict[str, Any]] = json.loads((self.directory / "golden.json").read_text())["cases"]
        stored = np.load(self.directory / "golden_logits.npz")
        self.logits = [stored[f"logits_{i}"] for i in range(len(self.cases))]
        self.engine: OnnxEngine = open_engine(self.directory, root)


@pytest.fixture(scope="session", params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest, engines_root: Path) -> Golden:
    return Golden(request.param, engines_root)


@pytest.fixture(autouse=True)
def garbage(request: pytest.FixtureRequest) -> None:
    """Every test finds the caches of a shared engine full of garbage."""
    if "golden" in request.fixturenames:
        engine = request.getfixturevalue("golden").engine
        caches(engine)[:] = 7.0
        engine._lengths[:] = [0] * len(engine._lengths)
