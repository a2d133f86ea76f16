"""The frame of every benchmark: arguments in, one JSON object as the last line out.

A benchmark module has `GOALS` and `run(quick: bool) -> dict[str, float]` (and, where it knows several, `DEVICES` and a
`device` argument); `python -m benchmarks NAME` calls it and prints `{"name", "figures", "goals", "environment"}`.
Times are never asserted: a missed goal is reported, not raised.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

PACKAGES = ("torch", "onnxruntime", "onnxruntime-genai", "transformers", "triton", "numpy")


@dataclass(frozen=True)
class Goal:
    """What a figure should reach."""

    figure: str
    goal: float
    sense: Literal["<=", ">="]

    def is_met(self, value: float | None) -> bool:
        """Whether `value` reaches the goal; a figure that was not measured does not."""
        if value is None:
            return False
        return value <= self.goal if self.sense == "<=" else value >= self.goal


def report(
    name: str, figures: Mapping[str, float], goals: Sequence[Goal], extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The benchmark's result as plain data."""
    return {
        "name": name,
        "figures": dict(figures),
        "goals": [{**asdict(goal), "met": goal.is_met(figures.get(goal.figure))} for goal in goals],
        "environment": {**environment(), **(extra or {})},
    }


def environment() -> dict[str, Any]:
    """Machine and versions, so that a figure can be read later."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "accelerator": _accelerator(),
        "load_1min": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def emit(result: Mapping[str, Any], json_file: Path | None) -> None:
    """Print goals for people, then the object on one last line; also into `json_file`."""
    for goal in result["goals"]:
        value = result["figures"].get(goal["figure"])
        shown = "not measured" if value is None else f"{value:.6g}"
        mark = "met   " if goal["met"] else "missed"
        print(f"  {mark} {goal['figure']} = {shown} (goal {goal['sense']} {goal['goal']:g})", file=sys.stderr)
    line = json.dumps(result)
    if json_file is not None:
        json_file.write_text(line + "\n")
    print(line, flush=True)


def _accelerator() -> str:
    """The GPU's name, or "" without one; torch is not imported for it."""
    torch: Any = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_available() else ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
