"""What a rollout tolerates, and what its outcomes say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cloud.control.rollout.state import FAILURES, OUTCOMES, Slot, State


@dataclass
class Tally:
    """Outcomes of one wave. Devices that were left out do not count."""

    num_counted: int = 0
    num_pending: int = 0
    num_offered: int = 0
    num_settled: int = 0
    num_succeeded: int = 0
    num_failed: int = 0


def tally(state: State) -> Mapping[int, Tally]:
    """The outcomes of each wave that has devices, in one pass."""
    by_wave: dict[int, Tally] = {}
    for device in state.devices.values():
        wave = by_wave.setdefault(device.wave, Tally())
        if device.slot in (Slot.SKIPPED, Slot.WITHDRAWN):
            continue
        wave.num_counted += 1
        wave.num_pending += device.slot is Slot.PENDING
        wave.num_offered += device.slot is Slot.OFFERED
        wave.num_settled += device.slot in OUTCOMES
        wave.num_succeeded += device.slot is Slot.SUCCEEDED
        wave.num_failed += device.slot in FAILURES
    return by_wave


def find_breach(state: State) -> str | None:
    """Why the gate does not hold, or None while it does. All waves that were opened are judged."""
    gate, by_wave = state.terms.gate, tally(state)
    num_failed = sum(wave.num_failed for wave in by_wave.values())
    if num_failed > gate.max_failures:
        failed = sorted(name for name, device in state.devices.items() if device.slot in FAILURES)
        why = "; ".join(f"{name}: {state.devices[name].reason or 'no answer'}" for name in failed[:3])
        return f"{num_failed} failed, {gate.max_failures} are allowed ({why})"
    for number, wave in sorted(by_wave.items()):
        if number > state.wave or not wave.num_counted:
            continue
        best = 1 - wave.num_failed / wave.num_counted
        if wave.num_counted - wave.num_failed < gate.min_success_ratio * wave.num_counted:
            return (
                f"wave {number + 1} can reach a success ratio of {best:.2f} at best, "
                f"{gate.min_success_ratio:.2f} is asked"
            )
    return None


def may_open_next(state: State) -> bool:
    """Whether the current wave has gone far and well enough for the next one."""
    gate, by_wave = state.terms.gate, tally(state)
    if any(wave.num_pending for number, wave in by_wave.items() if number <= state.wave):
        return False
    wave = by_wave.get(state.wave, Tally())
    return (
        wave.num_settled >= gate.min_settled_ratio * wave.num_counted
        and wave.num_succeeded >= gate.min_success_ratio * wave.num_settled
    )
