"""Certificates that renew themselves while HelixFlow serves."""

import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from helixflow.config import Config, PkiConfig, load
from helixflow.pki import issue, keeper, pairs, rotate
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout, Role


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Certificates of nine days, made a week ago."""
    layout = Layout(tmp_path / "certs")
    issue.init(layout, key_type=KeyType.ECDSA_P256, days=9, now=datetime.now(UTC) - timedelta(days=7))
    return layout


def config(layout: Layout, **pki: object) -> Config:
    return dataclasses.replace(load(None, {}), certs=layout.directory, pki=PkiConfig(**pki))  # type: ignore[arg-type]


def renew_due(config: Config) -> bool:
    return asyncio.run(keeper.renew_due(config))


def ends_in(layout: Layout) -> timedelta:
    return pairs.load_cert(layout.pair("api-gateway", Role.SERVER)).not_valid_after_utc - datetime.now(UTC)


def test_what_is_due_is_renewed_for_the_configured_time(layout: Layout) -> None:
    assert ends_in(layout) < timedelta(days=3)
    assert renew_due(config(layout, leaf_days=6))
    assert timedelta(days=5) < ends_in(layout) < timedelta(days=6)
    before = layout.pair("api-gateway", Role.SERVER).cert.read_bytes()
    assert renew_due(config(layout, leaf_days=6))
    assert layout.pair("api-gateway", Role.SERVER).cert.read_bytes() == before


def test_an_encrypted_key_elsewhere_is_used(layout: Layout, tmp_path: Path) -> None:
    words, elsewhere = tmp_path / "words", tmp_path / "ca.pem"
    words.write_text("correct horse battery")
    words.chmod(0o600)
    rotate.encrypt_ca_key(layout, b"correct horse battery")
    layout.ca_key.rename(elsewhere)
    assert not renew_due(config(layout, ca_key=elsewhere))
    assert renew_due(config(layout, ca_key=elsewhere, ca_passphrase_file=words))
    assert ends_in(layout) > timedelta(days=80)


def test_without_the_key_it_says_so_and_goes_on(layout: Layout, capfd: pytest.CaptureFixture[str]) -> None:
    layout.ca_key.unlink()
    rounds: list[float] = []

    async def pause(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 2:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(keeper.keep(config(layout), pause=pause))
    assert rounds == [keeper.INTERVAL_S] * 2
    assert capfd.readouterr().err.count("nothing can be signed") == 2


def test_it_can_be_switched_off(layout: Layout) -> None:
    async def renew(_config: Config) -> bool:
        raise AssertionError

    asyncio.run(keeper.keep(config(layout, renew=False), renew))
