"""Devices, groups and rollouts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import Field

from cloud.control import rollout
from cloud.control.api.base import Body, Cursor, Device, Limit, Operator, Plane, Viewer, page
from cloud.control.fleet import ALL, details, summary
from cloud.control.rollouts import Order
from cloud.control.tables import Group
from wire.messages import Digest, Name

router = APIRouter()


class GroupBody(Body):
    """A group: devices by name, or a filter."""

    device_ids: Annotated[list[Name], Field(max_length=100_000)] | None = None
    filter: Annotated[str, Field(max_length=500)] | None = None


class NewGroupBody(GroupBody):
    """A group with its name."""

    name: Name


class WaveBody(Body):
    """How far a wave reaches: the next `count` devices, or up to `percent` of all."""

    count: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    percent: Annotated[float, Field(gt=0, le=100)] | None = None


class GateBody(Body):
    """What a rollout tolerates."""

    max_failures: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    min_success_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


class RolloutBody(Body):
    """A release for a group, in waves."""

    release: Digest
    group: Name = ALL
    waves: Annotated[list[WaveBody], Field(max_length=rollout.MAX_WAVES)] = []
    gate: GateBody = GateBody()
    soak_s: Annotated[float, Field(ge=0, le=86400)] = 0.0
    device_timeout_s: Annotated[float, Field(ge=1, le=30 * 24 * 3600)] = 600.0
    start: bool = False


class SteerBody(Body):
    """Why, in a sentence."""

    reason: Annotated[str, Field(max_length=500)] = ""


@router.get("/devices")
def list_devices(plane: Plane, by: Viewer, group: Name = ALL, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """Devices by name."""
    rows = plane.fleet.list_devices(by.tenant, group=group, limit=limit + 1, offset=cursor)
    return page([summary(row) for row in rows], limit, cursor)


@router.get("/devices/{device_id}")
def get_device(device_id: str, plane: Plane, by: Viewer) -> dict[str, Any]:
    """One device: desired and reported."""
    return details(plane.fleet.get_device(by.tenant, device_id))


@router.delete("/devices/{device_id}", status_code=204)
def revoke_device(device_id: str, plane: Plane, by: Operator) -> None:
    """Take a device out of the fleet."""
    plane.revoke(by, device_id)


@router.get("/device/desired")
def get_desired(plane: Plane, by: Device) -> Response:
    """The device's own signed wish, as the retained message has it."""
    envelope = plane.fleet.desired_envelope(by.tenant, by.device_id or "")
    return Response(envelope, media_type="application/json", headers={"cache-control": "no-store"})


@router.get("/groups")
def list_groups(plane: Plane, by: Viewer) -> dict[str, Any]:
    """The groups, `all` first."""
    everyone = {"name": ALL, "device_ids": None, "filter": None, "num_devices": None}
    items = [everyone] + [_group(row) for row in plane.fleet.list_groups(by.tenant)]
    return {"items": items, "next": None}


@router.post("/groups", status_code=201)
def create_group(body: NewGroupBody, plane: Plane, by: Operator) -> dict[str, Any]:
    """Make a group."""
    return _group(plane.fleet.put_group(by, body.name, body.device_ids, body.filter, is_new=True))


@router.put("/groups/{name}")
def change_group(name: str, body: GroupBody, plane: Plane, by: Operator) -> dict[str, Any]:
    """Change a group."""
    return _group(plane.fleet.put_group(by, name, body.device_ids, body.filter, is_new=False))


@router.delete("/groups/{name}", status_code=204)
def delete_group(name: str, plane: Plane, by: Operator) -> None:
    """Forget a group."""
    plane.fleet.delete_group(by, name)


@router.post("/rollouts", status_code=201)
def create_rollout(body: RolloutBody, plane: Plane, by: Operator) -> dict[str, Any]:
    """Plan a rollout; with `start` it begins at once."""
    order = Order(
        release=body.release,
        group=body.group,
        waves=[wave.model_dump(exclude_none=True) for wave in body.waves],
        gate=rollout.Gate(body.gate.max_failures, body.gate.min_success_ratio),
        soak_s=body.soak_s,
        device_timeout_s=body.device_timeout_s,
    )
    return plane.rollouts.create(by, order, start=body.start)


@router.get("/rollouts")
def list_rollouts(plane: Plane, by: Viewer, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """Rollouts, newest first."""
    return page(plane.rollouts.newest(by.tenant, limit=limit + 1, offset=cursor), limit, cursor)


@router.get("/rollouts/{rollout_id}")
def get_rollout(rollout_id: str, plane: Plane, by: Viewer) -> dict[str, Any]:
    """One rollout with its waves and devices."""
    return plane.rollouts.get(by.tenant, rollout_id)


@router.post("/rollouts/{rollout_id}/{order}")
def steer_rollout(
    rollout_id: str,
    order: Literal["start", "pause", "resume", "halt", "rollback"],
    plane: Plane,
    by: Operator,
    body: SteerBody | None = None,
) -> dict[str, Any]:
    """Steer a rollout."""
    return plane.rollouts.steer(by, rollout_id, order, body.reason if body else "")


def _group(row: Group) -> dict[str, Any]:
    return {"name": row.name, "device_ids": row.device_ids, "filter": row.filter}
