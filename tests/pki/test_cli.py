"""`helixflow pki` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helixflow.cli import main
from helixflow.pki.layout import Layout, Role
from helixflow.pki.verify import verify


def pki(layout: Layout, command: str, *arguments: str) -> int:
    return main(["pki", command, "--dir", str(layout.directory), *arguments])


def test_init_then_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(tmp_path / "certs")
    assert pki(layout, "init", "--key-type", "ecdsa-p256", "--san", "ai.example.com") == 0
    out = capsys.readouterr().out
    assert out.count("made ") == 20
    assert pki(layout, "verify") == 0
    captured = capsys.readouterr()
    assert captured.out.count("ok  ") == 21
    assert captured.err == ""
    assert pki(layout, "init", "--san", "b.example") == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "renew --all --san b.example" in out


def test_verify_fails_with_status_1_and_names_the_file(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    path = layout.pair("auth-service", Role.SERVER).key
    path.chmod(0o644)
    assert pki(layout, "verify") == 1
    captured = capsys.readouterr()
    assert f"{path}: a private key that the group or others can get at (mode 0644)" in captured.err
    assert f"chmod 600 {path}" in captured.err
    assert f"ok       {path}" not in captured.out


def test_verify_as_json(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    assert pki(layout, "verify", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["findings"] == []
    assert len(report["checked"]) == 21
    layout.ca_key.unlink()
    path = layout.pair("monitoring", Role.CLIENT).cert
    path.unlink()
    assert pki(layout, "verify", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [(item["file"], item["level"]) for item in report["findings"]] == [
        (str(layout.ca_key), "warning"),
        (str(path), "error"),
    ]
    assert all(item["reason"] and item["hint"] for item in report["findings"])


def test_show(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    assert pki(layout, "show", "inference-pool") == 0
    out = capsys.readouterr().out
    assert "inference-pool.crt" in out
    assert "inference-pool-client.crt" in out
    assert "URI:spiffe://helixflow.local/inference-pool" in out
    assert "ECDSA secp256r1" in out
    assert pki(layout, "show", "--json") == 0
    described = {each["file"]: each for each in json.loads(capsys.readouterr().out)}
    assert len(described) == 9
    server = described["api-gateway.crt"]
    assert server["purposes"] == ["serverAuth"]
    assert server["days_left"] == 89
    assert server["key_type"] == "ECDSA secp256r1"
    assert server["not_after"].endswith("Z")
    assert len(server["sha256"]) == 64
    assert described["helixflow-ca.pem"]["issuer"] == server["issuer"]
    assert pki(layout, "show", "nobody") == 1
    assert "nobody.crt: does not exist" in capsys.readouterr().err


def test_issue_renew_and_revoke(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    assert pki(layout, "issue", "batch-runner", "--san", "10.0.0.1") == 0
    assert capsys.readouterr().out.count("made ") == 4
    assert pki(layout, "issue", "batch-runner") == 1
    assert "renew batch-runner" in capsys.readouterr().err
    assert pki(layout, "renew") == 0
    assert "nothing to renew" in capsys.readouterr().out
    assert pki(layout, "renew", "batch-runner") == 0
    assert capsys.readouterr().out.count("renewed ") == 2
    assert pki(layout, "renew", "--all", "--within", "365") == 0
    assert capsys.readouterr().out.count("renewed ") == 10
    assert pki(layout, "renew", "--all", "--days", "5") == 0
    capsys.readouterr()
    assert pki(layout, "renew") == 0
    assert "nothing to renew" in capsys.readouterr().out
    assert pki(layout, "renew", "--within", "5") == 0
    assert capsys.readouterr().out.count("renewed ") == 10

    assert pki(layout, "revoke", "batch-runner") == 0
    out = capsys.readouterr().out
    assert out.count("revoked ") == 2
    assert f"signed {layout.crl}" in out
    assert pki(layout, "verify") == 1
    assert "was revoked on" in capsys.readouterr().err
    assert pki(layout, "revoke", "--serial", "0a:0B") == 0
    assert "revoked a0b" in capsys.readouterr().out
    assert pki(layout, "revoke", "--serial", "a0b") == 0
    assert "was revoked before: a0b" in capsys.readouterr().out
    assert pki(layout, "renew", "batch-runner") == 0
    assert f"the revocation list {layout.crl} is current" in capsys.readouterr().out
    assert verify(layout).ok


def test_rotate_tokens(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    before = layout.jwt_private.read_bytes(), layout.jwt_public.read_bytes()
    others = {path: path.read_bytes() for path in layout.directory.iterdir() if not path.name.startswith("jwt-")}
    assert pki(layout, "rotate-tokens") == 0
    out = capsys.readouterr().out
    assert out == f"replaced {layout.jwt_private}\nreplaced {layout.jwt_public}\n"
    after = layout.jwt_private.read_bytes(), layout.jwt_public.read_bytes()
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert layout.jwt_private.stat().st_mode & 0o777 == 0o600
    assert {path: path.read_bytes() for path in others} == others
    assert verify(layout).findings == []
    layout.jwt_private.unlink()
    assert pki(layout, "rotate-tokens") == 1
    assert "`helixflow pki init` makes what is missing" in capsys.readouterr().err
    assert layout.jwt_public.read_bytes() == after[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["revoke"], "say what to revoke"),
        (["revoke", "monitoring", "--serial", "5"], "say what to revoke"),
        (["renew", "monitoring", "--all"], "exclude each other"),
        (["renew", "--all", "--san", "späti"], "neither a DNS name nor an IP address"),
        (["issue", "A/B"], "cannot name a service"),
    ],
)
def test_mistakes_are_explained(
    layout: Layout, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert pki(layout, *arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", "--days", "0"],
        ["init", "--days", "9999999999"],
        ["init", "--key-type", "dsa"],
        ["revoke", "--serial", "xyz"],
        ["revoke", "--serial", "-5"],
        ["renew", "--within", "soon"],
        ["frobnicate"],
    ],
)
def test_wrong_usage_ends_with_status_64(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pki", *arguments])
    assert caught.value.code == 64


def test_the_default_directory_is_that_of_the_configuration(
    layout: Layout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIX_CERTS", str(layout.directory))
    assert main(["pki", "verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["directory"] == str(layout.directory)


def test_the_parser_is_built_without_importing_cryptography() -> None:
    code = (
        "import argparse, sys, helixflow.pki.cli as cli\n"
        "cli.add_parser(argparse.ArgumentParser().add_subparsers())\n"
        "sys.exit(any(name.split('.')[0] == 'cryptography' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=20).returncode == 0
