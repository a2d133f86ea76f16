"""What the pages show, made from the API's documents: rollouts by wave, fleet health, a decision's arithmetic.

Pure: documents in, frozen values out. The API's JSON is trusted for its truth, not for its completeness: a field that
an older server does not send becomes empty, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wire import decision

Json = Mapping[str, Any]
FAILED_SLOTS = frozenset({"failed", "timed_out", "stranded"})
BUSY_PHASES = frozenset({"preflight", "fetch", "verify", "staged", "probe", "switch", "soak"})
ACTIONS_BY_STATE: Mapping[str, tuple[str, ...]] = {
    "draft": ("start",),
    "running": ("pause", "halt"),
    "paused": ("resume", "halt"),
    "halted": ("rollback",),
    "succeeded": ("rollback",),
    "rolling_back": (),
    "rolled_back": (),
}
TONES: Mapping[str, str] = {
    **dict.fromkeys(("succeeded", "released", "committed", "online", "returned", "done", "completed"), "good"),
    **dict.fromkeys(("failed", "halted", "timed_out", "stranded", "offline", "unable_to_roll_back"), "bad"),
    **dict.fromkeys(("running", "offered", "compiling", "rolling_back", "returning", "leased", *BUSY_PHASES), "busy"),
    **dict.fromkeys(("paused", "awaiting_signature", "rolled_back", "rejected", "failed_no_change"), "warn"),
}


def tone(word: str) -> str:
    """The mood of a state: good, bad, busy, warn or quiet."""
    return TONES.get(word, "quiet")


@dataclass(frozen=True)
class SlotView:
    """One device in a rollout."""

    device_id: str
    state: str
    phase: str
    reason: str


@dataclass(frozen=True)
class WaveView:
    """One wave: its number from 1, its devices, how many of them are through."""

    number: int
    state: str
    slots: tuple[SlotView, ...]
    num_succeeded: int
    num_failed: int

    @property
    def num_devices(self) -> int:
        """Devices of the wave."""
        return len(self.slots)


@dataclass(frozen=True)
class RolloutView:
    """A rollout as pages show it."""

    rollout_id: str
    state: str
    model: str
    version: str
    release: str
    group: str
    reason: str
    decision_id: str
    created_at: str
    gate: Json
    waves: tuple[WaveView, ...]
    left_out: tuple[SlotView, ...]
    num_devices: int
    num_succeeded: int
    num_failed: int
    actions: tuple[str, ...]


def rollout_view(document: Json) -> RolloutView:
    """Read a rollout, from a listing (counts only) or alone (waves and devices too)."""
    status = str(document.get("status", ""))
    slots_by_wave: dict[int | None, list[SlotView]] = {}
    for row in document.get("devices") or ():
        slots_by_wave.setdefault(row.get("wave"), []).append(_slot(row))
    waves = tuple(
        _wave(wave, status, tuple(slots_by_wave.get(wave["wave"], ())))
        for wave in document.get("waves") or ()
        if "wave" in wave
    )
    counts: Mapping[str, int] = document.get("counts") or {}
    return RolloutView(
        rollout_id=str(document.get("rollout_id", "")),
        state=status,
        model=str(document.get("model", "")),
        version=str(document.get("version", "")),
        release=str(document.get("release", "")),
        group=str(document.get("group", "")),
        reason=str(document.get("reason") or ""),
        decision_id=str(document.get("decision_id") or ""),
        created_at=str(document.get("created_at") or ""),
        gate=document.get("gate") or {},
        waves=waves,
        left_out=tuple(slots_by_wave.get(None, ())),
        num_devices=int(document.get("num_devices") or 0),
        num_succeeded=counts.get("succeeded", 0),
        num_failed=sum(counts.get(slot, 0) for slot in FAILED_SLOTS),
        actions=ACTIONS_BY_STATE.get(status, ()),
    )


def _slot(row: Json) -> SlotView:
    return SlotView(
        device_id=str(row.get("device_id", "")),
        state=str(row.get("state") or "pending"),
        phase=str(row.get("phase") or ""),
        reason=str(row.get("reason") or ""),
    )


def _wave(wave: Json, status: str, slots: tuple[SlotView, ...]) -> WaveView:
    num_succeeded = sum(slot.state == "succeeded" for slot in slots)
    num_failed = sum(slot.state in FAILED_SLOTS for slot in slots)
    if slots and num_succeeded == len(slots):
        state = "succeeded"
    elif num_failed:
        state = "failed"
    elif wave.get("is_current") and status in {"running", "paused", "rolling_back"}:
        state = status
    else:
        state = "waiting" if status in {"draft", "running", "paused"} else "not reached"
    return WaveView(int(wave["wave"]), state, slots, num_succeeded, num_failed)


@dataclass(frozen=True)
class FleetHealth:
    """The fleet in five counts."""

    num_devices: int
    num_online: int
    num_in_sync: int
    num_updating: int
    num_trouble: int


def fleet_health(devices: Sequence[Json]) -> FleetHealth:
    """Count devices; trouble is an error, or a last update that did not succeed."""
    return FleetHealth(
        num_devices=len(devices),
        num_online=sum(bool(device.get("online")) for device in devices),
        num_in_sync=sum(bool(device.get("is_in_sync", True)) for device in devices),
        num_updating=sum(any(m.get("phase") in BUSY_PHASES for m in device.get("models") or ()) for device in devices),
        num_trouble=sum(has_trouble(device) for device in devices),
    )


def has_trouble(device: Json) -> bool:
    """Whether a person should look at this device."""
    results = (model.get("result") for model in device.get("models") or ())
    return bool(device.get("error")) or any(result not in (None, "succeeded") for result in results)


@dataclass(frozen=True)
class Contribution:
    """One term of a candidate's score: raw value, weight, and what it adds."""

    name: str
    value: float
    weight: float
    points: float


@dataclass(frozen=True)
class CandidateView:
    """A candidate with its arithmetic. `share` is its score as a part of the worst score, 0 to 1."""

    name: str
    score: float | None
    share: float
    terms: tuple[Contribution, ...]
    excluded: tuple[str, ...]
    is_chosen: bool
    is_runner_up: bool


def candidates_of(record: decision.Decision) -> list[CandidateView]:
    """All candidates, best first, the excluded ones last."""
    ranked = decision.rank(record.candidates, record.weights)
    excluded = [candidate for candidate in record.candidates if candidate.excluded]
    worst = max((abs(decision.score(candidate, record.weights)) for candidate in ranked), default=0.0) or 1.0
    return [_candidate(candidate, record, worst) for candidate in [*ranked, *excluded]]


def _candidate(candidate: decision.Candidate, record: decision.Decision, worst: float) -> CandidateView:
    score = None if candidate.excluded else decision.score(candidate, record.weights)
    terms = tuple(
        Contribution(name, value, record.weights.get(name, 1.0), value * record.weights.get(name, 1.0))
        for name, value in sorted(candidate.terms.items())
    )
    return CandidateView(
        name=candidate.name,
        score=score,
        share=min(abs(score or 0.0) / worst, 1.0),
        terms=terms,
        excluded=candidate.excluded,
        is_chosen=candidate.name == record.chosen,
        is_runner_up=candidate.name == record.runner_up,
    )
