"""The pure rollout engine: `step(state, event) -> (state, actions)`. No clock, no network, no database.

Rules, in this order:
1. A device is offered the release only while the rollout runs, and only in the current wave.
2. The gate is judged at each event that changes an outcome: more than `max_failures` failures in all, or a wave
   whose best possible share of successes is under `min_success_ratio`, halts the rollout at once.
3. A device that says nothing before its deadline has failed: a silent device never stalls a rollout.
4. The next wave opens only when every device of this one has an outcome and the gate holds.
5. Halting takes the release back from every offered device that has not succeeded; rolling back takes it from all.
6. Each state leads to an end: deadlines bound the waiting in waves and in the roll-back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from wire.errors import ConflictError, InvalidInputError

MAX_WAVES = 50


class Status(StrEnum):
    """Where a rollout is. The last four are ends (a halted or succeeded one can still be rolled back)."""

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
    SKIPPED = "skipped"
    RETURNING = "returning"  # told to go back to what it had
    RETURNED = "returned"
    STRANDED = "stranded"  # told to go back, did not say that it did


ENDS = frozenset({Status.HALTED, Status.SUCCEEDED, Status.ROLLED_BACK})
FAILURES = frozenset({Slot.FAILED, Slot.TIMED_OUT})


@dataclass(frozen=True)
class Gate:
    """What a rollout tolerates. `max_failures` counts over all waves, the ratio within each wave."""

    max_failures: int = 0
    min_success_ratio: float = 1.0


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
    """A rollout as data; `to_dict` and `from_dict` carry it through the database."""

    status: Status
    gate: Gate
    device_timeout_s: float
    num_waves: int
    wave: int = 0
    devices: Mapping[str, DeviceSlot] = field(default_factory=dict)
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def of_wave(self, wave: int) -> dict[str, DeviceSlot]:
        """The devices of one wave."""
        return {name: slot for name, slot in self.devices.items() if slot.wave == wave}

    @property
    def num_failures(self) -> int:
        """Devices that failed or fell silent."""
        return sum(slot.slot in FAILURES for slot in self.devices.values())


# events


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
class RollBack:
    """A person wants the release off every device that got it."""

    now: float
    reason: str = "rolled back by request"


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
    """A device left the fleet."""

    device_id: str
    now: float


@dataclass(frozen=True)
class Ticked:
    """Time passed."""

    now: float


Event = Started | Paused | Halted | RollBack | Progressed | Succeeded | Failed | Returned | Removed | Ticked

# actions


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
Step = tuple[State, tuple[Action, ...]]


def new(waves: Sequence[Sequence[str]], gate: Gate, device_timeout_s: float, skipped: Mapping[str, str]) -> State:
    """A draft with these waves; `skipped` devices cannot run the release, each with the reason."""
    devices = {name: DeviceSlot(Slot.PENDING, number) for number, wave in enumerate(waves) for name in wave}
    devices |= {name: DeviceSlot(Slot.SKIPPED, -1, reason=reason) for name, reason in skipped.items()}
    return State(Status.DRAFT, gate, device_timeout_s, len(waves), devices=devices)


def plan_waves(device_ids: Sequence[str], waves: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Cut the devices, in their order, into waves.

    `{"count": n}` takes the next n; `{"percent": p}` takes what is needed so that p percent of all are reached. Who is
    left forms a last wave; empty waves vanish. Without waves everybody is one wave.
    """
    if len(waves) > MAX_WAVES:
        raise InvalidInputError(f"{len(waves)} waves are too many", remedy=f"at most {MAX_WAVES}")
    planned, taken = list[list[str]](), 0
    for wave in waves:
        if len(wave) != 1 or not set(wave) <= {"count", "percent"}:
            raise InvalidInputError(f"wave {dict(wave)} is not understood", remedy='{"count": 1} or {"percent": 50}')
        amount = next(iter(wave.values()))
        if amount <= 0 or ("percent" in wave and amount > 100):
            raise InvalidInputError(f"wave {dict(wave)} is out of range", remedy="a count from 1, a percentage to 100")
        goal = taken + int(amount) if "count" in wave else -int(-len(device_ids) * amount // 100)
        goal = min(max(goal, taken), len(device_ids))
        planned.append(list(device_ids[taken:goal]))
        taken = goal
    planned.append(list(device_ids[taken:]))
    return [wave for wave in planned if wave]


def step(state: State, event: Event) -> Step:
    """What follows from `event`. Raises `ConflictError` for a person's order that the state does not allow."""
    match event:
        case Started(now):
            _expect(state, "start", Status.DRAFT, Status.PAUSED)
            return _advance(replace(state, status=Status.RUNNING), now)
        case Paused():
            _expect(state, "pause", Status.RUNNING)
            return replace(state, status=Status.PAUSED), ()
        case Halted(reason):
            _expect(state, "halt", Status.DRAFT, Status.RUNNING, Status.PAUSED)
            return _halt(state, reason, by_itself=False)
        case RollBack(now, reason):
            _expect(state, "roll back", Status.RUNNING, Status.PAUSED, Status.HALTED, Status.SUCCEEDED)
            return _roll_back(state, now, reason)
        case Ticked(now):
            return _expire(state, now)
        case Removed(device_id, now):
            return _remove(state, device_id, now)
        case _:
            return _hear(state, event)


def _hear(state: State, event: Progressed | Succeeded | Failed | Returned) -> Step:
    device = state.devices.get(event.device_id)
    if device is None:
        return state, ()
    if isinstance(event, Returned):
        if device.slot is not Slot.RETURNING:
            return state, ()
        return _finish_return(_put(state, event.device_id, replace(device, slot=Slot.RETURNED, deadline=None)))
    if device.slot is not Slot.OFFERED:
        return state, ()
    if isinstance(event, Progressed):
        return _put(state, event.device_id, replace(device, phase=event.phase)), ()
    if isinstance(event, Succeeded):
        done = replace(device, slot=Slot.SUCCEEDED, phase="committed", deadline=None)
    else:
        done = replace(device, slot=Slot.FAILED, reason=event.reason, deadline=None)
    return _judge(_put(state, event.device_id, done), event.now)


def _judge(state: State, now: float) -> Step:
    if state.status not in (Status.RUNNING, Status.PAUSED):
        return state, ()
    breach = find_breach(state)
    if breach is not None:
        return _halt(state, breach, by_itself=True)
    return _advance(state, now) if state.status is Status.RUNNING else (state, ())


def find_breach(state: State) -> str | None:
    """Why the gate does not hold, or None while it does."""
    wave = state.of_wave(state.wave)
    if state.num_failures > state.gate.max_failures:
        failed = sorted(name for name, slot in state.devices.items() if slot.slot in FAILURES)
        why = "; ".join(f"{name}: {state.devices[name].reason or 'no answer'}" for name in failed[:3])
        return f"{state.num_failures} failed, {state.gate.max_failures} are allowed ({why})"
    counted = [slot for slot in wave.values() if slot.slot is not Slot.SKIPPED]
    best = sum(slot.slot not in FAILURES for slot in counted)
    if counted and best / len(counted) < state.gate.min_success_ratio:
        return (
            f"wave {state.wave + 1} can reach a success ratio of {best / len(counted):.2f}, "
            f"{state.gate.min_success_ratio:.2f} is asked"
        )
    return None


def _advance(state: State, now: float) -> Step:
    """Offer what is pending in the current wave; open the next one when this one is through."""
    while state.wave < state.num_waves:
        wave = state.of_wave(state.wave)
        pending = tuple(sorted(name for name, slot in wave.items() if slot.slot is Slot.PENDING))
        if pending:
            deadline = now + state.device_timeout_s
            offered = {
                name: replace(wave[name], slot=Slot.OFFERED, deadline=deadline, attempts=wave[name].attempts + 1)
                for name in pending
            }
            return replace(state, devices={**state.devices, **offered}), (Offer(pending),)
        if any(slot.slot is Slot.OFFERED for slot in wave.values()):
            return state, ()
        state = replace(state, wave=state.wave + 1)
    return replace(state, status=Status.SUCCEEDED, wave=max(state.num_waves - 1, 0)), ()


def _halt(state: State, reason: str, *, by_itself: bool) -> Step:
    back = tuple(sorted(n for n, s in state.devices.items() if s.slot is Slot.OFFERED or s.slot in FAILURES))
    devices = dict(state.devices)
    for name, slot in state.devices.items():
        if slot.slot in (Slot.PENDING, Slot.OFFERED):
            devices[name] = replace(slot, slot=Slot.SKIPPED, deadline=None, reason="the rollout was halted")
    halted = replace(state, status=Status.HALTED, reason=reason, devices=devices)
    actions: list[Action] = [Withdraw(back)] if back else []
    return halted, (*actions, Explain(reason)) if by_itself else tuple(actions)


def _roll_back(state: State, now: float, reason: str) -> Step:
    touched = tuple(sorted(n for n, s in state.devices.items() if s.attempts > 0))
    devices = dict(state.devices)
    for name, slot in state.devices.items():
        if slot.attempts > 0:
            devices[name] = replace(slot, slot=Slot.RETURNING, deadline=now + state.device_timeout_s)
        elif slot.slot is Slot.PENDING:
            devices[name] = replace(slot, slot=Slot.SKIPPED, reason="the rollout was rolled back")
    after, _ = _finish_return(replace(state, status=Status.ROLLING_BACK, reason=reason, devices=devices))
    return after, (Withdraw(touched),) if touched else ()


def _finish_return(state: State) -> Step:
    waiting = any(slot.slot is Slot.RETURNING for slot in state.devices.values())
    if state.status is Status.ROLLING_BACK and not waiting:
        return replace(state, status=Status.ROLLED_BACK), ()
    return state, ()


def _expire(state: State, now: float) -> Step:
    devices, late = dict(state.devices), False
    for name, slot in state.devices.items():
        if slot.deadline is None or slot.deadline > now:
            continue
        late = True
        to = Slot.STRANDED if slot.slot is Slot.RETURNING else Slot.TIMED_OUT
        silence = f"no result within {state.device_timeout_s:g} s"
        devices[name] = replace(slot, slot=to, deadline=None, reason=silence)
    if not late:
        return state, ()
    state = replace(state, devices=devices)
    return _finish_return(state) if state.status is Status.ROLLING_BACK else _judge(state, now)


def _remove(state: State, device_id: str, now: float) -> Step:
    device = state.devices.get(device_id)
    if device is None or device.slot not in (Slot.PENDING, Slot.OFFERED, Slot.RETURNING):
        return state, ()
    gone = replace(device, slot=Slot.SKIPPED, deadline=None, reason="the device left the fleet")
    state = _put(state, device_id, gone)
    return _finish_return(state) if state.status is Status.ROLLING_BACK else _judge(state, now)


def _put(state: State, device_id: str, slot: DeviceSlot) -> State:
    return replace(state, devices={**state.devices, device_id: slot})


def _expect(state: State, order: str, *allowed: Status) -> None:
    if state.status not in allowed:
        raise ConflictError(
            f"cannot {order} a rollout that is {state.status}", remedy=f"possible while {' or '.join(allowed)}"
        )


def counts(slots: Iterable[DeviceSlot]) -> dict[str, int]:
    """How many devices are in each slot, those of zero left out."""
    found: dict[str, int] = {}
    for slot in slots:
        found[slot.slot.value] = found.get(slot.slot.value, 0) + 1
    return found


def from_dict(data: Mapping[str, Any]) -> State:
    """The state that `to_dict` gave."""
    return State(
        status=Status(data["status"]),
        gate=Gate(**data["gate"]),
        device_timeout_s=data["device_timeout_s"],
        num_waves=data["num_waves"],
        wave=data["wave"],
        devices={
            name: DeviceSlot(**{**slot, "slot": Slot(slot["slot"])}) for name, slot in dict(data["devices"]).items()
        },
        reason=data["reason"],
    )
