"""Ties between processes: output that nobody reads, parents that are gone."""

import os
import subprocess
import sys
from pathlib import Path

from helixflow.process import PARENT_PID, Output


def test_output_outlives_its_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        output = Output(stream)
        assert output.write("lost\n") == 5
        output.flush()
        output.writelines(["lost, too\n", "and this\n"])
        output.flush()
        assert Path(f"/proc/self/fd/{stream.fileno()}").readlink() == Path(os.devnull)


def test_a_full_disk_may_have_room_again() -> None:
    with Path("/dev/full").open("w") as stream:
        output = Output(stream)
        output.write("lost\n")
        output.flush()
        assert Path(f"/proc/self/fd/{stream.fileno()}").readlink() == Path("/dev/full")
        with Path(os.devnull).open("w") as nowhere:  # what is still buffered must go somewhere at the end
            os.dup2(nowhere.fileno(), stream.fileno())


def test_what_output_does_not_know_is_asked_of_the_stream() -> None:
    assert Output(sys.__stdout__).encoding == sys.__stdout__.encoding  # type: ignore[union-attr,arg-type]


def test_the_output_of_a_command_is_no_reason_to_fail() -> None:
    command = f"{sys.executable} -m helixflow config options | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_process_whose_parent_is_gone_does_not_start() -> None:
    nobody = {**os.environ, PARENT_PID: str(os.getppid())}
    ended = subprocess.run(
        [sys.executable, "-m", "helixflow", "version"], env=nobody, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "the parent process has ended" in ended.stderr
    assert not ended.stdout
