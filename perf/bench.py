"""`make bench`: every benchmark, one after another. Each writes a file under `perf/results/`."""

import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = (
    ("perf.bench_gateway",),
    ("perf.bench_front",),
    ("perf.bench_engine", "--out", str(RESULTS / "engine.md")),
    ("perf.bench_latency",),
    ("perf.bench_fairness",),
    ("perf.bench_spinning",),
    ("perf.bench_stores",),
    ("perf.bench_accounts",),
    ("perf.limits_proof",),
    ("perf.outage",),
)


def main() -> int:
    """Runs all parts; the exit status says whether all of them could be measured."""
    failed = [
        name
        for name, *options in PARTS
        if subprocess.run([sys.executable, "-m", name, *options], check=False).returncode
    ]
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
