"""The TUF repository of the caller's tenant: what clients fetch, and where signed documents are handed in."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from pydantic import Field

from cloud.control.api.base import Admin, Body, Plane, Publisher, Viewer, decoded, needs
from cloud.control.identity import Principal, Role
from cloud.control.trust import summary
from wire.messages import Name

router = APIRouter(prefix="/trust")

FileName = Annotated[str, Path(min_length=1, max_length=250)]
Client = Annotated[Principal, Depends(needs(Role.VIEWER, Role.DEVICE))]


class DocumentBody(Body):
    """Signed metadata of root, targets or a publisher: base64 of its bytes."""

    role: Name
    metadata: Annotated[str, Field(max_length=2 << 20)]


class OnlineKeyBody(Body):
    """An online role that is to get a new key."""

    role: Name


@router.get("/metadata/{name}")
def get_metadata(name: FileName, plane: Plane, by: Client) -> Response:
    """One file of the repository, by the name that the TUF specification gives it."""
    cache = "no-store" if name == "timestamp.json" else "private, max-age=86400"
    return Response(plane.trust.file(by.tenant, name), media_type="application/json", headers={"cache-control": cache})


@router.get("")
def get_trust(plane: Plane, by: Viewer) -> dict[str, Any]:
    """All roles with versions, expiry and keys, what waits for signatures, and the newest online keys."""
    repository = plane.trust.repository(by.tenant)
    return {**summary(repository), "online_keys": plane.trust.keys.public()}


@router.post("/metadata", status_code=201)
def submit_metadata(body: DocumentBody, plane: Plane, by: Publisher) -> dict[str, Any]:
    """Hand in a signed document. It becomes current once enough keys have signed and all others fit to it."""
    return summary(plane.trust.submit(by, body.role, decoded("metadata", body.metadata)))


@router.post("/online-keys", status_code=201)
def add_online_key(body: OnlineKeyBody, plane: Plane, by: Admin) -> dict[str, Any]:
    """Make a new key for an online role; it signs nothing before root or targets name it."""
    plane.trust.add_online_key(by, body.role)
    return {"online_keys": plane.trust.keys.public()}
