"""The start-up self-test of the engines, every form of attention, in both types."""

import tempfile
from pathlib import Path
from typing import cast

from helixflow.engine.kinds import Backend
from helixflow.engine.tensorrt.options import Compute
from helixflow.engine.tensorrt.selftest import run_selftest
from perf.gpu.bench import Tools
from perf.gpu.rows import Task

COMPUTES: tuple[Compute, ...] = ("fp16", "bf16")


def check(task: Task) -> None:
    """A row per form; the option is the type. A form that fails is not served with, but it is worth knowing where."""
    tools = task.tools or Tools()
    compute = next(compute for compute in COMPUTES if compute == task.option)
    passed = []
    with tempfile.TemporaryDirectory(prefix="helix-gpu-check-") as directory:
        backend = cast("Backend", task.backend)
        for result in run_selftest(tools.toolkit, backend, 0, Path(directory), compute, tools.sizes.forms):
            figure = f"logits within {result.error:.4f} of {result.tolerance:g}, {result.wrong} tokens wrong"
            figure += f" of {result.tokens} ({result.ties} near ties), {result.seconds:.1f} s"
            task.report.check(result.form, figure, result.passed, result.reason)
            passed += [result.form] if result.passed else []
    task.report.fact(f"forms.{task.backend}.{compute}", passed)
