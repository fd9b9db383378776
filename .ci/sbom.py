"""Writes the software bill of materials: every crate of Cargo.lock and every Python package of requirements.lock.

    python .ci/sbom.py OUTPUT.cdx.json

CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/), checked against its schema before it is written. Crates that are
only built or tested with are in Cargo.lock too, and so in here.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parent.parent
LOCKED = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)")
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def component(kind: str, name: str, version: str, licence: str, hashes: list[str], root: bool = False) -> Component:
    """One package; `licence`: an SPDX expression, or what the package calls it, or ""."""
    made = LicenseFactory()
    text = re.sub(r" ?/ ?", " OR ", licence)  # how Cargo wrote it once
    # Some packages have the whole text in the place of the name.
    licences = [made.make_from_string(text)] if 0 < len(text) < 100 else []
    return Component(
        type=ComponentType.APPLICATION if root else ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=f"{kind}:{name}@{version}",
        purl=PackageURL(kind, name=name, version=version),
        licenses=licences,
        # Python packages have a hash for each file: which one is installed depends on the machine.
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=hashes[0])] if len(hashes) == 1 else [],
    )


def crates() -> Iterator[Component]:
    """Every crate that comes from a registry."""
    listed = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--locked"], cwd=ROOT, check=True, capture_output=True
    )
    licences = {
        (each["name"], each["version"]): each["license"] or "" for each in json.loads(listed.stdout)["packages"]
    }
    for each in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]:
        if "source" in each:
            name, version = each["name"], each["version"]
            yield component("cargo", name, version, licences.get((name, version), ""), [each["checksum"]])


def packages() -> Iterator[Component]:
    """Every Python package that `make serve` installs; its licence is known where it is installed."""
    for entry in re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text()):
        match = LOCKED.match(entry)
        if match:
            name, version = match["name"], match["version"]
            try:
                data = metadata(name)
                licence = data.get("License-Expression") or data.get("License") or ""
            except PackageNotFoundError:
                licence = ""
            yield component("pypi", name, version, licence.split("\n")[0], HASH.findall(entry))


def main(output: Path) -> None:
    """Writes the document. Raises ValueError when it does not fit its schema."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    bom = Bom(components=[*crates(), *packages()])
    bom.metadata.component = component("pypi", "helixflow", version, "Apache-2.0", [], root=True)
    bom.register_dependency(bom.metadata.component, bom.components)
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        raise ValueError(f"the bill of materials does not fit its schema: {problem}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n")
    print(f"{output}: {len(bom.components)} components")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
