"""A disk that fills up: a warning before, a clear end when it is full. Real file systems need root."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from helixflow.disk import AGAIN_S, LOOK_S, Room
from tests.db.support import folder

FREE = 1 << 20


@pytest.fixture
def small() -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    with folder() as place:
        path = place / "small"
        path.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0711", "none", str(path)], check=False)
        if mounted.returncode:
            pytest.skip("this machine allows no mounts")
        try:
            yield path
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path, left: int = 0) -> None:
    """Writes until `left` bytes are free."""
    with (path / "filling").open("wb", buffering=0) as file:
        try:
            while os.statvfs(path).f_bavail * os.statvfs(path).f_frsize > left:
                file.write(bytes(4096))
        except OSError:
            return


def test_little_room_is_told_once_an_hour_and_when_it_is_over(small: Path) -> None:
    now = 100.0
    room = Room(small, FREE, lambda: now)

    def said() -> list[str]:
        with structlog.testing.capture_logs() as logs:
            room.look()
        assert all(line["folder"] == str(small) for line in logs)
        return [line["event"] for line in logs]

    assert said() == []
    fill(small, FREE // 2)
    assert said() == [], "not so often"
    now += LOOK_S
    assert said() == ["little room is left on the disk"]
    now += LOOK_S
    assert said() == []
    now += AGAIN_S
    assert said() == ["little room is left on the disk"]
    (small / "filling").unlink()
    now += LOOK_S
    assert said() == ["there is room on the disk again"]
    now += LOOK_S
    assert said() == []


def test_no_limit_and_no_folder_are_silent(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        Room(tmp_path, 0).look()
        Room(tmp_path / "missing", 1 << 60).look()
        Room(tmp_path, 1).look()
    assert logs == []


@pytest.mark.parametrize("left", [0, 64 << 10])
def test_a_database_without_room_ends_with_a_reason(small: Path, left: int) -> None:
    fill(small, left)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HELIX_")}
    environ |= {"HELIX_HOME": str(small), "HELIX_LOG_FORMAT": "json"}
    done = subprocess.run(
        [sys.executable, "-m", "helixflow", "db", "run"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode not in (0, -6)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(line.startswith("{") for line in done.stderr.splitlines())
