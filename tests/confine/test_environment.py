"""What a service is told: its own part of the configuration, and no secret of another."""

import dataclasses
import re
from pathlib import Path

import pytest

from helixflow import config
from helixflow.confine import environment

ROOT = Path(config.PACKAGE)
SECRETS = {
    "HELIX_DATABASE_URL": "postgresql://a:database-secret@127.0.0.1/b",
    "HELIX_DATABASE_ADMIN_URL": "postgresql://a:admin-secret@127.0.0.1/b",
    "HELIX_AUTH_OIDC_CLIENT_SECRET": "oidc-secret",
    "HELIX_REDIS_URL": "redis://:redis-secret@127.0.0.1:6379/0",
}


def make(tmp_path: Path, **options: str) -> config.Config:
    return config.load(None, {"HELIX_HOME": str(tmp_path), "HELIX_PROFILE": "development", **options})


@pytest.mark.parametrize("service", environment.PARTS)
def test_secrets_reach_the_auth_service_alone(tmp_path: Path, service: str) -> None:
    given = environment.options(service, make(tmp_path, **SECRETS))
    text = " ".join(given.values())
    found = {name for name in ("database", "admin", "oidc", "redis") if f"{name}-secret" in text}
    assert found == ({"database", "oidc", "redis"} if service == "auth" else set())


@pytest.mark.parametrize("service", environment.PARTS)
def test_a_service_reads_the_same_values_as_its_supervisor(tmp_path: Path, service: str) -> None:
    file = tmp_path / "helix.toml"
    file.write_text(
        'aliases = 1\n[gateway]\nlisten = "[::1]:9000"\npools = ["127.0.0.1:1", "127.0.0.1:2"]\nkey_grace_s = 7\n'
        '[ledger]\nspool = "relative/spool"\n[pool]\naliases = ["a", "b"]\nprefix_reuse = false\nslots = 3\n'
        '[auth]\nissuer = "https://x"\n[limits]\ncurrency = "EUR"\n[supervise]\nstall_timeout_s = 8.5\n'.replace(
            "aliases = 1\n", ""
        )
    )
    whole = config.load(file, {"HELIX_HOME": str(tmp_path), "HELIX_PROFILE": "development", **SECRETS})
    mine = config.load(None, environment.options(service, whole))
    sections = environment.PARTS[service]
    for section in sections:
        for field in dataclasses.fields(config.SECTIONS[section]):
            value = getattr(getattr(whole, section), field.name)
            if environment.is_secret(field) and service != "auth":
                value = field.default
            if (section, field.name) in (("database", "admin_url"), ("database", "owner_url")):
                value = field.default
            if isinstance(value, Path) and value != config.UNSET:
                value = value.absolute()
            assert getattr(getattr(mine, section), field.name) == value, (section, field.name)
    assert (mine.profile, mine.home, mine.certs) == (whole.profile, whole.home.absolute(), whole.certs.absolute())
    if service == "auth":
        assert mine.gateway.key_grace_s == 7


def test_every_secret_option_has_one_who_gets_it() -> None:
    secret = {
        (section, field.name)
        for section, cls in config.SECTIONS.items()
        for field in dataclasses.fields(cls)
        if environment.is_secret(field)
    }
    given = {each for options in environment.SECRETS.values() for each in options}
    assert secret >= given
    assert secret - given == {("database", "admin_url"), ("database", "owner_url")}, "only commands use those"


READERS = {"gateway": ("gateway",), "auth": ("auth",), "pool": ("pool",)}


@pytest.mark.parametrize("service", READERS)
def test_no_service_reads_an_option_that_it_is_not_given(service: str) -> None:
    """Searches the sources: an option of a section that is not handed over would silently have its default."""
    given = set(environment.PARTS[service])
    single = set(environment.SINGLE.get(service, ()))
    for folder in READERS[service]:
        for path in (ROOT / folder).rglob("*.py"):
            for section, name in re.findall(r"\bconfig\.(\w+)(?:\.(\w+))?", path.read_text("utf-8")):
                if section in config.SECTIONS and section not in given:
                    assert (section, name) in single, f"{path.name} reads {section}.{name}"


def test_of_the_machine_only_harmless_variables() -> None:
    there = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "AWS_SECRET_ACCESS_KEY": "x",
        "HTTPS_PROXY": "http://user:word@proxy",
        "CUDA_VISIBLE_DEVICES": "1",
        "NOTIFY_SOCKET": "/run/notify",
        "HELIX_DATABASE_URL": "x",
        "HELIX_CONFIG": "x",
    }
    assert set(environment.general("gateway", there)) == {"PATH", "LC_ALL"}
    assert set(environment.general("auth", there)) == {"PATH", "LC_ALL", "HTTPS_PROXY"}
    assert set(environment.general("pool", there)) == {"PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES"}
