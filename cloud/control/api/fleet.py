"""Devices, their labels and their groups."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import Field

from cloud.control.api.base import Body, Cursor, Device, Limit, Operator, Plane, Viewer, page
from cloud.control.device_filter import MAX_CHARS
from cloud.control.fleet import ALL, MAX_LABELS, details, summary
from cloud.control.tables import Group
from wire.messages import Name

router = APIRouter()


class GroupBody(Body):
    """A group: devices by name, or a filter."""

    device_ids: Annotated[list[Name], Field(max_length=10_000)] | None = None
    filter: Annotated[str, Field(max_length=MAX_CHARS)] | None = None


class NewGroupBody(GroupBody):
    """A group with its name."""

    name: Name


class LabelsBody(Body):
    """All labels of a device."""

    labels: Annotated[dict[str, str], Field(max_length=MAX_LABELS)]


@router.get("/devices")
def list_devices(
    plane: Plane,
    by: Viewer,
    group: Name = ALL,
    filter_text: Annotated[str | None, Query(alias="filter", max_length=MAX_CHARS)] = None,
    limit: Limit = 100,
    cursor: Cursor = 0,
) -> dict[str, Any]:
    """Devices by name, of a group or as a filter says."""
    rows = plane.fleet.list_devices(by.tenant, group=group, filter_text=filter_text, limit=limit + 1, offset=cursor)
    return page([summary(row) for row in rows], limit, cursor)


@router.get("/devices/{device_id}")
def get_device(device_id: str, plane: Plane, by: Viewer) -> dict[str, Any]:
    """One device: desired and reported."""
    return details(plane.fleet.get_device(by.tenant, device_id))


@router.delete("/devices/{device_id}", status_code=204)
def revoke_device(device_id: str, plane: Plane, by: Operator) -> None:
    """Take a device out of the fleet."""
    plane.revoke(by, device_id)


@router.put("/devices/{device_id}/labels")
def label_device(device_id: str, body: LabelsBody, plane: Plane, by: Operator) -> dict[str, Any]:
    """Replace a device's labels."""
    device = plane.fleet.label(by, device_id, body.labels)
    plane.rollouts.consider(by.tenant, device_id=device_id)
    return summary(device)


@router.get("/devices/{device_id}/desired")
def get_device_desired(device_id: str, plane: Plane, by: Operator) -> Response:
    """A device's signed wish, for a bundle."""
    envelope = plane.fleet.desired_envelope(by.tenant, device_id)
    return Response(envelope, media_type="application/json", headers={"cache-control": "no-store"})


@router.get("/device/desired")
def get_desired(plane: Plane, by: Device) -> Response:
    """The device's own signed wish, as the retained message has it."""
    envelope = plane.fleet.desired_envelope(by.tenant, by.device_id or "")
    return Response(envelope, media_type="application/json", headers={"cache-control": "no-store"})


@router.get("/groups")
def list_groups(plane: Plane, by: Viewer) -> dict[str, Any]:
    """The groups, `all` first."""
    everyone = {"name": ALL, "device_ids": None, "filter": None, "num_devices": plane.fleet.count(by.tenant)}
    items = [everyone] + [_group(row, count) for row, count in plane.fleet.list_groups(by.tenant)]
    return {"items": items, "next": None}


@router.post("/groups", status_code=201)
def create_group(body: NewGroupBody, plane: Plane, by: Operator) -> dict[str, Any]:
    """Make a group."""
    return _group(*plane.fleet.put_group(by, body.name, body.device_ids, body.filter, is_new=True))


@router.put("/groups/{name}")
def change_group(name: str, body: GroupBody, plane: Plane, by: Operator) -> dict[str, Any]:
    """Change a group."""
    changed = _group(*plane.fleet.put_group(by, name, body.device_ids, body.filter, is_new=False))
    plane.rollouts.consider(by.tenant, group=name)
    return changed


@router.delete("/groups/{name}", status_code=204)
def delete_group(name: str, plane: Plane, by: Operator) -> None:
    """Forget a group."""
    plane.fleet.delete_group(by, name)


def _group(row: Group, num_devices: int) -> dict[str, Any]:
    return {"name": row.name, "device_ids": row.device_ids, "filter": row.filter, "num_devices": num_devices}
