"""A directory of real certificates, made once and copied for each test."""

import shutil
from pathlib import Path

import pytest

from helixflow.pki import issue
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki") / "certs"
    issue.init(Layout(directory), key_type=KeyType.ECDSA_P256)
    return directory


@pytest.fixture
def layout(made_once: Path, tmp_path: Path) -> Layout:
    return Layout(Path(shutil.copytree(made_once, tmp_path / "certs")))
