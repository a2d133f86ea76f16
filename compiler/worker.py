"""The compile worker: leases jobs from a control plane and runs each in a process of its own.

Rules, in order. The source is fetched and verified before a process starts. From the lease on, two heartbeats a second
go out; a cancelled or lost job is ended with its whole process group, transfers and files at once. A process that
crashes is a failed job with the tail of its log, never the end of the worker. The artefact is uploaded before the job
is called complete. A worker that is killed says nothing: its lease runs out and the job is leased again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compiler.cache import BuildCache
from compiler.targets import parse_target
from model_registry.chunking import describe_folder
from model_registry.client import Lease, OnBytes
from model_registry.manifest import ArtefactFile, Manifest, parse_manifest
from model_registry.sources import KIND_BY_FORMAT, SourceFile, source_digest
from wire.errors import (
    ConflictError,
    ForeshoreError,
    IntegrityError,
    InvalidInputError,
    TimedOutError,
    UnavailableError,
)

HEARTBEAT_S = 0.5
JOB_TIMEOUT_S = 3600.0
LOG_TAIL_BYTES = 8000
MAX_SOURCE_BYTES = 64 << 30
MAX_RETRY_S = 30.0


class Control(Protocol):
    """What a worker needs of the control plane; `model_registry.client.ControlClient` is one."""

    def lease_job(self, worker_id: str, kinds: Any, targets: Any) -> Lease | None:
        """The next job, or None when there was none for a while."""

    def heartbeat(
        self, lease: Lease, *, stage: str, progress: float, message: str = "", log: str | None = None
    ) -> bool:
        """True when the job is to be cancelled."""

    def complete_job(self, lease: Lease, manifest: str, *, stages: Any = None) -> None:
        """The job is done."""

    def fail_job(self, lease: Lease, *, code: str, reason: str, log: str) -> None:
        """The job has failed."""

    def download_blob(self, digest: str, path: Path, *, max_bytes: int, on_bytes: OnBytes) -> int:
        """Fetch and verify a blob into a file."""

    def upload_artefact(self, root: Path, files: Any, manifest: Manifest, on_bytes: OnBytes) -> str:
        """Store chunks and manifest."""


class _Cancelled(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The job was cancelled or its lease is lost; there is nothing to report."""


@dataclass
class _Progress:
    """Where the job is, as the next heartbeat says it."""

    stage: str = "fetch"
    share: float = 0.0
    message: str = ""


