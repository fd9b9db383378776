"""The commands of accounts as a user types them, against a scripted auth-service."""

import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helixflow.cli import build_parser
from helixflow.core_rs import Conflict, NotFound, PermissionDenied, Unavailable
from helixflow.pki.layout import Layout
from helixflow.rpc import messages
from tests.admin.conftest import Shell
from tests.admin.scripted import Scripted, error, sent

ID = "7b7e6f3e-0000-4000-8000-000000000001"
OTHER = "7b7e6f3e-0000-4000-8000-000000000002"
USER = {"id": ID, "email": "a@example.com", "role": "member", "organisation": "default", "organisation_id": OTHER}
KEY = {"id": ID, "name": "ci", "prefix": "hf-AbCd", "user": "a@example.com"}


def user(**fields: Any) -> Any:
    return messages.User(**{**USER, **fields})


def key(**fields: Any) -> Any:
    return messages.Key(**{**KEY, **fields})


def test_the_operator_is_named_and_acts_for_nobody(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/CreateOrganisation"] = lambda asked: messages.Organisation(id=ID, name=asked.name)
    assert shell("organisation", "add", "research").status == 0
    (call,) = service.calls
    assert call.caller.service == "auth-service"
    actor = call.message["actor"]
    assert actor["name"] == pwd.getpwuid(os.getuid()).pw_name
    assert actor["request_id"].startswith("cli-")
    assert actor["request_id"] == call.caller.request_id
    assert not {"key_digest", "access_token"} & set(actor)


def test_sudo_is_said(service: Scripted, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setenv("SUDO_USER", "alice")
    shell("organisation", "add", "research")
    assert service.calls[0].message["actor"]["name"] == "root (sudo by alice)"


def test_user_add_shows_the_password_once_with_a_sentence(service: Scripted, shell: Shell) -> None:
    made = messages.CreatedUser(user=user(must_change_password=True), one_time_password="correct horse")
    service.answers["AdminService/CreateUser"] = made
    done = shell("user", "add", "a@example.com", "--role", "admin", "--organisation", "default")
    assert done.status == 0
    assert done.out.count("correct horse") == 1
    assert "shown this once" in done.out
    assert "correct horse" not in done.err
    assert sent(service, "CreateUser") == {"email": "a@example.com", "role": "admin", "organisation": "default"}


def test_a_service_account_has_no_password(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/CreateUser"] = messages.CreatedUser(user=user(email="ci", service_account=True))
    done = shell("user", "add", "ci", "--service-account")
    assert "password" not in done.out
    assert sent(service, "CreateUser") == {"email": "ci", "role": "member", "service_account": True}


def test_user_list_reads_every_page(service: Scripted, shell: Shell) -> None:
    def page(asked: Any) -> Any:
        number = int(asked.after or 0)
        rows = [user(email=f"u{number}@example.com", locked=number == 1, service_account=number == 2)]
        return messages.Users(data=rows, next=str(number + 1) if number < 2 else "")

    service.answers["AdminService/ListUsers"] = page
    done = shell("user", "list", "--organisation", "default")
    assert [line.split()[0] for line in done.out.splitlines()] == ["E-MAIL", *(f"u{n}@example.com" for n in range(3))]
    assert "has to wait" in done.out
    assert "service" in done.out
    assert [call.message["limit"] for call in service.calls] == [1000] * 3
    assert all(call.message["organisation"] == "default" for call in service.calls)
    listed = shell("user", "list", "--json").json
    assert [row["email"] for row in listed["data"]] == [f"u{n}@example.com" for n in range(3)]


def test_a_page_that_comes_twice_does_not_turn_for_ever(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/ListUsers"] = messages.Users(data=[user()], next="x")
    done = shell("user", "list")
    assert done.status == 1
    assert "twice" in done.err


@pytest.mark.parametrize(
    ("arguments", "method", "fields"),
    [
        (("update", "a@example.com", "--role", "viewer"), "UpdateUser", {"user": "a@example.com", "role": "viewer"}),
        (("update", "a@example.com", "--disable"), "UpdateUser", {"user": "a@example.com", "disabled": True}),
        (("unlock", ID), "UnlockUser", {"user": ID}),
        (("remove", ID), "DeleteUser", {"user": ID}),
    ],
)
def test_changing_users(
    service: Scripted, shell: Shell, arguments: tuple[str, ...], method: str, fields: dict[str, Any]
) -> None:
    done = shell("user", *arguments)
    assert done.status == 0, done.err
    assert done.out
    assert sent(service, method) == fields


def test_enable_is_sent_although_it_is_false(service: Scripted, shell: Shell) -> None:
    shell("user", "update", ID, "--enable")
    assert service.only("AdminService/UpdateUser")["disabled"] is False
    assert "role" not in service.only("AdminService/UpdateUser")


def test_sessions(service: Scripted, shell: Shell) -> None:
    row = {"id": ID, "user": "a@example.com", "method": "password", "address": "192.0.2.1", "created_at": 1_800_000_000}
    service.answers["AdminService/ListSessions"] = messages.Sessions(data=[messages.Session(**row)])
    shown = shell("session", "list", "--user", "a@example.com")
    assert sent(service, "ListSessions") == {"user": "a@example.com", "limit": 1000}
    for text in (ID, "a@ex", "password", "192.0.2.1", "2027-01-15 08:00", "never"):
        assert text in shown.out
    service.answers["AdminService/EndSession"] = messages.Deleted(id=ID)
    assert "is over" in shell("session", "end", ID).out
    assert sent(service, "EndSession") == {"session": ID}
    service.answers["AdminService/EndSessions"] = messages.EndedSessions(ended=3)
    assert "3 sessions of a@example.com are over" in shell("session", "end", "--user", "a@example.com").out
    for wrong in ((), (ID, "--user", "a@example.com")):
        done = shell("session", "end", *wrong)
        assert done.status != 0
        assert "name one session, or a user" in done.err


def test_second_factors(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/ResetFactor"] = user()
    assert "no second factor now" in shell("user", "reset-factor", "a@example.com").out
    service.answers["AdminService/RequireFactor"] = lambda asked: messages.Organisation(id=ID, name=asked.organisation)
    assert "from the role admin on" in shell("organisation", "require-factor", "default", "admin").out
    assert sent(service, "RequireFactor") == {"organisation": "default", "role": "admin"}
    service.calls.clear()
    assert "nobody needs" in shell("organisation", "require-factor", "default", "nobody").out
    assert sent(service, "RequireFactor") == {"organisation": "default"}


def test_reset_password_says_what_becomes_of_keys_and_how_long_it_lasts(service: Scripted, shell: Shell) -> None:
    made = messages.CreatedUser(user=user(password_expires_at=1_800_000_000), one_time_password="battery staple")
    service.answers["AdminService/ResetPassword"] = made
    assert "valid until 2027-01-15 08:00" in shell("user", "reset-password", "a@example.com", "--keys", "revoke").out
    assert sent(service, "ResetPassword") == {"user": "a@example.com", "keys": "revoke"}


def test_reset_password(service: Scripted, shell: Shell) -> None:
    made = messages.CreatedUser(user=user(), one_time_password="battery staple")
    service.answers["AdminService/ResetPassword"] = made
    assert "battery staple" in shell("user", "reset-password", "a@example.com").out
    assert shell("user", "reset-password", "a@example.com", "--json").json["one_time_password"] == "battery staple"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("user", "update", ID), "--role"),
        (("key", "update", ID), "--expires"),
        (("organisation", "update", "default"), "--suspend"),
        (("limits", "set", f"key:{ID}"), "--none"),
        (("limits", "set", f"key:{ID}", "--none", "--tokens-per-day", "1"), "--none"),
        (("limits", "set", "nobody", "--none"), "key:ID"),
        (("limits", "set", "key:ci", "--none"), "helixflow key list"),
        (("usage", "--by", "day", "export"), "usage show"),
        (("usage", "--from", "2026-02-01", "--to", "2026-01-01"), "after --to"),
        (("audit", "verify", "--from", "2026-02-01", "--to", "2026-01-01"), "after --to"),
    ],
)
def test_what_makes_no_sense_asks_nobody(
    service: Scripted, shell: Shell, arguments: tuple[str, ...], hint: str
) -> None:
    done = shell(*arguments)
    assert done.status == 1
    assert hint in done.err
    assert service.calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("usage", "--from", "2026-02-30"),
        ("usage", "show", "--to", "tomorrow"),
        ("usage", "export", "--from", "1"),
        ("usage", "--by", "colour"),
        ("usage", "--by", "day,day"),
        ("audit", "list", "--from", "x"),
        ("audit", "list", "--limit", "0"),
        ("key", "add", "ci", "--expires", "2001-01-01"),
        ("key", "add", "ci", "--tokens-per-minute", "ten"),
        ("key", "rotate", ID, "--overlap", "soon"),
        ("price", "set", "m", "--prompt", "0.00001", "--completion", "1"),
        ("user", "add", "a", "--role", "god"),
        ("user", "update", ID, "--enable", "--disable"),
    ],
)
def test_typing_errors_end_before_anything_is_asked(
    service: Scripted, shell: Shell, arguments: tuple[str, ...]
) -> None:
    done = shell(*arguments)
    assert done.status == 64
    assert "error:" in done.err
    assert service.calls == []


