"""The pure rollout engine: `step(state, event) -> (state, actions)`. No clock, no network, no database.

Rules, in this order:
1. A device is offered the release only while the rollout runs, only in a wave that is open, and no faster than the pace
   allows. A rollout that needs approval starts only once another person gave it.
2. The gate is judged at each event that changes an outcome, over every open wave: more than `max_failures` failures in
   all, or a wave whose best possible share of successes is under `min_success_ratio`, halts the rollout at once.
3. A device that says nothing before its deadline has failed: a silent device never stalls a rollout. If it succeeds
   late while the rollout still goes on, that counts.
4. The next wave opens only when enough devices of this one have an outcome, well enough, and the gate holds.
5. Halting takes the release back from every offered device that has not succeeded; rolling back takes it from all.
6. Retrying touches only devices that failed or fell silent; what a halt left out stays left out.
7. Devices that join later form one last wave, behind the gate like every other.
8. Each state leads to an end: deadlines bound the waiting in waves and in the roll-back.
"""

from __future__ import annotations

from dataclasses import replace

from cloud.control.rollout.events import (
    Action,
    Approved,
    Event,
    Explain,
    Failed,
    FromDevice,
    Halted,
    Joined,
    Offer,
    Paused,
    Progressed,
    Removed,
    RetriedFailed,
    Returned,
    RollBack,
    Started,
    Succeeded,
    Ticked,
    Withdraw,
)
from cloud.control.rollout.gate import find_breach, may_open_next
from cloud.control.rollout.state import FAILURES, DeviceSlot, Slot, State, Status
from wire.errors import ConflictError

Step = tuple[State, tuple[Action, ...]]


def step(state: State, event: Event) -> Step:
    """What follows from `event`. Raises `ConflictError` for a person's order that the state does not allow."""
    match event:
        case Approved(by, now):
            _expect(state, "approve", Status.AWAITING_APPROVAL)
            state = replace(state, status=Status.DRAFT, approved_by=by)
            return _run(state, now) if state.terms.starts_when_approved else (state, ())
        case Started(now):
            _expect(state, "start", Status.DRAFT, Status.PAUSED)
            return _run(state, now)
        case Paused():
            _expect(state, "pause", Status.RUNNING)
            return replace(state, status=Status.PAUSED), ()
        case Halted(reason):
            _expect(state, "halt", Status.AWAITING_APPROVAL, Status.DRAFT, Status.RUNNING, Status.PAUSED)
            return _halt(state, reason, by_itself=False)
        case RetriedFailed(now):
            _expect(state, "retry", Status.HALTED, Status.SUCCEEDED)
            return _retry(state, now)
        case RollBack(now, reason):
            _expect(state, "roll back", Status.RUNNING, Status.PAUSED, Status.HALTED, Status.SUCCEEDED)
            return _roll_back(state, now, reason)
        case Joined(device_ids, now):
            return _join(state, device_ids, now)
        case Ticked(now):
            return _expire(state, now)
        case Removed(device_id, now, reason):
            return _remove(state, device_id, now, reason)
        case _:
            return _hear(state, event)


def _hear(state: State, event: FromDevice) -> Step:
    device = state.devices.get(event.device_id)
    if device is None:
        return state, ()
    match event:
        case Returned() if device.slot is Slot.RETURNING:
            return _finish_return(_put(state, event.device_id, replace(device, slot=Slot.RETURNED, deadline=None)))
        case Progressed(phase=phase) if device.slot is Slot.OFFERED and device.phase != phase:
            return _put(state, event.device_id, replace(device, phase=phase)), ()
        case Succeeded(now=now) if device.slot is Slot.OFFERED or _is_late(state, device):
            done = replace(device, slot=Slot.SUCCEEDED, phase="committed", reason="", deadline=None)
            return _judge(_put(state, event.device_id, done), now)
        case Failed(now=now, reason=reason) if device.slot is Slot.OFFERED:
            done = replace(device, slot=Slot.FAILED, phase="", reason=reason, deadline=None)
            return _judge(_put(state, event.device_id, done), now)
    return state, ()


def _is_late(state: State, device: DeviceSlot) -> bool:
    return device.slot is Slot.TIMED_OUT and state.status in (Status.RUNNING, Status.PAUSED)


def _judge(state: State, now: float) -> Step:
    if state.status not in (Status.RUNNING, Status.PAUSED):
        return state, ()
    breach = find_breach(state)
    if breach is not None:
        return _halt(state, breach, by_itself=True)
    return _advance(state, now) if state.status is Status.RUNNING else (state, ())


def _run(state: State, now: float) -> Step:
    return _judge(replace(state, status=Status.RUNNING), now)


def _advance(state: State, now: float) -> Step:
    """Offer what is pending in the open waves, as far as the pace allows; then open the next wave, if it may."""
    state = _earn(state, now)
    offered: list[str] = []
    while True:
        pending = [n for n, d in state.devices.items() if d.slot is Slot.PENDING and d.wave <= state.wave]
        taken = pending if state.terms.pace is None else pending[: int(state.credit)]
        state = _mark_offered(state, taken, now)
        offered += taken
        if len(taken) < len(pending) or not may_open_next(state):
            break
        if state.wave + 1 >= state.num_waves:
            return _finish(state), _offer(offered)
        state = replace(state, wave=state.wave + 1)
    return state, _offer(offered)


def _earn(state: State, now: float) -> State:
    pace = state.terms.pace
    if pace is None:
        return state
    since = now if state.paced_at is None else state.paced_at
    credit = pace.earn(state.credit, now - since, state.num_succeeded)
    return replace(state, credit=credit, paced_at=max(now, since))  # a clock that went back earns nothing twice


