"""A service's copy of its certificates follows the originals, holds nothing else, and outlives them."""

import os
import shutil
from pathlib import Path

import pytest

from helixflow.confine.account import Account
from helixflow.confine.copies import Copies
from helixflow.pki import rotate
from helixflow.pki.layout import Layout, Role

ME = Account("me", os.geteuid(), os.getegid())
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root makes them")


@pytest.fixture
def certs(pki: Layout, tmp_path: Path) -> Layout:
    shutil.copytree(pki.directory, tmp_path / "certs")
    return Layout(tmp_path / "certs")


@pytest.mark.parametrize(
    ("service", "name", "more"),
    [("gateway", "api-gateway", set()), ("pool", "inference-pool", set()),
     ("auth", "auth-service", {"jwt-private.pem", "jwt-public.pem"})],
)  # fmt: skip
def test_a_service_has_its_own_files_alone(
    certs: Layout, tmp_path: Path, service: str, name: str, more: set[str]
) -> None:
    copies = Copies(service, certs, tmp_path / "mine", ME)
    copies.begin()
    own = {f"{name}{role}{kind}" for role in ("", "-client") for kind in (".crt", "-key.pem")}
    assert {path.name for path in copies.target.iterdir()} == {*own, *more, "helixflow-ca.pem"}
    for path in copies.target.iterdir():
        assert path.read_bytes() == (certs.directory / path.name).read_bytes()
        assert path.stat().st_mode == (certs.directory / path.name).stat().st_mode
    assert copies.target.stat().st_mode & 0o777 == 0o750


def test_it_follows_renewals_and_revocations_and_keeps_what_goes_away(certs: Layout, tmp_path: Path) -> None:
    copies = Copies("gateway", certs, tmp_path / "mine", ME)
    copies.begin()
    pair, mine = certs.pair("api-gateway", Role.SERVER), Layout(copies.target)
    before = mine.pair("api-gateway", Role.SERVER).cert.read_bytes()
    rotate.renew(certs, ["api-gateway"])
    assert mine.pair("api-gateway", Role.SERVER).cert.read_bytes() == before
    copies.follow()
    assert mine.pair("api-gateway", Role.SERVER).cert.read_bytes() == pair.cert.read_bytes() != before
    rotate.revoke(certs, [4711])
    copies.follow()
    assert mine.crl.read_bytes() == certs.crl.read_bytes()
    shutil.rmtree(certs.directory)
    copies.follow()
    assert mine.crl.exists()
    assert mine.pair("api-gateway", Role.SERVER).key.exists()


def test_a_key_that_others_may_read_stays_one(certs: Layout, tmp_path: Path) -> None:
    certs.pair("api-gateway", Role.SERVER).key.chmod(0o644)
    copies = Copies("gateway", certs, tmp_path / "mine", ME)
    copies.begin()
    assert Layout(copies.target).pair("api-gateway", Role.SERVER).key.stat().st_mode & 0o777 == 0o644


def test_a_new_start_forgets_what_was_taken_away(certs: Layout, tmp_path: Path) -> None:
    rotate.revoke(certs, [4711])
    copies = Copies("gateway", certs, tmp_path / "mine", ME)
    copies.begin()
    (copies.target / "left-over").touch()
    certs.crl.unlink()
    copies.begin()
    assert not (copies.target / "left-over").exists()
    assert not Layout(copies.target).crl.exists()
