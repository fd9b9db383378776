"""The 8B shape through the real runner: tokens per second, as shares of what memory and arithmetic allow."""

import time

from helixflow.engine.base import EngineError
from helixflow.engine.tensorrt.device import DeviceError
from helixflow.engine.tensorrt.engine import RunOptions, TensorRtEngine
from helixflow.engine.tensorrt.options import ATTENTION_FORMS, EngineOptions
from perf.gpu.bench import open_bench
from perf.gpu.drive import LOGITS
from perf.gpu.model import RandomModel
from perf.gpu.rows import RefusedError, Report, Task
from perf.gpu.work import Work


def check(task: Task) -> None:
    """Prompts, and decoding at several numbers of sequences, with and without a step ahead. The option is the form of
    attention."""
    report = task.report
    with open_bench(task) as bench:
        sizes = bench.sizes
        form = next(form for form in ATTENTION_FORMS if form == task.option)
        options = EngineOptions("bf16", sizes.slots, sizes.max_len, form, chunk_tokens=sizes.chunk)
        try:
            model = RandomModel(bench, sizes.large, options)
        except EngineError as error:
            if isinstance(error, DeviceError):
                raise
            raise RefusedError(str(error)) from error
        parameters = sizes.large.parameters() / 1e9
        report.row(
            "plans", f"{parameters:.2f} G parameters: {model.plan_bytes / 2**20:.0f} MiB in {model.seconds:.0f} s"
        )
        report.need(15)
        work = Work(report, task.backend, sizes.large, sizes, bench.rng)
        engine, slots = _fitting(report, model)
        sequences = [count for count in sizes.sequences if count <= slots]
        # A launch ahead would stand in the way of the next prompt.
        work.prompts(engine)
        work.fill(engine, slots)
        for count in sequences:
            rate = count / work.step_seconds(engine, count)
            report.row(f"decode without a step ahead, {count} sequences", f"{rate:,.0f} tokens/s", value=rate)
        work.sound(engine, LOGITS)
        engine.close()
        report.need(10)
        engine = model.engine(RunOptions(slots))
        work.fill(engine, slots)
        work.decode(engine, sequences)
        engine.close()


def _fitting(report: Report, model: RandomModel) -> tuple[TensorRtEngine, int]:
    """An engine that does not run ahead, with as many slots as the device has memory for."""
    refusal = ""
    for slots in sorted({model.options.slots, *model.bench.sizes.sequences}, reverse=True):
        started = time.monotonic()
        try:
            engine = model.engine(RunOptions(slots, ahead=False))
        except DeviceError as error:
            if error.kind != "out_of_memory":
                raise
            refusal = str(error)
            continue
        figure = f"{slots} of {model.options.max_len} positions, warm after {time.monotonic() - started:.1f} s"
        report.row("slots", figure, note=refusal)
        return engine, slots
    raise RefusedError(refusal)