class Worker:
    """Runs compile jobs one at a time; `home` holds the build cache and the running job's files."""

    def __init__(self, control: Control, home: Path, name: str) -> None:
        self._control = control
        self._home = home.resolve()
        self._name = name
        self._jobs = self._home / "jobs" / str(os.getpid())
        self._cache = BuildCache(self._home / "cache")

    def run(self, *, num_jobs: int | None = None) -> None:
        """Work until `num_jobs` jobs are done (None: for ever). An unreachable control plane is waited for."""
        _remove_orphans(self._home / "jobs")
        done, failures = 0, 0
        while num_jobs is None or done < num_jobs:
            try:
                done += self.run_one()
                failures = 0
            except UnavailableError:
                failures += 1
                time.sleep(min(MAX_RETRY_S, 0.5 * 2 ** min(failures, 8)) * random.uniform(0.5, 1.0))

    def run_one(self) -> bool:
        """Lease one job and see it through; False when there was none."""
        lease = self._control.lease_job(self._name, ["compile"], [])
        if lease is None:
            return False
        self._jobs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._jobs))
        log = folder / "job.log"
        try:
            self._compile(lease, folder, log)
        except _Cancelled:
            pass
        except ConflictError:  # the lease is lost: another worker has the job
            pass
        except ForeshoreError as error:
            reason = f"{error.message} ({error.remedy})" if error.remedy else error.message
            self._fail(lease, error.code, reason, _tail(log))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._cache.sweep()
        return True

    def _compile(self, lease: Lease, folder: Path, log: Path) -> None:
        progress = _Progress(message="fetching the source")
        with _Heart(self._control, lease, progress, log) as heart:
            request = self._prepare(lease, folder, heart)
            result = self._run_process(request, folder, log, progress, heart)
            manifest = parse_manifest(Path(result["manifest"]).read_bytes())
            progress.stage, progress.message = "upload", "storing the artefact"
            files = _files(request, manifest)
            digest = self._control.upload_artefact(Path(request["out"]), files, manifest, heart.check)
            heart.check()
        self._control.complete_job(lease, digest, stages=result["stages"])

    def _prepare(self, lease: Lease, folder: Path, heart: _Heart) -> dict[str, Any]:
        """Fetch what the job needs and write down the request for its process."""
        spec = lease.spec
        try:
            source, target = spec["source"], parse_target(spec["target"])
            files = tuple(SourceFile(f["path"], f["digest"], f["size_bytes"]) for f in source["files"])
            source_format, wanted, golden = source["format"], source["digest"], spec.get("golden")
            request = {key: spec.get(key) for key in ("name", "model_kind", "recipe", "vision")}
        except (KeyError, TypeError) as error:
            raise InvalidInputError(
                f"the job's description lacks {error}", remedy="update the control plane"
            ) from error
        if source_format not in KIND_BY_FORMAT or not files or sum(f.size_bytes for f in files) > MAX_SOURCE_BYTES:
            raise InvalidInputError(
                f"the job's source is a {source_format!r} of {len(files)} files", remedy="publish again"
            )
        if source_digest(source_format, files) != wanted:
            raise IntegrityError("the source's files do not add up to its digest", remedy="publish the model again")
        for file in files:
            path = (folder / "source" / file.path).resolve()
            if not path.is_relative_to(folder / "source"):
                raise InvalidInputError(f"source path {file.path!r} leaves its folder", remedy="publish again")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._control.download_blob(file.digest, path, max_bytes=file.size_bytes, on_bytes=heart.check)
            heart.check()
        if golden:
            self._control.download_blob(golden, folder / "golden.npz", max_bytes=256 << 20, on_bytes=heart.check)
        is_folder = source_format == "huggingface"
        main = next((f.path for f in files if f.path.endswith((".onnx", ".gguf"))), files[0].path)
        return request | {
            "target": target.model_dump(mode="json"),
            "source_format": source_format,
            "source_digest": wanted,
            "source": str(folder / "source" if is_folder else folder / "source" / main),
            "golden": str(folder / "golden.npz") if golden else None,
            "cache": str(self._cache.root),
            "out": str(folder / "artefact"),
        }

    def _run_process(
        self, request: dict[str, Any], folder: Path, log: Path, progress: _Progress, heart: _Heart
    ) -> dict[str, Any]:
        """Run the job's process to its end; return its last line: the manifest's path and the stages."""
        request_path = folder / "request.json"
        request_path.write_text(json.dumps(request))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "TMPDIR": str(folder)}
        for secret in ("FORESHORE_TOKEN_FILE", "FORESHORE_URL"):
            environment.pop(secret, None)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "compiler.job", str(request_path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        try:
            return _follow(process, progress, heart)
        finally:
            end_group(process)

    def _fail(self, lease: Lease, code: str, reason: str, log: str) -> None:
        with contextlib.suppress(ConflictError):  # the lease is lost: nobody waits for this any more
            self._control.fail_job(lease, code=code, reason=reason[:2000], log=log)


class _Heart:
    """Sends heartbeats from a thread of its own, so that slow work never costs the lease."""

    def __init__(self, control: Control, lease: Lease, progress: _Progress, log: Path) -> None:
        self._control, self._lease, self._progress, self._log = control, lease, progress, log
        self._stop = threading.Event()
        self.cancelled = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heart-{lease.job_id}", daemon=True)

    def __enter__(self) -> _Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def check(self, num_bytes: int = 0) -> None:
        """Raise when the job is to end; asked between pieces of what is fetched or stored, too."""
        if self.cancelled.is_set():
            raise _Cancelled

    def _beat(self) -> None:
        while not self._stop.is_set():
            try:
                progress = self._progress
                cancel = self._control.heartbeat(
                    self._lease,
                    stage=progress.stage,
                    progress=progress.share,
                    message=progress.message[:500],
                    log=_tail(self._log),
                )
            except UnavailableError:
                cancel = False  # the lease outlives a short outage
            except ForeshoreError:  # lost, revoked or unknown: the work is nobody's
                cancel = True
            if cancel:
                self.cancelled.set()
                return
            self._stop.wait(HEARTBEAT_S)


def _follow(process: subprocess.Popen[bytes], progress: _Progress, heart: _Heart) -> dict[str, Any]:
    lines: queue.Queue[bytes | None] = queue.Queue(maxsize=1000)
    threading.Thread(target=_read_lines, args=(process, lines), name="job-output", daemon=True).start()
    deadline = time.monotonic() + JOB_TIMEOUT_S
    result: dict[str, Any] = {}
    while True:
        heart.check()
        if time.monotonic() > deadline:
            raise TimedOutError(
                f"the job ran over {JOB_TIMEOUT_S:.0f} s", remedy="use a smaller model or a faster worker"
            )
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            continue
        if line is None:
            break
        document = json.loads(line)
        if "stage" in document:
            progress.stage, progress.share = document["stage"], document["progress"]
            progress.message = document["message"]
        else:
            result = document
    return _outcome(result, process.wait(timeout=30))


def _outcome(result: dict[str, Any], status: int) -> dict[str, Any]:
    if "manifest" in result:
        return result
    if "error" in result:
        raise _JobError.of(result["error"])
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    raise _JobError.of({"code": "crashed", "message": f"the compile process ended with {how}", "remedy": "see its log"})


class _JobError(ForeshoreError):
    """What the job's process said about its failure, with the code it gave."""

    @classmethod
    def of(cls, error: dict[str, Any]) -> _JobError:
        """The error in a process's last line."""
        made = cls(error["message"], remedy=error.get("remedy", ""))
        made.code = error["code"]  # type: ignore[misc]
        return made


def _read_lines(process: subprocess.Popen[bytes], lines: queue.Queue[bytes | None]) -> None:
    if process.stdout is not None:
        with contextlib.suppress(ValueError, OSError):  # closed under us when the job is ended
            for line in process.stdout:
                lines.put(line)
    lines.put(None)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all it started, at once, and collect it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    if process.stdout is not None:
        process.stdout.close()


def _files(request: dict[str, Any], manifest: Manifest) -> list[ArtefactFile]:
    """The artefact's files as they are on disk now, which must be those of the manifest."""
    files = describe_folder(Path(request["out"]))
    if files != manifest.files:
        raise IntegrityError("the artefact changed after it was described", remedy="compile it again")
    return files


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _remove_orphans(jobs: Path) -> None:
    """Remove what killed workers left: each folder is named by the process that owned it."""
    for folder in jobs.glob("*"):
        if folder.name == str(os.getpid()) or not Path("/proc", folder.name).exists():
            shutil.rmtree(folder, ignore_errors=True)
