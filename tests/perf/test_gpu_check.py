"""The command around the steps of the GPU check: processes, time, state, and the table; with real subprocesses."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from perf import gpu_check
from perf.gpu import runner
from perf.gpu.plan import BACKENDS, STEPS, Backend, Step
from perf.gpu.report import slug
from perf.gpu.rows import Row
from perf.gpu.state import FILE, Record, State, key_of

pytestmark = pytest.mark.long

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
PROBED = {
    "device": "NVIDIA Test 9000", "sm": 90, "driver": "580.1", "cuda": "13.0", "memory": 80 << 30, "cache": 50 << 20,
    "processors": 132, "versions": {"python": "3.12", "tensorrt": "11.4"},
}  # fmt: skip


def run(name: str, seconds: float = 20, **facts: Any) -> Record:
    job = runner.Job((name, "tensorrt"), seconds, facts)
    return runner.run(job, "key", "sources", worker=FAKE)


def ended(pid: int) -> bool:
    """Whether a process that is not ours to wait for ends soon."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 10)[0])
    finally:
        os.close(handle)


# --- one step ---


def test_a_step_that_ends_well() -> None:
    record = run("good", seen=["earlier"])
    assert (record.end, record.step, record.backend, record.key) == ("done", "good", "tensorrt", "key")
    assert record.rows == (Row("what", "1", value=1.0), Row("check", "2", "PASS"))
    assert record.facts == {"seen": ["earlier", "good"]}
    assert record.good


@pytest.mark.parametrize(
    ("name", "end", "verdict", "note"),
    [
        ("wrong", "done", "FAIL", "it differs"),
        ("refused", "done", "REFUSED", "UNSUPPORTED_CC: this device is\nnot supported"),
        ("skipped", "done", "SKIPPED", "the package x is not installed"),
        ("cut", "cut", "SKIPPED", "time is up: too late"),
        ("broken", "failed", "FAIL", "KeyError: 'no such thing'"),
        ("crashed", "crashed", "FAIL", "the process died of SIGSEGV"),
        ("silent", "crashed", "FAIL", "the process ended with status 7"),
    ],
)
def test_a_step_that_ends_otherwise(name: str, end: str, verdict: str, note: str) -> None:
    record = run(name)
    assert (record.end, record.rows[-1].verdict, record.rows[-1].note) == (end, verdict, note)
    assert not record.good


def test_what_a_crash_leaves_behind_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    record = run("crashed")
    assert record.rows[0] == Row("before", "6")
    assert "crashed | last words" in capfd.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_that_hangs(whole: bool) -> None:
    job = runner.Job(("hanging", ""), 1.5, whole=whole)
    started = time.monotonic()
    record = runner.run(job, "key", "", worker=FAKE)
    assert time.monotonic() - started < 15
    assert record.rows[0] == Row("before", "8")
    expected = ("crashed", "FAIL", "did not end within 2 s") if whole else ("cut", "SKIPPED", "time is up after 2 s")
    assert (record.end, record.rows[-1].verdict) == expected[:2]
    assert expected[2] in record.rows[-1].note


def test_a_step_that_does_not_want_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    record = run("stubborn", seconds=1.5)
    assert record.end == "crashed"
    assert ended(int(record.rows[0].figure))


def test_children_do_not_outlive_their_step() -> None:
    record = run("leaving")
    assert record.end == "done"
    assert ended(int(record.rows[0].figure))


def test_more_output_than_a_pipe_holds() -> None:
    record = run("noisy")
    assert (record.end, len(record.rows)) == ("done", 3000)


def test_a_worker_that_cannot_be_started(tmp_path: Path) -> None:
    job = runner.Job(("good", ""), 5)
    with pytest.raises(FileNotFoundError):
        runner.run(job, "", "", worker=(str(tmp_path / "nothing"),))


def test_an_interrupt_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def interrupt(row: Row) -> None:
        pids.append(int(row.figure))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    with pytest.raises(KeyboardInterrupt):
        runner.run(runner.Job(("stubborn", ""), 20), "", "", interrupt, FAKE)
    assert ended(pids[0])


def test_the_real_worker_says_what_is_missing() -> None:
    """Without a GPU it fails or skips, in words; with one this copies memory."""
    record = runner.run(runner.Job(("copy", ""), 60), "", "")
    assert record.end in ("done", "failed")
    assert record.rows[-1].verdict in ("PASS", "FAIL", "SKIPPED")


# --- state ---


def test_state_survives_a_cut_line(tmp_path: Path) -> None:
    state = State(tmp_path / "deep" / "state")
    assert state.latest("key", "good", "tensorrt") is None
    first, second = run("good"), run("wrong")
    state.append(first)
    state.append(second)
    path = tmp_path / "deep" / "state" / FILE
    path.write_text(path.read_text() + '{"key": "key", "step": "go\n[]\n{"rows": [{"what": "x", "verdict": "?"}]}\n')
    again = State(tmp_path / "deep" / "state")
    assert again.records == [first, second]
    assert again.latest("key", "good", "tensorrt") == first
    assert again.latest("other", "good", "tensorrt") is None


