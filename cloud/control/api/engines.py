"""Engine builds: leases for whoever has the hardware, uploads, signatures, and engines for the devices of a key."""

from __future__ import annotations

import base64
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from cloud.control.api.base import Body, Cursor, Device, Limit, Plane, Publisher, Viewer, arriving, decoded, needs, page
from cloud.control.identity import Principal, Role
from model_registry.manifest import MAX_ENGINE_BYTES
from wire.messages import Digest

router = APIRouter()

Builder = Annotated[Principal, Depends(needs(Role.DEVICE, Role.WORKER))]
LeaseId = Annotated[str, Field(min_length=1, max_length=40)]
Code = Annotated[str, Field(max_length=64, pattern=r"^[a-z_]+$")]
DigestPart = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]


class LeaseBody(Body):
    """The hardware keys that a builder has; a device's own is known."""

    keys: Annotated[list[Annotated[str, Field(max_length=120)]], Field(max_length=64)] = []


class HeldBody(Body):
    """By which lease."""

    lease_id: LeaseId


class CompleteBody(HeldBody):
    """A finished engine, uploaded before."""

    hardware_key: Annotated[str, Field(max_length=120)]
    engine: Digest


class FailBody(HeldBody):
    """Why an attempt came to nothing."""

    code: Code
    reason: Annotated[str, Field(max_length=2000)]


class ProofBody(HeldBody):
    """How the golden inputs went; no code: well."""

    code: Code | None = None
    reason: Annotated[str, Field(max_length=2000)] = ""


class SignatureBody(Body):
    """A publisher's list with the engine on it."""

    role: Annotated[str, Field(max_length=64)]
    metadata: Annotated[str, Field(max_length=8 << 20)]


@router.get("/engine-builds")
def list_builds(plane: Plane, by: Viewer, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """Engine builds, newest first."""
    return page(plane.engine_builds.newest(by.tenant, limit=limit + 1, offset=cursor), limit, cursor)


@router.get("/engine-builds/{build_id}")
def get_build(build_id: str, plane: Plane, by: Viewer) -> dict[str, Any]:
    """One engine build, and the bytes to sign when they are ready."""
    return plane.engine_builds.get(by.tenant, build_id)


@router.post("/engine-builds/lease", response_model=None, responses={204: {"description": "no work"}})
def lease_build(body: LeaseBody, plane: Plane, by: Builder) -> dict[str, Any] | Response:
    """Take a build; 204 when there is none."""
    return plane.engine_builds.lease(by, body.keys) or Response(status_code=204)


@router.post("/engine-builds/{build_id}/heartbeat", status_code=204)
def heartbeat(build_id: str, body: HeldBody, plane: Plane, by: Builder) -> None:
    """Keep the lease; 409 when it is lost."""
    plane.engine_builds.heartbeat(by, build_id, body.lease_id)


@router.put("/engine-builds/{build_id}/engine/{digest}", status_code=201)
async def put_engine(
    build_id: str,
    digest: DigestPart,
    request: Request,
    plane: Plane,
    by: Builder,
    lease_id: Annotated[str, Query(min_length=1, max_length=40)],
) -> dict[str, Any]:
    """Upload the engine, streamed; bytes that do not hash to `digest` are refused."""
    pieces = arriving(request)

    def store() -> int:
        plane.engine_builds.check_lease(by, build_id, lease_id)
        return plane.blobs.put_stream(digest, pieces, max_bytes=MAX_ENGINE_BYTES)

    return {"digest": digest, "size_bytes": await run_in_threadpool(store)}


@router.post("/engine-builds/{build_id}/complete", status_code=204)
def complete_build(build_id: str, body: CompleteBody, plane: Plane, by: Builder) -> None:
    """Hand in an uploaded engine."""
    plane.engine_builds.complete(by, build_id, body.lease_id, hardware_key=body.hardware_key, engine=body.engine)


@router.post("/engine-builds/{build_id}/fail", status_code=204)
def fail_build(build_id: str, body: FailBody, plane: Plane, by: Builder) -> None:
    """Say why it could not be built."""
    plane.engine_builds.fail(by, build_id, body.lease_id, code=body.code, reason=body.reason)


@router.post("/engine-builds/{build_id}/sign")
def sign_build(build_id: str, body: SignatureBody, plane: Plane, by: Publisher) -> dict[str, Any]:
    """Hand in metadata that lists the engine."""
    return plane.engine_builds.sign(by, build_id, body.role, decoded("metadata", body.metadata))


@router.post("/engine-builds/{build_id}/prove", status_code=204)
def prove_build(build_id: str, body: ProofBody, plane: Plane, by: Device) -> None:
    """The first device of the key says how its golden inputs went."""
    plane.engine_builds.prove(by, build_id, body.lease_id, code=body.code, reason=body.reason)


@router.post("/device/engines/{manifest}", response_model=None, responses={204: {"description": "none for it"}})
def offer_engine(manifest: DigestPart, plane: Plane, by: Device) -> dict[str, Any] | Response:
    """The signed engine of an artefact for this device's key; with a lease when this device is to prove it first."""
    offer = plane.engine_builds.offer(by, manifest)
    if offer is None:
        return Response(status_code=204)
    return {**offer, "document": base64.b64encode(offer["document"]).decode()}