def _mark_offered(state: State, device_ids: list[str], now: float) -> State:
    if not device_ids:
        return state
    devices, deadline = dict(state.devices), state.terms.deadline(now)
    for name in device_ids:
        device = devices[name]
        devices[name] = replace(
            device, slot=Slot.OFFERED, deadline=deadline, phase="", reason="", attempts=device.attempts + 1
        )
    credit = state.credit if state.terms.pace is None else state.credit - len(device_ids)
    return replace(state, devices=devices, credit=credit)


def _offer(device_ids: list[str]) -> tuple[Action, ...]:
    return (Offer(tuple(device_ids)),) if device_ids else ()


def _finish(state: State) -> State:
    """The last wave is open and good enough; the rollout ends when nobody is under way any more."""
    if any(device.slot is Slot.OFFERED for device in state.devices.values()):
        return state
    return replace(state, status=Status.SUCCEEDED, reason="")


def _halt(state: State, reason: str, *, by_itself: bool) -> Step:
    back = tuple(n for n, d in state.devices.items() if d.slot is Slot.OFFERED or d.slot in FAILURES)
    devices, why = dict(state.devices), "the rollout was halted"
    for name, device in state.devices.items():
        if device.slot is Slot.PENDING and device.attempts:  # failed before, and was to be retried
            devices[name] = replace(device, slot=Slot.FAILED)
        elif device.slot is Slot.PENDING:
            devices[name] = replace(device, slot=Slot.SKIPPED, reason=why)
        elif device.slot is Slot.OFFERED:
            devices[name] = replace(device, slot=Slot.WITHDRAWN, deadline=None, reason=why)
    halted = replace(state, status=Status.HALTED, reason=reason, devices=devices)
    actions: list[Action] = [Withdraw(back)] if back else []
    return halted, (*actions, Explain(reason)) if by_itself else tuple(actions)


def _retry(state: State, now: float) -> Step:
    failed = {name: device for name, device in state.devices.items() if device.slot in FAILURES}
    if not failed:
        raise ConflictError("no device failed in this rollout", remedy="there is nothing to retry")
    again = {name: replace(device, slot=Slot.PENDING, deadline=None) for name, device in failed.items()}
    first = min(device.wave for device in failed.values())
    return _run(replace(state, wave=first, reason="", devices={**state.devices, **again}), now)


def _roll_back(state: State, now: float, reason: str) -> Step:
    devices, touched = dict(state.devices), list[str]()
    for name, device in state.devices.items():
        if device.attempts > 0:
            touched.append(name)
            devices[name] = replace(device, slot=Slot.RETURNING, deadline=now + state.terms.device_timeout_s)
        elif device.slot is Slot.PENDING:
            devices[name] = replace(device, slot=Slot.SKIPPED, reason="the rollout was rolled back")
    after, _ = _finish_return(replace(state, status=Status.ROLLING_BACK, reason=reason, devices=devices))
    return after, (Withdraw(tuple(touched)),) if touched else ()


def _finish_return(state: State) -> Step:
    waiting = any(device.slot is Slot.RETURNING for device in state.devices.values())
    if state.status is Status.ROLLING_BACK and not waiting:
        return replace(state, status=Status.ROLLED_BACK), ()
    return state, ()


def _join(state: State, device_ids: tuple[str, ...], now: float) -> Step:
    fresh = [name for name in device_ids if name not in state.devices]
    if not fresh or state.status in (Status.ROLLING_BACK, Status.HALTED, Status.ROLLED_BACK):
        return state, ()
    if state.joined_wave is None:
        state = replace(state, joined_wave=state.num_waves, num_waves=state.num_waves + 1)
    wave = state.num_waves - 1
    devices = {**state.devices, **{name: DeviceSlot(Slot.PENDING, wave) for name in fresh}}
    state = replace(state, devices=devices)
    if state.status is Status.SUCCEEDED:
        state = replace(state, status=Status.RUNNING, wave=wave)
    return _advance(state, now) if state.status is Status.RUNNING else (state, ())


def _expire(state: State, now: float) -> Step:
    devices, is_late = dict(state.devices), False
    for name, device in state.devices.items():
        if device.deadline is None or device.deadline > now:
            continue
        is_late = True
        to = Slot.STRANDED if device.slot is Slot.RETURNING else Slot.TIMED_OUT
        silence = f"no result within {state.terms.device_timeout_s:g} s"
        devices[name] = replace(device, slot=to, deadline=None, reason=silence)
    if is_late:
        state = replace(state, devices=devices)
        return _finish_return(state) if state.status is Status.ROLLING_BACK else _judge(state, now)
    if state.status is Status.RUNNING and state.terms.pace is not None:
        return _advance(state, now)
    return state, ()


def _remove(state: State, device_id: str, now: float, reason: str) -> Step:
    device = state.devices.get(device_id)
    if device is None or device.slot not in (Slot.PENDING, Slot.OFFERED, Slot.RETURNING):
        return state, ()
    state = _put(state, device_id, replace(device, slot=Slot.SKIPPED, deadline=None, reason=reason))
    return _finish_return(state) if state.status is Status.ROLLING_BACK else _judge(state, now)


def _put(state: State, device_id: str, device: DeviceSlot) -> State:
    return replace(state, devices={**state.devices, device_id: device})


def _expect(state: State, order: str, *allowed: Status) -> None:
    if state.status in allowed:
        return
    if state.status is Status.AWAITING_APPROVAL:
        raise ConflictError(
            f"cannot {order} a rollout that awaits approval",
            remedy=f"another person with role {state.terms.approval_role} or above approves it first",
        )
    raise ConflictError(
        f"cannot {order} a rollout that is {state.status}", remedy=f"possible while {' or '.join(allowed)}"
    )
