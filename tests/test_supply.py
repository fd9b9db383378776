"""What HelixFlow is built from: locked, hashed, from registries, under licences that it may be shipped with."""

import json
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from license_expression import get_spdx_licensing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DENY = tomllib.loads((ROOT / "deny.toml").read_text())
EXTRAS = ("build", "test", "lint", "rtx", "bench", "sbom")


def entries(lock: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package of a lock."""
    found: dict[str, tuple[str, list[str]]] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / lock).read_text().strip()):
        requirement = Requirement(re.split(r"[\\]", entry, maxsplit=1)[0].strip())
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found[canonicalize_name(requirement.name)] = (pin.version, re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry))
    return found


def asked(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(r for extra in extras for r in optional[extra])]]


@cache
def crates() -> list[dict[str, Any]]:
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--offline"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return [each for each in json.loads(done.stdout)["packages"] if each["source"] is not None]


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_every_python_package_is_pinned_with_its_hashes(lock: str) -> None:
    found = entries(lock)
    assert len(found) > 20
    assert [name for name, (_version, hashes) in found.items() if not hashes] == []


def test_the_locks_hold_what_the_project_asks_for() -> None:
    served, tested = entries("requirements.lock"), entries("requirements-dev.lock")
    for found, extras in ((served, ("build",)), (tested, EXTRAS)):
        for requirement in asked(*extras):
            version, _hashes = found[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: run `make lock`"
    assert {name: tested[name] for name in served} == served


def test_nothing_is_installed_but_what_is_locked() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "INSTALL := $(BIN)/python -m pip install --require-hashes --no-deps" in makefile
    assert "DEVELOP := PIP_NO_INDEX=1 " in makefile
    serve_and_test = [line for line in makefile.splitlines() if "maturin develop" in line]
    assert serve_and_test == ["DEVELOP := PIP_NO_INDEX=1 $(BIN)/maturin develop --quiet"]


def test_every_crate_comes_from_the_registry_under_a_hash() -> None:
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    external = [each for each in lock if "source" in each]
    assert len(external) > 100
    assert {each["source"].partition("+")[0] for each in external} == {"registry"}
    assert [each["name"] for each in external if not re.fullmatch("[0-9a-f]{64}", each.get("checksum", ""))] == []


def test_every_crate_has_a_licence_that_deny_toml_allows() -> None:
    licensing = get_spdx_licensing()
    allowed = dict.fromkeys(DENY["licenses"]["allow"], licensing.TRUE)
    refused = []
    for each in crates():
        text = re.sub(r" ?/ ?", " OR ", each["license"] or "LicenseRef-none")
        expression = licensing.parse(text)
        known = {symbol: allowed.get(symbol.render(), licensing.FALSE) for symbol in expression.symbols}
        if expression.subs(known, simplify=True) != licensing.TRUE:
            refused.append((each["name"], text))
    assert refused == []


def test_no_banned_crate_is_there() -> None:
    names = {each["name"] for each in crates()}
    banned = {each["name"]: each for each in DENY["bans"]["deny"]}
    assert all(each["reason"] for each in banned.values())
    assert {name for name in names & banned.keys() if "wrappers" not in banned[name]} == set()


def test_the_toolchain_is_pinned_and_new_enough() -> None:
    channel = tomllib.loads((ROOT / "rust-toolchain.toml").read_text())["toolchain"]["channel"]
    least = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["rust-version"]
    assert tuple(map(int, channel.split("."))) >= tuple(map(int, least.split(".")))


def test_the_bill_of_materials_names_everything(tmp_path: Path) -> None:
    output = tmp_path / "sbom.json"
    subprocess.run(
        [ROOT / ".venv" / "bin" / "python", ".ci/sbom.py", output], cwd=ROOT, check=True, capture_output=True
    )
    named = {(each["purl"].split("/")[0], each["name"]) for each in json.loads(output.read_text())["components"]}
    assert {("pkg:pypi", name) for name in entries("requirements.lock")} <= named
    assert {("pkg:cargo", each["name"]) for each in crates()} <= named
