"""Blobs, chunks, manifests, releases and models: immutable content by its digest, and the catalogue above it.

Content is stored once for all tenants, but a tenant reads only what is its own: what it uploaded (which proves that it
has the bytes) and what its publications and releases name. Of anything else it is told that it does not exist.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from cloud.control.api.base import Cursor, Limit, Plane, Viewer, arriving, needs, page
from cloud.control.identity import Principal, Role
from cloud.control.plane import ControlPlane
from model_registry import catalogue
from model_registry.manifest import MAX_MANIFEST_BYTES, parse_manifest
from model_registry.tables import ReleaseRow
from model_registry.trust.repository import Repository
from wire.errors import InvalidInputError, NotFoundError

router = APIRouter()

MAX_UPLOAD_BYTES = 64 << 30
OCTETS = "application/octet-stream"
UPLOADED = "upload"  # owner of the references that say whose a blob is before anything names it
IMMUTABLE = {"cache-control": "private, max-age=31536000, immutable"}

Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
Reader = Annotated[Principal, Depends(needs(Role.VIEWER, Role.WORKER, Role.DEVICE))]
Uploader = Annotated[Principal, Depends(needs(Role.PUBLISHER, Role.WORKER))]


@router.put("/blobs/{digest}", status_code=201)
async def put_blob(digest: Digest, request: Request, plane: Plane, by: Uploader) -> dict[str, Any]:
    """Store bytes that hash to `digest`; the body is streamed, never held."""
    pieces = arriving(request)

    def store() -> int:
        size = plane.blobs.put_stream(digest, pieces, max_bytes=MAX_UPLOAD_BYTES)
        if by.role is not Role.WORKER:  # what a worker uploads is named by the job that it completes
            with plane.database.write() as session:
                catalogue.add_references(session, by.tenant, UPLOADED, [digest])
        return size

    size = await run_in_threadpool(store)
    return {"digest": digest, "size_bytes": size}


@router.head("/blobs/{digest}")
@router.get("/blobs/{digest}")
def get_blob(digest: Digest, request: Request, plane: Plane, by: Reader) -> Response:
    """A blob, or the range of it that is asked for."""
    _check_readable(plane, by, digest)
    return _serve(plane, digest, request)


@router.get("/chunks/{digest}")
def get_chunk(digest: Digest, request: Request, plane: Plane, by: Reader) -> Response:
    """One chunk of an artefact: a device's way round the broker."""
    _check_readable(plane, by, digest)
    return _serve(plane, digest, request)


@router.get("/manifests/{digest}")
def get_manifest(digest: Digest, request: Request, plane: Plane, by: Reader) -> Response:
    """A manifest's canonical bytes."""
    _check_readable(plane, by, digest)
    return _serve(plane, digest, request, media_type="application/json")


@router.get("/releases/{digest}")
def get_release(digest: Digest, plane: Plane, by: Reader) -> Response:
    """A release's canonical bytes; what makes it installable is the publisher's metadata that lists it."""
    with plane.database.read() as session:
        row = catalogue.get_release(session, digest)
        if row.tenant != by.tenant and by.role is not Role.WORKER:
            raise NotFoundError(f"release {digest[:12]} is not in the catalogue", remedy="see: foreshore models")
        return Response(row.document, media_type="application/json", headers=IMMUTABLE)


