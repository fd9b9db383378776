"""No secret and no prompt in any log: every handler fails once, at every level, in both forms."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest

from helixflow.pki.layout import Layout
from tests.logs import CANARY
from tests.logs.support import ROOT, environ
from tests.pool.support import write_model


@pytest.mark.timeout(180)
@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_a_failure_in_any_handler_shows_no_data(pki: Layout, tmp_path: Path, level: str, form: str) -> None:
    options = {
        "HELIX_PROFILE": "development",
        "HELIX_HOME": str(tmp_path),
        "HELIX_CERTS": str(pki.directory),
        "HELIX_LOG_LEVEL": level,
        "HELIX_LOG_FORMAT": form,
        "HELIX_GATEWAY_AUTH": "127.0.0.1:9",
        "HELIX_GATEWAY_POOLS": "127.0.0.1:9",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "tests.logs.every_handler", str(pki.directory), str(write_model(tmp_path / "bytes"))],
        cwd=ROOT,
        env=environ(**options),
        capture_output=True,
        check=False,
        timeout=150,
    )
    out, err = ended.stdout.decode(), ended.stderr.decode()
    assert ended.returncode == 0, err[-3000:]
    counts = dict(line.split() for line in out.splitlines())
    assert int(counts["methods"]) > 30
    assert int(counts["routes"]) > 30
    assert err.count("a handler failed") == int(counts["methods"])
    assert err.count("request failed") == int(counts["routes"])
    assert "the engine failed" in err
    secret = CANARY.encode()
    for form_of in (CANARY, secret.hex(), base64.b64encode(secret).decode()[:20], repr([*secret])[1:-1]):
        assert form_of not in out + err
    assert "UniqueViolationError" in err, "what happened is told"
    assert "tests/logs/every_handler.py" in err, "and where"