def test_keys_tell_devices_and_versions_apart() -> None:
    versions = {"tensorrt": "11.4"}
    key = key_of(PROBED, versions)
    assert key == key_of({**PROBED, "free": 3}, dict(versions))
    others = [
        ({**PROBED, "device": "x"}, versions),
        ({**PROBED, "driver": "x"}, versions),
        (PROBED, {"tensorrt": "12"}),
    ]
    assert key not in {key_of(*other) for other in others}


# --- the command ---


def step(name: str, *backends: Backend, **options: Any) -> Step:
    return Step(name, f"title of {name}", "nothing:nothing", backends or ("tensorrt",), 20, **options)


class Command:
    """Calls of the command on one state folder."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.state, self.out, self.capfd = folder / "state", folder / "out" / "table.md", capfd
        self.sources = "first"

    def __call__(self, steps: Sequence[Step], *only: str, budget: float = 100, **options: Any) -> list[str]:
        """Names of the steps that were run."""
        chosen = gpu_check.Options(
            options.pop("backends", BACKENDS), only, budget, self.state, self.out, options.pop("again", False),
            options.pop("keep", False),
        )  # fmt: skip
        probed = Record("", "probe", "", "", "done", "", 0, facts=PROBED)
        check = gpu_check.Check(chosen, probed, FAKE, steps)
        check.sources = self.sources
        before = len(check.state.records)
        self.status = check.run()
        self.check, self.printed = check, self.capfd.readouterr().out
        return [f"{record.step} {record.backend}".rstrip() for record in check.state.records[before:]]

    def verdicts(self) -> dict[str, str]:
        """By step and back end."""
        found: dict[str, str] = {}
        for entry in self.check.entries():
            found[f"{entry.step.name} {entry.backend}".rstrip()] = entry.rows[-1].verdict
        return found


@pytest.fixture
def command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capfd)


def test_finished_steps_are_read_back(command: Command) -> None:
    steps = [step("good.a"), step("wrong.a"), step("cut.a"), step("crashed.a"), step("good.b")]
    assert command(steps) == [f"{one.name} tensorrt" for one in steps]
    assert command.status == 1
    # What never ran comes first; what was cut or crashed is run again, what failed is known.
    steps.append(step("good.c"))
    assert command(steps) == ["good.c tensorrt", "cut.a tensorrt", "crashed.a tensorrt"]
    assert command(steps[:2]) == []
    assert command.status == 1
    assert command(steps[:1], "good") == ["good.a tensorrt"]
    assert command(steps[:1], again=True) == ["good.a tensorrt"]


def test_other_sources_other_results(command: Command) -> None:
    steps = [step("good.a"), step("good.b", needs=("good.a",))]
    assert len(command(steps)) == 2
    command.sources = "second"
    assert command(steps, keep=True) == []
    assert "Measured with earlier sources: good.a, good.b." in command.out.read_text()
    # What the chosen step builds on need not be found again.
    assert command(steps, "good.b") == ["good.b tensorrt"]
    assert command(steps) == ["good.a tensorrt"]
    assert "earlier sources" not in command.out.read_text()
    assert command.status == 0


def test_steps_wait_for_what_they_need(command: Command) -> None:
    every: tuple[Backend, ...] = ("tensorrt-rtx", "tensorrt")
    steps = [
        step("good.late", *every, needs=("refused",), uses=("good.shared",)),
        step("good.free", "onnx", uses=("good.shared",)),
        step("refused", *every),
        step("good.shared", ""),
        step("good.last", needs=("good.shared", "good.free")),
    ]
    ran = command(steps, backends=("tensorrt-rtx", "onnx"))
    assert ran == ["refused tensorrt-rtx", "good.shared", "good.free onnx"]
    assert command.status == 0
    assert command.verdicts() == {
        "good.late tensorrt-rtx": "SKIPPED",
        "good.free onnx": "PASS",
        "refused tensorrt-rtx": "REFUSED",
        "good.shared": "PASS",
    }
    text = command.out.read_text()
    assert "SKIPPED: `refused` did not pass" in text
    assert "REFUSED: UNSUPPORTED_CC: this device is not supported" in text


def test_results_of_other_back_ends_stay_in_the_table(command: Command) -> None:
    steps = [step("good.a", "tensorrt", "onnx")]
    assert command(steps, backends=("tensorrt",)) == ["good.a tensorrt"]
    assert command(steps, backends=("onnx",)) == ["good.a onnx"]
    assert command.verdicts() == {"good.a tensorrt": "PASS", "good.a onnx": "PASS"}


def test_facts_go_from_step_to_step(command: Command) -> None:
    command([step("good.a"), step("good.b")])
    assert command.check.state.records[-1].facts == {"seen": ["good.a", "good.b"]}


def test_a_budget_that_is_spent(command: Command) -> None:
    assert command([step("good.a"), step("good.b")], budget=gpu_check.RESERVE_S) == []
    assert (command.status, set(command.verdicts().values())) == (0, {"SKIPPED"})
    assert "time is up: run the command again" in command.printed
    # Sixteen seconds are enough to try what may take twenty, not what may take two minutes.
    budget = gpu_check.RESERVE_S + 16
    steps = [step("good.a"), Step("good.b", "", "", ("tensorrt",), 120)]
    assert command(steps, budget=budget) == ["good.a tensorrt"]
    assert command.verdicts() == {"good.a tensorrt": "PASS", "good.b tensorrt": "SKIPPED"}


def test_the_best_back_end_goes_to_the_end(command: Command) -> None:
    from perf.gpu.plan import BEST

    names = {"tensorrt": "golden.fp16", "onnx": "golden-cuda.fp16"}
    steps = [step(name, backend) for backend, name in names.items()]  # type: ignore[arg-type]
    state = State(command.state)
    key = key_of(PROBED, PROBED["versions"])  # type: ignore[arg-type]
    for backend, name in names.items():
        facts = {f"speed.{backend}": {"tensorrt": 10.0, "onnx": 20.0}[backend]}
        rows = (Row("x", "", "PASS"),)
        state.append(Record(key, name, backend, command.sources, "done", "", 0, "", rows, facts))
    assert command(steps) == []
    assert command.check._ranking() == ["onnx", "tensorrt"]
    assert BEST in {one.name for one in STEPS}


def test_the_table(command: Command) -> None:
    command([step("good.a", ""), step("wrong.a")])
    text = command.out.read_text()
    assert text.startswith("# GPU check: NVIDIA Test 9000\n")
    assert "SM 90, 132 multiprocessors, 80.0 GiB" in text
    assert "python 3.12, tensorrt 11.4" in text
    assert "1 PASS, 1 FAIL, 1 measured" in text
    assert "| good.a |  | what | 1 | measured |\n|  |  | check | 2 | PASS |" in text
    assert r"| wrong.a | tensorrt | a \| b | 3 | FAIL: it differs |" in text
    assert text in command.printed
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_device_names_as_file_names() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("???") == "unknown"


def test_every_step_can_be_found() -> None:
    """Names of modules, functions and of other steps are right."""
    import importlib

    names = {one.name for one in STEPS}
    assert len(names) == len(STEPS)
    for one in STEPS:
        module, _, function = one.call.partition(":")
        assert callable(getattr(importlib.import_module(f"perf.gpu.{module}"), function))
        assert {*one.needs, *one.uses} <= names
        assert not one.name.endswith(".")


def call(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, from another folder."""
    command = [sys.executable, str(gpu_check.ROOT / "perf" / "gpu_check.py"), *arguments]
    environ = {**os.environ, **environ}
    environ.pop("PYTHONPATH", None)
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environ)