@router.get("/releases")
def list_releases(plane: Plane, by: Viewer, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """All releases, newest first."""
    with plane.database.read() as session:
        rows = catalogue.list_releases(session, by.tenant, limit=limit + 1, offset=cursor)
        return page([release_document(plane, row) for row in rows], limit, cursor)


@router.get("/models")
def list_models(plane: Plane, by: Viewer, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """All models with their newest release."""
    with plane.database.read() as session:
        rows = catalogue.list_models(session, by.tenant, limit=limit + 1, offset=cursor)
        return page([_model_document(plane, row) for row in rows], limit, cursor)


@router.get("/models/{name}")
def get_model(name: str, plane: Plane, by: Viewer) -> dict[str, Any]:
    """One model with all its releases, newest first."""
    with plane.database.read() as session:
        document = _model_document(plane, catalogue.get_model(session, by.tenant, name))
        rows = catalogue.list_versions(session, by.tenant, name)
        trust = plane.trust.repository(by.tenant)
        releases = [release_document(plane, row) | {"signed_by": _signed_by(trust, name, row.digest)} for row in rows]
        return {**document, "releases": releases}


def _signed_by(trust: Repository, model: str, digest: str) -> dict[str, Any] | None:
    """The publisher and the keys that vouch for a release now; None once nobody does."""
    found = trust.find_signers(model, digest)
    return {"publisher": found[0], "keys": list(found[1])} if found is not None else None


def release_document(plane: ControlPlane, row: ReleaseRow) -> dict[str, Any]:
    """A release as lists show it."""
    return {
        "digest": row.digest,
        "release": row.digest,
        "name": row.name,
        "version": row.version,
        "sequence": row.sequence,
        "kind": row.kind,
        "licence": row.licence,
        "source_format": row.source_format,
        "source_digest": row.source_digest,
        "created_at": row.created_at.isoformat(),
        "artefacts": [
            {
                "target": one.target,
                "manifest": one.manifest,
                "manifest_bytes": one.manifest_bytes,
                "size_bytes": one.size_bytes,
                "runtime": one.runtime,
                "precision": one.precision,
                "deltas": one.deltas,
                **_quality(plane, one.manifest),
            }
            for one in row.artefacts
        ],
    }


def _model_document(plane: ControlPlane, summary: catalogue.ModelSummary) -> dict[str, Any]:
    latest = summary.latest
    return {
        "name": summary.name,
        "kind": summary.kind,
        "created_at": summary.created_at.isoformat(),
        "num_releases": summary.num_releases,
        "latest_version": latest.version if latest else None,
        "latest": release_document(plane, latest) if latest else None,
    }


def _quality(plane: ControlPlane, digest: str) -> dict[str, Any]:
    """Gates and provenance as the artefact's manifest states them; empty where the manifest is gone."""
    try:
        manifest = parse_manifest(plane.blobs.get(digest, max_bytes=MAX_MANIFEST_BYTES), expected_digest=digest)
    except NotFoundError:
        return {"gates": [], "tools": {}, "recipe_digest": None, "reproducibility": None, "runtime_choice": None}
    gates = [gate.model_dump(mode="json") for gate in manifest.gates]
    choice = manifest.runtime_choice
    return {
        "gates": gates,
        "tools": manifest.tools,
        "recipe_digest": manifest.recipe_digest,
        "reproducibility": manifest.reproducibility,
        "runtime_choice": choice.model_dump(mode="json") if choice is not None else None,
    }


def _check_readable(plane: ControlPlane, by: Principal, digest: str) -> None:
    if by.role is Role.WORKER:
        return
    with plane.database.read() as session:
        if not catalogue.is_referenced(session, digest, tenant=by.tenant):
            raise NotFoundError(f"blob {digest[:12]} is not stored", remedy="upload it first")


def _serve(
    plane: ControlPlane, digest: str, request: Request, media_type: str = "application/octet-stream"
) -> Response:
    size = plane.blobs.find_size(digest)
    if size is None:
        raise NotFoundError(f"blob {digest[:12]} is not stored", remedy="upload it first")
    headers = {**IMMUTABLE, "etag": f'"{digest}"', "accept-ranges": "bytes"}
    if request.method == "HEAD":
        return Response(None, 200, {**headers, "content-length": str(size)}, media_type)
    start, end = _range(request.headers.get("range"), size)
    is_part = (start, end) != (0, size)
    if is_part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    pieces = plane.blobs.stream(digest, start, end)
    return StreamingResponse(pieces, 206 if is_part else 200, headers, media_type)


def _range(text: str | None, size: int) -> tuple[int, int]:
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text or "")
    if match is None or not (match[1] or match[2]):
        return 0, size  # several ranges, or another unit: the whole is a fair answer (RFC 9110, 14.2)
    if not match[1]:
        return max(size - int(match[2]), 0), size
    start = int(match[1])
    end = min(int(match[2]) + 1, size) if match[2] else size
    if start >= size or end <= start:
        raise InvalidInputError(f"range {text} is outside of {size} bytes", remedy="ask for bytes that exist")
    return start, end
