"""Which worker prefills and which decodes a request: a pure policy that returns an explained decision.

Rules, in order:
1. Out: workers that are unreachable, draining, tried already, or whose context is too small; pairs whose caches differ.
2. Workers are used in their role. Only when no worker in the right role is left may another one do the whole job.
3. An embedding is prompt only: one worker computes it, and a prefill worker is in its role there.
4. The lowest cost wins. Costs are in prompt tokens' worth of work: what must be computed after prefix hits, dearer on a
   decode worker because it delays running answers; what must be moved; and what waits there already.

No clock, no network, no torch: views of the workers come in, a `Decision` goes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wire.decision import Candidate, Decision, Input, decide

POLICY = "route/1"
PREFIX_BYTES = 8

WEIGHTS: Mapping[str, float] = {
    "prefill_tokens": 1.0,  # computed on a prefill worker, or on one that does both
    "interfering_tokens": 3.0,  # computed on a decode worker
    "moved_tokens": 0.1,
    "handoff": 24.0,  # one more connection and one more queue
    "queued_tokens": 1.0,  # prompt tokens waiting at the worker that prefills
    "running": 8.0,  # answers in progress at the worker that decodes
    "waiting": 64.0,
    "kv_usage": 32.0,
}


@dataclass(frozen=True)
class WorkerView:
    """What the router knows about one worker, `age_s` seconds ago."""

    name: str
    role: str
    address: str
    unfit: tuple[str, ...] = ()  # reasons why it gets nothing now
    fingerprint: str = ""
    block_size: int = 16
    max_context_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    kv_usage: float = 0.0
    prefixes: frozenset[bytes] = frozenset()
    embedding_size: int = 0  # 0: it cannot embed
    age_s: float = 0.0


@dataclass(frozen=True)
class RouteQuery:
    """A request to place: its length and, per fingerprint of the cache, the shortened names of its full blocks.

    `num_longest` makes it an embedding: the longest of its inputs, `num_tokens` being those of all.
    """

    num_tokens: int
    prefixes_by_fingerprint: Mapping[str, Sequence[bytes]] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()  # workers that failed this request already
    num_longest: int | None = None


@dataclass(frozen=True)
class Route:
    """The choice: who decodes, and who prefills for it (None: the same worker)."""

    decision: Decision
    decode: WorkerView | None
    prefill: WorkerView | None = None


def route(query: RouteQuery, workers: Sequence[WorkerView], *, decision_id: str, decided_at: str) -> Route:
    """Place a request. `decode` is None when nobody can take it; the decision says why."""
    reasons = {worker.name: _unfit(worker, query) for worker in workers}
    pairs: dict[str, tuple[WorkerView, WorkerView | None]] = {}
    candidates: list[Candidate] = []
    fit = [w for w in workers if not reasons[w.name]]
    is_embedding = query.num_longest is not None
    has_decoder = any(w.role != "prefill" for w in fit) and not is_embedding
    for worker in workers:
        excluded = reasons[worker.name]
        if not excluded and worker.role == "prefill" and has_decoder:
            excluded = ("role is prefill and a decode worker is there",)
        terms = {} if excluded else _alone_terms(worker, query)
        candidates.append(Candidate(worker.name, terms, excluded))
        pairs[worker.name] = (worker, None)
    for decode in fit:
        if decode.role != "decode" or is_embedding:
            continue
        for prefill in (w for w in workers if w.role == "prefill"):
            name = f"{prefill.name} > {decode.name}"
            excluded = reasons[prefill.name]
            if not excluded and prefill.fingerprint != decode.fingerprint:
                excluded = ("model, compute type or block layout differ",)
            candidates.append(Candidate(name, {} if excluded else _pair_terms(prefill, decode, query), excluded))
            pairs[name] = (decode, prefill)
    decision = decide(
        decision_id=decision_id,
        kind="route",
        policy=POLICY,
        config=WEIGHTS,
        decided_at=decided_at,
        inputs={"num_tokens": Input(query.num_tokens), **{w.name: Input(_summary(w), w.age_s) for w in workers}},
        candidates=candidates,
        weights=WEIGHTS,
    )
    if decision.chosen is None:
        return Route(decision, None)
    chosen, helper = pairs[decision.chosen]
    return Route(decision, chosen, helper)


def count_cached_tokens(worker: WorkerView, query: RouteQuery) -> int:
    """Leading prompt tokens whose KV blocks the worker holds; the last token is always computed."""
    usable = max(0, query.num_tokens - 1) // worker.block_size
    count = 0
    for prefix in query.prefixes_by_fingerprint.get(worker.fingerprint, ())[:usable]:
        if prefix not in worker.prefixes:
            break
        count += 1
    return count * worker.block_size


def _unfit(worker: WorkerView, query: RouteQuery) -> tuple[str, ...]:
    reasons = list(worker.unfit)
    if worker.name in query.excluded:
        reasons.append("failed this request already")
    if query.num_longest is not None:
        return (*reasons, *_unfit_to_embed(worker, query.num_longest))
    if worker.max_context_tokens and query.num_tokens >= worker.max_context_tokens:
        reasons.append(f"context holds {worker.max_context_tokens} tokens, the prompt has {query.num_tokens}")
    return tuple(reasons)


def _unfit_to_embed(worker: WorkerView, num_longest: int) -> tuple[str, ...]:
    if worker.unfit:
        return ()
    if not worker.embedding_size:
        return ("cannot embed",)
    if num_longest > worker.max_context_tokens:
        return (f"context holds {worker.max_context_tokens} tokens, an input has {num_longest}",)
    return ()


def _alone_terms(worker: WorkerView, query: RouteQuery) -> dict[str, float]:
    to_compute = query.num_tokens - count_cached_tokens(worker, query)
    kind = "interfering_tokens" if worker.role == "decode" else "prefill_tokens"
    return {kind: float(to_compute), "queued_tokens": float(worker.num_waiting_tokens), **_decode_terms(worker)}


def _pair_terms(prefill: WorkerView, decode: WorkerView, query: RouteQuery) -> dict[str, float]:
    full = max(0, query.num_tokens - 1) // decode.block_size * decode.block_size
    held = count_cached_tokens(decode, query)
    if held == full:
        to_compute = 0
    else:
        to_compute = full - min(full, count_cached_tokens(prefill, query))
    return {
        "prefill_tokens": float(to_compute),
        "interfering_tokens": float(query.num_tokens - full),
        "moved_tokens": float(full - held),
        "handoff": 1.0,
        "queued_tokens": float(prefill.num_waiting_tokens),
        **_decode_terms(decode),
    }


def _decode_terms(worker: WorkerView) -> dict[str, float]:
    return {
        "running": float(worker.num_running),
        "waiting": float(worker.num_waiting),
        "kv_usage": worker.kv_usage,
    }


def _summary(worker: WorkerView) -> dict[str, object]:
    return {
        "role": worker.role,
        "running": worker.num_running,
        "waiting": worker.num_waiting,
        "waiting_tokens": worker.num_waiting_tokens,
        "kv_usage": round(worker.kv_usage, 4),
        "cached_blocks": len(worker.prefixes),
    }
