"""The gateway's Prometheus metrics, by names close to vLLM's. No label by user, key or prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cloud.gateway.fleet import Fleet
from cloud.gateway.generation import Outcome

_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one gateway process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make: Any = {"registry": self.registry, "namespace": "foreshore"}
        self.requests = Counter("gateway_requests_total", "Answered requests.", ["route", "status"], **make)
        self.prompt_tokens = Counter("prompt_tokens_total", "Prompt tokens received.", ["model"], **make)
        self.cached_tokens = Counter(
            "prefix_cached_tokens_total", "Prompt tokens not computed again.", ["model"], **make
        )
        self.output_tokens = Counter("generation_tokens_total", "Tokens generated.", ["model"], **make)
        self.kv_bytes = Counter("kv_moved_bytes_total", "KV bytes handed from prefill to decode.", ["model"], **make)
        self.failovers = Counter("failovers_total", "Answers continued on another worker.", ["model"], **make)
        self.ttft = Histogram(
            "time_to_first_token_seconds", "From request to first token.", ["model"], buckets=_LATENCIES, **make
        )
        self.tpot = Histogram(
            "time_per_output_token_seconds", "Mean per answer.", ["model"], buckets=_LATENCIES, **make
        )
        self.running = Gauge("num_requests_running", "Requests in the worker's batch.", ["worker"], **make)
        self.waiting = Gauge("num_requests_waiting", "Requests in the worker's queue.", ["worker"], **make)
        self.kv_usage = Gauge("kv_cache_usage_ratio", "Share of KV blocks in use.", ["worker"], **make)
        self.threads = Gauge(
            "worker_threads", "CPU threads of the worker's steps, by phase; 0 on a GPU.", ["worker", "phase"], **make
        )
        self.up = Gauge("worker_up", "1 when the worker answers and takes requests.", ["worker", "role"], **make)

    def record(self, model: str, num_prompt_tokens: int, outcome: Outcome, total_s: float) -> None:
        """Count one finished answer."""
        self.prompt_tokens.labels(model).inc(num_prompt_tokens)
        self.cached_tokens.labels(model).inc(outcome.cached_tokens)
        self.output_tokens.labels(model).inc(outcome.num_tokens)
        self.kv_bytes.labels(model).inc(outcome.kv_bytes_moved)
        self.failovers.labels(model).inc(outcome.num_failovers)
        if outcome.num_tokens:
            self.ttft.labels(model).observe(outcome.ttft_ms / 1000)
        if outcome.num_tokens > 1:
            self.tpot.labels(model).observe((total_s - outcome.ttft_ms / 1000) / (outcome.num_tokens - 1))

    def render(self, fleets: Mapping[str, Fleet]) -> bytes:
        """The text exposition, with the workers' newest status."""
        for fleet in fleets.values():
            for view in fleet.views():
                self.up.labels(view.name, view.role).set(0 if view.unfit else 1)
                self.running.labels(view.name).set(view.num_running)
                self.waiting.labels(view.name).set(view.num_waiting)
                self.kv_usage.labels(view.name).set(view.kv_usage)
            for name, link in fleet.links.items():
                if link.status is not None:
                    self.threads.labels(name, "prefill").set(link.status.prefill_threads)
                    self.threads.labels(name, "decode").set(link.status.decode_threads)
        return generate_latest(self.registry)
