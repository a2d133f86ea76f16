"""Pure policy: answer on the device or send to the cloud? Returns a decision record; reads no clock, no network.

Hard filters first (privacy, is the model here, context, queue, is there a link), then the estimated time in seconds,
with a small charge for the cloud. A wish to prefer one place takes 1000 s off its score and overrides no filter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime

from wire.decision import Candidate, Decision, Input, decide

POLICY = "offload/1"
WEIGHTS: Mapping[str, float] = {"time_s": 1.0, "charge": 1.0, "preference": 1.0, "late_s": 10.0}
DEFAULT_LOCAL_TOKENS_PER_S = 15.0
DEFAULT_CLOUD_TOKENS_PER_S = 30.0
CLOUD_CHARGE = 5.0
PREFERENCE = -1000.0


@dataclass(frozen=True)
class Request:
    """What is asked."""

    model: str
    prompt_tokens: int = 0
    max_tokens: int = 0
    is_local_only: bool = False
    prefer: str | None = None
    deadline_ms: float | None = None


@dataclass(frozen=True)
class Situation:
    """What the device knows right now."""

    model_is_here: bool
    missing_reason: str = ""
    context_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    queue_is_full: bool = False
    local_tokens_per_s: float | None = None
    has_gateway: bool = False
    cloud_is_reachable: bool = False
    cloud_state_age_s: float = 0.0
    cloud_round_trip_s: float = 0.05
    cloud_tokens_per_s: float | None = None


def choose(request: Request, situation: Situation, *, decision_id: str, now: datetime) -> Decision:
    """Where `request` is answered: `device`, `cloud`, or None when neither can."""
    device = Candidate("device", _device_terms(request, situation), tuple(_device_filters(request, situation)))
    cloud = Candidate("cloud", _cloud_terms(request, situation), tuple(_cloud_filters(request, situation)))
    inputs = {name: Input(value) for name, value in {**asdict(request), **asdict(situation)}.items()}
    inputs["cloud_is_reachable"] = Input(situation.cloud_is_reachable, situation.cloud_state_age_s)
    return decide(
        decision_id=decision_id,
        kind="offload",
        policy=POLICY,
        config={"weights": dict(WEIGHTS), "cloud_charge": CLOUD_CHARGE},
        decided_at=now.isoformat(),
        inputs=inputs,
        candidates=(device, cloud),
        weights=WEIGHTS,
        reason=_reason(request, device, cloud),
        subject=request.model,
    )


def _reason(request: Request, device: Candidate, cloud: Candidate) -> str | None:
    if device.excluded and not cloud.excluded:
        return f"Sent to the cloud: {', '.join(device.excluded)}."
    if cloud.excluded and not device.excluded:
        return f"Answered on the device: {', '.join(cloud.excluded)}."
    if request.prefer and not device.excluded:
        return f"Both could answer; the request prefers the {request.prefer}."
    return None


def _device_filters(request: Request, situation: Situation) -> list[str]:
    if not situation.model_is_here:
        return [situation.missing_reason or f"the model {request.model} is not on this device"]
    reasons = []
    total = request.prompt_tokens + request.max_tokens
    if situation.context_tokens and total > situation.context_tokens:
        reasons.append(f"{total} tokens exceed the device's context of {situation.context_tokens}")
    if situation.queue_is_full:
        reasons.append(f"the device's queue is full ({situation.num_running} run, {situation.num_waiting} wait)")
    return reasons


def _cloud_filters(request: Request, situation: Situation) -> list[str]:
    if request.is_local_only:
        return ["the request is labelled local-only"]
    if not situation.has_gateway:
        return ["this device has no gateway"]
    if not situation.cloud_is_reachable:
        return ["the cloud is not reachable"]
    return []


def _device_terms(request: Request, situation: Situation) -> dict[str, float]:
    speed = situation.local_tokens_per_s or DEFAULT_LOCAL_TOKENS_PER_S
    queue = situation.num_running + situation.num_waiting
    return _terms(request, "device", (queue + 1) * request.max_tokens / speed)


def _cloud_terms(request: Request, situation: Situation) -> dict[str, float]:
    speed = situation.cloud_tokens_per_s or DEFAULT_CLOUD_TOKENS_PER_S
    time_s = situation.cloud_round_trip_s + request.max_tokens / speed
    return {**_terms(request, "cloud", time_s), "charge": CLOUD_CHARGE}


def _terms(request: Request, place: str, time_s: float) -> dict[str, float]:
    terms = {"time_s": time_s, "preference": PREFERENCE if request.prefer == place else 0.0}
    if request.deadline_ms is not None:
        terms["late_s"] = max(0.0, time_s - request.deadline_ms / 1000)
    return terms
