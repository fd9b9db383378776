"""The configuration: precedence, types, every error at once, secrets masked."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow import cli, config
from helixflow.engine.recipe import Recipe, pool_recipe
from helixflow.errors import ConfigError
from helixflow.options import Address

KEY = "ci:" + "ab" * 32


def write(folder: Path, text: str) -> Path:
    path = folder / "helixflow.toml"
    path.write_text(text, "utf-8")
    return path


def test_defaults_are_closed() -> None:
    loaded = config.load(None, {})
    assert loaded.profile == "production"
    assert loaded.gateway.accounts
    assert loaded.auth.listen.loopback
    assert loaded.gateway.listen.loopback
    assert loaded.gateway.cors_origins == ()
    assert not loaded.gateway.plain_http
    assert loaded.pool.aliases == ()


def test_environment_wins_over_file_wins_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, '[pool]\nslots = 4\nthreads = 3\nprecision = "int8"\n')
    loaded = config.load(path, {"HELIX_POOL_SLOTS": "8"})
    assert (loaded.pool.slots, loaded.pool.threads, loaded.pool.precision) == (8, 3, "int8")
    assert loaded.pool.step_tokens == config.PoolConfig().step_tokens


def test_file_named_by_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path, "[gateway]\nworkers = 2\n")
    assert config.load(None, {"HELIX_CONFIG": str(path)}).gateway.workers == 2


def test_lists(tmp_path: Path) -> None:
    path = write(tmp_path, '[gateway]\npools = ["127.0.0.1:1", "[::1]:2"]\n')
    loaded = config.load(path, {})
    assert loaded.gateway.pools == (Address("127.0.0.1", 1), Address("::1", 2))
    loaded = config.load(path, {"HELIX_GATEWAY_POOLS": "10.0.0.1:7, 10.0.0.2:7"})
    assert len(loaded.gateway.pools) == 2


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "colour = 1\n[pool]\nslots = 0\nslotz = 1\n[gatewy]\nworkers = 1\n[log]\nlevel = 3\n")
    environ = {"HELIX_PROFILE": "dev", "HELIX_GATEWAY_LISTEN": "8443", "HELIX_GATEWAY_WORKRES": "2"}
    with pytest.raises(ConfigError) as caught:
        config.load(path, environ)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 8
    for part in (
        "colour is not an option",
        "pool.slots: must be between 1 and 1024",
        "did you mean slots?",
        "did you mean gateway?",
        "log.level",
        "HELIX_PROFILE: must be one of production, development",
        "HELIX_GATEWAY_LISTEN: '8443' is not an address",
        "did you mean HELIX_GATEWAY_WORKERS?",
    ):
        assert part in text


@pytest.mark.parametrize("text", ["[pool", "pool = 3\n", "\x00"])
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"helixflow\.toml"):
        config.load(write(tmp_path, text), {})


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "absent.toml", {})


@pytest.mark.parametrize("listen", ["0.0.0.0:8443", "[::]:8443", "192.0.2.1:8443", "example.org:8443"])
@pytest.mark.parametrize("service", ["GATEWAY", "POOL"])
def test_development_profile_is_loopback_only(service: str, listen: str) -> None:
    environ = {"HELIX_PROFILE": "development", f"HELIX_{service}_LISTEN": listen}
    with pytest.raises(ConfigError, match="is not a loopback address"):
        config.load(None, environ)
    assert config.load(None, {**environ, "HELIX_PROFILE": "production"})


@pytest.mark.parametrize(
    ("profile", "listen"),
    [("production", "127.0.0.1:8080"), ("development", "0.0.0.0:8080"), ("production", "0.0.0.0:80")],
)
def test_plain_http_is_for_development_on_loopback(profile: str, listen: str) -> None:
    environ = {"HELIX_PROFILE": profile, "HELIX_GATEWAY_LISTEN": listen, "HELIX_GATEWAY_PLAIN_HTTP": "true"}
    with pytest.raises(ConfigError, match="plain_http"):
        config.load(None, environ)


def test_development_profile_names_the_demo_model() -> None:
    loaded = config.load(None, {"HELIX_PROFILE": "development"})
    assert loaded.pool.aliases == config.DEVELOPMENT_ALIASES
    assert loaded.pool.model_id == "helixflow-demo"
    other = config.load(None, {"HELIX_PROFILE": "development", "HELIX_MODEL": "/models/llama-8b"})
    assert (other.pool.model_id, other.pool.aliases) == ("llama-8b", ())


def test_accounts_cannot_be_off_in_production() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.accounts: .* development profile only"):
        config.load(None, {"HELIX_GATEWAY_ACCOUNTS": "false"})
    loaded = config.load(None, {"HELIX_GATEWAY_ACCOUNTS": "false", "HELIX_PROFILE": "development"})
    assert not loaded.gateway.accounts


OIDC = {"HELIX_AUTH_OIDC_ISSUER": "https://provider.example", "HELIX_AUTH_OIDC_CLIENT_ID": "us"}


def test_login_through_a_provider_needs_a_public_url_in_production() -> None:
    """The provider sends browsers there; the Host header of a request must not say where that is."""
    with pytest.raises(ConfigError, match=r"auth\.public_url: set the https URL"):
        config.load(None, OIDC)
    config.load(None, {**OIDC, "HELIX_PROFILE": "development"})
    for url in ("https://ai.example", "https://ai.example:8443", "https://10.0.0.1:443", "https://[fd00::1]:8443"):
        assert config.load(None, {**OIDC, "HELIX_AUTH_PUBLIC_URL": url}).auth.public_url == url


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://ai.example",
            "ai.example",
            "https://",
            "https://ai.example/",
            "https://ai.example/path",
            "https://a b",
        ),
        *("https://user@ai.example", "https://ai.example:0", "https://ai.example:99999", "https://ai.example?x"),
    ],
)
def test_a_public_url_is_an_origin(url: str) -> None:
    with pytest.raises(ConfigError, match=r"PUBLIC_URL: must read https://NAME"):
        config.load(None, {"HELIX_AUTH_PUBLIC_URL": url})


def test_redis_has_a_short_name() -> None:
    assert config.load(None, {"HELIX_REDIS_URL": "redis://localhost"}).limits.redis_url.reveal() == "redis://localhost"


def test_secrets_and_spool_live_under_home(tmp_path: Path) -> None:
    loaded = config.load(None, {"HELIX_HOME": str(tmp_path)})
    assert loaded.auth.pepper == tmp_path / "secrets" / "pepper"
    assert loaded.ledger.spool == tmp_path / "spool"
    assert config.load(None, {"HELIX_LEDGER_SPOOL": "/spool"}).ledger.spool == Path("/spool")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ENGINE": "tensorrt-trx"}, "POOL_ENGINE: must be one of onnx, tensorrt, tensorrt-rtx, scripted"),
        ({"PROVIDER": "rocm"}, "POOL_PROVIDER: must be one of cpu, cuda"),
        ({"PRECISION": "fp64"}, "POOL_PRECISION: must be one of auto, fp32, fp16, bf16, int8, int4, fp8"),
        ({"ATTENTION": "flash"}, "POOL_ATTENTION: must be one of auto, posmask, key_value_lengths, split"),
        ({"CHUNK_TOKENS": "1"}, "POOL_CHUNK_TOKENS: must be between 16 and 65536"),
        (
            {"PRECISION": "bf16"},
            "pool.precision: bf16 is not offered by onnx with provider cpu; choose among auto, fp32",
        ),
        ({"PRECISION": "fp8", "PROVIDER": "cuda"}, "pool.precision: fp8 is not offered by onnx with provider cuda"),
        ({"ENGINE": "tensorrt", "PRECISION": "fp32"}, "pool.precision: fp32 is not offered by tensorrt; choose among"),
        ({"ENGINE": "tensorrt-rtx", "PROVIDER": "cuda"}, "pool.provider: cuda is for the onnx engine; tensorrt-rtx"),
    ],
)
def test_engines_that_do_not_exist_are_refused(options: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(None, {f"HELIX_POOL_{name}": value for name, value in options.items()})
    [found] = caught.value.problems
    assert problem in found


def test_a_pool_says_what_it_is_built_with() -> None:
    def recipe(**options: str) -> Recipe:
        return pool_recipe(config.load(None, {f"HELIX_POOL_{name}": value for name, value in options.items()}).pool)

    assert recipe() == Recipe()
    assert recipe(PROVIDER="cuda", PRECISION="fp16", DEVICE="1", SLOTS="3") == Recipe("onnx", "cuda", "fp16", device=1)
    assert recipe(ENGINE="tensorrt-rtx", MAX_LEN="9000", DEVICE="2", CHUNK_TOKENS="256") == Recipe(
        "tensorrt-rtx", slots=16, max_len=9000, attention="auto", chunk_tokens=256, device=2
    )


def test_every_option_is_documented() -> None:
    sections: list[Any] = [config.Config, *config.SECTIONS.values()]
    for cls in sections:
        for field in dataclasses.fields(cls):
            if field.name not in config.SECTIONS:
                assert len(field.metadata["doc"]) > 10, field.name


def test_check_prints_the_effective_values_and_masks_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIX_REDIS_URL", "redis://:abab@localhost")
    assert cli.main(["config", "check", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["limits"]["redis_url"] == "***"
    assert json.loads(out)["database"]["url"] == ""
    assert "abab" not in out
    assert cli.main(["config", "check"]) == 0
    assert 'redis_url = "***"' in capsys.readouterr().out


def test_wrong_configuration_exits_64(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIX_POOL_SLOTS", "many")
    assert cli.main(["config", "check"]) == 64
    assert "'many' is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["serve"],
        ["gateway"],
        ["auth"],
        ["pool"],
        ["user"],
        ["user", "add"],
        ["organisation"],
        ["key"],
        ["key", "add"],
        ["limits"],
        ["price"],
        ["usage"],
        ["audit"],
        ["pki"],
        ["pki", "init"],
        ["engine"],
        ["engine", "build"],
        ["engine", "selftest"],
        ["config"],
        ["config", "check"],
        ["config", "options"],
        ["version"],
    ],
)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out) > 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("helixflow ")
    assert cli.main(["version", "--json"]) == 0
    assert "onnxruntime" in json.loads(capsys.readouterr().out)


@given(st.text(max_size=40))
def test_any_address_parses_or_is_refused_by_name(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError as error:
        assert "is not an address" in str(error)  # noqa: PT017 - both outcomes are right, the message is what counts
    else:
        assert Address.parse(str(address)) == address


@pytest.mark.parametrize("listen", ["127.example.org:8443", "localhost.example.org:8443", "[::]:8443"])
def test_what_only_looks_like_a_loopback_address_is_none(listen: str) -> None:
    with pytest.raises(ConfigError, match="not a loopback address"):
        config.load(environ={"HELIX_PROFILE": "development", "HELIX_GATEWAY_LISTEN": listen})


@pytest.mark.parametrize(
    "listen", ["a" * 64 + ".org:1", "a..b:1", "a b:1", "127.0.0.1.:1", "host:\uff18\uff14", "[::1:8443", "-x:1", ":1"]
)
def test_what_no_socket_can_take_is_no_address(listen: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        config.load(environ={"HELIX_POOL_LISTEN": listen})


def test_a_model_must_be_there_where_it_is_served(tmp_path: Path) -> None:
    loaded = config.load(environ={"HELIX_MODEL": str(tmp_path / "nope")})
    with pytest.raises(ConfigError, match="nope is not a directory"):
        config.model_of(loaded)


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:6379/0", "rediss://:word@redis.example.com", "unix:///run/redis.sock", "redis://[::1]:1"]
)
def test_a_redis_url_is_taken(url: str) -> None:
    config.load(None, {"HELIX_REDIS_URL": url})


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1",
        "redis://:s3cret@host:port",
        "redis://",
        "127.0.0.1:6379",
        "unix://",
        "redis://a:99999",
        "redis://a/x",
    ],
)
def test_a_wrong_redis_url_is_named_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"limits\.redis_url: write redis://") as caught:
        config.load(None, {"HELIX_REDIS_URL": url})
    assert "s3cret" not in str(caught.value)
