"""The worker with real processes: finished, cancelled, crashed and killed jobs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from compiler.worker import Worker
from model_registry.client import OnBytes
from model_registry.manifest import Manifest
from tests.fakes.compiler_models import write_classifier
from tests.fakes.folder_control import LENIENT, FolderControl

pytestmark = pytest.mark.faults

EVERYTHING = os.environ.get("FORESHORE_FAULTS") == "all"
NUM_CRASHES = 50 if EVERYTHING else 4
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGKILL)
KILL_AFTER = (1, 2, 4, 6, 8, 9) if EVERYTHING else (5,)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def control(tmp_path: Path) -> FolderControl:
    return FolderControl(write_classifier(tmp_path / "classifier.onnx"), LENIENT)


def _job_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "compiler.job" in " ".join(p.cmdline())]


def _wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def _leftovers(home: Path) -> list[Path]:
    """Files of jobs and half-built stages."""
    half = (home / "cache").glob(".building-*")
    return [*half, *(path for path in (home / "jobs").rglob("*") if path.is_file())]


@dataclass(frozen=True)
class Finished:
    """A job that a worker saw through, in a home where a killed worker had left `orphan`."""

    control: FolderControl
    home: Path
    orphan: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    orphan = folder / "home" / "jobs" / "4194399" / "x"
    assert not psutil.pid_exists(4194399)
    orphan.mkdir(parents=True)
    (orphan / "file").write_text("left")
    control = FolderControl(write_classifier(folder / "classifier.onnx"), LENIENT)
    Worker(control, folder / "home", "w").run(num_jobs=1)
    return Finished(control, folder / "home", orphan)


def test_a_job_is_compiled_in_its_own_process_and_completed(finished: Finished) -> None:
    assert finished.control.failed is None
    assert finished.control.completed is not None
    assert _leftovers(finished.home) == []


def test_a_failed_gate_is_a_failed_job_with_its_code(control: FolderControl, tmp_path: Path) -> None:
    control.spec["recipe"] = {
        "tensor": {"min_cosine": 1.0, "float_rungs": [0], "gate_crops": 8, "calibration_crops": 8}
    }
    Worker(control, tmp_path / "home", "w").run(num_jobs=1)
    assert control.failed is not None
    assert control.failed["code"] == "gate_failed"


def test_a_crash_of_the_process_is_a_failed_job_and_not_the_workers_end(control: FolderControl, tmp_path: Path) -> None:
    thread = threading.Thread(target=Worker(control, tmp_path / "home", "w").run_one)
    thread.start()
    _wait_for(_job_processes)
    _job_processes()[0].send_signal(signal.SIGSEGV)
    thread.join(60)
    assert control.failed is not None
    assert control.failed["code"] == "crashed"
    assert "SIGSEGV" in control.failed["reason"]


def test_a_cancelled_job_ends_at_once_and_leaves_nothing(control: FolderControl, tmp_path: Path) -> None:
    thread = threading.Thread(target=Worker(control, tmp_path / "home", "w").run_one)
    thread.start()
    _wait_for(_job_processes)
    control.cancel.set()
    thread.join(30)
    assert not thread.is_alive()
    assert _job_processes() == []
    assert control.completed is None
    assert control.failed is None
    assert _leftovers(tmp_path / "home") == []


class EndlessControl(FolderControl):
    """A control plane on a slow line: cancels once a transfer has begun, which would then take a minute."""

    def __init__(self, source: Path, step: str) -> None:
        super().__init__(source, LENIENT)
        self.step = step
        self.num_pieces = 0

    def download_blob(self, digest: str, path: Path, *, max_bytes: int, on_bytes: OnBytes) -> int:
        self._transfer("fetch", on_bytes)
        return super().download_blob(digest, path, max_bytes=max_bytes, on_bytes=on_bytes)

    def upload_artefact(self, root: Path, files: Any, manifest: Manifest, on_bytes: OnBytes) -> str:
        self._transfer("upload", on_bytes)
        return super().upload_artefact(root, files, manifest, on_bytes)

    def _transfer(self, step: str, on_bytes: OnBytes) -> None:
        while step == self.step and self.num_pieces < 600:
            self.cancel.set()
            time.sleep(0.1)
            self.num_pieces += 1
            on_bytes(1)


@pytest.mark.parametrize("step", ["fetch", "upload"])
def test_a_job_is_cancelled_in_the_middle_of_a_transfer(finished: Finished, tmp_path: Path, step: str) -> None:
    control = EndlessControl(write_classifier(tmp_path / "classifier.onnx"), step)
    Worker(control, finished.home, "w").run(num_jobs=1)  # whose stages are there
    assert 0 < control.num_pieces < 600
    assert control.completed is None
    assert control.failed is None
    assert _leftovers(finished.home) == []


def test_a_source_that_does_not_match_its_digest_is_refused(control: FolderControl, tmp_path: Path) -> None:
    control.spec["source"]["digest"] = "0" * 64
    Worker(control, tmp_path / "home", "w").run(num_jobs=1)
    assert control.failed is not None
    assert control.failed["code"] == "integrity"


def test_what_a_killed_worker_left_is_removed_by_the_next(finished: Finished) -> None:
    assert not finished.orphan.exists()


def test_progress_rises_names_stages_and_tells_the_time_left(finished: Finished) -> None:
    control = finished.control
    shares = [share for stage, share, _ in control.heartbeats if stage not in ("fetch", "upload")]
    assert shares == sorted(shares)
    assert any("s left" in message for _, _, message in control.heartbeats)
    assert {stage["stage"] for stage in control.stages} >= {"clean", "calibrate", "quantise", "measure", "package"}


def test_every_native_crash_is_a_failed_job_that_says_why_and_the_worker_goes_on(tmp_path: Path) -> None:
    """The job's process or a tool below it is ended by a signal at a random moment; the cache is cold each time."""
    random_ = random.Random(4)
    source = write_classifier(tmp_path / "classifier.onnx")
    for number in range(NUM_CRASHES):
        control = FolderControl(source, LENIENT, "rtx")
        home = tmp_path / f"home{number}"
        thread = threading.Thread(target=Worker(control, home, "w").run_one)
        thread.start()
        _wait_for(_job_processes)
        if number % 2:
            _wait_for(_tool_processes)
        else:
            time.sleep(random_.uniform(0, 1))
        victims = _tool_processes() if number % 2 else _job_processes()
        crash = random_.choice(CRASHES)
        victims[0].send_signal(crash)
        thread.join(60)
        assert not thread.is_alive()
        assert control.failed is not None, number
        assert control.failed["code"] in ("crashed", "tool_crashed")
        assert signal.Signals(crash).name in control.failed["reason"]
        assert _leftovers(home) == []
    control = FolderControl(source, LENIENT)
    Worker(control, tmp_path / "home0", "w").run(num_jobs=1)
    assert control.completed is not None


