"""200 seeded bad models on a real agent: all refused or rolled back, each for its own reason (see tests/faults)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Goal

SEED = 1
GOALS = [Goal("num_models", 200, ">="), Goal("caught_ratio", 1.0, ">="), Goal("reason_right_ratio", 1.0, ">=")]


def run(quick: bool) -> dict[str, float]:
    """Send them one after another; what was not caught is printed."""
    from tests.faults.bad_models import BadModelRun

    with tempfile.TemporaryDirectory(prefix="foreshore-bad-", ignore_cleanup_errors=True) as folder:
        run = BadModelRun(Path(folder), SEED)
        try:
            figures = run.run(16 if quick else 200)
        finally:
            run.close()
    for finding in figures.findings:
        print(finding)
    return {
        "num_models": float(figures.num_models),
        "caught_ratio": figures.num_caught / figures.num_models,
        "reason_right_ratio": figures.num_reason_right / figures.num_models,
        **{name: float(count) for name, count in sorted(figures.results.items())},
    }
