"""What a service logs: lines, their order and form, and that nobody waits for who reads them."""

import gzip
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from helixflow.core_rs import log_counts
from tests.logs.support import ROOT, Unread, command, environ, lines, run
from tests.logs.writer import SECRET


def test_every_line_arrives_in_order_and_in_form() -> None:
    ended = subprocess.run(
        ["bash", "-c", 'exec "$@" 3>&1', "-", *command("flood", 5000)],
        cwd=ROOT,
        env=environ(),
        input=b"x",
        capture_output=True,
        check=True,
        timeout=60,
    )
    found = lines(ended.stderr)
    assert [line["number"] for line in found[:-1]] == list(range(5000))
    assert found[-1]["event"] == "last"
    for line in found:
        assert {"timestamp", "level", "service", "component", "event"} <= line.keys()


def test_a_reader_who_stops_reading_stops_nobody_and_hears_what_was_lost() -> None:
    unread = Unread(*command("flood", 20_000))
    try:
        assert unread.told.readline() == b"done\n", "20,000 lines, 6 MB, into a pipe of 64 KiB that nobody reads"
        assert unread.process.stdin
        reader = os.fdopen(os.dup(unread._reader), "rb")
        first = reader.read(1 << 20)  # what flows again makes room
        unread.process.stdin.write(b"x")
        unread.process.stdin.flush()
        found = lines(first + reader.read())
        reader.close()
        assert unread.process.wait(20) == 0
    finally:
        unread.end()
    kept = [line for line in found if line["event"] == "line"]
    lost = [line for line in found if line["event"].startswith("log lines were lost")]
    assert lost
    assert len(kept) + sum(line["lines"] for line in lost) == 20_000
    assert found[-1]["event"] == "last"


def test_an_end_does_not_wait_for_a_reader() -> None:
    unread = Unread(*command("flood", 2000))
    try:
        unread.told.readline()
        assert unread.process.stdin
        unread.process.stdin.write(b"x")
        unread.process.stdin.close()
        assert unread.process.wait(15) == 0
    finally:
        unread.end()


@pytest.mark.parametrize(
    "what",
    [
        "raw",
        pytest.param("other_account", marks=pytest.mark.skipif(os.geteuid() != 0, reason="changes the account")),
    ],
)
def test_what_writes_past_the_queue_does_not_wait_either(what: str) -> None:
    unread = Unread(*command(what))
    try:
        assert unread.told.readline() == b"done\n"
        assert unread.process.wait(20) == 0
        assert b"r" * 1000 in unread.rest()
    finally:
        unread.end()


