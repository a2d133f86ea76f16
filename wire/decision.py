"""The decision record: one schema for route, offload, placement, mode switch, rollout halt and schedule.

A policy scores candidates as a weighted sum of named terms (lower is better) after hard filters. The record keeps the
inputs with their age, every candidate with its filter reasons or terms, the tie-break, the choice, the runner-up and
what would have changed the answer. `replay` computes the choice again from the record alone and gets the same one.
Standard library only; no clock, no randomness: ids and times come from the caller.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wire.errors import InvalidInputError, UnknownVersionError

VERSION = 1
TIE_BREAK = "lowest score, then first in order"
KINDS = frozenset({"route", "offload", "placement", "mode", "rollout", "schedule"})


@dataclass(frozen=True)
class Input:
    """A fact the policy looked at, and how old it was."""

    value: Any
    age_s: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """An option: hard-filter reasons that exclude it, or its score terms by name (raw values, before weights)."""

    name: str
    terms: Mapping[str, float] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """One explained choice. `chosen` is None when every candidate was excluded."""

    decision_id: str
    kind: str
    policy: str
    config_digest: str
    decided_at: str  # aware UTC, ISO 8601
    inputs: Mapping[str, Input]
    candidates: tuple[Candidate, ...]
    weights: Mapping[str, float]
    chosen: str | None
    runner_up: str | None
    reason: str
    counterfactual: str = ""
    tie_break: str = TIE_BREAK
    predicted: Mapping[str, float] = field(default_factory=dict)
    actual: Mapping[str, float] = field(default_factory=dict)
    parent_id: str | None = None
    subject: str = ""
    version: int = VERSION

    def with_actual(self, actual: Mapping[str, float]) -> Decision:
        """The record with the outcome that was measured later."""
        return replace(self, actual=dict(actual))

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data for JSON."""
        return asdict(self)


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a policy's configuration, so that a record names exactly what decided."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def score(candidate: Candidate, weights: Mapping[str, float]) -> float:
    """Weighted sum of the candidate's terms in sorted order of their names; lower is better."""
    return sum(weights.get(name, 1.0) * candidate.terms[name] for name in sorted(candidate.terms))


def rank(candidates: Sequence[Candidate], weights: Mapping[str, float]) -> list[Candidate]:
    """Candidates that pass the hard filters, best first; equal scores keep their order."""
    return sorted((c for c in candidates if not c.excluded), key=lambda c: score(c, weights))


def decide(
    *,
    decision_id: str,
    kind: str,
    policy: str,
    config: Mapping[str, Any],
    decided_at: str,
    inputs: Mapping[str, Input],
    candidates: Sequence[Candidate],
    weights: Mapping[str, float],
    reason: str | None = None,
    predicted: Mapping[str, float] | None = None,
    parent_id: str | None = None,
    subject: str = "",
) -> Decision:
    """Choose the best candidate and write down why.

    `reason` overrides the sentence for people; otherwise one is made from the terms. Raises `InvalidInputError` for
    an unknown kind.
    """
    if kind not in KINDS:
        raise InvalidInputError(f"decision kind {kind!r} is unknown", remedy=f"one of {', '.join(sorted(KINDS))}")
    ranked = rank(candidates, weights)
    best = ranked[0] if ranked else None
    second = ranked[1] if len(ranked) > 1 else None
    return Decision(
        decision_id=decision_id,
        kind=kind,
        policy=policy,
        config_digest=config_digest(config),
        decided_at=decided_at,
        inputs=dict(inputs),
        candidates=tuple(candidates),
        weights=dict(weights),
        chosen=best.name if best else None,
        runner_up=second.name if second else None,
        reason=reason or _sentence(best, second, candidates, weights),
        counterfactual=_counterfactual(best, second, candidates, weights),
        predicted=dict(predicted or {}),
        parent_id=parent_id,
        subject=subject,
    )


def replay(decision: Decision) -> str | None:
    """The choice that the recorded candidates and weights lead to; equals `decision.chosen` for an honest record."""
    ranked = rank(decision.candidates, decision.weights)
    return ranked[0].name if ranked else None


def from_dict(data: Mapping[str, Any]) -> Decision:
    """Read a record that crossed a process boundary; unknown versions and malformed records are refused."""
    version = data.get("version")
    if version != VERSION:
        raise UnknownVersionError(
            f"decision record version {version!r} is unknown", remedy=f"this build reads {VERSION}"
        )
    try:
        fields = dict(data)
        fields["inputs"] = {str(name): Input(**value) for name, value in dict(data["inputs"]).items()}
        fields["candidates"] = tuple(_candidate(c) for c in data["candidates"])
        return Decision(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"decision record is malformed: {error}", remedy="see docs/decisions.md") from error


def _candidate(data: Mapping[str, Any]) -> Candidate:
    terms = {str(name): float(value) for name, value in dict(data.get("terms") or {}).items()}
    return Candidate(str(data["name"]), terms, tuple(str(reason) for reason in data.get("excluded") or ()))


def _sentence(
    best: Candidate | None, second: Candidate | None, candidates: Sequence[Candidate], weights: Mapping[str, float]
) -> str:
    if best is None:
        reasons = "; ".join(f"{c.name}: {', '.join(c.excluded)}" for c in candidates)
        return f"Nothing could be chosen ({reasons})." if reasons else "There was nothing to choose from."
    if second is not None:
        return f"{best.name} scored {score(best, weights):.4g} against {score(second, weights):.4g} for {second.name}."
    others = "; ".join(f"{c.name} was out: {', '.join(c.excluded)}" for c in candidates if c.excluded)
    return f"{best.name} was the only one left ({others})." if others else f"{best.name} was the only candidate."


def _counterfactual(
    best: Candidate | None, second: Candidate | None, candidates: Sequence[Candidate], weights: Mapping[str, float]
) -> str:
    if best is None:
        return ""
    if second is None:
        excluded = next((c for c in candidates if c.excluded), None)
        return f"{excluded.name} could win without: {', '.join(excluded.excluded)}" if excluded else ""
    gap = score(second, weights) - score(best, weights)
    term = max(sorted(second.terms), key=lambda name: weights.get(name, 1.0) * second.terms[name], default=None)
    if term is None or weights.get(term, 1.0) <= 0:
        return ""
    limit = second.terms[term] - gap / weights.get(term, 1.0)
    return f"{second.name} wins if {term} < {limit:.6g}"
