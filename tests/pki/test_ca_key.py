"""The CA's key elsewhere, encrypted, or not there at all."""

import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from helixflow.pki import issue, keys, pairs, passphrase, rotate
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout, Role
from helixflow.pki.verify import verify

WORDS = "correct horse battery"


def pki(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helixflow", "pki", *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=60,
    )


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "passphrase"
    file.write_text(WORDS + "\n")
    file.chmod(0o600)
    return file


def test_a_key_elsewhere_signs_and_nothing_of_it_is_in_the_directory(tmp_path: Path) -> None:
    elsewhere = tmp_path / "safe" / "ca.pem"
    elsewhere.parent.mkdir(mode=0o700)
    directory = tmp_path / "certs"
    made = pki("init", "--dir", str(directory), "--ca-key", str(elsewhere), "--key-type", "ecdsa-p256")
    assert made.returncode == 0, made.stderr
    assert elsewhere.stat().st_mode & 0o777 == 0o600
    assert not Layout(directory).ca_key.exists()
    env = {"HELIX_PKI_CA_KEY": str(elsewhere)}
    assert pki("renew", "monitoring", "--dir", str(directory), env=env).returncode == 0
    assert pki("verify", "--dir", str(directory), env=env).returncode == 0


def test_without_the_key_everything_works_that_signs_nothing(layout: Layout) -> None:
    layout.ca_key.unlink()
    assert issue.init(layout) == []
    assert rotate.renew_due(layout) == []
    report = verify(layout)
    assert report.ok
    assert [each.file for each in report.findings] == [layout.ca_key]
    assert pki("show", "--dir", str(layout.directory)).returncode == 0
    failed = pki("renew", "--all", "--dir", str(layout.directory))
    assert (failed.returncode, "nothing can be signed" in failed.stderr) == (1, True)


def test_an_encrypted_key_opens_with_its_passphrase_alone(layout: Layout, words: Path, tmp_path: Path) -> None:
    rotate.encrypt_ca_key(layout, WORDS.encode())
    assert b"ENCRYPTED" in layout.ca_key.read_bytes()
    with pytest.raises(PkiError, match="there is no passphrase"):
        rotate.renew(layout, ["monitoring"])
    wrong = tmp_path / "wrong"
    wrong.write_text("another one entirely")
    wrong.chmod(0o600)
    with pytest.raises(PkiError, match="does not open with this passphrase"):
        rotate.renew(Layout(layout.directory, passphrase=passphrase.from_file(wrong)), ["monitoring"])
    opened = Layout(layout.directory, passphrase=passphrase.from_file(words))
    assert len(rotate.renew(opened, ["monitoring"])) == 2
    assert verify(layout).findings == []
    assert verify(opened).findings == []
    rotate.encrypt_ca_key(opened, None)
    assert b"ENCRYPTED" not in layout.ca_key.read_bytes()


def test_a_new_ca_can_be_born_encrypted(tmp_path: Path, words: Path) -> None:
    directory = str(tmp_path / "certs")
    options = ("--dir", directory, "--ca-passphrase-file", str(words))
    made = pki("init", *options, "--encrypt-ca-key", "--key-type", "ecdsa-p256")
    assert made.returncode == 0, made.stderr
    assert b"ENCRYPTED" in Layout(Path(directory)).ca_key.read_bytes()
    assert pki("init", "--dir", directory).returncode == 0
    assert pki("issue", "batch-runner", *options).returncode == 0
    refused = pki("issue", "another", "--dir", directory)
    assert (refused.returncode, "--ca-passphrase-file" in refused.stderr) == (1, True)


def test_a_passphrase_is_long_enough_and_nobody_elses(layout: Layout, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("0123456789\n")
    short.chmod(0o600)
    command = ("encrypt-ca-key", "--dir", str(layout.directory), "--new-passphrase-file", str(short))
    assert "too short" in pki(*command).stderr
    short.write_text(WORDS)
    short.chmod(0o644)
    assert "the group or others can get at" in pki(*command).stderr
    assert b"ENCRYPTED" not in layout.ca_key.read_bytes()


def test_on_a_terminal_the_passphrase_is_asked_for(layout: Layout) -> None:
    command = [sys.executable, "-m", "helixflow", "pki", "encrypt-ca-key", "--dir", str(layout.directory)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command)
    shown = b""
    for prompt in (b"New passphrase of the CA key: ", b"Once more: "):
        while prompt not in shown:
            shown += os.read(terminal, 1024)
        os.write(terminal, WORDS.encode() + b"\n")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    assert WORDS.encode() not in shown
    assert len(rotate.renew(Layout(layout.directory, passphrase=lambda _path: WORDS.encode()), ["monitoring"])) == 2


def test_a_service_s_key_is_never_encrypted(layout: Layout) -> None:
    pair = layout.pair("monitoring", Role.SERVER)
    pair.key.write_bytes(keys.to_pem(keys.generate(KeyType.ECDSA_P256), WORDS.encode()))
    assert any("a service starts with nobody to ask" in each.reason for each in verify(layout).findings)


@pytest.mark.parametrize(("days", "left"), [(365, 30), (90, 30), (6, 2), (1, 1 / 3)])
def test_what_is_due(layout: Layout, days: int, left: float) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    rotate.renew(layout, days=days, now=now)
    end = now + timedelta(days=days)
    margin = timedelta(minutes=10)
    assert rotate.renew_due(layout, now=end - timedelta(days=left) - margin) == []
    assert len(rotate.renew_due(layout, now=end - timedelta(days=left) + margin)) == 8


def test_the_revocation_list_is_signed_anew_when_half_of_its_life_is_over(layout: Layout) -> None:
    now = datetime.now(UTC)
    rotate.revoke(layout, [7], now=now)
    content = layout.crl.read_bytes()
    key = layout.ca_key.read_bytes()
    layout.ca_key.unlink()
    assert rotate.renew_due(layout, now=now + timedelta(days=14)) == []
    with pytest.raises(PkiError, match="nothing can be signed"):
        rotate.renew_due(layout, now=now + timedelta(days=16))
    layout.ca_key.write_bytes(key)
    layout.ca_key.chmod(0o600)
    assert rotate.renew_due(layout, now=now + timedelta(days=16)) == []
    assert layout.crl.read_bytes() != content
    assert [entry.serial_number for entry in rotate.load_crl(layout)] == [7]


def test_a_leaf_lives_as_long_as_asked(layout: Layout) -> None:
    done = pki("renew", "monitoring", "--days", "2", "--dir", str(layout.directory))
    assert done.returncode == 0, done.stderr
    cert = pairs.load_cert(layout.pair("monitoring", Role.SERVER))
    assert cert.not_valid_after_utc - datetime.now(UTC) < timedelta(days=2)
