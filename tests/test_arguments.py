"""Wrong command lines: exit status 64, what was meant, and no value that may be a secret."""

import pytest

from helixflow import cli


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 64
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: helixflow")
    return said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--profile", "prod"), "did you mean production?"),
        (("gateway", "--profile", "developement"), "did you mean development?"),
        (("serv",), "did you mean serve?"),
        (("db", "migrat"), "did you mean migrate?"),
        (("serve", "--profil=x"), "invalid choice"),
        (("serve", "--modle", "x"), "did you mean --model?"),
        (("key", "add", "--user", "x"), "the following arguments are required"),
        (("db", "forget-pepper"), "--revoke-all-keys"),
        ((), "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_command_line_is_a_wrong_configuration(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in wrong(capsys, *arguments)


def test_nothing_is_meant_by_what_is_like_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in wrong(capsys, "serve", "--profile", "xyz")
    assert "did you mean" not in wrong(capsys, "zzz")


def test_values_that_are_not_known_are_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    said = wrong(capsys, "version", "--passwrod=s3cret", "s3cret")
    assert "s3cret" not in said
    assert "--passwrod" in said
