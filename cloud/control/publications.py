"""A model on its way to a signed release: jobs, then deltas, then bytes to sign, then the catalogue.

A publication fails as a whole: one target's failed gate never gives a release without it. The control plane only
proposes: nothing is in the catalogue before publishers' metadata, signed by as many keys as it takes, lists exactly the
proposed bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control import audit
from cloud.control.database import Database, announce
from cloud.control.identity import Principal, new_id
from cloud.control.jobs import FINISHED, Jobs, jobs_of, shown
from cloud.control.tables import Job, Publication
from cloud.control.trust import Trust, listed_in
from model_registry import catalogue
from model_registry.blobs import BlobStore
from model_registry.encodings import build_delta
from model_registry.manifest import (
    MAX_MANIFEST_BYTES,
    DeltaEncoding,
    Manifest,
    Release,
    ReleaseArtefact,
    parse_manifest,
    parse_release,
)
from model_registry.sources import KIND_BY_FORMAT, SourceFile, source_digest
from model_registry.trust.repository import Repository
from model_registry.trust.roles import release_path
from wire.errors import ConflictError, ForeshoreError, IntegrityError, InvalidInputError, NotFoundError
from wire.frames import MAX_CHUNK_BYTES
from wire.topics import check_name

NUM_BASES = 2
GOOD_DELTA = 0.9  # a delta that saves less than a tenth is not worth its storage

FindTarget = Callable[[str], Mapping[str, Any]]
"""Target name -> the content of its file; raises `InvalidInputError` for an unknown one."""


@dataclass(frozen=True)
class PublicationOrder:
    """What a publisher asked for, parsed."""

    name: str
    source_format: str
    files: tuple[SourceFile, ...]
    targets: tuple[str, ...]
    version: str | None = None
    kind: str | None = None
    licence: str = ""
    recipe: Mapping[str, Any] | None = None
    golden: str | None = None
    vision: Mapping[str, Any] | None = None


class Publications:
    """The publications of all tenants."""

    def __init__(self, database: Database, blobs: BlobStore, jobs: Jobs, trust: Trust, find_target: FindTarget) -> None:
        self._database = database
        self._blobs = blobs
        self._jobs = jobs
        self._trust = trust
        self._find_target = find_target
        jobs.on_finished = self._hear_job

    def create(self, by: Principal, order: PublicationOrder) -> dict[str, Any]:
        """Queue a job per target. Everything the jobs need must be stored already."""
        check_name("model", order.name)
        targets = {name: dict(self._find_target(name)) for name in dict.fromkeys(order.targets)}
        for digest in [file.digest for file in order.files] + ([order.golden] if order.golden else []):
            if not self._is_ours(by.tenant, digest):
                raise InvalidInputError(f"blob {digest[:12]} is not stored", remedy="upload it with PUT /blobs first")
        source: dict[str, Any] = {
            "format": order.source_format,
            "files": [{"path": f.path, "digest": f.digest, "size_bytes": f.size_bytes} for f in order.files],
            "digest": source_digest(order.source_format, order.files),
        }
        now = datetime.now(UTC)
        with self._database.write() as session:
            self._refuse_taken_version(session, by.tenant, order)
            row = Publication(
                publication_id=new_id("pub"), tenant=by.tenant, name=order.name, model_version=order.version,
                state="compiling", reason="", created_by=by.subject, created_at=now, updated_at=now,
                order={
                    "kind": order.kind or KIND_BY_FORMAT[order.source_format],
                    "licence": order.licence, "source": source, "targets": list(targets),
                },
            )  # fmt: skip
            session.add(row)
            catalogue.add_source(session, by.tenant, source["digest"], order.source_format, order.files, now)
            session.flush()
            for target, content in targets.items():
                spec = {
                    "kind": "compile", "tenant": by.tenant, "name": order.name, "model_kind": row.order["kind"],
                    "target": content, "recipe": dict(order.recipe or {}), "source": source, "golden": order.golden,
                    "vision": dict(order.vision) if order.vision else None,
                    "base_manifests": catalogue.earlier_manifests(session, by.tenant, order.name, target),
                }  # fmt: skip
                self._jobs.add(session, tenant=by.tenant, publication_id=row.publication_id, target=target, spec=spec)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="publication.create", subject=row.publication_id,
                details={"name": order.name, "source": source["digest"], "targets": list(targets)},
            )  # fmt: skip
            _tell(session, row)
            return self._shown(session, row)

    def _is_ours(self, tenant: str, digest: str) -> bool:
        with self._database.read() as session:
            return catalogue.is_referenced(session, digest, tenant=tenant) and self._blobs.has(digest)

    def get(self, tenant: str, publication_id: str) -> dict[str, Any]:
        """A publication with its jobs, and the bytes to sign when they are ready."""
        with self._database.read() as session:
            return self._shown(session, _get(session, tenant, publication_id))

    def newest(self, tenant: str, *, limit: int = 100, offset: int = 0) -> list[dict[str, Any]]:
        """Publications, newest first, without jobs' logs."""
        query = select(Publication).where(Publication.tenant == tenant).order_by(Publication.created_at.desc())
        with self._database.read() as session:
            return [_summary(row) for row in session.scalars(query.limit(limit).offset(offset))]

    def cancel(self, by: Principal, publication_id: str) -> dict[str, Any]:
        """Stop everything; a released publication stays released."""
        with self._database.write() as session:
            row = _get(session, by.tenant, publication_id)
            if row.state not in ("compiling", "awaiting_signature"):
                raise ConflictError(f"the publication is {row.state}", remedy="only one under way can be cancelled")
            self._end(session, row, "cancelled", f"cancelled by {by.subject}", by.subject)
            return self._shown(session, row)

    def sign(self, by: Principal, publication_id: str, role: str, metadata: bytes) -> dict[str, Any]:
        """Take in a publisher's metadata that lists the proposed release; released once enough keys have signed."""
        with self._database.write() as session:
            row = _get(session, by.tenant, publication_id)
            if row.state == "released":  # the answer to the first time was lost
                return self._shown(session, row)
            if row.state != "awaiting_signature" or row.release is None:
                raise ConflictError(f"the publication is {row.state}", remedy="sign while it awaits the signature")
            entry = listed_in(role, metadata).targets.get(release_path(row.name, row.release_digest or ""))
            if entry is None or entry.length != len(row.release) or entry.hashes.get("sha256") != row.release_digest:
                raise IntegrityError("another release was signed", remedy="list the bytes that the publication offers")
            self._trust.submit_in(session, by, role, metadata)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="release.sign", subject=row.release_digest or "",
                details={"name": row.name, "version": row.model_version, "role": role},
            )  # fmt: skip
            return self._shown(session, row)

    def hear_trust(self, session: Session, tenant: str, repository: Repository) -> None:
        """New metadata is current: what it lists is released."""
        waiting = select(Publication).where(Publication.tenant == tenant, Publication.state == "awaiting_signature")
        for row in session.scalars(waiting):
            if row.release is not None and repository.find_release(row.name, row.release_digest or "") is not None:
                self._release(session, row, parse_release(row.release, expected_digest=row.release_digest))

    def _release(self, session: Session, row: Publication, release: Release) -> None:
        catalogue.add_release(session, release)
        for artefact in release.artefacts:
            manifest = self._manifest(artefact.manifest)
            owned = [artefact.manifest, *(chunk.digest for chunk in manifest.chunk_list())]
            for delta in artefact.deltas:
                owned += [delta.index, *_frames(self._blobs, delta)]
            catalogue.add_references(session, row.tenant, release.digest, owned)
        row.state, row.updated_at = "released", datetime.now(UTC)
        audit.record(
            session, tenant=row.tenant, actor="publishers", action="release.listed", subject=release.digest,
            details={"name": release.name, "version": release.version},
        )  # fmt: skip
        _tell(session, row)

    def tick(self) -> None:
        """Propose a release for each publication whose jobs are done; deltas are computed here, outside any lock."""
        with self._database.read() as session:
            waiting = session.scalars(select(Publication.publication_id).where(Publication.state == "compiling")).all()
        for publication_id in waiting:
            with self._database.read() as session:
                jobs = jobs_of(session, publication_id)
            if jobs and all(job.state == "succeeded" for job in jobs):
                self._propose(publication_id, jobs)

    def _propose(self, publication_id: str, jobs: list[Job]) -> None:
        try:
            artefacts = [self._artefact(job) for job in jobs]
        except ForeshoreError as error:
            with self._database.write() as session:
                row = session.get_one(Publication, publication_id)
                self._end(session, row, "failed", str(error), "control-plane")
            return
        with self._database.write() as session:
            row = session.get_one(Publication, publication_id)
            if row.state != "compiling":
                return
            sequence = catalogue.next_sequence(session, row.tenant, row.name)
            release = Release(
                tenant=row.tenant,
                name=row.name,
                version=row.model_version or str(sequence),
                sequence=sequence,
                kind=row.order["kind"],
                licence=row.order["licence"],
                source_format=row.order["source"]["format"],
                source_digest=row.order["source"]["digest"],
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                artefacts=artefacts,
            )
            row.model_version = release.version
            row.release, row.release_digest = release.to_bytes(), release.digest
            row.state, row.updated_at = "awaiting_signature", datetime.now(UTC)
            _tell(session, row)

    def _artefact(self, job: Job) -> ReleaseArtefact:
        manifest = self._manifest(job.manifest or "")
        return ReleaseArtefact(
            target=job.target,
            manifest=manifest.digest,
            manifest_bytes=len(manifest.to_bytes()),
            size_bytes=manifest.size_bytes,
            runtime=manifest.runtime,
            precision=manifest.precision,
            deltas=self._deltas(job, manifest),
        )

    def _deltas(self, job: Job, manifest: Manifest) -> list[DeltaEncoding]:
        with self._database.read() as session:
            name = str(job.spec["name"])
            bases = catalogue.earlier_manifests(session, job.tenant, name, job.target, limit=NUM_BASES)
        deltas = []
        for digest in bases:
            if digest == manifest.digest:
                continue
            delta = build_delta(
                self._manifest(digest),
                manifest,
                lambda chunk: self._blobs.get(chunk, max_bytes=MAX_CHUNK_BYTES),
                self._blobs.put,
            )
            if delta.wire_bytes <= GOOD_DELTA * manifest.size_bytes:
                deltas.append(delta)
        return deltas

    def _manifest(self, digest: str) -> Manifest:
        return parse_manifest(self._blobs.get(digest, max_bytes=MAX_MANIFEST_BYTES), expected_digest=digest)

    def _hear_job(self, session: Session, job: Job) -> None:
        row = session.get(Publication, job.publication_id)
        if row is None or row.state != "compiling":
            return
        if job.state in ("failed", "cancelled"):
            self._end(session, row, job.state, f"{job.target}: {job.reason or job.state}", "control-plane")
        else:
            _tell(session, row)

    def _end(self, session: Session, row: Publication, state: str, reason: str, actor: str) -> None:
        row.state, row.reason, row.updated_at = state, reason, datetime.now(UTC)
        for job in jobs_of(session, row.publication_id):
            if job.state not in FINISHED:
                self._jobs.request_cancel(session, job)
        audit.record(
            session, tenant=row.tenant, actor=actor, action=f"publication.{state}", subject=row.publication_id,
            details={"reason": reason},
        )  # fmt: skip
        _tell(session, row)

    @staticmethod
    def _refuse_taken_version(session: Session, tenant: str, order: PublicationOrder) -> None:
        if order.version is None:
            return
        try:
            catalogue.get_version(session, tenant, order.name, order.version)
        except NotFoundError:
            return
        raise ConflictError(f"{order.name} {order.version} exists", remedy="choose a new version")

    @staticmethod
    def _shown(session: Session, row: Publication) -> dict[str, Any]:
        document = _summary(row)
        document["jobs"] = [shown(job) for job in jobs_of(session, row.publication_id)]
        if row.state in ("awaiting_signature", "released") and row.release is not None:
            document["release"] = base64.b64encode(row.release).decode()
        return document


def _frames(blobs: BlobStore, delta: DeltaEncoding) -> list[str]:
    return [str(one) for one in json.loads(blobs.get(delta.index, max_bytes=MAX_MANIFEST_BYTES * 4))]


def _get(session: Session, tenant: str, publication_id: str) -> Publication:
    row = session.get(Publication, publication_id)
    if row is None or row.tenant != tenant:
        raise NotFoundError(f"publication {publication_id!r} does not exist", remedy="see: foreshore models")
    return row


def _summary(row: Publication) -> dict[str, Any]:
    return {
        "publication_id": row.publication_id,
        "state": row.state,
        "name": row.name,
        "version": row.model_version,
        "kind": row.order["kind"],
        "targets": row.order["targets"],
        "reason": row.reason,
        "release_digest": row.release_digest,
        "created_by": row.created_by,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
    }


def _tell(session: Session, row: Publication) -> None:
    announce(session, "publication", row.tenant, _summary(row))
