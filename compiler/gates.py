"""Gates: the figures of an artefact with the limits of its recipe and the budget of its target.

A gate that does not hold is a failed job with this report, never a published artefact. Each result is name, figure,
limit and verdict, and `sentence` says it in words. A figure that a gate needs and nobody measured does not hold, and
neither does one that is not finite. Who measures is `compiler.metrics`; who runs the models is not the gates' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from model_registry.manifest import GateResult
from wire.errors import GateFailedError

if TYPE_CHECKING:
    from compiler.recipe import LanguageRecipe, TensorRecipe
    from compiler.targets import Budget

Sense = Literal["<=", ">="]


def gate(name: str, value: float, sense: Sense, limit: float) -> GateResult:
    """One result. A value that is not finite fails, whatever the limit."""
    finite = bool(np.isfinite(value))
    passed = finite and (value <= limit if sense == "<=" else value >= limit)
    number = round(float(value), 6) if finite else (1e308 if sense == "<=" else -1e308)
    return GateResult(name=name, value=number, limit=limit, sense=sense, passed=passed)


def tensor_gates(figures: Mapping[str, float], recipe: TensorRecipe) -> list[GateResult]:
    """The gates of `metrics.tensor_figures`: a classifier's only where it is one."""
    results = [
        gate("cosine", figures.get("cosine", np.nan), ">=", recipe.min_cosine),
        gate("relative_error", figures.get("relative_error", np.nan), "<=", recipe.max_relative_error),
    ]
    limits: tuple[tuple[str, Sense, float], ...] = (
        ("top1_agreement", ">=", recipe.min_top1_agreement),
        ("worst_slice_agreement", ">=", recipe.min_worst_slice_agreement),
        ("top1_drop", "<=", recipe.max_top1_drop),
        ("broken_numbers", "<=", 0.0),
    )
    return results + [gate(name, figures[name], sense, limit) for name, sense, limit in limits if name in figures]


def language_gates(figures: Mapping[str, float], recipe: LanguageRecipe) -> list[GateResult]:
    """The gates of `metrics.language_figures` and `prompt_set.prompt_figures`, all of them required."""
    limits: tuple[tuple[str, Sense, float], ...] = (
        ("perplexity_ratio", "<=", recipe.max_perplexity_ratio),
        ("kl_nats", "<=", recipe.max_kl),
        ("worst_slice_kl_nats", "<=", recipe.max_worst_slice_kl),
        ("greedy_agreement", ">=", recipe.min_greedy_agreement),
        ("exact_match", ">=", recipe.min_exact_match),
        ("tokenizer_match", ">=", 1.0),
    )
    results = [gate(name, figures.get(name, np.nan), sense, limit) for name, sense, limit in limits]
    if "broken_numbers" in figures:
        results.append(gate("broken_numbers", figures["broken_numbers"], "<=", 0.0))
    return results


def budget_gates(figures: Mapping[str, float], budget: Budget) -> list[GateResult]:
    """Latency and memory against what the target's devices have to give; no gate where the target sets no budget."""
    limits = (("latency_ms", budget.latency_ms), ("memory_bytes", budget.memory_bytes))
    return [gate(name, figures.get(name, np.nan), "<=", float(limit)) for name, limit in limits if limit is not None]


def require_all(results: Sequence[GateResult]) -> None:
    """Raise `GateFailedError` naming every gate that does not hold."""
    failed = [f"{r.name} is {r.value:g}, limit {r.sense} {r.limit:g}" for r in results if not r.passed]
    if failed:
        raise GateFailedError(
            "; ".join(failed),
            remedy="choose a higher precision in the recipe, or relax its limit knowingly",
            gates=[r.model_dump() for r in results],
        )
