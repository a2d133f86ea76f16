"""Publications and compile jobs."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from cloud.control.api.base import Body, Cursor, Limit, Plane, Publisher, Viewer, Worker, decoded, page
from cloud.control.api.records import stream_events
from cloud.control.publications import PublicationOrder
from model_registry.sources import Format, SourceFile
from wire.messages import Digest, Name

router = APIRouter()

LEASE_WAIT_S = 20.0
LEASE_LOOK_S = 0.5


class SourceFileBody(Body):
    """One uploaded file of a source."""

    path: Annotated[str, Field(min_length=1, max_length=200)]
    digest: Digest
    size_bytes: Annotated[int, Field(ge=0, le=1 << 44)]


class SourceBody(Body):
    """What is to be compiled."""

    format: Format
    files: Annotated[list[SourceFileBody], Field(min_length=1, max_length=1000)]


class PublicationBody(Body):
    """A model to compile for targets."""

    name: Name
    version: Annotated[str, Field(max_length=64, pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]*$")] | None = None
    kind: Literal["tensor", "language"] | None = None
    licence: Annotated[str, Field(max_length=200)] = ""
    source: SourceBody
    targets: Annotated[list[Name], Field(min_length=1, max_length=16)]
    recipe: dict[str, Any] | None = None
    golden: Digest | None = None
    vision: dict[str, Any] | None = None


class SignatureBody(Body):
    """A publisher's signed metadata that lists the release: its role, and base64 of its bytes."""

    role: Name
    metadata: Annotated[str, Field(max_length=2 << 20)]


class LeaseBody(Body):
    """Which jobs a worker can do; an empty list means any."""

    worker_id: Annotated[str, Field(min_length=1, max_length=200)]
    kinds: Annotated[list[str], Field(max_length=16)] = []
    targets: Annotated[list[str], Field(max_length=64)] = []


class HeartbeatBody(Body):
    """How far a job is."""

    lease_id: Annotated[str, Field(max_length=40)]
    stage: Annotated[str, Field(max_length=64)] = ""
    progress: Annotated[float, Field(ge=0, le=1)] = 0.0
    message: Annotated[str, Field(max_length=2000)] = ""
    log: Annotated[str, Field(max_length=1 << 20)] | None = None


class CompleteBody(Body):
    """A finished build."""

    lease_id: Annotated[str, Field(max_length=40)]
    manifest: Digest
    stages: list[Any] | None = None


class FailBody(Body):
    """A build that cannot succeed."""

    lease_id: Annotated[str, Field(max_length=40)]
    code: Annotated[str, Field(max_length=64)]
    reason: Annotated[str, Field(max_length=4000)]
    log: Annotated[str, Field(max_length=1 << 20)] = ""
    gates: list[Any] | None = None


@router.post("/publications", status_code=201)
def create_publication(body: PublicationBody, plane: Plane, by: Publisher) -> dict[str, Any]:
    """Queue a compile job per target."""
    files = tuple(SourceFile(file.path, file.digest, file.size_bytes) for file in body.source.files)
    order = PublicationOrder(
        name=body.name, source_format=body.source.format, files=files, targets=tuple(body.targets),
        version=body.version, kind=body.kind, licence=body.licence, recipe=body.recipe, golden=body.golden,
        vision=body.vision,
    )  # fmt: skip
    return plane.publications.create(by, order)


@router.get("/publications")
def list_publications(plane: Plane, by: Viewer, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """Publications, newest first."""
    return page(plane.publications.newest(by.tenant, limit=limit + 1, offset=cursor), limit, cursor)


@router.get("/publications/{publication_id}")
def get_publication(publication_id: str, plane: Plane, by: Viewer) -> dict[str, Any]:
    """A publication, its jobs, and the bytes to sign when ready."""
    return plane.publications.get(by.tenant, publication_id)


@router.get("/publications/{publication_id}/events")
def follow_publication(publication_id: str, request: Request, plane: Plane, by: Viewer) -> StreamingResponse:
    """Events of one publication and its jobs, as they happen."""
    plane.publications.get(by.tenant, publication_id)
    return stream_events(request, plane, by, lambda one: one.data.get("publication_id") == publication_id)


@router.post("/publications/{publication_id}/sign")
def sign_publication(publication_id: str, body: SignatureBody, plane: Plane, by: Publisher) -> dict[str, Any]:
    """Hand in metadata that lists the release."""
    return plane.publications.sign(by, publication_id, body.role, decoded("metadata", body.metadata))


@router.post("/publications/{publication_id}/cancel")
def cancel_publication(publication_id: str, plane: Plane, by: Publisher) -> dict[str, Any]:
    """Stop a publication and its jobs."""
    return plane.publications.cancel(by, publication_id)


@router.get("/jobs")
def list_jobs(plane: Plane, by: Viewer, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """Jobs, newest first."""
    return page(plane.jobs.newest(by.tenant, limit=limit + 1, offset=cursor), limit, cursor)


@router.get("/jobs/{job_id}")
def get_job(job_id: str, plane: Plane, by: Viewer) -> dict[str, Any]:
    """One job with its log."""
    return plane.jobs.get(by.tenant, job_id)


@router.post("/jobs/lease", response_model=None, responses={204: {"description": "no work"}})
async def lease_job(body: LeaseBody, request: Request, plane: Plane, by: Worker) -> dict[str, Any] | Response:
    """Wait for a job; 204 when none came."""
    deadline = time.monotonic() + LEASE_WAIT_S
    while not await request.is_disconnected():
        lease = await run_in_threadpool(plane.jobs.lease, body.worker_id, body.kinds, body.targets)
        if lease is not None:
            return lease
        if time.monotonic() > deadline or request.app.state.is_stopping.is_set():
            break
        await asyncio.sleep(LEASE_LOOK_S)
    return Response(status_code=204)


@router.post("/jobs/{job_id}/heartbeat")
def heartbeat(job_id: str, body: HeartbeatBody, plane: Plane, by: Worker) -> dict[str, bool]:
    """Keep the lease; says whether to stop."""
    cancel = plane.jobs.heartbeat(
        job_id, body.lease_id, stage=body.stage, progress=body.progress, message=body.message, log=body.log
    )
    return {"cancel": cancel}


@router.post("/jobs/{job_id}/complete", status_code=204)
def complete_job(job_id: str, body: CompleteBody, plane: Plane, by: Worker) -> None:
    """Hand in a build."""
    plane.jobs.complete(job_id, body.lease_id, body.manifest, body.stages)


@router.post("/jobs/{job_id}/fail", status_code=204)
def fail_job(job_id: str, body: FailBody, plane: Plane, by: Worker) -> None:
    """Say why a build failed."""
    plane.jobs.fail(job_id, body.lease_id, code=body.code, reason=body.reason, log=body.log, gates=body.gates)


@router.post("/jobs/{job_id}/cancel", status_code=204)
def cancel_job(job_id: str, plane: Plane, by: Publisher) -> None:
    """Stop a job."""
    plane.jobs.cancel(by, job_id)
