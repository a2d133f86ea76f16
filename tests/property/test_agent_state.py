"""The device's state machine under any order of events, crashes and restarts included."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.state import (
    MAX_CRASHES,
    MAX_WRITES,
    Abandon,
    Commit,
    Done,
    Event,
    Failed,
    Healthy,
    Perform,
    Restarted,
    Restore,
    Restored,
    RestoreFailed,
    Retry,
    SlotState,
    Wanted,
    Wish,
    from_dict,
    step,
)
from wire.messages import Phase, Result
from wire.window import Window

MANIFESTS = ["a" * 64, "b" * 64, "c" * 64]
wishes = st.builds(
    lambda manifest, attempt: Wish(Wanted(manifest, manifest[0], manifest, attempt=attempt)),
    st.sampled_from(MANIFESTS),
    st.integers(0, 2),
)
codes = st.sampled_from(["timed_out", "bad_signature", "probe_failed", "insufficient_space", "unavailable"])
phases = st.sampled_from(list(Phase))
moves = st.one_of(
    wishes,
    st.just("done"),
    st.just("done"),
    st.just("done"),
    st.builds(lambda code: ("fail", code), codes),
    st.builds(Done, phases, st.integers(0, 30)),
    st.builds(Failed, phases, st.integers(0, 30), codes, st.just("stale")),
    st.just(Restarted()),
    st.just(Healthy()),
    st.just(Retry()),
    st.builds(Restored, st.sampled_from(MANIFESTS)),
    st.builds(RestoreFailed, st.sampled_from(MANIFESTS), st.just("integrity"), st.just("broken")),
)


def _event(state: SlotState, move: object) -> Event:
    if move == "done":
        return Done(state.phase, state.ticket)
    if isinstance(move, tuple):
        return Failed(state.phase, state.ticket, move[1], "it did not work")
    return move  # type: ignore[return-value]


@settings(max_examples=400, deadline=None)
@given(st.lists(moves, max_size=80))
def test_no_order_of_events_loses_a_committed_model_or_runs_for_ever(order: list[object]) -> None:
    state = SlotState("vision")
    has_committed = False
    for move in order:
        before = state
        state, actions = step(state, _event(state, move))
        has_committed = has_committed or state.committed is not None
        assert not has_committed or state.committed is not None
        assert state.writes <= MAX_WRITES + 1
        assert state.crashes <= MAX_CRASHES
        assert from_dict(state.to_dict()) == state
        performed = [action for action in actions if isinstance(action, Perform)]
        assert len(performed) <= 1
        if performed:
            assert (performed[0].phase, performed[0].ticket) == (state.phase, state.ticket)
            assert state.ticket > before.ticket
        if state.committed != before.committed and before.committed is not None:
            assert any(isinstance(action, Commit | Restore) for action in actions)
        if not state.is_working and before.is_working:
            assert state.result is not None
        if state.committed:
            assert state.committed.manifest in state.held()
        if isinstance(move, Restarted) and state.runnable is not None:
            assert any(isinstance(action, Restore) and action.slot == state.runnable for action in actions)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["done", "restart"]), max_size=400))
def test_an_update_ends_whatever_the_restarts(order: list[str]) -> None:
    state, _ = step(SlotState("m"), Wish(Wanted(MANIFESTS[0], "1", MANIFESTS[0])))
    for move in order:
        state, _ = step(state, Restarted() if move == "restart" else Done(state.phase, state.ticket))
        assert state.writes <= MAX_WRITES + 1
    for _ in range(len(Phase)):
        state, _ = step(state, Done(state.phase, state.ticket))
    assert not state.is_working


def _committed(manifest: str = MANIFESTS[0]) -> SlotState:
    state, _ = step(SlotState("m"), Wish(Wanted(manifest, "1", manifest)))
    while state.is_working:
        state, _ = step(state, Done(state.phase, state.ticket))
    assert state.result is Result.SUCCEEDED
    return state


def _at(phase: Phase, attempt: int = 0) -> SlotState:
    state, _ = step(_committed(), Wish(Wanted(MANIFESTS[1], "2", MANIFESTS[1], attempt=attempt)))
    while state.phase != phase:
        state, _ = step(state, Done(state.phase, state.ticket))
    return state


def _fail(state: SlotState, code: str) -> SlotState:
    return step(state, Failed(state.phase, state.ticket, code, "because"))[0]


def test_a_window_is_waited_for_after_the_download_and_survives_a_restart() -> None:
    wanted = Wanted(MANIFESTS[1], "2", MANIFESTS[1], window=Window(7200, 3600, (5, 6)))
    state, _ = step(_committed(), Wish(wanted))
    for phase in (Phase.PREFLIGHT, Phase.FETCH, Phase.VERIFY):
        assert state.phase is phase
        state, _ = step(state, Done(phase, state.ticket))
    assert state.phase is Phase.WAIT_WINDOW
    assert state.runnable is not None
    assert state.runnable.manifest == MANIFESTS[0]
    assert from_dict(json.loads(json.dumps(state.to_dict()))) == state
    state, actions = step(state, Restarted())
    assert Perform(Phase.VERIFY, state.ticket) in actions  # checked again, not fetched again


def test_results_say_honestly_how_an_update_ended() -> None:
    assert _fail(_at(Phase.PREFLIGHT), "insufficient_space").result is Result.FAILED_NO_CHANGE
    again = _fail(_at(Phase.VERIFY), "integrity")  # a cut may have damaged what lay here: once more
    assert again.phase is Phase.PREFLIGHT
    while again.phase != Phase.VERIFY:
        again, _ = step(again, Done(again.phase, again.ticket))
    assert _fail(again, "integrity").result is Result.REJECTED
    assert _fail(_at(Phase.FETCH), "timed_out").result is Result.TIMED_OUT
    assert _fail(_at(Phase.PROBE), "probe_failed").result is Result.FAILED_NO_CHANGE
    assert _fail(_at(Phase.SOAK), "soak_failed").result is Result.ROLLED_BACK
    ended = _fail(_at(Phase.SOAK), "soak_failed")
    stuck = step(replace(ended, previous=None), RestoreFailed(MANIFESTS[0], "integrity", "gone"))[0]
    assert stuck.result is Result.UNABLE_TO_ROLL_BACK
    assert stuck.runnable is None


def test_a_suspended_model_is_tried_again_until_it_runs() -> None:
    alone = _committed()
    stuck, _ = step(alone, RestoreFailed(MANIFESTS[0], "crashed", "SIGSEGV"))
    assert stuck.result is Result.UNABLE_TO_ROLL_BACK
    restarted, actions = step(stuck, Restarted())
    assert restarted.runnable is None
    assert not any(isinstance(action, Restore) for action in actions)
    same, actions = step(restarted, Retry())
    assert same == restarted
    assert actions == (Restore(alone.committed, is_careful=True),)
    assert step(same, RestoreFailed(MANIFESTS[0], "crashed", "SIGSEGV")) == (same, ())
    back, _ = step(same, Restored(MANIFESTS[0]))
    assert back.runnable == alone.committed
    assert back.result is Result.SUCCEEDED


def test_a_wish_that_failed_is_tried_again_only_with_a_higher_attempt() -> None:
    ended = _fail(_at(Phase.PROBE), "probe_failed")
    same, actions = step(ended, Wish(Wanted(MANIFESTS[1], "2", MANIFESTS[1])))
    assert same == ended
    assert actions == ()
    again, actions = step(ended, Wish(Wanted(MANIFESTS[1], "2", MANIFESTS[1], attempt=1)))
    assert again.phase is Phase.PREFLIGHT
    assert any(isinstance(action, Perform) for action in actions)


def test_dying_with_the_new_model_loaded_gives_up_after_three_times() -> None:
    state = _at(Phase.SOAK)
    for _ in range(MAX_CRASHES - 1):
        state, _ = step(state, Restarted())
        assert state.phase is Phase.VERIFY
        while state.phase != Phase.SOAK:
            state, _ = step(state, Done(state.phase, state.ticket))
    state, actions = step(state, Restarted())
    assert state.result is Result.ROLLED_BACK
    assert state.reason is not None
    assert state.reason.startswith("crash_loop")
    assert any(isinstance(action, Restore) and action.slot == state.committed for action in actions)


def test_a_committed_model_that_never_gets_healthy_gives_way_to_the_previous() -> None:
    state = _at(Phase.SOAK)
    state, _ = step(state, Done(Phase.SOAK, state.ticket))
    for _ in range(MAX_CRASHES):
        state, _ = step(state, Restarted())
        assert state.committed is not None
        assert state.committed.manifest == MANIFESTS[1]
    state, _ = step(state, Restarted())
    assert state.committed is not None
    assert state.committed.manifest == MANIFESTS[0]
    assert state.result is Result.ROLLED_BACK


def test_power_cuts_alone_never_take_away_the_only_model() -> None:
    state = _committed()
    for number in range(1, 20):
        state, actions = step(state, Restarted())
        assert Restore(state.committed, is_careful=number >= MAX_CRASHES) in actions
        assert not state.suspended


def test_removal_stops_work_and_forgets_the_model() -> None:
    state, actions = step(_at(Phase.FETCH), Wish(None))
    assert state.phase is Phase.REMOVED
    assert state.held() == set()
    assert actions[:2] == (Abandon(), Restore(None))
