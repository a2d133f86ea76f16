"""1,000 updates on real file systems of 48 MiB that fill and empty (see tests/faults/small_disk.py).

Several devices run side by side, each on a file system of its own with its own seed: a trial is mostly waiting.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Goal

if TYPE_CHECKING:
    from tests.faults.small_disk import Figures

GOALS = [Goal("trials", 1000, ">="), Goal("enospc_in_mid_update", 0, "<="), Goal("lost_slots", 0, "<=")]
NUM_DEVICES = 8


def run(quick: bool) -> dict[str, float]:
    """Needs the right to mount a tmpfs."""
    share = -(-(24 if quick else 1000) // NUM_DEVICES)
    with ProcessPoolExecutor(NUM_DEVICES, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(_one_device, range(1, NUM_DEVICES + 1), [share] * NUM_DEVICES))
    for part in parts:
        for finding in part.findings:
            print(finding)
    return {
        "trials": float(sum(part.num_trials for part in parts)),
        "refused": float(sum(part.num_refused for part in parts)),
        "enospc_in_mid_update": float(sum(part.enospc_in_mid_update for part in parts)),
        "lost_slots": float(sum(part.lost_slots for part in parts)),
        **{name: float(count) for name, count in sorted(sum((p.results for p in parts), Counter[str]()).items())},
    }


def _one_device(seed: int, num_trials: int) -> Figures:
    from tests.faults.small_disk import SmallDiskRun, mounted

    with tempfile.TemporaryDirectory(prefix="foreshore-disk-", ignore_cleanup_errors=True) as folder:
        disk = Path(folder) / "disk"
        with mounted(disk):
            run = SmallDiskRun(Path(folder), disk, seed)
            try:
                return run.run(num_trials)
            finally:
                run.close()
