"""Becoming another account, with real processes: rights, files, closed folders. Needs root."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helixflow.confine import kernel
from helixflow.confine.account import ROOT, Account, ConfinementError
from helixflow.confine.belongings import give, software
from helixflow.confine.plan import PLAN, Plan
from helixflow.process import PARENT_PID
from tests.db.support import folder

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others")
SOMEBODY = Account("somebody", 61999, 61999)

LOOK = """
import json, os, sys
from pathlib import Path

def status():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = ("Uid", "Gid", "Groups", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
    return {name: lines[name].split() for name in names}

def seen(path):
    try:
        return sorted(os.listdir(path)) if os.path.isdir(path) else Path(path).read_text()
    except OSError as error:
        return type(error).__name__

print(json.dumps({"status": status(), "seen": {path: seen(path) for path in sys.argv[1:]}, "cwd": os.getcwd()}))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with folder() as path:
        (path / "hf_look.py").write_text(LOOK)
        (path / "hf_look.py").chmod(0o644)
        path.chmod(0o755)
        yield path


def launch(place: Path, plan: Plan, *paths: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "helixflow.confine.launch", "hf_look", *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(place), PLAN: plan.dumps(), PARENT_PID: str(os.getpid())},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_of_root_is_left(place: Path) -> None:
    shown = tuple(map(str, [*software(), place]))
    secret = place / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    said = launch(place, Plan.of(SOMEBODY, shown=shown), secret, Path("/etc/shadow"))
    status = said["status"]
    assert status["Uid"] == status["Gid"] == ["61999"] * 4
    assert status["Groups"] == []
    assert {status[name][0] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == ["1"]
    assert set(said["seen"].values()) <= {"PermissionError", "FileNotFoundError"}
    assert said["cwd"] == "/"


def test_root_that_stays_root_has_no_capabilities(place: Path) -> None:
    mine, others = place / "mine", place / "others"
    for path in (mine, others):
        path.write_text(path.name)
        path.chmod(0o600)
    os.chown(others, 61998, 61998)
    said = launch(place, Plan.of(ROOT), mine, others)
    status = said["status"]
    assert {status[name][0] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert said["seen"] == {str(mine): "mine", str(others): "PermissionError"}


def test_one_capability_may_stay(place: Path) -> None:
    shown = tuple(map(str, [*software(), place]))
    status = launch(place, Plan.of(SOMEBODY, (kernel.CAP_NET_BIND,), shown))["status"]
    assert {status[name][0] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {f"{1 << 10:016x}"}


def test_what_lies_behind_a_closed_folder_is_shown_and_nothing_beside_it(place: Path) -> None:
    closed = place / "closed"
    (closed / "deep" / "needed").mkdir(parents=True)
    (closed / "deep" / "needed" / "file").write_text("here")
    (closed / "deep" / "other").mkdir()
    (closed / "one-file").write_text("this")
    (closed / "another-file").write_text("not this")
    (closed / "deep").chmod(0o700)
    closed.chmod(0o700)
    wanted = (closed / "deep" / "needed", closed / "one-file")
    plan = Plan.of(SOMEBODY, shown=tuple(map(str, [*software(), place / "hf_look.py", *wanted])))
    said = launch(place, plan, closed, closed / "deep", wanted[0], wanted[0] / "file", wanted[1])["seen"]
    assert list(said.values()) == [["deep", "one-file"], ["needed"], ["file"], "here", "this"]
    assert sorted(path.name for path in closed.iterdir()) == ["another-file", "deep", "one-file"], "for us as before"


def test_a_plan_survives_its_text() -> None:
    plan = Plan(1, 2, (3, 4), (10,), ("/a b", "/ü"))
    assert Plan.loads(plan.dumps()) == plan


def test_an_account_is_found_by_name_or_made_of_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Account.of("auth", 61900) == Account("uid 61901", 61901, 61901)
    with pytest.raises(ConfinementError, match="uid 65534 belongs to nobody"):
        Account.of("gateway", 65534)


def test_ownership_follows_no_link_and_takes_from_nobody_else(place: Path) -> None:
    tree, outside = place / "tree", place / "outside"
    for path in (tree / "below", outside):
        path.mkdir(parents=True)
    for path in (tree / "file", tree / "below" / "file", tree / "foreign", outside / "file", outside / "linked"):
        path.write_text("x")
    os.chown(tree / "foreign", 61998, 61998)
    (tree / "link").symlink_to(outside)
    os.link(outside / "linked", tree / "hard-link")
    give(tree, SOMEBODY, {0})
    owners = {path.name: path.lstat().st_uid for path in tree.iterdir()}
    assert owners == {"below": 61999, "file": 61999, "foreign": 61998, "link": 61999, "hard-link": 0}
    assert (tree / "below" / "file").stat().st_uid == 61999
    assert {path.stat().st_uid for path in (outside, outside / "file", outside / "linked")} == {0}
    give(tree, ROOT, {0, 61999})
    assert (tree / "below" / "file").stat().st_uid == 0
