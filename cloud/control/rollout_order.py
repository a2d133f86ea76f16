"""What a person asked of a rollout: checked here once, kept with the rollout as a document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cloud.control.identity import LADDER
from cloud.control.rollout import Gate, Pace, Terms
from wire.errors import InvalidInputError
from wire.window import Window

MAX_TIMEOUT_S = 30 * 24 * 3600
MAX_SOAK_S = 86_400
APPROVERS = tuple(role.value for role in LADDER[1:])


@dataclass(frozen=True)
class Order:
    """A release for a group: how far each wave reaches, how fast, when devices may switch, and what is tolerated."""

    release: str
    group: str = "all"
    waves: Sequence[Mapping[str, float]] = ()
    gate: Gate = field(default_factory=Gate)
    soak_s: float = 0.0
    device_timeout_s: float = 600.0
    pace: Pace | None = None
    window: Window | None = None
    approval: str | None = None  # the least role of the person who has to agree
    joins: bool = False  # devices that come into the group later get the release too

    def __post_init__(self) -> None:
        """Raise `InvalidInputError` for what is out of range."""
        if not math.isfinite(self.device_timeout_s) or not 1 <= self.device_timeout_s <= MAX_TIMEOUT_S:
            raise InvalidInputError(f"device_timeout_s is {self.device_timeout_s}", remedy=f"1 to {MAX_TIMEOUT_S}")
        if not 0 <= self.soak_s <= MAX_SOAK_S:
            raise InvalidInputError(f"soak_s is {self.soak_s}", remedy=f"0 to {MAX_SOAK_S} seconds")
        gate = self.gate
        if gate.max_failures < 0 or not 0 <= gate.min_success_ratio <= 1 or not 0 <= gate.min_settled_ratio <= 1:
            raise InvalidInputError(f"the gate {gate} is out of range", remedy="ratios of 0 to 1, failures from 0")
        if self.approval is not None and self.approval not in APPROVERS:
            raise InvalidInputError(f"approval role {self.approval!r} is none", remedy=f"one of {', '.join(APPROVERS)}")
        if self.pace is not None:
            _check_pace(self.pace)

    def terms(self, *, start: bool) -> Terms:
        """What the engine needs of it; a soak comes on top of the time that a device has."""
        return Terms(
            gate=self.gate,
            device_timeout_s=self.device_timeout_s + self.soak_s,
            pace=self.pace,
            window=self.window,
            approval_role=self.approval,
            starts_when_approved=start,
        )

    def to_dict(self) -> dict[str, Any]:
        """The order as it is kept and shown, without release and group, which have columns."""
        document = asdict(self)
        del document["release"], document["group"]
        return {**document, "waves": [dict(wave) for wave in self.waves]}


def _check_pace(pace: Pace) -> None:
    if not all(math.isfinite(number) for number in (pace.per_minute, pace.factor, pace.max_per_minute)):
        raise InvalidInputError(f"the pace {pace} is not finite", remedy="give numbers")
    if not 0.001 <= pace.per_minute <= 1e6 or not 0.001 <= pace.max_per_minute <= 1e6:
        raise InvalidInputError(f"a pace of {pace.per_minute:g} devices a minute", remedy="0.001 to 1000000")
    if not 1 <= pace.factor <= 10 or not 1 <= pace.every <= 1_000_000:
        raise InvalidInputError(
            f"a pace that grows by {pace.factor:g} every {pace.every}", remedy="a factor of 1 to 10, every 1 or more"
        )
