"""Compile jobs: leased to workers, kept by heartbeats, tried once more when a worker vanishes, cancelled on request.

A lease ends: without a heartbeat in `LEASE_S` the job is free again, and the second time it is
lost it has failed, with the log so far. A worker that lost its lease hears 409 and stops. Builds are cached by digest
of all that decides their output, so the same order twice costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control import audit
from cloud.control.database import Database, announce
from cloud.control.identity import Principal, new_id
from cloud.control.tables import Build, Job
from model_registry import catalogue
from model_registry.blobs import BlobStore
from model_registry.manifest import MAX_MANIFEST_BYTES, canonical_bytes, parse_manifest, sha256
from wire.errors import ConflictError, IntegrityError, NotFoundError

LEASE_S = 30.0
MAX_ATTEMPTS = 2
MAX_LOG_CHARS = 64 * 1024
ACTIVE = ("queued", "running")
FINISHED = ("succeeded", "failed", "cancelled")


class Jobs:
    """The job queue. `on_finished` hears of each job that ends, inside the same transaction."""

    def __init__(self, database: Database, blobs: BlobStore, *, lease_s: float = LEASE_S) -> None:
        self.lease_s = lease_s
        self.on_finished: Callable[[Session, Job], None] = lambda session, job: None
        self._database = database
        self._blobs = blobs

    def lease(self, worker_id: str, kinds: Sequence[str], targets: Sequence[str]) -> dict[str, Any] | None:
        """The oldest job this worker can do, now its own; None when there is none."""
        query = select(Job.job_id).where(Job.state == "queued", Job.cancel_requested.is_(False))
        query = query.where(Job.kind.in_(kinds)) if kinds else query
        query = query.where(Job.target.in_(targets)) if targets else query
        with self._database.read() as session:
            if session.scalar(query.limit(1)) is None:
                return None
        with self._database.write() as session:
            job_id = session.scalar(query.order_by(Job.created_at, Job.job_id).limit(1))
            job = session.get(Job, job_id) if job_id else None
            if job is None:
                return None
            now = datetime.now(UTC)
            job.state, job.worker_id, job.lease_id = "running", worker_id, new_id("lea")
            job.lease_expires_at = now + timedelta(seconds=self.lease_s)
            job.started_at = job.started_at or now
            job.attempts += 1
            job.message = f"taken by {worker_id}"
            _tell(session, job)
            return {"job_id": job.job_id, "lease_id": job.lease_id, "lease_s": self.lease_s, "spec": job.spec}

    def heartbeat(
        self, job_id: str, lease_id: str, *, stage: str, progress: float, message: str, log: str | None
    ) -> bool:
        """Keep the lease and tell how far it is; returns whether to stop."""
        with self._database.write() as session:
            job = _held(session, job_id, lease_id)
            job.lease_expires_at = datetime.now(UTC) + timedelta(seconds=self.lease_s)
            job.stage, job.progress, job.message = stage, progress, message
            if log is not None:
                job.log = log[-MAX_LOG_CHARS:]
            _tell(session, job)
            return job.cancel_requested

    def complete(self, job_id: str, lease_id: str, manifest_digest: str, stages: list[Any] | None) -> None:
        """Accept a build: its manifest and every chunk must be stored, and it must be what was asked for."""
        manifest = parse_manifest(
            self._blobs.get(manifest_digest, max_bytes=MAX_MANIFEST_BYTES), expected_digest=manifest_digest
        )
        lost = [chunk.digest for chunk in manifest.chunk_list() if not self._blobs.has(chunk.digest)]
        if lost:
            raise IntegrityError(
                f"{len(lost)} chunks of the manifest are not stored, first {lost[0][:12]}", remedy="upload them first"
            )
        with self._database.write() as session:
            job = _held(session, job_id, lease_id)
            asked = (job.spec["name"], job.target, job.spec["source"]["digest"])
            if (manifest.name, manifest.target, manifest.source_digest) != asked:
                raise IntegrityError("the manifest is for another model, target or source", remedy="build it again")
            if job.cancel_requested:
                self._finish(session, job, "cancelled", reason="cancelled")
                return
            job.manifest, job.stages, job.progress = manifest_digest, stages, 1.0
            job.gates = [gate.model_dump(mode="json") for gate in manifest.gates]
            now = datetime.now(UTC)
            built = [manifest_digest, *(chunk.digest for chunk in manifest.chunk_list())]
            catalogue.add_references(session, job.tenant, manifest_digest, built)
            session.merge(Build(cache_key=job.cache_key, manifest=manifest_digest, built_at=now))
            self._finish(session, job, "succeeded")

    def fail(
        self, job_id: str, lease_id: str, *, code: str, reason: str, log: str, gates: list[Any] | None = None
    ) -> None:
        """Accept that a build failed; it is not tried again, as it would fail again."""
        with self._database.write() as session:
            job = _held(session, job_id, lease_id)
            job.log = log[-MAX_LOG_CHARS:] or job.log
            job.gates = gates or job.gates
            is_cancelled = job.cancel_requested or code == "cancelled"
            self._finish(session, job, "cancelled" if is_cancelled else "failed", code=code, reason=reason)

    def cancel(self, by: Principal, job_id: str) -> None:
        """Stop a job: at once when nobody works on it, else with its worker's next heartbeat."""
        with self._database.write() as session:
            job = get_job(session, by.tenant, job_id)
            if job.state in FINISHED:
                raise ConflictError(f"job {job_id} is {job.state}", remedy="only a job under way can be cancelled")
            self.request_cancel(session, job)
            audit.record(session, tenant=by.tenant, actor=by.subject, action="job.cancel", subject=job_id)

    def request_cancel(self, session: Session, job: Job) -> None:
        """`cancel` within a transaction."""
        job.cancel_requested = True
        if job.state == "queued":
            self._finish(session, job, "cancelled", reason="cancelled before it began")
        else:
            _tell(session, job)

    def tick(self) -> None:
        """Take back leases that ended."""
        now = datetime.now(UTC)
        overdue = select(Job.job_id).where(Job.state == "running", Job.lease_expires_at < now)
        with self._database.read() as session:
            job_ids = list(session.scalars(overdue))
        for job_id in job_ids:
            with self._database.write() as session:
                job = session.get(Job, job_id)
                if job is None or job.state != "running" or (job.lease_expires_at or now) >= now:
                    continue
                lost = f"worker {job.worker_id} fell silent in stage {job.stage or 'start'}"
                if job.cancel_requested:
                    self._finish(session, job, "cancelled", reason="cancelled")
                elif job.attempts >= MAX_ATTEMPTS:
                    self._finish(session, job, "failed", code="worker_lost", reason=f"{lost}, {job.attempts} times")
                else:
                    job.state, job.lease_id, job.lease_expires_at, job.progress = "queued", None, None, 0.0
                    job.message = f"{lost}; waiting for another"
                    job.log = f"{job.log}\n[{lost}; tried again]\n"[-MAX_LOG_CHARS:]
                    _tell(session, job)

    def add(self, session: Session, *, tenant: str, publication_id: str, target: str, spec: dict[str, Any]) -> Job:
        """Queue a job, or find that the very same build was made before."""
        cache_key = sha256(canonical_bytes({k: v for k, v in spec.items() if k != "base_manifests"}))
        now = datetime.now(UTC)
        job = Job(
            job_id=new_id("job"), tenant=tenant, publication_id=publication_id, kind=spec["kind"], target=target,
            state="queued", spec={**spec, "cache_key": cache_key}, cache_key=cache_key, created_at=now,
            stage="", progress=0.0, message="waiting for a worker", log="", attempts=0, reason="",
            cancel_requested=False, cached=False,
        )  # fmt: skip
        session.add(job)
        built = session.get(Build, cache_key)
        if built is not None and (manifest := self._find_build(built.manifest)) is not None:
            job.manifest, job.cached, job.progress, job.message = built.manifest, True, 1.0, "built before"
            job.gates = [gate.model_dump(mode="json") for gate in manifest.gates]
            job.state, job.finished_at = "succeeded", now
        _tell(session, job)
        return job

    def _find_build(self, digest: str) -> Any:
        try:
            manifest = parse_manifest(self._blobs.get(digest, max_bytes=MAX_MANIFEST_BYTES), expected_digest=digest)
        except NotFoundError:
            return None
        return manifest if all(self._blobs.has(chunk.digest) for chunk in manifest.chunk_list()) else None

    def newest(self, tenant: str | None, *, limit: int = 100, offset: int = 0) -> list[dict[str, Any]]:
        """Jobs, newest first; of all tenants with `tenant` None."""
        query = select(Job).order_by(Job.created_at.desc(), Job.job_id).limit(limit).offset(offset)
        query = query if tenant is None else query.where(Job.tenant == tenant)
        with self._database.read() as session:
            return [shown(job, log=False) for job in session.scalars(query)]

    def get(self, tenant: str, job_id: str) -> dict[str, Any]:
        """One job with its log."""
        with self._database.read() as session:
            return shown(get_job(session, tenant, job_id))

    def _finish(self, session: Session, job: Job, state: str, *, code: str | None = None, reason: str = "") -> None:
        job.state, job.code, job.reason = state, code, reason
        job.message = reason or state
        job.finished_at, job.lease_id, job.lease_expires_at = datetime.now(UTC), None, None
        audit.record(
            session, tenant=job.tenant, actor=job.worker_id or "job-queue", action=f"job.{state}", subject=job.job_id,
            details={"target": job.target, **({"reason": reason} if reason else {})},
        )  # fmt: skip
        _tell(session, job)
        self.on_finished(session, job)


