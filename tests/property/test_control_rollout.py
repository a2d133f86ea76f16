"""The rollout engine under any order of events: lost, repeated, late; devices that fail, crawl or say nothing."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.control import rollout
from cloud.control.rollout import Gate, Offer, Pace, Slot, Status, Terms
from tests.fakes.rollout_world import play
from wire.errors import ConflictError
from wire.window import Window

NAMES = [f"d{number}" for number in range(6)]
NUM_ORDERS = 100_000 if os.environ.get("FORESHORE_FAULTS") == "all" else 3_000


@pytest.mark.timeout(1800)
def test_random_orders_never_pass_a_breached_gate_a_wave_or_the_pace_and_always_end() -> None:
    ends: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for seed in range(NUM_ORDERS):
        world = play(seed)
        ends[world.state.status] += 1
        outcomes.update(device.slot for device in world.state.devices.values())
    assert set(ends) == set(rollout.ENDS)  # the orders reach every end
    assert set(outcomes) == set(Slot) - {Slot.PENDING, Slot.OFFERED, Slot.RETURNING}


@settings(max_examples=100, deadline=None)
@given(st.integers(min_value=10_000_000))
def test_any_seed_holds_and_the_state_survives_json(seed: int) -> None:
    state = play(seed).state
    assert rollout.from_dict(state.to_dict()) == state


WAVES = [{"count": 1}, {"count": 3}, {"percent": 10}, {"percent": 50}, {"percent": 100}]


@given(st.lists(st.sampled_from(WAVES), max_size=rollout.MAX_WAVES))
def test_waves_hold_every_device_once_in_order(waves: list[dict[str, float]]) -> None:
    planned = rollout.plan_waves(NAMES, waves)
    assert [name for wave in planned for name in wave] == NAMES


@given(st.integers(0, 86_399), st.integers(60, 86_400), st.sets(st.integers(0, 6)), st.floats(0, 4e9, allow_nan=False))
def test_a_window_is_open_when_it_says_so_and_opens_within_a_week(
    opens_s: int, lasts_s: int, weekdays: set[int], now_s: float
) -> None:
    window = Window(opens_s, lasts_s, tuple(sorted(weekdays)))
    at = window.next_open_s(now_s)
    assert now_s <= at <= now_s + 8 * 86_400
    assert window.next_open_s(at) == at


def started(waves: list[list[str]], terms: Terms = Terms()) -> rollout.State:  # noqa: B008 - frozen
    return rollout.step(rollout.new(waves, terms, {}), rollout.Started(0.0))[0]


def offers(actions: tuple[rollout.Action, ...]) -> list[str]:
    return [name for action in actions if isinstance(action, Offer) for name in action.device_ids]


def test_a_rollout_that_needs_approval_does_not_start_without_it() -> None:
    state = rollout.new([["a"]], Terms(approval_role="operator"), {})
    with pytest.raises(ConflictError, match="awaits approval"):
        rollout.step(state, rollout.Started(0.0))
    state, actions = rollout.step(state, rollout.Approved("second", 0.0))
    assert (state.status, actions) == (Status.DRAFT, ())
    assert offers(rollout.step(state, rollout.Started(0.0))[1]) == ["a"]


def test_retrying_touches_only_what_failed() -> None:
    state = started([["a", "b"], ["c"]], Terms(gate=Gate(max_failures=1, min_success_ratio=0.0)))
    state, _ = rollout.step(state, rollout.Failed("a", 1.0, "broken"))
    state, _ = rollout.step(state, rollout.Succeeded("b", 1.0))
    state, _ = rollout.step(state, rollout.Failed("c", 2.0, "broken"))
    assert state.status is Status.HALTED
    state, actions = rollout.step(state, rollout.RetriedFailed(3.0))
    assert offers(actions) == ["a"]  # the waves hold for a retry too
    state, actions = rollout.step(state, rollout.Succeeded("a", 4.0))
    assert offers(actions) == ["c"]
    assert rollout.step(state, rollout.Succeeded("c", 5.0))[0].status is Status.SUCCEEDED


def test_a_pace_grows_with_success_up_to_its_ceiling() -> None:
    pace = Pace(per_minute=10, factor=2.0, every=5, max_per_minute=60)
    assert [pace.rate(count) for count in (0, 4, 5, 10, 15, 10**9)] == [10, 10, 20, 40, 60, 60]
    state = started([["a", "b", "c"]], Terms(pace=Pace(per_minute=6)))
    assert [name for name, d in state.devices.items() if d.slot is Slot.OFFERED] == ["a"]
    state, actions = rollout.step(state, rollout.Ticked(9.0))
    assert offers(actions) == []
    state, actions = rollout.step(state, rollout.Ticked(10.0))
    assert offers(actions) == ["b"]


def test_a_window_moves_the_deadline_behind_its_opening() -> None:
    terms = Terms(device_timeout_s=600, window=Window(opens_s=7200, lasts_s=3600))
    state = started([["a"]], terms)
    assert state.devices["a"].deadline == 7200 + 600


def test_devices_that_join_a_finished_rollout_form_one_last_wave_behind_the_gate() -> None:
    state = started([["a"]])
    state, _ = rollout.step(state, rollout.Succeeded("a", 1.0))
    state, actions = rollout.step(state, rollout.Joined(("b", "c"), 2.0))
    assert (state.status, offers(actions), state.num_waves) == (Status.RUNNING, ["b", "c"], 2)
    state, _ = rollout.step(state, rollout.Failed("b", 3.0, "broken"))
    assert state.status is Status.HALTED
    assert state.devices["a"].slot is Slot.SUCCEEDED


def test_a_device_that_succeeds_late_counts_while_the_rollout_goes_on() -> None:
    state = started([["a"], ["b"]], Terms(gate=Gate(max_failures=1, min_success_ratio=0.0), device_timeout_s=10))
    state, _ = rollout.step(state, rollout.Ticked(11.0))
    assert state.devices["a"].slot is Slot.TIMED_OUT
    state, _ = rollout.step(state, rollout.Succeeded("a", 12.0))
    assert state.num_failures == 0