def _tool_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "compiler.tools" in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.mark.parametrize("num_stages", KILL_AFTER)
def test_a_killed_worker_loses_at_most_the_stage_it_was_in(tmp_path: Path, num_stages: int) -> None:
    source = write_classifier(tmp_path / "classifier.onnx")
    home, result = tmp_path / "home", tmp_path / "result.json"
    command = [sys.executable, "-m", "tests.fakes.folder_control", str(source), str(home), str(result)]
    worker = subprocess.Popen(command, cwd=ROOT)
    _wait_for(lambda: len(_built_stages(home)) >= num_stages)
    jobs = psutil.Process(worker.pid).children(recursive=True)
    worker.kill()
    worker.wait(30)
    psutil.wait_procs(jobs, timeout=5)
    assert not any(p.is_running() for p in jobs)
    kept = _built_stages(home)
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    outcome = json.loads(result.read_bytes())
    assert outcome["failed"] is None
    rebuilt = {f"{s['stage']}-{s['key'][:40]}" for s in outcome["stages"] if not s["was_cached"]}
    assert rebuilt.isdisjoint(kept)
    assert _leftovers(home) == []


def _built_stages(home: Path) -> set[str]:
    return {path.parent.name for path in (home / "cache").glob("[!.]*/stage.json")}
