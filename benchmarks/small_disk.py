"""1,000 updates on a real file system of 48 MiB that fills and empties (see tests/faults/small_disk.py)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Goal

GOALS = [Goal("trials", 1000, ">="), Goal("enospc_in_mid_update", 0, "<="), Goal("lost_slots", 0, "<=")]


def run(quick: bool) -> dict[str, float]:
    """Needs the right to mount a tmpfs."""
    from tests.faults.small_disk import SmallDiskRun, mounted

    with tempfile.TemporaryDirectory(prefix="foreshore-disk-", ignore_cleanup_errors=True) as folder:
        disk = Path(folder) / "disk"
        with mounted(disk):
            run = SmallDiskRun(Path(folder), disk, seed=1)
            try:
                figures = run.run(20 if quick else 1000)
            finally:
                run.close()
    for finding in figures.findings:
        print(finding)
    return {
        "trials": float(figures.num_trials),
        "refused": float(figures.num_refused),
        "enospc_in_mid_update": float(figures.enospc_in_mid_update),
        "lost_slots": float(figures.lost_slots),
        **{name: float(count) for name, count in sorted(figures.results.items())},
    }
