"""For whom a request runs: identifiers, scopes of prefixes, weights."""

from typing import Any
from uuid import UUID

import pytest

from helixflow import config
from helixflow.config import GatewayConfig
from helixflow.errors import ConfigError
from helixflow.gateway import owners
from helixflow.gateway.auth import Principal

ORGANISATION, USER, KEY = (UUID(int=number) for number in (1, 2, 3))


def principal(*, key: bool = True) -> Principal:
    ids = (ORGANISATION.bytes, USER.bytes, KEY.bytes if key else None)
    return Principal(
        name="key",
        organisation="acme",
        organisation_id=str(ORGANISATION),
        key_id=str(KEY) if key else "",
        ids=ids,
    )


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners as what they were given; the real ones can be sent, not read."""
    monkeypatch.setattr(owners, "Owner", lambda **given: given)


def made(options: GatewayConfig, caller: Principal) -> Any:
    return owners.Owners(options).of(caller)


@pytest.mark.parametrize(
    ("scope", "with_key", "with_session"),
    [("organisation", ORGANISATION, ORGANISATION), ("user", USER, USER), ("key", KEY, USER)],
)
def test_a_scope_is_never_wider_than_the_organisation(scope: str, with_key: UUID, with_session: UUID) -> None:
    options = GatewayConfig(prefix_scope=scope)
    assert made(options, principal())["prefixes"] == with_key.bytes
    assert made(options, principal(key=False))["prefixes"] == with_session.bytes


def test_shares_go_by_organisation_and_key() -> None:
    owner = made(GatewayConfig(), principal())
    assert (owner["organisation"], owner["key"]) == (ORGANISATION.bytes, KEY.bytes)
    assert made(GatewayConfig(), principal(key=False))["key"] == USER.bytes


def test_weights_by_name_and_id() -> None:
    by_name = made(GatewayConfig(weights=("acme=3", f"{KEY}=0.5")), principal())
    assert (by_name["organisation_weight"], by_name["key_weight"]) == (3.0, 0.5)
    by_id = made(GatewayConfig(weights=(f"{ORGANISATION}=2",)), principal())
    assert (by_id["organisation_weight"], by_id["key_weight"]) == (2.0, 1.0)


def test_without_accounts_everybody_is_nobody() -> None:
    assert made(GatewayConfig(), Principal(name="development")) is owners.NOBODY


@pytest.mark.parametrize("entry", ["acme", "acme=", "=3", "acme=0", "acme=-1", "acme=1e9", "acme=nan", "acme=x"])
def test_wrong_weights_are_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway_weights|GATEWAY_WEIGHTS.*NAME=WEIGHT"):
        config.load(None, {"HELIX_GATEWAY_WEIGHTS": entry})
    assert config.load(None, {"HELIX_GATEWAY_WEIGHTS": "a=1,b=2.5"}).gateway.weights == ("a=1", "b=2.5")
