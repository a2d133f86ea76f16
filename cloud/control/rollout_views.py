"""A rollout as the API shows it, and as its events tell it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from cloud.control import rollout
from cloud.control.rollout import State, Status
from cloud.control.tables import RolloutRow


def summary(row: RolloutRow) -> dict[str, Any]:
    """A rollout as lists and events show it."""
    state = rollout.from_dict(row.state)
    return {
        "rollout_id": row.rollout_id,
        "status": row.status,
        "model": row.model,
        "version": row.model_version,
        "release": row.release,
        "group": row.group,
        "wave": state.wave + 1,
        "num_waves": state.num_waves,
        "counts": rollout.counts(state.devices.values()),
        "num_devices": len(state.devices),
        "reason": row.reason,
        "decision_id": row.decision_id,
        "approved_by": state.approved_by or None,
        "created_by": row.created_by,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
    }


def details(row: RolloutRow) -> dict[str, Any]:
    """A rollout with its order, waves and devices."""
    state = rollout.from_dict(row.state)
    return {
        **summary(row),
        **row.order,
        "waves_planned": row.order["waves"],
        "waves": [_wave(state, number) for number in range(state.num_waves)],
        "devices": [_device(row, name, device) for name, device in sorted(state.devices.items())],
        "rate_per_minute": state.terms.pace.rate(state.num_succeeded) if state.terms.pace else None,
    }


def _wave(state: State, number: int) -> dict[str, Any]:
    inside = state.of_wave(number)
    return {
        "wave": number + 1,
        "is_canary": number == 0 and state.num_waves > 1,
        "is_joined": number == state.joined_wave,
        "is_current": number == state.wave,
        "is_open": number <= state.wave and state.status not in (Status.DRAFT, Status.AWAITING_APPROVAL),
        "counts": rollout.counts(inside.values()),
        "device_ids": sorted(inside),
    }


def _device(row: RolloutRow, name: str, device: rollout.DeviceSlot) -> dict[str, Any]:
    return {
        "device_id": name,
        "wave": device.wave + 1 if device.wave >= 0 else None,
        "state": device.slot.value,
        "phase": device.phase,
        "reason": device.reason,
        "attempts": device.attempts,
        "deadline": datetime.fromtimestamp(device.deadline, UTC).isoformat() if device.deadline else None,
        "target": row.offers.get(name, {}).get("model", {}).get("target"),
        "choice": row.offers.get(name, {}).get("choice"),  # why this target
    }
