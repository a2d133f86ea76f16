"""Whether a device may build an engine for others now: only in its idle time and within its power budget.

Pure decision, and one reader of power sensors (hwmon and the INA3221 of Jetson boards) below an injectable root. A
budget without a sensor that tells is a reason not to build.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import EngineSettings

_SENSORS = ("sys/class/hwmon/hwmon*/power1_input", "sys/class/hwmon/hwmon*/power1_average")
_MICROWATTS_PER_WATT = 1e6


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


def read_power_w(root: Path = Path("/")) -> float | None:
    """Power of the whole board: the largest reading of its sensors."""
    found = []
    for pattern in _SENSORS:
        for sensor in root.glob(pattern):
            try:
                found.append(int(sensor.read_text()) / _MICROWATTS_PER_WATT)
            except (OSError, ValueError):
                continue
    for bus in root.glob("sys/class/hwmon/hwmon*/in1_input"):  # INA3221: millivolts and milliamperes of the input rail
        try:
            current_ma = int(bus.with_name("curr1_input").read_text())
            found.append(int(bus.read_text()) * current_ma / _MICROWATTS_PER_WATT)
        except (OSError, ValueError):
            continue
    return max(found, default=None)
