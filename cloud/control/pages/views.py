"""What the pages show, made from the API's documents: fleet health, a decision's arithmetic, the mood of a state.

Pure: documents in, frozen values out. The API's JSON is trusted for its truth, not for its completeness: a field that
an older server does not send becomes empty, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wire import decision

Json = Mapping[str, Any]
BUSY_PHASES = frozenset({"preflight", "fetch", "verify", "wait_window", "staged", "probe", "switch", "soak"})
GOOD = ("succeeded", "released", "committed", "online", "returned", "done", "completed", "delivered", "whole")
BAD = ("failed", "halted", "timed_out", "stranded", "offline", "unable_to_roll_back", "given_up", "broken")
BUSY = ("running", "offered", "compiling", "rolling_back", "returning", "leased", *BUSY_PHASES)
WARN = ("paused", "awaiting_signature", "awaiting_approval", "withdrawn", "rolled_back", "rejected", "failed_no_change")
TONES: Mapping[str, str] = {
    **dict.fromkeys(GOOD, "good"),
    **dict.fromkeys(BAD, "bad"),
    **dict.fromkeys(BUSY, "busy"),
    **dict.fromkeys(WARN, "warn"),
}


def tone(word: str) -> str:
    """The mood of a state: good, bad, busy, warn or quiet."""
    return TONES.get(word, "quiet")


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
