"""Fixtures that several folders share."""

import hypothesis
import pytest

from helixflow.pki import issue
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout

# How long an example takes says something about the machine, and nothing about what is tested.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A certificate directory of the session; a test that changes files copies it first."""
    layout = Layout(tmp_path_factory.mktemp("pki") / "certs")
    layout.directory.mkdir()
    issue.init(layout, key_type=KeyType.ECDSA_P256)
    return layout
