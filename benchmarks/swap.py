"""50 requests a second against a device's local API during 200 switches of version (see tests/faults/swap_load.py).

`p99_ratio` compares with the same load on the same process before the first switch.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import Goal

GOALS = [
    Goal("switches", 200, ">="),
    Goal("failed", 0, "<="),
    Goal("wrong_version", 0, "<="),
    Goal("p99_ratio", 2.0, "<="),
]


def run(quick: bool) -> dict[str, float]:
    """Measure without switches, then with."""
    from tests.faults.swap_load import SwapRun

    with tempfile.TemporaryDirectory(prefix="foreshore-swap-", ignore_cleanup_errors=True) as folder:
        run = SwapRun(Path(folder))
        try:
            figures = run.run(*((10, 5.0) if quick else (200, 60.0)))
        finally:
            run.close()
    for finding in figures.findings[:20]:
        print(finding)
    quiet, busy = _percentiles(figures.quiet_s), _percentiles(figures.busy_s)
    return {
        "switches": float(figures.num_switches - 1),
        "requests": float(len(figures.busy_s)),
        "failed": float(figures.failed),
        "wrong_version": float(figures.wrong_version),
        "p50_ms_quiet": quiet[49] * 1000,
        "p99_ms_quiet": quiet[98] * 1000,
        "p50_ms": busy[49] * 1000,
        "p99_ms": busy[98] * 1000,
        "p99_ratio": busy[98] / quiet[98],
    }


def _percentiles(times_s: list[float]) -> list[float]:
    return statistics.quantiles(times_s, n=100)
