"""Measures of an artefact against its source on held data. Pure functions over arrays; limits are not their business.

"Source" is what the full-precision model answers, "artefact" what is about to be published answers to the same input.
Logits are [cases, classes] for classifiers and [windows, length, vocabulary] for language models. Cosine and top-1 do
not see a wrong scale, so `relative_error` stands beside them; means do not see a group that suffers alone, so
`worst_slice` does. A NaN in an artefact's output is never averaged away: it comes out as NaN, which no gate passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
MIN_SLICE_CASES = 8


@dataclass(frozen=True)
class Slice:
    """The group of cases that fares worst: its mean, and how many cases the mean is of."""

    group: str
    value: float
    num_cases: int


def agreement_by_case(source: Array, artefact: Array) -> Array:
    """1.0 where the largest logit stands at the same place, else 0.0; NaN where a logit is. [...] of [..., classes]."""
    agrees = (source.argmax(-1) == artefact.argmax(-1)).astype(np.float64)
    return np.where(np.isfinite(artefact).all(-1), agrees, np.nan)


def top1_agreement(source: Array, artefact: Array) -> float:
    """Share of rows whose largest logit stands at the same place."""
    return float(agreement_by_case(source, artefact).mean())


def top1_accuracy(logits: Array, labels: Array) -> float:
    """Share of `labels` [cases] that are the largest of `logits` [cases, classes]."""
    return float((logits.argmax(-1) == labels).mean())


def cosine_by_case(source: Array, artefact: Array) -> Array:
    """[cases]: the cosine between flattened outputs; 1.0 where both are equal, zeros included."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (source, artefact))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)
    return np.where(same, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-30))


def mean_cosine(source: Array, artefact: Array) -> float:
    """Mean of `cosine_by_case`."""
    return float(cosine_by_case(source, artefact).mean())


def relative_error(source: Array, artefact: Array) -> float:
    """Frobenius norm of the difference over that of the source's output. 0 is equal; a scale of 2 gives 1."""
    a, b = source.astype(np.float64), artefact.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-30))


def log_softmax(logits: Array) -> Array:
    """Log probabilities along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def kl_by_case(source: Array, artefact: Array) -> Array:
    """Kullback-Leibler divergence of the artefact's distribution from the source's in nats; [...] of [..., classes]."""
    p, q = log_softmax(source.astype(np.float64)), log_softmax(artefact.astype(np.float64))
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def mean_kl(source: Array, artefact: Array) -> float:
    """Mean of `kl_by_case` over all positions, in nats."""
    return float(kl_by_case(source, artefact).mean())


def perplexity(logits: Array, tokens: Array) -> float:
    """exp(mean negative log-likelihood) of `tokens` [windows, length] under `logits` [windows, length, vocabulary]."""
    likelihood = np.take_along_axis(log_softmax(logits[:, :-1].astype(np.float64)), tokens[:, 1:, None], -1)
    return float(np.exp(-likelihood.mean()))


def worst_slice(
    values: Array, groups: Sequence[object], *, smallest_is_worst: bool = True, min_cases: int = MIN_SLICE_CASES
) -> Slice | None:
    """The group of `values` [cases] with the worst mean, among those of at least `min_cases` cases; else None.

    `groups` names each case's group: its class, its photograph, its prompt's kind. A group with NaN is the worst.
    """
    labels = np.asarray([str(group) for group in groups])
    found = [
        Slice(str(group), float(values[labels == group].mean()), int((labels == group).sum()))
        for group in np.unique(labels)
    ]
    large = [one for one in found if one.num_cases >= min_cases]
    sign = 1.0 if smallest_is_worst else -1.0
    return min(large, key=lambda one: -np.inf if np.isnan(one.value) else sign * one.value, default=None)


def tensor_figures(
    source: Array, artefact: Array, groups: Sequence[object] | None = None, labels: Array | None = None
) -> dict[str, float]:
    """All figures of a tensor model for outputs [cases, ...]; those of a classifier only for [cases, classes > 1].

    Slices are `groups`, else the class that the source chose. With `labels` the top-1 accuracy lost is told too.
    """
    if source.shape != artefact.shape:
        return {"cosine": float("nan"), "relative_error": float("nan")}
    figures = {"cosine": mean_cosine(source, artefact), "relative_error": relative_error(source, artefact)}
    if source.ndim != 2 or source.shape[1] < 2:
        return figures
    by_case = agreement_by_case(source, artefact)
    figures["top1_agreement"] = float(by_case.mean())
    slice_ = worst_slice(by_case, groups if groups is not None else source.argmax(-1).tolist())
    if slice_ is not None:
        figures["worst_slice_agreement"] = slice_.value
    if labels is not None:
        figures["top1_drop"] = top1_accuracy(source, labels) - top1_accuracy(artefact, labels)
    return figures


def language_figures(source: Array, artefact: Array, tokens: Array) -> dict[str, float]:
    """Figures of a language model on held text: logits [windows, length, vocabulary] for `tokens` [windows, length].

    Each window is a slice. What answers to prompts tell stands in `prompt_set.prompt_figures`.
    """
    if source.shape != artefact.shape:
        names = ("perplexity_ratio", "kl_nats", "worst_slice_kl_nats", "greedy_agreement")
        return dict.fromkeys(names, float("nan"))
    by_case = kl_by_case(source, artefact)
    return {
        "perplexity_ratio": perplexity(artefact, tokens) / perplexity(source, tokens),
        "kl_nats": float(by_case.mean()),
        "worst_slice_kl_nats": float(by_case.mean(axis=1).max()),
        "greedy_agreement": top1_agreement(source, artefact),
    }