def test_what_a_service_prints_is_printed() -> None:
    ended = subprocess.run(
        ["bash", "-c", 'exec "$@" 3>/dev/null', "-", *command("raw")],
        cwd=ROOT,
        env=environ(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert ended.stdout.endswith(b"printed\n")
    assert ended.stderr.endswith(b"printed, too\n")


def test_the_terminal_of_others_is_left_as_it_is() -> None:
    mine, theirs = pty.openpty()
    try:
        ended = subprocess.run(command("forks"), cwd=ROOT, env=environ(), stdout=theirs, stderr=theirs, check=True)
        assert ended.returncode == 0
        assert os.get_blocking(theirs), "O_NONBLOCK would reach the shell"
        assert b"parent after" in os.read(mine, 65536)
    finally:
        os.close(mine)
        os.close(theirs)


def test_a_fork_has_a_queue_of_its_own() -> None:
    found = [line["event"] for line in lines(run("forks").stderr)]
    assert sorted(found) == ["child", "parent after", "parent before"], "each line is written once"
    # Between two processes no order is promised: each has a queue that gathers for a moment.
    assert found.index("parent before") < found.index("parent after")


def test_this_process_counts_nothing_lost() -> None:
    assert log_counts()[0] == 0


@pytest.mark.parametrize("form", ["json", "console"])
def test_text_of_others_does_not_steer_a_terminal(form: str) -> None:
    ended = run("steers", HELIX_LOG_FORMAT=form)
    text = ended.stderr.decode()
    assert ended.returncode == 0
    assert len(text.splitlines()) == 3
    assert text.replace("\n", "").isprintable()
    assert "\\u001b[2J" in text


def test_repetitions_are_summed_up() -> None:
    found = lines(run("repeats").stderr)
    requests = [line for line in found if line["event"] == "request"]
    assert sum(line.get("address") == "192.0.2.1" for line in requests) == 5
    assert sum(line.get("address") == "192.0.2.2" for line in requests) == 1
    assert sum(line["status"] == 200 for line in requests) == 1
    sums = {line["of"]: line for line in found if line["event"] == "more of the same"}
    assert sums["request"]["lines"] == 95
    assert "192.0.2.1" in sums["request"]["what"]
    assert sums["the database is away"]["lines"] == 95
    assert sums["the database is away"]["level"] == "warning"


@pytest.mark.parametrize("form", ["json", "console"])
def test_errors_are_logged_without_data(form: str) -> None:
    ended = run("errors", HELIX_LOG_FORMAT=form)
    text = (ended.stdout + ended.stderr).decode()
    assert SECRET not in text
    assert SECRET.encode().hex() not in text
    for event in (
        "caught",
        "caught by a library",
        "a thread ended by an unexpected error",
        "an error that nobody could handle",
        "Task exception was never retrieved",
        "a group",
        "ended by an unexpected error",
    ):
        assert event in text, text
    assert "tests/logs/writer.py" in text, "the place of an error is told"
    assert "No such file or directory" in text, "messages of the system are told"
    assert ended.returncode == 1


def test_a_file_is_set_aside_compressed_and_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "{service}.log"
    options = {"HELIX_LOG_FILE": str(path), "HELIX_LOG_FILE_MAX_BYTES": "100000", "HELIX_LOG_FILE_KEEP": "1000"}
    writers = [
        subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3>/dev/null', "-", *command("flood", 2000)],
            cwd=ROOT,
            env=environ(**options),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for process in writers:
        assert process.communicate(timeout=60)[1] == b""
    folder = path.parent
    files = sorted(folder.iterdir())
    assert folder / "test.log" in files
    found, larger = [], 0
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        larger += file.suffix != ".part" and len(data) > 100_000
        found += [] if file.suffix == ".part" else lines(data)
    assert len(files) > 5
    # What has gathered while a process had no processor is written as one piece, and is not taken apart.
    assert larger <= 2
    assert any(file.suffix == ".gz" for file in files)
    numbers = sorted(line["number"] for line in found if line["event"] == "line")
    assert numbers == sorted([*range(2000), *range(2000)]), "several processes write one file, and no line is lost"


def test_only_as_many_files_are_kept_as_asked_for(tmp_path: Path) -> None:
    options = {
        "HELIX_LOG_FILE": str(tmp_path / "test.log"),
        "HELIX_LOG_FILE_MAX_BYTES": "50000",
        "HELIX_LOG_FILE_KEEP": "2",
    }
    for _ in range(3):
        subprocess.run(
            ["bash", "-c", 'exec "$@" 3>/dev/null', "-", *command("flood", 400)],
            cwd=ROOT,
            env=environ(**options),
            stdin=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )
    # What the last turn of each process left is tidied up by the next one.
    assert len(list(tmp_path.glob("test.log.*"))) <= 2 + 3


def test_a_file_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command_line = [sys.executable, "-m", "helixflow", "gateway", "--profile", "development"]
    options = {"HELIX_LOG_FILE": str(tmp_path / "file" / "x.log"), "HELIX_HOME": str(tmp_path)}
    ended = subprocess.run(
        command_line, cwd=ROOT, env=environ(**options), capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 69
    assert "log.file" in ended.stderr
    assert "Traceback" not in ended.stderr
