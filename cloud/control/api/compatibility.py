"""Which devices can run a model, which artefact each would get and why; the rollout asks the very same rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import select

from cloud.control.api.base import Cursor, Limit, Plane, Viewer, page
from cloud.control.placement import place
from cloud.control.tables import Device
from model_registry import catalogue
from model_registry.compatibility import Choice
from model_registry.tables import ReleaseRow
from wire.errors import NotFoundError

router = APIRouter()

Version = Annotated[str | None, Query(max_length=64, description="A version; the newest release by default.")]


@router.get("/models/{name}/compatibility")
def get_compatibility(
    name: str, plane: Plane, by: Viewer, version: Version = None, limit: Limit = 100, cursor: Cursor = 0
) -> dict[str, Any]:
    """The devices of the fleet in pages: the artefact each would get, the rule and the reason; nothing is offered."""
    query = (
        select(Device)
        .where(Device.tenant == by.tenant, Device.revoked_at.is_(None))
        .order_by(Device.device_id)
        .limit(limit + 1)
        .offset(cursor)
    )
    with plane.database.read() as session:
        release = _find_release(catalogue.list_versions(session, by.tenant, name), name, version)
        devices = list(session.scalars(query))
        choices = place(plane.blobs, release, devices).choices
        items = [_shown(device, choices[device.device_id]) for device in devices]
        rules = Counter(item["rule"] for item in items[:limit] if item["target"] is None)
        targets = Counter(item["target"] for item in items[:limit] if item["target"] is not None)
        return {
            "name": name,
            "version": release.version,
            "release": release.digest,
            "num_by_target": dict(targets),
            "num_by_rule": dict(rules),
            **page(items, limit, cursor),
        }


def _find_release(releases: Sequence[ReleaseRow], name: str, version: str | None) -> ReleaseRow:
    found = next((one for one in releases if version in (None, one.version)), None)
    if found is None:
        wanted = f"{name} {version}" if version else f"a release of {name}"
        raise NotFoundError(f"{wanted} is not in the catalogue", remedy="see: foreshore models")
    return found


def _shown(device: Device, choice: Choice) -> dict[str, Any]:
    return {
        "device_id": device.device_id,
        "online": device.online,
        "target": choice.target,
        "rule": choice.rule,
        "reason": choice.reason,
        "verdicts": {
            target: {"will_run": one.will_run, "rule": one.rule, "sentence": one.sentence, "assumed": list(one.assumed)}
            for target, one in choice.verdicts.items()
        },
    }
