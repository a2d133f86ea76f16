"""Pure policy: answer on the device or send to the cloud? Returns a decision record; reads no clock, no network.

Hard filters first (privacy, is the model here, context, queue, is there a link), then the estimated time in seconds,
with a small charge for the cloud and one for the device when it is hot, over its power budget or low on battery. A wish
to prefer one place takes 1000 s off its score and overrides no filter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime

from wire.decision import Candidate, Decision, Input, decide, rank

POLICY = "offload/2"
WEIGHTS: Mapping[str, float] = {
    "time_s": 1.0,
    "charge": 1.0,
    "preference": 1.0,
    "late_s": 10.0,
    "heat": 1.0,
    "power": 1.0,
}
DEFAULT_LOCAL_TOKENS_PER_S = 15.0
DEFAULT_CLOUD_TOKENS_PER_S = 30.0
CLOUD_CHARGE = 5.0
PREFERENCE = -1000.0
HEAT_CHARGE = 15.0
"""For a device that is throttled or has no headroom left; half of it at half of `COMFORT_C`."""

COMFORT_C = 10.0
POWER_CHARGE = 10.0
"""For a device over its power budget, or on a battery below `LOW_BATTERY`."""

LOW_BATTERY = 0.2


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
    model_context_tokens: int = 0  # what it would be with more memory; 0: the same
    num_running: int = 0
    num_waiting: int = 0
    queue_is_full: bool = False
    local_tokens_per_s: float | None = None
    has_gateway: bool = False
    cloud_is_reachable: bool = False
    cloud_state_age_s: float = 0.0
    cloud_round_trip_s: float = 0.05
    cloud_tokens_per_s: float | None = None
    headroom_c: float | None = None  # to where the system slows down; None: not told
    is_throttled: bool = False
    power_w: float | None = None
    power_budget_w: float | None = None
    on_battery: bool = False
    battery_share: float | None = None


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
        config={
            "weights": dict(WEIGHTS),
            "cloud_charge": CLOUD_CHARGE,
            "heat_charge": HEAT_CHARGE,
            "comfort_c": COMFORT_C,
            "power_charge": POWER_CHARGE,
            "low_battery": LOW_BATTERY,
        },
        decided_at=now.isoformat(),
        inputs=inputs,
        candidates=(device, cloud),
        weights=WEIGHTS,
        reason=_reason(request, situation, device, cloud),
        subject=request.model,
    )


def _reason(request: Request, situation: Situation, device: Candidate, cloud: Candidate) -> str | None:
    if device.excluded and not cloud.excluded:
        return f"Sent to the cloud: {', '.join(device.excluded)}."
    if cloud.excluded and not device.excluded:
        return f"Answered on the device: {', '.join(cloud.excluded)}."
    if request.prefer and not device.excluded:
        return f"Both could answer; the request prefers the {request.prefer}."
    calm = Candidate("device", {**device.terms, "heat": 0.0, "power": 0.0}, device.excluded)
    if [rank((one, cloud), WEIGHTS)[:1] for one in (calm, device)] == [[calm], [cloud]]:
        return f"Sent to the cloud: the device is {' and '.join(_strain(situation))}."
    return None


def _strain(situation: Situation) -> list[str]:
    """What speaks for sparing the device, in words."""
    found = []
    if situation.is_throttled:
        found.append("slowed down for heat")
    elif _heat(situation) > 0:
        found.append(f"{situation.headroom_c:.0f} degrees from slowing down")
    if _is_over_budget(situation):
        found.append(f"drawing {situation.power_w:.0f} of {situation.power_budget_w:.0f} W")
    if _is_low(situation):
        found.append(f"on battery at {situation.battery_share:.0%}")
    return found


def _heat(situation: Situation) -> float:
    """0: comfortable, 1: throttled or without headroom."""
    if situation.is_throttled:
        return 1.0
    if situation.headroom_c is None:
        return 0.0
    return min(1.0, max(0.0, 1 - situation.headroom_c / COMFORT_C))


def _is_over_budget(situation: Situation) -> bool:
    budget_w = situation.power_budget_w
    return situation.power_w is not None and budget_w is not None and situation.power_w > budget_w


def _is_low(situation: Situation) -> bool:
    return situation.on_battery and situation.battery_share is not None and situation.battery_share < LOW_BATTERY


def _device_filters(request: Request, situation: Situation) -> list[str]:
    if not situation.model_is_here:
        return [situation.missing_reason or f"the model {request.model} is not on this device"]
    reasons = []
    total = request.prompt_tokens + request.max_tokens
    if situation.context_tokens and total > situation.context_tokens:
        reasons.append(f"{total} tokens exceed the device's context of {_context(situation)}")
    if situation.queue_is_full:
        reasons.append(f"the device's queue is full ({situation.num_running} run, {situation.num_waiting} wait)")
    return reasons


def _context(situation: Situation) -> str:
    here, whole = situation.context_tokens, situation.model_context_tokens
    return f"{here} (its memory budget holds no more, the model has {whole})" if whole > here else str(here)


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
    terms = _terms(request, "device", (queue + 1) * request.max_tokens / speed)
    strained = _is_over_budget(situation) or _is_low(situation)
    return {**terms, "heat": HEAT_CHARGE * _heat(situation), "power": POWER_CHARGE if strained else 0.0}


def _cloud_terms(request: Request, situation: Situation) -> dict[str, float]:
    speed = situation.cloud_tokens_per_s or DEFAULT_CLOUD_TOKENS_PER_S
    time_s = situation.cloud_round_trip_s + request.max_tokens / speed
    return {**_terms(request, "cloud", time_s), "charge": CLOUD_CHARGE}


def _terms(request: Request, place: str, time_s: float) -> dict[str, float]:
    terms = {"time_s": time_s, "preference": PREFERENCE if request.prefer == place else 0.0}
    if request.deadline_ms is not None:
        terms["late_s"] = max(0.0, time_s - request.deadline_ms / 1000)
    return terms
