"""A rollout as the pages show it, made from the API's document: its waves, their bars, and what a person may do now.

Pure: a document in, frozen values out. A field that an older server does not send becomes empty, never an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cloud.rollout_text import pace_text, waves_text, window_text

Json = Mapping[str, Any]
MAX_SLOTS_SHOWN = 200
FAILED_SLOTS = frozenset({"failed", "timed_out", "stranded"})
LEFT_OUT_SLOTS = frozenset({"skipped", "withdrawn"})
UNDER_WAY = frozenset({"running", "paused", "rolling_back"})
WATCHED_FIRST = ("failed", "timed_out", "stranded", "offered", "returning", "pending", "succeeded", "returned",
                 "withdrawn", "skipped")  # fmt: skip
BAR = (("succeeded", "good"), ("returned", "good"), ("offered", "busy"), ("returning", "busy"), ("failed", "bad"),
       ("timed_out", "bad"), ("stranded", "bad"), ("pending", "quiet"), ("withdrawn", "quiet"),
       ("skipped", "quiet"))  # fmt: skip
ACTIONS_BY_STATE: Mapping[str, tuple[str, ...]] = {
    "awaiting_approval": ("approve", "halt"),
    "draft": ("start", "halt"),
    "running": ("pause", "halt", "rollback"),
    "paused": ("resume", "halt", "rollback"),
    "halted": ("retry", "rollback"),
    "succeeded": ("retry", "rollback"),
}


@dataclass(frozen=True)
class Segment:
    """A part of a bar: where it begins and how wide it is, in percent."""

    tone: str
    start: float
    width: float


@dataclass(frozen=True)
class SlotView:
    """One device in a rollout."""

    device_id: str
    state: str
    phase: str
    reason: str
    deadline: str
    attempts: int


@dataclass(frozen=True)
class WaveView:
    """One wave: its number from 1, its devices (those to look at first), how many of them are through."""

    number: int
    title: str
    state: str
    slots: tuple[SlotView, ...]
    num_devices: int
    num_succeeded: int
    num_failed: int
    progress: str
    gate_text: str
    bar: tuple[Segment, ...]
    is_open: bool

    @property
    def num_hidden(self) -> int:
        """Devices that the page leaves out."""
        return self.num_devices - len(self.slots)


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
    created_by: str
    approved_by: str
    approval: str
    gate: Json
    terms: tuple[tuple[str, str], ...]
    waves: tuple[WaveView, ...]
    left_out: tuple[SlotView, ...]
    num_devices: int
    num_succeeded: int
    num_failed: int
    num_under_way: int
    bar: tuple[Segment, ...]
    actions: tuple[str, ...]


def rollout_view(document: Json) -> RolloutView:
    """Read a rollout, from a listing (counts only) or alone (waves and devices too)."""
    status = str(document.get("status", ""))
    slots_by_wave: dict[int | None, list[SlotView]] = {}
    for row in document.get("devices") or ():
        slots_by_wave.setdefault(row.get("wave"), []).append(_slot(row))
    gate: Json = document.get("gate") or {}
    counts: Mapping[str, int] = document.get("counts") or {}
    num_failed = sum(counts.get(slot, 0) for slot in FAILED_SLOTS)
    actions = ACTIONS_BY_STATE.get(status, ())
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
        created_by=str(document.get("created_by") or ""),
        approved_by=str(document.get("approved_by") or ""),
        approval=str(document.get("approval") or ""),
        gate=gate,
        terms=tuple(_terms(document, gate)) if "waves" in document else (),
        waves=tuple(
            _wave(wave, status, gate, slots_by_wave.get(wave["wave"], []))
            for wave in document.get("waves") or ()
            if "wave" in wave
        ),
        left_out=tuple(slots_by_wave.get(None, ())),
        num_devices=int(document.get("num_devices") or 0),
        num_succeeded=counts.get("succeeded", 0),
        num_failed=num_failed,
        num_under_way=counts.get("offered", 0) + counts.get("returning", 0),
        bar=_bar(counts),
        actions=tuple(one for one in actions if one != "retry" or num_failed),
    )


def _terms(document: Json, gate: Json) -> Iterable[tuple[str, str]]:
    """What was agreed, as label and text; only what differs from the plainest rollout is worth a line."""
    yield "Waves", waves_text(list(document.get("waves_planned") or ()))
    settled = float(gate.get("min_settled_ratio", 1))
    yield "Next wave opens", "when every device has an outcome" if settled == 1 else f"at {settled:.0%} with an outcome"
    pace = pace_text(document.get("pace"))
    rate = document.get("rate_per_minute")
    yield "Pace", f"{pace}, now {rate:g}/min" if rate and "x" in pace else pace
    yield "May switch", window_text(document.get("window"))
    yield "Silent device fails after", f"{float(document.get('device_timeout_s') or 0):g} s"
    yield "Soak", f"{float(document.get('soak_s') or 0):g} s"
    approval = document.get("approval")
    yield "Approval", f"another {approval} or above" if approval else "not needed"
    yield "Devices that come later", "join" if document.get("joins") else "are left alone"


def _slot(row: Json) -> SlotView:
    return SlotView(
        device_id=str(row.get("device_id", "")),
        state=str(row.get("state") or "pending"),
        phase=str(row.get("phase") or ""),
        reason=str(row.get("reason") or ""),
        deadline=str(row.get("deadline") or ""),
        attempts=int(row.get("attempts") or 0),
    )


def _wave(wave: Json, status: str, gate: Json, slots: list[SlotView]) -> WaveView:
    counts: dict[str, int] = {}
    for slot in slots:
        counts[slot.state] = counts.get(slot.state, 0) + 1
    num_succeeded = counts.get("succeeded", 0)
    num_failed = sum(counts.get(state, 0) for state in FAILED_SLOTS)
    num_counted = len(slots) - sum(counts.get(state, 0) for state in LEFT_OUT_SLOTS)
    needed = f"gate: {float(gate.get('min_success_ratio', 1)):.0%} needed"
    num_returned = counts.get("returned", 0)
    done = f"{num_returned} of {len(slots)} returned" if num_returned else f"{num_succeeded} of {len(slots)} succeeded"
    best = (num_counted - num_failed) / num_counted if num_counted else 1.0
    number = int(wave["wave"])
    ranked = sorted(slots, key=lambda slot: (WATCHED_FIRST.index(slot.state), slot.device_id))
    return WaveView(
        number=number,
        title="Joined later" if wave.get("is_joined") else "Canary" if wave.get("is_canary") else f"Wave {number}",
        state=_wave_state(wave, status, counts, len(slots), num_failed),
        slots=tuple(ranked[:MAX_SLOTS_SHOWN]),
        num_devices=len(slots),
        num_succeeded=num_succeeded,
        num_failed=num_failed,
        progress=done,
        gate_text=f"{needed}, {best:.0%} still possible" if num_failed else needed,
        bar=_bar(counts),
        is_open=bool(num_failed) or bool(wave.get("is_current")),
    )


def _wave_state(wave: Json, status: str, counts: Mapping[str, int], num_devices: int, num_failed: int) -> str:
    if num_devices and counts.get("succeeded", 0) == num_devices:
        return "succeeded"
    if num_devices and counts.get("returned", 0) == num_devices:
        return "returned"
    if num_failed:
        return "failed"
    if status in UNDER_WAY and (wave.get("is_current") or counts.get("offered") or counts.get("returning")):
        return status
    if counts.get("succeeded"):
        return "succeeded"
    return "waiting" if status in {"awaiting_approval", "draft", "running", "paused"} else "not reached"


def _bar(counts: Mapping[str, int]) -> tuple[Segment, ...]:
    total, start, segments = sum(counts.values()), 0.0, list[Segment]()
    for state, tone in BAR:
        width = 100 * counts.get(state, 0) / total if total else 0.0
        if width:
            segments.append(Segment(tone, round(start, 3), round(width, 3)))
        start += width
    return tuple(segments)
