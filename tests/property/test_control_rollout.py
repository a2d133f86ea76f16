"""The rollout engine under any order of events."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.control import rollout
from cloud.control.rollout import Gate, Offer, Slot, Status
from wire.errors import ConflictError

NAMES = [f"d{number}" for number in range(6)]


@st.composite
def plans(draw: st.DrawFn) -> rollout.State:
    waves = draw(st.lists(st.sampled_from([{"count": 1}, {"count": 2}, {"percent": 50}]), max_size=3))
    gate = Gate(draw(st.integers(0, 2)), draw(st.sampled_from([0.0, 0.5, 1.0])))
    return rollout.new(rollout.plan_waves(NAMES[: draw(st.integers(0, 6))], waves), gate, 10.0, {})


events = st.one_of(
    st.sampled_from(["start", "pause", "halt", "rollback", "tick"]).map(lambda kind: (kind, "")),
    st.tuples(st.sampled_from(["ok", "fail", "progress", "returned", "removed"]), st.sampled_from(NAMES)),
)


def event_of(kind: str, name: str, now: float) -> rollout.Event:
    made: dict[str, Any] = {
        "start": lambda: rollout.Started(now), "pause": rollout.Paused, "halt": lambda: rollout.Halted("asked"),
        "rollback": lambda: rollout.RollBack(now), "tick": lambda: rollout.Ticked(now),
        "ok": lambda: rollout.Succeeded(name, now), "fail": lambda: rollout.Failed(name, now, "broken"),
        "progress": lambda: rollout.Progressed(name, "fetch"), "returned": lambda: rollout.Returned(name),
        "removed": lambda: rollout.Removed(name, now),
    }  # fmt: skip
    event: rollout.Event = made[kind]()
    return event


def check(before: rollout.State, after: rollout.State, actions: tuple[rollout.Action, ...]) -> None:
    assert rollout.from_dict(after.to_dict()) == after
    for action in actions:
        if isinstance(action, Offer):
            assert after.status is Status.RUNNING
            assert {after.devices[name].wave for name in action.device_ids} == {after.wave}
            assert rollout.find_breach(before) is None  # a breached gate never opens a wave
    for slot in after.devices.values():
        if slot.slot is Slot.OFFERED:
            assert slot.wave <= after.wave
            assert slot.deadline is not None


@settings(max_examples=300, deadline=None)
@given(plans(), st.lists(events, max_size=40))
def test_no_wave_opens_while_the_gate_is_breached_and_every_rollout_ends(
    state: rollout.State, steps: list[tuple[str, str]]
) -> None:
    now = 0.0
    for kind, name in steps:
        now += 3.0
        try:
            after, actions = rollout.step(state, event_of(kind, name, now))
        except ConflictError:
            continue
        check(state, after, actions)
        state = after
    if state.status in (Status.DRAFT, Status.PAUSED):
        state, _ = rollout.step(state, rollout.Started(now))
    for _ in range(len(NAMES) + 2):  # silence: time alone ends it
        now += 11.0
        state, _ = rollout.step(state, rollout.Ticked(now))
    assert state.status in rollout.ENDS


@given(st.lists(st.sampled_from([{"count": 1}, {"count": 3}, {"percent": 10}, {"percent": 50}, {"percent": 100}])))
def test_waves_hold_every_device_once_in_order(waves: list[dict[str, float]]) -> None:
    planned = rollout.plan_waves(NAMES, waves)
    assert [name for wave in planned for name in wave] == NAMES
