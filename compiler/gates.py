"""Gates: an artefact compared with its source model on held data, as numbers with limits.

A gate that does not hold is a failed job with this report, never a published artefact. Pure functions over arrays;
who runs the models is not their business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from model_registry.manifest import GateResult
from wire.errors import GateFailedError

Array = np.ndarray[Any, Any]


def gate(name: str, value: float, sense: Literal["<=", ">="], limit: float) -> GateResult:
    """One result. A value that is not finite fails, whatever the limit."""
    finite = bool(np.isfinite(value))
    passed = finite and (value <= limit if sense == "<=" else value >= limit)
    number = round(float(value), 6) if finite else (1e308 if sense == "<=" else -1e308)
    return GateResult(name=name, value=number, limit=limit, sense=sense, passed=passed)


def top1_agreement(one: Array, other: Array) -> float:
    """Share of rows [cases, classes] whose largest value stands at the same place."""
    return float((one.argmax(-1) == other.argmax(-1)).mean())


def mean_cosine(one: Array, other: Array) -> float:
    """Mean over cases of the cosine between flattened outputs; NaN in, NaN out."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (one, other))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)
    return float(np.where(same, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-30)).mean())


def log_softmax(logits: Array) -> Array:
    """Log probabilities along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_kl(source: Array, artefact: Array) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions, source from artefact, in nats; logits in."""
    p, q = log_softmax(source.astype(np.float64)), log_softmax(artefact.astype(np.float64))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def perplexity(logits: Array, tokens: Array) -> float:
    """exp(mean negative log-likelihood) of `tokens` [windows, length] under `logits` [windows, length, vocabulary]."""
    likelihood = np.take_along_axis(log_softmax(logits[:, :-1].astype(np.float64)), tokens[:, 1:, None], -1)
    return float(np.exp(-likelihood.mean()))


def require_all(results: Sequence[GateResult]) -> None:
    """Raise `GateFailedError` naming every gate that does not hold."""
    failed = [f"{r.name} is {r.value:g}, limit {r.sense} {r.limit:g}" for r in results if not r.passed]
    if failed:
        raise GateFailedError(
            "; ".join(failed),
            remedy="choose a higher precision in the recipe, or relax its limit knowingly",
            gates=[r.model_dump() for r in results],
        )