def test_key_add_shows_the_key_once_with_a_sentence(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/CreateKey"] = messages.CreatedKey(key=key(models=["m"]), secret="hf-secret")
    done = shell(
        *("key", "add", "ci", "--user", "a@example.com", "--model", "m", "--endpoint", "/v1/completions"),
        *("--tokens-per-minute", "10k", "--cost-per-month", "1.25"),
    )
    assert done.status == 0
    assert done.out.count("hf-secret") == 1
    assert "shown this once" in done.out
    assert "hf-secret" not in done.err
    assert sent(service, "CreateKey") == {
        "name": "ci",
        "user": "a@example.com",
        "models": ["m"],
        "endpoints": ["/v1/completions"],
        "limits": {"tokens_per_minute": 10_000, "cost_per_month": 1_250_000_000},
    }


def test_key_add_is_for_the_first_owner_by_default(
    service: Scripted, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIX_AUTH_OWNER", "boss@example.com")
    service.answers["AdminService/CreateKey"] = messages.CreatedKey(key=key(), secret="hf-secret")
    shell("key", "add", "ci")
    assert sent(service, "CreateKey") == {"name": "ci", "user": "boss@example.com"}
    assert "limits" not in service.only("AdminService/CreateKey")


def test_a_key_administers_when_it_is_said(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/CreateKey"] = messages.CreatedKey(key=key(role="admin"), secret="hf-secret")
    assert "admin work" in shell("key", "add", "ci", "--user", "a@example.com", "--admin").out
    assert service.only("AdminService/CreateKey")["admin"] is True
    service.answers["AdminService/UpdateKey"] = key(parent_id=OTHER)
    for flag, wanted in (("--admin", True), ("--no-admin", False)):
        service.calls.clear()
        out = shell("key", "update", ID, flag).out
        assert "inference" in out
        assert f"key {OTHER}" in out, "which made it"
        assert service.only("AdminService/UpdateKey")["admin"] is wanted
    service.calls.clear()
    shell("key", "update", ID, "--name", "x")
    assert "admin" not in service.only("AdminService/UpdateKey")


def test_domains_of_an_organisation(service: Scripted, shell: Shell) -> None:
    declared = messages.Organisation(id=ID, name="default", domains=["a.example", "b.example"])
    service.answers["AdminService/UpdateOrganisation"] = declared
    out = shell("organisation", "update", "default", "--domain", "a.example", "--domain", "b.example").out
    assert "b.example" in out
    assert service.only("AdminService/UpdateOrganisation")["domains"] == {"values": ["a.example", "b.example"]}
    service.calls.clear()
    shell("organisation", "update", "default", "--no-domain")
    assert service.only("AdminService/UpdateOrganisation")["domains"] == {"values": []}


def test_key_list_has_states_and_no_secret(service: Scripted, shell: Shell) -> None:
    rows = [
        key(),
        key(expires_at=4_000_000_000),
        key(expires_at=1),
        key(revoked_at=5, last_used_at=1_770_000_000, name="a name that is far too long " * 4),
    ]
    service.answers["AdminService/ListKeys"] = messages.Keys(data=rows)
    done = shell("key", "list")
    lines = done.out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert all(ID in line for line in lines[1:])
    assert [
        state in line for state, line in zip(("active", "until 2096", "expired", "revoked"), lines[1:], strict=True)
    ]
    assert "2026-02-02" in lines[4]


def test_key_update(service: Scripted, shell: Shell) -> None:
    done = shell("key", "update", ID, "--any-model", "--endpoint", "/v1/completions", "--expires", "never")
    assert done.status == 0
    message = service.only("AdminService/UpdateKey")
    assert message["models"] == {"values": []}
    assert message["endpoints"] == {"values": ["/v1/completions"]}
    assert message["expires_at"] == 0
    assert "name" not in message


def test_key_rotate_and_revoke(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/RotateKey"] = messages.CreatedKey(key=key(), secret="hf-new")
    service.answers["AdminService/RevokeKey"] = key(revoked_at=7)
    assert "hf-new" in shell("key", "rotate", ID, "--overlap", "2h").out
    assert sent(service, "RotateKey") == {"key": ID, "overlap_s": 7200}
    assert "revoked" in shell("key", "revoke", ID).out
    service.calls.clear()
    shell("key", "rotate", ID)
    assert "overlap_s" not in service.only("AdminService/RotateKey")


def test_organisations(service: Scripted, shell: Shell) -> None:
    content = messages.ContentPolicy(store=True, retention_days=30, redact=["[0-9]{16}"])
    kept = messages.Organisation(id=ID, name="default", content=content)
    service.answers["AdminService/ListOrganisations"] = messages.Organisations(data=[kept])
    service.answers["AdminService/UpdateOrganisation"] = kept
    assert "kept 30 days" in shell("organisation", "list").out
    service.calls.clear()
    done = shell("organisation", "update", "default", "--retention-days", "7", "--suspend")
    assert "[0-9]{16}" in done.out
    asked = service.only("AdminService/UpdateOrganisation")
    assert asked["content"] == {"store": True, "retention_days": 7, "redact": ["[0-9]{16}"]}, "the rest stays"
    assert asked["suspended"] is True
    service.calls.clear()
    shell("organisation", "update", "default", "--no-keep-texts", "--no-redact")
    asked = service.only("AdminService/UpdateOrganisation")
    assert asked["content"] == {"store": False, "retention_days": 30, "redact": []}
    assert "suspended" not in asked
    service.calls.clear()
    shell("organisation", "update", "default", "--name", "main")
    assert sent(service, "UpdateOrganisation") == {"organisation": "default", "name": "main"}


def test_an_organisation_that_is_not_there(service: Scripted, shell: Shell) -> None:
    done = shell("organisation", "update", "nobody", "--keep-texts")
    assert done.status == 1
    assert "`nobody`" in done.err


def test_limits(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/ListUsers"] = messages.Users(data=[user(), user(id=OTHER, email="b@example.com")])
    service.answers["AdminService/SetLimits"] = lambda asked: messages.SubjectLimits(
        subject=asked.subject, limits=asked.limits
    )
    done = shell("limits", "set", "user:b@example.com", "--requests-per-minute", "60", "--cost-per-day", "1.25")
    assert sent(service, "SetLimits") == {
        "subject": f"user:{OTHER}",
        "limits": {"requests_per_minute": 60, "cost_per_day": 1_250_000_000},
    }
    assert "1.25" in done.out
    assert "1250000000" not in done.out
    service.calls.clear()
    assert "none" in shell("limits", "set", f"key:{ID.upper()}", "--none").out
    assert service.only("AdminService/SetLimits")["subject"] == f"key:{ID}"
    assert service.only("AdminService/SetLimits")["limits"] == {}
    done = shell("limits", "set", "user:nobody@example.com", "--none")
    assert done.status == 1
    assert "nobody@example.com" in done.err
    limits = messages.Limits(tokens_per_minute=2_000_000, cost_per_month=500_000_000)
    rows = [messages.SubjectLimits(subject=f"organisation:{ID}", limits=limits)]
    service.answers["AdminService/ListLimits"] = messages.AllLimits(data=rows)
    out = shell("limits", "list").out
    assert "2,000,000" in out
    assert "0.50" in out


def test_prices_are_per_million_tokens(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/SetPrice"] = lambda asked: asked.price
    out = shell("price", "set", "m", "--prompt", "1.25", "--completion", "5").out
    assert service.only("AdminService/SetPrice")["price"] == {
        "model": "m",
        "prompt": 1250,
        "cached": 1250,
        "completion": 5000,
    }
    assert "1.25 per million" in out
    price = messages.Price(model="m", prompt=1250, cached=0, completion=1)
    service.answers["AdminService/ListPrices"] = messages.PriceList(currency="EUR", prices=[price])
    lines = shell("price", "list").out.splitlines()
    assert lines[1].split() == ["m", "1.25", "0.00", "0.001"]
    assert lines[-1] == "EUR per million tokens"
    shell("price", "remove", "m")
    assert sent(service, "DeletePrice") == {"model": "m"}


@pytest.mark.parametrize(
    ("refused", "status", "said"),
    [
        (error(NotFound, "there is no user `x`", "user"), 1, "helixflow: there is no user `x`\n"),
        (error(Conflict, "x exists already"), 1, "helixflow: x exists already\n"),
        (error(PermissionDenied, "the last owner stays"), 1, "helixflow: the last owner stays\n"),
        (error(Unavailable, "the database is away"), 69, "the database is away"),
    ],
)
def test_refusals(service: Scripted, shell: Shell, refused: Any, status: int, said: str) -> None:
    service.answers["AdminService/DeleteUser"] = refused
    done = shell("user", "remove", "x")
    assert (done.status, done.out) == (status, "")
    assert said in done.err
    assert "Traceback" not in done.err


def test_an_error_nobody_thought_of(service: Scripted, shell: Shell) -> None:
    def bug(_asked: Any) -> Any:
        raise RuntimeError("inner detail")

    service.answers["AdminService/DeleteUser"] = bug
    done = shell("user", "remove", "x")
    assert done.status == 1
    assert "helixflow: " in done.err


def test_no_auth_service(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIX_AUTH_LISTEN", "127.0.0.1:1")
    done = shell("user", "list")
    assert done.status == 69
    assert "127.0.0.1:1" in done.err
    assert "helixflow auth" in done.err


def test_as_a_process_it_prints_the_answer_and_nothing_else(service: Scripted, shell: Shell) -> None:
    service.answers["AdminService/ListUsers"] = messages.Users(data=[user()])
    command = [sys.executable, "-m", "helixflow", "user", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=25, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2


def test_no_certificates(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HELIX_CERTS", str(tmp_path))
    done = shell("user", "list")
    assert done.status == 1
    assert "helixflow pki verify" in done.err


def test_the_server_must_be_the_auth_service(
    pki: Layout, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another installation's CA is not trusted."""
    from helixflow.pki import issue
    from helixflow.pki.keys import KeyType

    other = Layout(tmp_path / "certs")
    other.directory.mkdir()
    issue.init(other, key_type=KeyType.ECDSA_P256)
    monkeypatch.setenv("HELIX_CERTS", str(other.directory))
    done = shell("user", "list")
    assert done.status == 69
    assert "certificate" in done.err


def test_every_leaf_has_help_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    leaves = [
        *(("user", name) for name in ("add", "list", "update", "reset-password", "reset-factor", "unlock", "remove")),
        *(("session", name) for name in ("list", "end")),
        *(("organisation", name) for name in ("add", "list", "update")),
        *(("key", name) for name in ("add", "list", "update", "rotate", "revoke")),
        *(("limits", name) for name in ("set", "list")),
        *(("price", name) for name in ("set", "list", "remove")),
        *(("usage", name) for name in ("show", "export")),
        ("usage",),
        *(("audit", name) for name in ("list", "verify")),
    ]
    parser = build_parser()
    for leaf in leaves:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([*leaf, "--help"])
        assert ended.value.code == 0
        assert "--json" in capsys.readouterr().out, leaf
