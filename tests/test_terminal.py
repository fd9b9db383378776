"""Text of others on a terminal."""

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from helixflow import terminal

PACKAGE = Path(terminal.__file__).parent


@given(st.text())
def test_nothing_steers_and_json_reads_it_back(text: str) -> None:
    shown = terminal.safe(text)
    assert not any(c in shown for c in "\n\r\t\x1b\x7f\x9b\u202e\u2066\u2028")
    dumped = terminal.safe(json.dumps({"name": text}, ensure_ascii=False))
    read = json.loads(dumped)["name"]
    assert read == text or any("\ud800" <= c <= "\udfff" for c in text)


def test_letters_stay() -> None:
    for text in ("Grüße", "你好", "🦀", "a b", ""):
        assert terminal.safe(text) == text
    assert terminal.safe("a\x1b[2J\u202eb\n") == "a\\u001b[2J\\u202eb\\u000a"


def test_say_keeps_lines_and_nothing_else() -> None:
    out = io.StringIO()
    terminal.say("one\ntwo\t\x1b[31m", file=out)
    assert out.getvalue() == "one\ntwo\t\\u001b[31m\n"


def test_commands_print_through_the_one_helper() -> None:
    """No `print` and no `sys.stdout.write` elsewhere: what a command shows may hold a name that somebody chose."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert [place for place in found if not place.startswith("terminal.py")] == []


def test_arguments_that_nobody_knows_are_not_repeated() -> None:
    command = [
        sys.executable,
        "-m",
        "helixflow",
        "user",
        "add",
        "ann@example.com",
        "--password",
        "hunter2",
        "--token=abcdef",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 64
    assert "--password --token" in ended.stderr
    assert "hunter2" not in ended.stderr
    assert "abcdef" not in ended.stderr
    steering = subprocess.run([*command[:3], "user", "\x1b[2J"], capture_output=True, text=True, check=False)
    assert steering.returncode == 64
    assert "\x1b" not in steering.stderr
