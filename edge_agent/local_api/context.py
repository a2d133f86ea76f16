"""What the local API's routes share: the agent, the cloud, metrics and the ring of decisions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from edge_agent.agent import Agent
from edge_agent.climate import Climate, ClimateWatch
from edge_agent.cloud import Cloud
from edge_agent.engines import Engine
from edge_agent.offload import Request, Situation, choose
from edge_agent.runtimes.base import LanguageRuntime
from wire.decision import Decision
from wire.errors import InvalidInputError, NotFoundError

MAX_DECISIONS = 1000


class Metrics:
    """Prometheus figures of one agent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "foreshore_agent_requests", "Requests by place and outcome", ["place", "outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            "foreshore_agent_request_seconds", "Time to the whole answer", ["place"], registry=self.registry
        )
        self.ttft = Histogram(
            "foreshore_agent_time_to_first_token_seconds", "Time to the first token", ["place"], registry=self.registry
        )
        self.running = Gauge("foreshore_agent_num_requests_running", "Generations now", registry=self.registry)
        self.waiting = Gauge("foreshore_agent_num_requests_waiting", "Generations queued", registry=self.registry)
        self.memory = Gauge("foreshore_agent_models_memory_bytes", "Memory of loaded models", registry=self.registry)
        self.cache = Gauge(
            "foreshore_agent_models_cache_bytes", "Keys and values of running streams", registry=self.registry
        )
        self.temperature = Gauge("foreshore_agent_temperature_celsius", "Of the hottest zone", registry=self.registry)
        self.power = Gauge("foreshore_agent_power_watts", "What the device draws, where told", registry=self.registry)
        self.online = Gauge(
            "foreshore_agent_broker_connected", "1 when the broker is reachable", registry=self.registry
        )


class Context:
    """One per agent."""

    def __init__(self, agent: Agent, cloud: Cloud, watch: ClimateWatch) -> None:
        self.agent, self.cloud, self.watch, self.metrics = agent, cloud, watch, Metrics()
        self._renewing: asyncio.Task[Climate] | None = None
        self._decisions: OrderedDict[str, Decision] = OrderedDict()
        self.tokens_per_s: dict[str, float] = {}

    def decide(self, headers: Mapping[str, str], model: str, prompt_tokens: int, max_tokens: int) -> Decision:
        """Choose a place for a request and remember why."""
        request = Request(
            model=model,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            is_local_only=_one_of(headers, "x-foreshore-privacy", {"local-only", "none"}) == "local-only",
            prefer=_one_of(headers, "x-foreshore-prefer", {"device", "cloud"}),
            deadline_ms=_number(headers, "x-foreshore-deadline-ms"),
        )
        engine = self.agent.engines.find(model)
        is_language = engine is not None and engine.manifest.kind == "language"
        language = cast(LanguageRuntime, engine.runtime) if engine is not None and is_language else None
        admission = self.agent.admission
        climate = self._climate()
        situation = Situation(
            model_is_here=engine is not None,
            missing_reason=self._why_missing(model),
            context_tokens=language.context_tokens if language is not None else 0,
            model_context_tokens=language.max_context_tokens if language is not None else 0,
            num_running=admission.num_running,
            num_waiting=admission.num_waiting,
            queue_is_full=admission.is_full,
            local_tokens_per_s=self.tokens_per_s.get(model),
            has_gateway=self.cloud.has_gateway,
            cloud_is_reachable=self.cloud.is_reachable,
            cloud_state_age_s=round(time.monotonic() - self.cloud.seen_at, 3),
            cloud_round_trip_s=round(self.cloud.round_trip_s, 4),
            headroom_c=climate.headroom_c,
            is_throttled=climate.is_throttled,
            power_w=climate.power_w,
            power_budget_w=self.agent.profile.power_budget_w,
            on_battery=climate.on_battery,
            battery_share=climate.battery_share,
        )
        decision = choose(request, situation, decision_id=uuid.uuid4().hex, now=datetime.now(UTC))
        self.remember(decision)
        return decision

    def _climate(self) -> Climate:
        """The last reading; an old one is renewed beside the request, for the next one."""
        if self.watch.is_old and (self._renewing is None or self._renewing.done()):
            self._renewing = asyncio.create_task(asyncio.to_thread(self.watch.renew), name="read-climate")
        return self.watch.climate

    def remember(self, decision: Decision) -> None:
        """Keep the record, the oldest give way."""
        self._decisions[decision.decision_id] = decision
        while len(self._decisions) > MAX_DECISIONS:
            self._decisions.popitem(last=False)

    def finish(self, decision: Decision, actual: Mapping[str, float]) -> None:
        """Add the outcome and send the record on its way to the control plane."""
        done = decision.with_actual(actual)
        self.remember(done)
        self.agent.outbox.add("decision", done.to_dict())

    def get_decision(self, decision_id: str) -> Decision:
        """A remembered record."""
        if decision_id not in self._decisions:
            raise NotFoundError(f"decision {decision_id!r} is not remembered", remedy="the control plane keeps more")
        return self._decisions[decision_id]

    def answer_headers(self, decision: Decision, place: str, engine: Engine | None = None) -> dict[str, str]:
        """The `x-foreshore-*` headers of an answer."""
        version = engine.slot.version if engine else ""
        return {
            "x-foreshore-decision": decision.decision_id,
            "x-foreshore-location": place,
            "x-foreshore-model-version": version,
            "x-foreshore-reason": decision.reason.encode("ascii", "replace").decode()[:500].replace("\n", " "),
        }

    def _why_missing(self, model: str) -> str:
        update = self.agent.updates.get(model)
        if update is None or update.state.reason is None:
            return f"the model {model} is not on this device"
        return f"the model {model} is not on this device ({update.state.reason[:200]})"


def _one_of(headers: Mapping[str, str], name: str, values: set[str]) -> str | None:
    value = headers.get(name)
    if value is not None and value not in values:
        raise InvalidInputError(f"{name} is {value!r}", remedy=f"one of {', '.join(sorted(values))}")
    return value


def _number(headers: Mapping[str, str], name: str) -> float | None:
    value = headers.get(name)
    try:
        number = float(value) if value is not None else None
    except ValueError as error:
        raise InvalidInputError(f"{name} is {value!r}", remedy="send milliseconds") from error
    if number is not None and not 0 < number < 1e9:
        raise InvalidInputError(f"{name} is {value!r}", remedy="send milliseconds above 0")
    return number
