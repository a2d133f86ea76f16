"""A rollout as data: what was agreed (`Terms`), where it is (`State`), and its way through the database as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from cloud.control.rollout.pace import Pace
from wire.window import Window


class Status(StrEnum):
    """Where a rollout is. The last three are ends (a halted or succeeded one can be retried or rolled back)."""

    AWAITING_APPROVAL = "awaiting_approval"
    DRAFT = "draft"
    RUNNING = "running"
    PAUSED = "paused"
    ROLLING_BACK = "rolling_back"
    HALTED = "halted"
    SUCCEEDED = "succeeded"
    ROLLED_BACK = "rolled_back"


class Slot(StrEnum):
    """Where one device is in a rollout."""

    PENDING = "pending"
    OFFERED = "offered"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    SKIPPED = "skipped"  # never offered
    WITHDRAWN = "withdrawn"  # offered, then taken back by a halt before it had an outcome
    RETURNING = "returning"  # told to go back to what it had
    RETURNED = "returned"
    STRANDED = "stranded"  # told to go back, did not say that it did


UNDER_WAY = frozenset({Status.RUNNING, Status.PAUSED, Status.ROLLING_BACK})
ENDS = frozenset({Status.HALTED, Status.SUCCEEDED, Status.ROLLED_BACK})
FAILURES = frozenset({Slot.FAILED, Slot.TIMED_OUT})
OUTCOMES = FAILURES | {Slot.SUCCEEDED}


@dataclass(frozen=True)
class Gate:
    """What a rollout tolerates. `max_failures` counts over all waves, the ratios within each wave."""

    max_failures: int = 0
    min_success_ratio: float = 1.0
    min_settled_ratio: float = 1.0  # share of a wave with an outcome before the next wave opens


@dataclass(frozen=True)
class Terms:
    """What was agreed when the rollout was made."""

    gate: Gate = field(default_factory=Gate)
    device_timeout_s: float = 600.0  # from the offer to the outcome, without waiting for a window
    pace: Pace | None = None
    window: Window | None = None
    approval_role: str | None = None  # another person with this role must agree first
    starts_when_approved: bool = False

    def deadline(self, now: float) -> float:
        """Until when a device that is offered the release now must have an outcome.

        With a window: it may download for the time-out, then has to wait for the window, then gets the time-out again.
        """
        late = now + self.device_timeout_s
        return late if self.window is None else self.window.next_open_s(late) + self.device_timeout_s


@dataclass(frozen=True)
class DeviceSlot:
    """One device: its slot, the wave it belongs to, its deadline and what it said."""

    slot: Slot
    wave: int
    deadline: float | None = None  # seconds since the epoch of whoever drives the engine
    phase: str = ""
    reason: str = ""
    attempts: int = 0


@dataclass(frozen=True)
class State:
    """A rollout; `to_dict` and `from_dict` carry it through the database. The devices' order is the order of offers."""

    status: Status
    terms: Terms
    num_waves: int
    wave: int = 0
    joined_wave: int | None = None  # the last wave, of devices that joined later
    devices: Mapping[str, DeviceSlot] = field(default_factory=dict)
    credit: float = 1.0  # devices that the pace lets through now
    paced_at: float | None = None
    approved_by: str = ""
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Devices are written field by field: `asdict` copies deeply, which is slow for many."""
        devices = {
            name: {"slot": one.slot.value, "wave": one.wave, "deadline": one.deadline, "phase": one.phase,
                   "reason": one.reason, "attempts": one.attempts}
            for name, one in self.devices.items()
        }  # fmt: skip
        return {**asdict(replace(self, devices={})), "devices": devices}

    def of_wave(self, wave: int) -> dict[str, DeviceSlot]:
        """The devices of one wave."""
        return {name: device for name, device in self.devices.items() if device.wave == wave}

    @property
    def num_succeeded(self) -> int:
        """Devices that committed the release."""
        return sum(device.slot is Slot.SUCCEEDED for device in self.devices.values())

    @property
    def num_failures(self) -> int:
        """Devices that failed or fell silent."""
        return sum(device.slot in FAILURES for device in self.devices.values())


def new(waves: Sequence[Sequence[str]], terms: Terms, skipped: Mapping[str, str]) -> State:
    """A draft with these waves; `skipped` devices cannot run the release, each with the reason."""
    devices = {name: DeviceSlot(Slot.PENDING, number) for number, wave in enumerate(waves) for name in wave}
    devices |= {name: DeviceSlot(Slot.SKIPPED, -1, reason=reason) for name, reason in skipped.items()}
    status = Status.AWAITING_APPROVAL if terms.approval_role else Status.DRAFT
    return State(status, terms, len(waves), devices=devices)


def counts(devices: Iterable[DeviceSlot]) -> dict[str, int]:
    """How many devices are in each slot, those of zero left out."""
    found: dict[str, int] = {}
    for device in devices:
        found[device.slot.value] = found.get(device.slot.value, 0) + 1
    return found


def from_dict(data: Mapping[str, Any]) -> State:
    """The state that `to_dict` gave."""
    devices = {
        name: DeviceSlot(**{**device, "slot": Slot(device["slot"])}) for name, device in dict(data["devices"]).items()
    }
    terms = terms_from_dict(data["terms"])
    return State(**{**data, "status": Status(data["status"]), "terms": terms, "devices": devices})


def terms_from_dict(data: Mapping[str, Any]) -> Terms:
    """The terms inside `State.to_dict`."""
    window = data["window"]
    return Terms(
        **{
            **data,
            "gate": Gate(**data["gate"]),
            "pace": Pace(**data["pace"]) if data["pace"] else None,
            "window": Window(**{**window, "weekdays": tuple(window["weekdays"])}) if window else None,
        }
    )