def jobs_of(session: Session, publication_id: str) -> list[Job]:
    """The jobs of a publication, in the order they were asked for."""
    query = select(Job).where(Job.publication_id == publication_id).order_by(Job.created_at, Job.target)
    return list(session.scalars(query))


def get_job(session: Session, tenant: str | None, job_id: str) -> Job:
    """One job; `NotFoundError` otherwise."""
    job = session.get(Job, job_id)
    if job is None or (tenant is not None and job.tenant != tenant):
        raise NotFoundError(f"job {job_id!r} does not exist", remedy="see: foreshore jobs")
    return job


def shown(job: Job, *, log: bool = True) -> dict[str, Any]:
    """A job as the API gives it."""
    document = {
        "job_id": job.job_id,
        "publication_id": job.publication_id,
        "kind": job.kind,
        "model": job.spec.get("name"),
        "target": job.target,
        "state": job.state,
        "stage": job.stage,
        "progress": job.progress,
        "message": job.message,
        "code": job.code,
        "reason": job.reason,
        "attempts": job.attempts,
        "worker_id": job.worker_id,
        "cancel_requested": job.cancel_requested,
        "cached": job.cached,
        "manifest": job.manifest,
        "stages": job.stages,
        "gates": job.gates or [],
        "created_at": job.created_at.isoformat(),
        "started_at": job.started_at.isoformat() if job.started_at else None,
        "finished_at": job.finished_at.isoformat() if job.finished_at else None,
    }
    return {**document, "log": job.log} if log else document


def _held(session: Session, job_id: str, lease_id: str) -> Job:
    job = get_job(session, None, job_id)
    if job.state != "running" or job.lease_id != lease_id:
        raise ConflictError(f"the lease of job {job_id} is lost", remedy="stop working on it")
    return job


def _tell(session: Session, job: Job) -> None:
    session.flush()
    announce(session, "job", job.tenant, shown(job, log=False))
