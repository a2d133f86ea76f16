"""A real agent killed, cut and failed at any system call from fetch to garbage collection (see tests/faults).

Several devices run side by side, each with its own broker and seed. `refetched_bytes_max` counts what a device asked
for again although it lay verified on its disk when it died; frames on their way (at most 8) are not part of it.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import Goal

DEVICES_PER_CORE = 3  # a life is mostly waiting
GOALS = [
    Goal("kills", 2000, ">="),
    Goal("torn_writes", 500, ">="),
    Goal("states_without_model", 0, "<="),
    Goal("wrong_digests", 0, "<="),
    Goal("stuck_updates", 0, "<="),
    Goal("refetched_bytes_max", 4 * 64 * 1024, "<="),
]
VISION = [
    Path(__file__).resolve().parent.parent / ".cache" / "models" / f"mobilenet_v2{kind}.onnx" for kind in ("", "_tuned")
]


def run(quick: bool, *, num_devices: int | None = None, max_s: float = 4 * 3600) -> dict[str, float]:
    """Share the faults among devices; their counts add up."""
    kills, torn_writes = (70, 30) if quick else (2000, 500)
    num_devices = num_devices or DEVICES_PER_CORE * (os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    share = (-(-kills // num_devices), -(-torn_writes // num_devices), time.monotonic() + max_s)
    begun = time.monotonic()
    with ProcessPoolExecutor(num_devices, mp_context=context) as pool:
        parts = list(pool.map(_one_device, range(1, num_devices + 1), [share] * num_devices))
    for part in parts:
        for finding in part["findings"]:
            print(finding)
    counted = ("kills", "torn_writes", "states_without_model", "wrong_digests", "stuck_updates", "answers")
    figures = {name: float(sum(part[name] for part in parts)) for name in counted}
    figures["refetched_bytes_max"] = float(max(part["refetched_bytes_max"] for part in parts))
    for kind in ("results", "faults"):
        for name in sorted({name for part in parts for name in part[kind]}):
            figures[f"{kind}: {name}"] = float(sum(part[kind].get(name, 0) for part in parts))
    figures["duration_s"] = time.monotonic() - begun
    return figures


def _one_device(seed: int, share: tuple[int, int, float]) -> dict[str, Any]:
    from tests.faults.agent_crashes import CrashRun

    kills, torn_writes, until_s = share
    vision = VISION if all(path.exists() for path in VISION) else None
    with tempfile.TemporaryDirectory(prefix="foreshore-crash-", ignore_cleanup_errors=True) as folder:
        run = CrashRun(Path(folder), seed, vision=vision)
        try:
            return run.run(kills, torn_writes, until_s=until_s).to_dict()
        finally:
            run.close()
