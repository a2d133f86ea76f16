"""How hot the device is, what it draws and whether it is slowed down, as the system tells: the kernel's thermal zones
and power meters (`/sys`, where a Jetson keeps its own too), and `nvidia-smi` where there is a GPU driver.

Reads only. What is not told is None and is held against nobody.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SYSFS = Path("/sys")
MAX_AGE_S = 2.0
QUERY_TIMEOUT_S = 3.0
MAX_ZONES = 64
_HOT_TRIPS = frozenset({"passive", "hot", "critical"})
_BOARD_RAILS = frozenset({"VDD_IN", "VIN_SYS_5V0", "POM_5V_IN"})
_MAX_SANE_C = 150.0
_QUERY = "temperature.gpu,power.draw,clocks_event_reasons.sw_thermal_slowdown,clocks_event_reasons.hw_thermal_slowdown"


@dataclass(frozen=True)
class Climate:
    """One reading."""

    headroom_c: float | None = None  # of the zone that is nearest to where the system slows down; below 0: beyond it
    hottest_c: float | None = None
    power_w: float | None = None
    is_throttled: bool = False  # the system slows the processor or the GPU for heat, now
    on_battery: bool = False
    battery_share: float | None = None


def read_climate(sysfs: Path = SYSFS, query_gpu: Callable[[], str | None] | None = None) -> Climate:
    """Read everything once. Blocking, some milliseconds; `query_gpu` returns nvidia-smi's line."""
    zones = [reading for zone in _sorted(sysfs / "class/thermal", "thermal_zone*") if (reading := _zone(zone))]
    gpu_c, gpu_w, gpu_throttled = _gpu(query_gpu() if query_gpu is not None else None)
    temperatures = [*(now for now, _ in zones), *([gpu_c] if gpu_c is not None else [])]
    headrooms = [trip - now for now, trip in zones if trip is not None]
    on_battery, battery_share = _battery(sysfs / "class/power_supply")
    powers = [power for power in (_meters_w(sysfs / "class/hwmon"), gpu_w) if power is not None]
    return Climate(
        headroom_c=min(headrooms, default=None),
        hottest_c=max(temperatures, default=None),
        power_w=sum(powers) if powers else None,
        is_throttled=gpu_throttled or _is_cooled(sysfs / "class/thermal"),
        on_battery=on_battery,
        battery_share=battery_share,
    )


def query_nvidia_smi() -> str | None:
    """One line of nvidia-smi for the first GPU, or None without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True)
        return done.stdout.strip()
    return None


@dataclass
class ClimateWatch:
    """The last reading, renewed when it is old; never waits for a reading that somebody else is taking."""

    read: Callable[[], Climate] = field(default=lambda: read_climate(query_gpu=query_nvidia_smi))
    clock: Callable[[], float] = time.monotonic
    _climate: Climate = field(default_factory=Climate)
    _read_at: float | None = None

    @property
    def is_old(self) -> bool:
        """Whether a new reading is due."""
        return self._read_at is None or self.clock() - self._read_at > MAX_AGE_S

    @property
    def climate(self) -> Climate:
        """The last reading."""
        return self._climate

    def renew(self) -> Climate:
        """Read now. Blocking."""
        self._read_at = self.clock()
        self._climate = self.read()
        return self._climate


def _zone(zone: Path) -> tuple[float, float | None] | None:
    """Temperature of a zone and the lowest trip point at which the system acts, in degrees."""
    now = _number(zone / "temp", 1e-3)
    if now is None or not 0 < now < _MAX_SANE_C:
        return None
    trips = []
    for kind in _sorted(zone, "trip_point_*_type"):
        if _text(kind) in _HOT_TRIPS:
            trip = _number(kind.with_name(kind.name.replace("_type", "_temp")), 1e-3)
            if trip is not None and 0 < trip < _MAX_SANE_C:
                trips.append(trip)
    return now, min(trips, default=None)


def _is_cooled(thermal: Path) -> bool:
    """Whether a processor or GPU is slowed down as a cooling measure (fans do not count)."""
    for device in _sorted(thermal, "cooling_device*"):
        kind = (_text(device / "type") or "").lower()
        if ("cpu" in kind or "gpu" in kind or "processor" in kind) and (_number(device / "cur_state", 1.0) or 0) > 0:
            return True
    return False


def _meters_w(hwmon: Path) -> float | None:
    """Input power over all meters: microwatts, or millivolts times milliamperes as the INA3221 of a Jetson has them."""
    found = []
    for monitor in _sorted(hwmon, "hwmon*"):
        powers = [_number(file, 1e-6) for file in _sorted(monitor, "power*_input")]
        if not powers:
            pairs = ((_rail(monitor, n), _number(monitor / f"curr{n}_input", 1e-3)) for n in range(1, 9))
            powers = [volts * amperes for volts, amperes in pairs if volts is not None and amperes is not None]
        found += [power for power in powers if power is not None]
    return sum(found) if found else None


def _rail(monitor: Path, number: int) -> float | None:
    """Volts of a rail that stands for the whole board; single consumers would count twice."""
    label = _text(monitor / f"in{number}_label")
    return (
        _number(monitor / f"in{number}_input", 1e-3) if label in {None, "VDD_IN", "VIN_SYS_5V0", "POM_5V_IN"} else None
    )


def _battery(supplies: Path) -> tuple[bool, float | None]:
    shares, discharging = [], False
    for supply in _sorted(supplies, "*"):
        if _text(supply / "type") == "Battery":
            share = _number(supply / "capacity", 1e-2)
            shares += [share] if share is not None else []
            discharging |= _text(supply / "status") == "Discharging"
    return discharging, min(shares, default=None)


def _gpu(line: str | None) -> tuple[float | None, float | None, bool]:
    parts = [part.strip() for part in (line or "").split(",")]
    if len(parts) != 4:
        return None, None, False
    return _parsed(parts[0], 1.0), _parsed(parts[1], 1.0), "Active" in parts[2:]


def _sorted(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))[:MAX_ZONES] if folder.is_dir() else []


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):  # some sensors refuse to be read while asleep
        return None


def _number(file: Path, scale: float) -> float | None:
    return _parsed(_text(file), scale)


def _parsed(text: str | None, scale: float) -> float | None:
    try:
        return float(text) * scale if text is not None else None
    except ValueError:
        return None
