"""What can happen to a rollout, and what it asks its shell to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Approved:
    """Another person agrees."""

    by: str
    now: float


@dataclass(frozen=True)
class Started:
    """A person starts the rollout, or resumes it."""

    now: float


@dataclass(frozen=True)
class Paused:
    """A person pauses it: no new offers; what is offered goes on."""


@dataclass(frozen=True)
class Halted:
    """A person stops it for good."""

    reason: str


@dataclass(frozen=True)
class RetriedFailed:
    """A person has the devices that failed or fell silent, and only those, try again."""

    now: float


@dataclass(frozen=True)
class RollBack:
    """A person wants the release off every device that got it."""

    now: float
    reason: str = "rolled back by request"


@dataclass(frozen=True)
class Joined:
    """Devices came into the group later."""

    device_ids: tuple[str, ...]
    now: float


@dataclass(frozen=True)
class Progressed:
    """A device works on it."""

    device_id: str
    phase: str


@dataclass(frozen=True)
class Succeeded:
    """A device committed the release."""

    device_id: str
    now: float


@dataclass(frozen=True)
class Failed:
    """A device gave up on the release, and is back on what it had."""

    device_id: str
    now: float
    reason: str


@dataclass(frozen=True)
class Returned:
    """A device runs again what it had before."""

    device_id: str


@dataclass(frozen=True)
class Removed:
    """A device is this rollout's no more: it left the fleet, or a later rollout decides about it."""

    device_id: str
    now: float
    reason: str = "the device left the fleet"


@dataclass(frozen=True)
class Ticked:
    """Time passed."""

    now: float


FromPerson = Approved | Started | Paused | Halted | RetriedFailed | RollBack
FromDevice = Progressed | Succeeded | Failed | Returned
Event = FromPerson | FromDevice | Joined | Removed | Ticked


@dataclass(frozen=True)
class Offer:
    """Wish the release on these devices."""

    device_ids: tuple[str, ...]


@dataclass(frozen=True)
class Withdraw:
    """Wish these devices what they had before."""

    device_ids: tuple[str, ...]


@dataclass(frozen=True)
class Explain:
    """The rollout halted by itself: write down why."""

    reason: str


Action = Offer | Withdraw | Explain