def test_without_a_gpu() -> None:
    answer = call(CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == gpu_check.NO_DEVICE
    assert "no GPU is here, so nothing was checked: " in answer.stdout
    assert answer.stderr == ""


def test_the_command_line() -> None:
    listed = call("--list")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert len(listed.stdout.splitlines()) == len(STEPS)
    assert "there is no step 'nothing'" in call("--only", "nothing").stderr
    assert call("--backend", "cpu").returncode == 2
    options = gpu_check._parse(["--backend", "onnx", "tensorrt", "--only", "golden", "--budget", "9"])
    assert options is not None
    assert (options.backends, options.only, options.budget) == (("tensorrt", "onnx"), ("golden",), 9)
    everything = gpu_check._parse([])
    assert everything is not None
    assert everything.backends == BACKENDS


def test_an_interrupted_call_leaves_a_table(tmp_path: Path) -> None:
    """SIGTERM, as a time limit around the command sends it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import json, signal, sys
sys.path.insert(0, {str(gpu_check.ROOT)!r})
from pathlib import Path
from perf import gpu_check
from perf.gpu.plan import Step
from perf.gpu.state import Record
folder = Path({str(tmp_path)!r})
options = gpu_check.Options(("tensorrt",), (), 100, folder, folder / "table.md", False, False)
probed = Record("", "probe", "", "", "done", "", 0, facts=json.loads({json.dumps(PROBED)!r}))
steps = [Step(name, name, "", ("tensorrt",), 50) for name in ("good", "hanging")]
signal.signal(signal.SIGTERM, gpu_check._stop)
sys.exit(gpu_check.guarded(gpu_check.Check(options, probed, {FAKE!r}, steps)))
"""
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "before" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == gpu_check.INTERRUPTED
    assert "run the command again to go on" in errors
    text = (tmp_path / "table.md").read_text()
    assert "| good | tensorrt | what | 1 | measured |" in text
    assert "| hanging | tensorrt |  |  | SKIPPED: not run |" in text
