"""Whether a device may build an engine for others now: only in its idle time and within its power budget.

A pure decision; `climate` reads the power. A budget without a sensor that tells is a reason not to build.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.config import EngineSettings


@dataclass(frozen=True)
class Conditions:
    """What the device does now. `power_w` None: no sensor tells."""

    idle_s: float
    is_updating: bool
    is_online: bool
    power_w: float | None = None


def reason_not_to_build(now: Conditions, settings: EngineSettings) -> str | None:
    """Why no build may begin or go on; None when one may."""
    if settings.build is None:
        return "this device builds no engines"
    if not now.is_online:
        return "the control plane cannot be reached"
    if now.is_updating:
        return "an update is under way"
    if now.idle_s < settings.min_idle_s:
        return f"the last request was {now.idle_s:.1f} s ago, {settings.min_idle_s:g} s of idle time are wanted"
    if settings.max_power_w is None:
        return None
    if now.power_w is None:
        return "there is a power budget and no sensor that tells the power"
    if now.power_w > settings.max_power_w:
        return f"the board draws {now.power_w:.1f} W, the budget is {settings.max_power_w:g} W"
    return None
