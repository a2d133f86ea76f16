"""Rollouts: made with an order, steered by a word."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field, ValidationError

from cloud.control import rollout
from cloud.control.api.base import Body, Cursor, Limit, Operator, Plane, Viewer, page
from cloud.control.fleet import ALL
from cloud.control.rollout.pace import MAX_PER_MINUTE
from cloud.control.rollout_order import MAX_SOAK_S, MAX_TIMEOUT_S, Order
from wire.errors import InvalidInputError
from wire.messages import Digest, Name
from wire.window import DAY_S, MIN_S, Window

router = APIRouter()


class WaveBody(Body):
    """How far a wave reaches: the next `count` devices, or up to `percent` of all."""

    count: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    percent: Annotated[float, Field(gt=0, le=100)] | None = None


class GateBody(Body):
    """What a rollout tolerates. `min_settled_ratio`: how much of a wave must have an outcome before the next opens."""

    max_failures: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    min_success_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    min_settled_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


class PaceBody(Body):
    """At most `per_minute` devices a minute, times `factor` for each `every` successes, up to `max_per_minute`."""

    per_minute: Annotated[float, Field(ge=0.001, le=MAX_PER_MINUTE)]
    factor: Annotated[float, Field(ge=1, le=10)] = 1.0
    every: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    max_per_minute: Annotated[float, Field(ge=0.001, le=MAX_PER_MINUTE)] = MAX_PER_MINUTE


class WindowBody(Body):
    """When devices may switch, in UTC: `opens_s` after midnight, for `lasts_s`, on `weekdays` (0 is Monday)."""

    opens_s: Annotated[int, Field(ge=0, lt=DAY_S)]
    lasts_s: Annotated[int, Field(ge=MIN_S, le=DAY_S)]
    weekdays: Annotated[list[Annotated[int, Field(ge=0, le=6)]], Field(max_length=7)] = []


class RolloutBody(Body):
    """A release for a group, in waves."""

    release: Digest
    group: Name = ALL
    waves: Annotated[list[WaveBody], Field(max_length=rollout.MAX_WAVES)] = []
    gate: GateBody = GateBody()
    soak_s: Annotated[float, Field(ge=0, le=MAX_SOAK_S)] = 0.0
    device_timeout_s: Annotated[float, Field(ge=1, le=MAX_TIMEOUT_S)] = 600.0
    pace: PaceBody | None = None
    window: WindowBody | None = None
    approval: Literal["operator", "publisher", "admin"] | None = None
    joins: bool = False
    start: bool = False

    def order(self) -> Order:
        """The order inside it."""
        return Order(
            release=self.release,
            group=self.group,
            waves=[wave.model_dump(exclude_none=True) for wave in self.waves],
            gate=rollout.Gate(**self.gate.model_dump()),
            soak_s=self.soak_s,
            device_timeout_s=self.device_timeout_s,
            pace=rollout.Pace(**self.pace.model_dump()) if self.pace else None,
            window=_window(self.window) if self.window else None,
            approval=self.approval,
            joins=self.joins,
        )


class SteerBody(Body):
    """Why, in a sentence."""

    reason: Annotated[str, Field(max_length=500)] = ""


@router.post("/rollouts", status_code=201)
def create_rollout(body: RolloutBody, plane: Plane, by: Operator) -> dict[str, Any]:
    """Plan a rollout; with `start` it begins at once, or once it is approved."""
    return plane.rollouts.create(by, body.order(), start=body.start)


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
    order: Literal["approve", "start", "pause", "resume", "halt", "retry", "rollback"],
    plane: Plane,
    by: Operator,
    body: SteerBody | None = None,
) -> dict[str, Any]:
    """Steer a rollout."""
    return plane.rollouts.steer(by, rollout_id, order, body.reason if body else "")


def _window(body: WindowBody) -> Window:
    try:
        return Window(body.opens_s, body.lasts_s, tuple(sorted(body.weekdays)))
    except (ValueError, ValidationError) as error:
        raise InvalidInputError(f"window: {error}", remedy="see docs/control.md, Rollouts") from error
