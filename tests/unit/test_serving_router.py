"""The router's policy: who prefills, who decodes, and why."""

from __future__ import annotations

from dataclasses import replace

from cloud.serving.breaker import Breaker
from cloud.serving.router import RouteQuery, WorkerView, route
from wire.decision import from_dict, replay

PREFILL = WorkerView("p", "prefill", "h:1", fingerprint="f", max_context_tokens=1000)
DECODE = WorkerView("d", "decode", "h:2", fingerprint="f", max_context_tokens=1000)
BOTH = WorkerView("b", "both", "h:3", fingerprint="f", max_context_tokens=1000)
NAMES = [bytes([i]) * 8 for i in range(20)]


def choose(query: RouteQuery, *workers: WorkerView) -> str | None:
    result = route(query, workers, decision_id="x", decided_at="2026-01-01T00:00:00+00:00")
    assert replay(from_dict(result.decision.to_dict())) == result.decision.chosen
    return result.decision.chosen


def test_a_long_prompt_is_prefilled_away_from_running_answers() -> None:
    assert choose(RouteQuery(300), PREFILL, DECODE) == "p > d"


def test_a_short_prompt_is_not_worth_a_hand_off() -> None:
    assert choose(RouteQuery(10), PREFILL, DECODE) == "d"


def test_a_prompt_that_the_decode_worker_has_cached_stays_there() -> None:
    query = RouteQuery(300, {"f": NAMES})
    assert choose(query, PREFILL, replace(DECODE, prefixes=frozenset(NAMES))) == "d"


def test_the_worker_with_the_longer_prefix_wins() -> None:
    other = replace(BOTH, name="c", prefixes=frozenset(NAMES[:5]))
    assert choose(RouteQuery(300, {"f": NAMES}), BOTH, other) == "c"


def test_load_outweighs_a_short_prefix() -> None:
    busy = replace(BOTH, name="busy", prefixes=frozenset(NAMES[:1]), num_running=10)
    assert choose(RouteQuery(300, {"f": NAMES}), busy, BOTH) == "b"


def test_a_dead_prefill_worker_leaves_the_decode_worker_alone() -> None:
    assert choose(RouteQuery(300), replace(PREFILL, unfit=("unreachable",)), DECODE) == "d"


def test_the_last_prefill_worker_answers_alone() -> None:
    assert choose(RouteQuery(300, excluded=frozenset({"d"})), PREFILL, DECODE) == "p"


def test_workers_with_different_models_are_never_paired() -> None:
    assert choose(RouteQuery(300), replace(PREFILL, fingerprint="other"), DECODE) == "d"


def test_a_prompt_beyond_every_context_is_refused_with_the_reason() -> None:
    result = route(RouteQuery(2000), [PREFILL, DECODE], decision_id="x", decided_at="2026-01-01T00:00:00+00:00")
    assert result.decode is None
    assert "context holds 1000 tokens" in result.decision.reason


def test_a_breaker_opens_longer_after_each_failure_and_closes_after_success() -> None:
    breaker = Breaker()
    breaker.record_failure(0.0)
    assert breaker.is_open(0.4)
    assert not breaker.is_open(0.6)
    breaker.record_failure(1.0)
    assert breaker.is_open(1.9)
    breaker.record_success()
    assert not breaker.is_open(1.9)


EMBEDDERS = [replace(worker, embedding_size=48) for worker in (PREFILL, DECODE, BOTH)]


def test_an_embedding_goes_to_a_worker_that_prefills() -> None:
    query = RouteQuery(300, num_longest=100)
    assert choose(query, *EMBEDDERS[:2]) == "p"
    assert choose(replace(query, excluded=frozenset({"p"})), *EMBEDDERS[:2]) == "d"
    assert choose(query, replace(EMBEDDERS[2], num_running=30), EMBEDDERS[0]) == "p"


def test_an_input_may_fill_the_context_and_all_inputs_together_more() -> None:
    limit = EMBEDDERS[0].max_context_tokens
    assert choose(RouteQuery(9 * limit, num_longest=limit), EMBEDDERS[0]) == "p"
    too_long = RouteQuery(9 * limit, num_longest=limit + 1)
    result = route(too_long, EMBEDDERS[:1], decision_id="x", decided_at="2026-01-01T00:00:00+00:00")
    assert result.decode is None
    assert f"an input has {limit + 1}" in result.decision.reason


def test_a_worker_that_cannot_embed_answers_and_does_not_embed() -> None:
    assert choose(RouteQuery(300), DECODE) == "d"
    assert choose(RouteQuery(300, num_longest=300), DECODE, EMBEDDERS[2]) == "b"
    query = RouteQuery(300, num_longest=300)
    result = route(query, [DECODE], decision_id="x", decided_at="2026-01-01T00:00:00+00:00")
    assert "cannot embed" in result.decision.reason
