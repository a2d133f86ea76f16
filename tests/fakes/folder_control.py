"""A control plane with one compile job whose blobs are files; keeps what the worker says.

Run as a program it is a real worker process on that job: `python -m tests.fakes.folder_control SOURCE HOME RESULT`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from compiler.targets import load_target
from compiler.worker import Worker
from model_registry.client import Lease, OnBytes
from model_registry.manifest import Manifest
from model_registry.sources import hash_source, recognise, source_digest
from wire.process import replace_durably

LENIENT = {"tensor": {"min_top1_agreement": 0.5, "min_cosine": 0.9, "gate_crops": 16, "calibration_crops": 16}}


class FolderControl:
    """What `compiler.worker.Control` asks for."""

    def __init__(self, source: Path, recipe: dict[str, Any], target: str = "cpu-x86") -> None:
        found = hash_source(recognise(source))
        self._source = source
        files = [{"path": f.path, "digest": f.digest, "size_bytes": f.size_bytes} for f in found.files]
        self.spec = {
            "name": "small",
            "model_kind": "tensor",
            "target": load_target(target).model_dump(mode="json"),
            "recipe": recipe,
            "source": {"format": "onnx", "files": files, "digest": source_digest(found.format, found.files)},
            "golden": None,
            "vision": None,
        }
        self.cancel = threading.Event()
        self.heartbeats: list[tuple[str, float, str]] = []
        self.completed: str | None = None
        self.failed: dict[str, str] | None = None
        self.stages: list[dict[str, Any]] = []

    def lease_job(self, worker_id: str, kinds: Any, targets: Any) -> Lease | None:
        return Lease("job", "lease", 30.0, self.spec)

    def heartbeat(
        self, lease: Lease, *, stage: str, progress: float, message: str = "", log: str | None = None
    ) -> bool:
        self.heartbeats.append((stage, progress, message))
        return self.cancel.is_set()

    def complete_job(self, lease: Lease, manifest: str, *, stages: Any = None) -> None:
        self.completed, self.stages = manifest, stages

    def fail_job(self, lease: Lease, *, code: str, reason: str, log: str) -> None:
        self.failed = {"code": code, "reason": reason, "log": log}

    def download_blob(self, digest: str, path: Path, *, max_bytes: int, on_bytes: OnBytes) -> int:
        shutil.copyfile(self._source, path)
        return path.stat().st_size

    def upload_artefact(self, root: Path, files: Any, manifest: Manifest, on_bytes: OnBytes) -> str:
        for file in files:
            on_bytes(file.size_bytes)
            assert hashlib.sha256((root / file.path).read_bytes()).hexdigest() == file.digest
        return manifest.digest


def _main(source: Path, home: Path, result: Path) -> None:
    control = FolderControl(source, LENIENT, "rtx")
    Worker(control, home, "w").run(num_jobs=1)
    document = {"completed": control.completed, "failed": control.failed, "stages": control.stages}
    replace_durably(result, json.dumps(document).encode())


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
