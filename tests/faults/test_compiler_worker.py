"""The worker with real processes: finished, cancelled, crashed and killed jobs."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from compiler.targets import load_target
from compiler.worker import Worker
from model_registry.client import Lease
from model_registry.manifest import Manifest
from model_registry.sources import hash_source, recognise, source_digest
from tests.fakes.compiler_models import write_classifier

pytestmark = pytest.mark.faults


class FolderControl:
    """A control plane with one job whose blobs are files; keeps what the worker says."""

    def __init__(self, source: Path, recipe: dict[str, Any]) -> None:
        found = hash_source(recognise(source))
        self._source = source
        files = [{"path": f.path, "digest": f.digest, "size_bytes": f.size_bytes} for f in found.files]
        self.spec = {
            "name": "small",
            "model_kind": "tensor",
            "target": load_target("cpu-x86").model_dump(mode="json"),
            "recipe": recipe,
            "source": {"format": "onnx", "files": files, "digest": source_digest(found.format, found.files)},
            "golden": None,
            "vision": None,
        }
        self.cancel = threading.Event()
        self.stages: list[str] = []
        self.completed: str | None = None
        self.failed: dict[str, str] | None = None

    def lease_job(self, worker_id: str, kinds: Any, targets: Any) -> Lease | None:
        return Lease("job", "lease", 30.0, self.spec)

    def heartbeat(
        self, lease: Lease, *, stage: str, progress: float, message: str = "", log: str | None = None
    ) -> bool:
        self.stages.append(stage)
        return self.cancel.is_set()

    def complete_job(self, lease: Lease, manifest: str, *, stages: Any = None) -> None:
        self.completed = manifest

    def fail_job(self, lease: Lease, *, code: str, reason: str, log: str) -> None:
        self.failed = {"code": code, "reason": reason, "log": log}

    def download_blob(self, digest: str, path: Path, *, max_bytes: int) -> int:
        shutil.copyfile(self._source, path)
        return path.stat().st_size

    def upload_artefact(self, root: Path, files: Any, manifest: Manifest) -> str:
        for file in files:
            assert hashlib.sha256((root / file.path).read_bytes()).hexdigest() == file.digest
        return manifest.digest


LENIENT = {"tensor": {"min_top1_agreement": 0.5, "min_cosine": 0.9, "gate_crops": 16, "calibration_crops": 16}}


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
    return [path for path in (home / "jobs").rglob("*") if path.is_file()]


def test_a_job_is_compiled_in_its_own_process_and_completed(control: FolderControl, tmp_path: Path) -> None:
    Worker(control, tmp_path / "home", "w").run(num_jobs=1)
    assert control.failed is None
    assert control.completed is not None
    assert _leftovers(tmp_path / "home") == []


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


def test_a_source_that_does_not_match_its_digest_is_refused(control: FolderControl, tmp_path: Path) -> None:
    control.spec["source"]["digest"] = "0" * 64
    Worker(control, tmp_path / "home", "w").run(num_jobs=1)
    assert control.failed is not None
    assert control.failed["code"] == "integrity"


def test_what_a_killed_worker_left_is_removed_by_the_next(control: FolderControl, tmp_path: Path) -> None:
    orphan = tmp_path / "home" / "jobs" / "4194399" / "x"
    orphan.mkdir(parents=True)
    (orphan / "file").write_text("left")
    assert not psutil.pid_exists(4194399) or os.getpid() != 4194399
    Worker(control, tmp_path / "home", "w").run(num_jobs=1)
    assert not orphan.exists()
