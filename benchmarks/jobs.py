"""Compile jobs under a real control plane: how fast a cancelled one is gone, what kill -9 costs, how good the ETA is.

A worker process compiles MobileNetV2, each time from an empty build cache (but with the times that it learned). Jobs
are cancelled over HTTP at seeded moments: `cancel_s` lasts until none of the job's processes and files is left.
Workers are killed with -9 at seeded moments; `stages_lost` are the stages that had been begun and had to be built once
more. `eta_error` compares what a message said was left with what was, relative to the whole job.
"""

from __future__ import annotations

import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Goal
from model_registry.sources import hash_file
from tests.fakes.control import ControlProcess, wait_until

SOURCE = Path(__file__).resolve().parent.parent / ".cache" / "models" / "mobilenet_v2.onnx"
RECIPE = {"tensor": {"gate_crops": 48, "calibration_crops": 24}}
CANCEL_GOAL_S = 2.0
JOB_TIMEOUT_S = 400.0
GOALS = (
    Goal("cancel_s_max", CANCEL_GOAL_S, "<="),
    Goal("cancel_leftovers", 0, "<="),
    Goal("stages_lost_max", 1, "<="),
)
_LEFT = re.compile(r"about (\d+) s left")


@dataclass
class Site:
    """A control plane, the uploaded source, and a home for workers."""

    control: ControlProcess
    home: Path
    digest: str
    worker: subprocess.Popen[bytes] | None = None
    num_orders: int = 0

    def start_worker(self) -> None:
        """A worker process."""
        command = [sys.executable, "-m", "cloud.cli", "worker", "--url", self.control.url, "--home", str(self.home)]
        command += ["--token-file", str(self.control.home / "tokens" / "worker")]
        with (self.home.parent / "worker.log").open("ab") as log:
            self.worker = subprocess.Popen(command, stdout=log, stderr=log)

    def kill_worker(self) -> None:
        """kill -9."""
        assert self.worker is not None
        self.worker.kill()
        self.worker.wait(10)

    def order(self) -> str:
        """Queue a job that no earlier result answers; its id."""
        self.num_orders += 1
        crops = RECIPE["tensor"]["gate_crops"] + self.num_orders  # another recipe: never the same build twice
        source = {"path": SOURCE.name, "digest": self.digest, "size_bytes": SOURCE.stat().st_size}
        body = {
            "name": "vision", "targets": ["cpu-x86"], "source": {"format": "onnx", "files": [source]},
            "recipe": {"tensor": {**RECIPE["tensor"], "gate_crops": crops}},
        }  # fmt: skip
        return str(self.control.ok("POST", "/publications", body)["jobs"][0]["job_id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """Where the job is."""
        return dict(self.control.ok("GET", f"/jobs/{job_id}"))

    def wait(self, job_id: str, *states: str) -> dict[str, Any]:
        """The job once it is in one of `states`."""
        return dict(wait_until(lambda: (j := self.job(job_id))["state"] in states and j, f"{states}", JOB_TIMEOUT_S))

    def empty_cache(self) -> None:
        """Drop built stages, keep the learned times."""
        for entry in (self.home / "cache").iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)

    def stages(self) -> set[str]:
        """Entries of the build cache."""
        return {path.parent.name for path in (self.home / "cache").glob("[!.]*/stage.json")}

    def leftovers(self) -> int:
        """Processes below the worker, files of jobs and half-built stages."""
        assert self.worker is not None
        files = [path for path in (self.home / "jobs").rglob("*") if path.is_file()]
        half = list((self.home / "cache").glob(".building-*"))
        return len(psutil.Process(self.worker.pid).children(recursive=True)) + len(files) + len(half)


def run(quick: bool) -> dict[str, float]:
    """All figures; `quick` cancels 4 times and kills 2."""
    random_ = random.Random(4)
    with tempfile.TemporaryDirectory(prefix="bench-jobs-") as folder:
        control = ControlProcess(Path(folder, "control"))
        control.start()
        site = Site(control, Path(folder, "worker"), hash_file(SOURCE))
        try:
            control.put_blob(SOURCE.read_bytes())
            site.start_worker()
            whole_s = _one(site)[0]  # teaches the times
            figures = _eta(site) | {"job_s": whole_s}
            figures |= _cancels(site, random_, whole_s, 4 if quick else 16)
            return figures | _kills(site, random_, whole_s, 2 if quick else 8)
        finally:
            site.kill_worker()
            control.stop()


def _one(site: Site) -> tuple[float, list[tuple[float, str]]]:
    """Seconds of a whole job from an empty cache, and what it said when."""
    job_id, said = site.order(), []
    site.wait(job_id, "running")
    started = time.monotonic()
    while (job := site.job(job_id))["state"] == "running":
        said.append((time.monotonic() - started, job["message"]))
        time.sleep(0.3)
    assert job["state"] == "succeeded", job["reason"]
    return time.monotonic() - started, said


def _eta(site: Site) -> dict[str, float]:
    site.empty_cache()
    whole_s, said = _one(site)
    errors = [abs(float(left[1]) - (whole_s - at)) / whole_s for at, message in said if (left := _LEFT.search(message))]
    return {"eta_error_median": statistics.median(errors), "eta_num": len(errors)} if errors else {"eta_num": 0}


def _cancels(site: Site, random_: random.Random, whole_s: float, num: int) -> dict[str, float]:
    taken, left = [], 0
    for _ in range(num):
        site.empty_cache()
        job_id = site.order()
        site.wait(job_id, "running")
        time.sleep(random_.uniform(0, 0.9 * whole_s))
        stage = site.job(job_id)["stage"]
        started = time.monotonic()
        if site.control.call("POST", f"/jobs/{job_id}/cancel").status_code == 409:
            continue  # it was done
        while site.leftovers() and time.monotonic() - started < 30:
            time.sleep(0.02)
        taken.append(time.monotonic() - started)
        left += site.leftovers()
        print(f"  cancelled in {stage}: {taken[-1]:.2f} s", flush=True)
    if not taken:
        return {"num_cancels": 0}
    return {
        "num_cancels": len(taken), "cancel_s_median": statistics.median(taken), "cancel_s_max": max(taken),
        "cancel_leftovers": left,
    }  # fmt: skip


def _kills(site: Site, random_: random.Random, whole_s: float, num: int) -> dict[str, float]:
    lost = []
    for _ in range(num):
        site.empty_cache()
        job_id = site.order()
        site.wait(job_id, "running")
        time.sleep(random_.uniform(0.2, 0.9) * whole_s)
        site.kill_worker()
        built, num_half = site.stages(), len(list((site.home / "cache").glob(".building-*")))
        site.start_worker()
        job = site.wait(job_id, "succeeded", "failed")
        assert job["state"] == "succeeded", job["reason"]
        rebuilt = {f"{s['stage']}-{s['key'][:40]}" for s in job["stages"] if not s["was_cached"]}
        lost.append(len(rebuilt & built) + num_half)
        print(f"  killed with {len(built)} stages built: {lost[-1]} lost, attempt {job['attempts']}", flush=True)
    return {"num_kills": num, "stages_lost_max": max(lost)}
