"""The pure state machine of one model on a device: `step(state, event) -> (state, actions)`.

Order of an update: PREFLIGHT, FETCH, VERIFY, WAIT_WINDOW, STAGED (load beside the old), PROBE, SWITCH (route requests),
SOAK, COMMITTED.
Rules, in this order:
1. `committed` names what must be runnable; it changes only at the end of a soak, by a crash loop, or by removal.
2. The shell writes the new state to the journal before it performs an action, so a restart finds what was intended.
3. Every event of work carries the ticket of the action it answers; an answer to an older action changes nothing.
4. Attempts are bounded: crashes while the new model was loaded, crashes of the committed one, damaged downloads,
   journal writes.
5. A wish that ended badly is not tried again until the wish changes or its `attempt` rises; one that ended only for
   want of trusted metadata is, once newer metadata is there.
6. A committed model that cannot run and has nothing to fall back to is suspended, never forgotten: each `Retry` tries
   it again, in a process of its own first.
No clock, disk, network or randomness here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from model_registry.trust.errors import PASSING, REFUSALS
from wire.messages import DesiredModel, Phase, Result
from wire.window import Window

MAX_CRASHES = 3
"""Process deaths while the candidate was loaded, or unhealthy starts of the committed model, before it is given up.

A committed model with nothing before it is not given up for that: power cuts look the same. It is loaded with care.
"""

MAX_REFETCHES = 1
"""Times that a download which does not hash right is fetched again: a cut may have damaged it, a liar stays one."""

MAX_WRITES = 64
"""Journal records of one update; more means that the update goes in circles."""

ORDER = (
    Phase.PREFLIGHT, Phase.FETCH, Phase.VERIFY, Phase.WAIT_WINDOW, Phase.STAGED, Phase.PROBE, Phase.SWITCH, Phase.SOAK,
)  # fmt: skip
_LOADED = frozenset({Phase.STAGED, Phase.PROBE, Phase.SWITCH, Phase.SOAK})
_SWITCHED = frozenset({Phase.SWITCH, Phase.SOAK})
_REFUSALS = REFUSALS | {
    "bad_signature", "integrity", "invalid_input", "unsupported_model", "unknown_version", "too_large", "refused",
    "expired_wish",
}  # fmt: skip
_WAITS_FOR_TRUST = PASSING | {"expired_wish"}


@dataclass(frozen=True)
class Slot:
    """An artefact on disk that can run."""

    manifest: str
    version: str
    release: str


@dataclass(frozen=True)
class Wanted:
    """What the signed wish asks for."""

    manifest: str
    version: str
    release: str
    target: str = ""
    manifest_bytes: int = 0
    attempt: int = 0
    soak_s: float = 0.0
    rollout_id: str | None = None
    window: Window | None = None

    @property
    def slot(self) -> Slot:
        """What will be committed when all goes well."""
        return Slot(self.manifest, self.version, self.release)

    @property
    def identity(self) -> tuple[str, str, int]:
        """Two wishes with the same identity are one update."""
        return (self.manifest, self.release, self.attempt)


@dataclass(frozen=True)
class SlotState:
    """All that is remembered about one model name."""

    name: str
    phase: Phase = Phase.IDLE
    committed: Slot | None = None
    previous: Slot | None = None
    wanted: Wanted | None = None
    ticket: int = 0  # of the action under way; rises with each
    crashes: int = 0  # of this update while the candidate was loaded
    unhealthy_starts: int = 0  # of the committed model
    suspended: bool = False  # the committed model cannot run and there is nothing to fall back to
    refetches: int = 0  # of this update, because what lay on the disk was damaged
    writes: int = 0  # journal records of this update
    result: Result | None = None
    reason: str | None = None

    @property
    def is_working(self) -> bool:
        """Whether an update is under way."""
        return self.phase in ORDER

    @property
    def runnable(self) -> Slot | None:
        """What requests shall run on after a start."""
        return None if self.suspended else self.committed

    def held(self) -> set[str]:
        """Manifests whose files must not be collected."""
        slots = {slot.manifest for slot in (self.committed, self.previous) if slot}
        return slots | ({self.wanted.manifest} if self.wanted and self.is_working else set())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return asdict(self)


@dataclass(frozen=True)
class Wish:
    """The device shall run `wanted`, or (None) nothing under this name."""

    wanted: Wanted | None


@dataclass(frozen=True)
class Done:
    """The action of `phase` ended well."""

    phase: Phase
    ticket: int


@dataclass(frozen=True)
class Failed:
    """The action of `phase` ended badly; `code` is that of the error."""

    phase: Phase
    ticket: int
    code: str
    sentence: str


@dataclass(frozen=True)
class Restarted:
    """The process has started and read this state from its journal."""


@dataclass(frozen=True)
class Healthy:
    """The committed model has been running for a while."""


@dataclass(frozen=True)
class RestoreFailed:
    """The committed model could not be brought (back) into service."""

    manifest: str
    code: str
    sentence: str


@dataclass(frozen=True)
class Retry:
    """Time to see whether a suspended model can run by now."""


@dataclass(frozen=True)
class Restored:
    """A suspended model answers again."""

    manifest: str


@dataclass(frozen=True)
class TrustRenewed:
    """Newer metadata or a newer wish was accepted: what failed only for want of it may begin again."""


Event = Wish | Done | Failed | Restarted | Healthy | RestoreFailed | Retry | Restored | TrustRenewed


@dataclass(frozen=True)
class Perform:
    """Do the work of `phase`; answer with `Done` or `Failed` and this ticket."""

    phase: Phase
    ticket: int


@dataclass(frozen=True)
class Abandon:
    """Stop work on the candidate and unload it."""


@dataclass(frozen=True)
class Restore:
    """Have requests run on `slot` (load it if it is not), or on nothing.

    `is_careful`: it has brought the process down before; load it in a process of its own first.
    """

    slot: Slot | None
    is_careful: bool = False


@dataclass(frozen=True)
class Commit:
    """The candidate is the model now: point `current` at it, let the old one go."""

    slot: Slot
    previous: Slot | None


@dataclass(frozen=True)
class Collect:
    """Delete files that no state holds."""


Action = Perform | Abandon | Restore | Commit | Collect


def step(state: SlotState, event: Event) -> tuple[SlotState, tuple[Action, ...]]:
    """What follows from `event`; the state returned is the one to journal before the actions are performed."""
    after, actions = _react(state, event)
    if after == state:
        return state, actions
    after = replace(after, writes=after.writes + 1)
    if after.is_working and after.writes > MAX_WRITES:
        ended, ending = _fail(after, "state_loop", f"the update wrote {after.writes} journal records")
        restoring = tuple(action for action in actions if isinstance(action, Restore))
        return ended, (*restoring, Abandon(), *ending)
    return after, actions


def from_dict(data: dict[str, Any]) -> SlotState:
    """Read what `SlotState.to_dict` wrote; raises `KeyError`, `TypeError` or `ValueError` for anything else."""
    fields = dict(data)
    fields["phase"] = Phase(fields["phase"])
    fields["result"] = Result(fields["result"]) if fields["result"] else None
    for name in ("committed", "previous"):
        fields[name] = Slot(**fields[name]) if fields[name] else None
    fields["wanted"] = _wanted_from_dict(fields["wanted"]) if fields["wanted"] else None
    return SlotState(**fields)


def _wanted_from_dict(data: dict[str, Any]) -> Wanted:
    window = data.get("window")
    return Wanted(**{**data, "window": Window(**{**window, "weekdays": tuple(window["weekdays"])}) if window else None})


def wanted_from(model: DesiredModel) -> Wanted:
    """The wish inside a desired state, without its name."""
    return Wanted(
        manifest=model.manifest,
        version=model.version,
        release=model.release,
        target=model.target,
        manifest_bytes=model.manifest_bytes,
        attempt=model.attempt,
        soak_s=model.soak_s,
        rollout_id=model.rollout_id,
        window=model.window,
    )


def _react(state: SlotState, event: Event) -> tuple[SlotState, tuple[Action, ...]]:
    match event:
        case Wish(wanted=None):
            return _remove(state)
        case Wish(wanted=wanted) if wanted is not None:
            return _wish(state, wanted)
        case Done(phase=phase, ticket=ticket) if phase == state.phase and ticket == state.ticket:
            return _advance(state)
        case Failed(phase=phase, ticket=ticket) if phase == state.phase and ticket == state.ticket and state.is_working:
            if phase == Phase.VERIFY and event.code == "integrity" and state.refetches < MAX_REFETCHES:
                return _enter(replace(state, refetches=state.refetches + 1), Phase.PREFLIGHT)
            return _fail(state, event.code, event.sentence)
        case Restarted():
            return _restart(state)
        case Healthy() if state.unhealthy_starts and not state.suspended:
            return replace(state, unhealthy_starts=0), ()
        case TrustRenewed() if state.wanted is not None and _lacked_trust(state):
            begun = replace(_fresh(state, state.wanted), phase=Phase.PREFLIGHT)
            return begun, (Perform(Phase.PREFLIGHT, begun.ticket),)
        case RestoreFailed(manifest=manifest) if state.runnable is not None and state.runnable.manifest == manifest:
            return _fall_back(state, f"{event.code}: {event.sentence}")
        case Retry() if state.suspended and not state.is_working:
            return state, (Restore(state.committed, is_careful=True),)
        case Restored(manifest=manifest) if state.suspended and state.committed and not state.is_working:
            if state.committed.manifest == manifest:
                back = replace(state, suspended=False, result=Result.SUCCEEDED, reason="recovered: it runs again")
                return back, ()
    return state, ()


def _remove(state: SlotState) -> tuple[SlotState, tuple[Action, ...]]:
    if state.phase == Phase.REMOVED:
        return state, ()
    gone = SlotState(name=state.name, phase=Phase.REMOVED, ticket=state.ticket + 1, result=Result.SUCCEEDED)
    return gone, (Abandon(), Restore(None), Collect())


def _wish(state: SlotState, wanted: Wanted) -> tuple[SlotState, tuple[Action, ...]]:
    same = state.wanted is not None and state.wanted.identity == wanted.identity
    if same and (state.is_working or state.phase != Phase.REMOVED):
        return state, ()
    stop: tuple[Action, ...] = (Abandon(), Restore(state.committed)) if state.is_working else ()
    if state.runnable is not None and state.runnable.manifest == wanted.manifest:
        slot = wanted.slot
        there = replace(_fresh(state, wanted), phase=Phase.COMMITTED, committed=slot, result=Result.SUCCEEDED)
        return there, (*stop, Commit(slot, state.previous))
    begun = replace(_fresh(state, wanted), phase=Phase.PREFLIGHT)
    return begun, (*stop, Perform(Phase.PREFLIGHT, begun.ticket))


def _fresh(state: SlotState, wanted: Wanted) -> SlotState:
    return replace(
        state,
        wanted=wanted,
        ticket=state.ticket + 1,
        crashes=0,
        refetches=0,
        writes=0,
        result=None,
        reason=None,
        phase=Phase.IDLE,
    )


def _lacked_trust(state: SlotState) -> bool:
    code = (state.reason or "").partition(":")[0]
    return not state.is_working and state.phase != Phase.REMOVED and code in _WAITS_FOR_TRUST


def _advance(state: SlotState) -> tuple[SlotState, tuple[Action, ...]]:
    if not state.is_working or state.wanted is None:
        return state, ()
    if state.phase != Phase.SOAK:
        return _enter(state, ORDER[ORDER.index(state.phase) + 1])
    slot = state.wanted.slot
    previous = state.committed if state.committed and state.committed.manifest != slot.manifest else state.previous
    done = replace(
        state,
        phase=Phase.COMMITTED,
        committed=slot,
        previous=previous,
        result=Result.SUCCEEDED,
        reason=None,
        suspended=False,
        unhealthy_starts=0,
    )
    return done, (Commit(slot, previous), Collect())


def _enter(state: SlotState, phase: Phase) -> tuple[SlotState, tuple[Action, ...]]:
    entered = replace(state, phase=phase, ticket=state.ticket + 1)
    return entered, (Perform(phase, entered.ticket),)


def _fail(state: SlotState, code: str, sentence: str) -> tuple[SlotState, tuple[Action, ...]]:
    if state.phase in _SWITCHED:
        result = Result.ROLLED_BACK
    elif code == "timed_out":
        result = Result.TIMED_OUT
    elif code in _REFUSALS:
        result = Result.REJECTED
    else:
        result = Result.FAILED_NO_CHANGE
    ended = replace(
        state,
        phase=Phase.COMMITTED if state.committed else Phase.IDLE,
        ticket=state.ticket + 1,
        result=result,
        reason=f"{code}: {sentence}",
    )
    back: tuple[Action, ...] = (Restore(state.runnable),) if state.phase in _LOADED else ()
    return ended, (*back, Abandon(), Collect())


def _restart(state: SlotState) -> tuple[SlotState, tuple[Action, ...]]:
    if state.runnable is not None:
        state = replace(state, unhealthy_starts=state.unhealthy_starts + 1)
        if state.unhealthy_starts > MAX_CRASHES and state.previous is not None and not state.is_working:
            return _fall_back(state, f"crash_loop: {MAX_CRASHES} starts in a row did not become healthy")
    doubted = state.unhealthy_starts >= MAX_CRASHES
    start: tuple[Action, ...] = (Restore(state.runnable, is_careful=doubted),) if state.runnable else ()
    if not state.is_working:
        return state, (*start, Collect())
    if state.phase not in _LOADED:
        is_here = state.phase in (Phase.VERIFY, Phase.WAIT_WINDOW)
        resumed, work = _enter(state, Phase.VERIFY if is_here else Phase.PREFLIGHT)
        return resumed, (*start, *work)
    state = replace(state, crashes=state.crashes + 1)
    if state.crashes >= MAX_CRASHES:
        ended, ending = _fail(state, "crash_loop", f"the agent died {state.crashes} times with this model loaded")
        return ended, (*start, *(action for action in ending if not isinstance(action, Restore)))
    resumed, work = _enter(state, Phase.VERIFY)
    return resumed, (*start, *work)


def _fall_back(state: SlotState, reason: str) -> tuple[SlotState, tuple[Action, ...]]:
    """The committed model cannot run: take the previous slot, or say that there is none."""
    if state.previous is not None:
        back = replace(
            state,
            committed=state.previous,
            previous=None,
            unhealthy_starts=0,
            phase=state.phase if state.is_working else Phase.COMMITTED,
            result=state.result if state.is_working else Result.ROLLED_BACK,
            reason=state.reason if state.is_working else reason,
        )
        return back, (Restore(back.committed),)
    stuck = replace(state, suspended=True, unhealthy_starts=0)
    if not state.is_working:
        stuck = replace(stuck, result=Result.UNABLE_TO_ROLL_BACK, reason=reason)
    return stuck, (Restore(None),)
